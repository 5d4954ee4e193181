"""Tests of ``per_layer``: matrices of the layers, the diagonal blocks of the whole matrix."""

import pytest
import torch
from models_under_test import CLASSES, ZOO, N, case
from torch import nn

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.estimators.per_layer import per_layer
from curvlab.matrices import KFAC
from curvlab.problem import Problem
from curvlab.spectrum.density import spectral_density
from curvlab.spectrum.traces import trace


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("resnet-20", "transformer encoder layer")])
def test_blocks_of_the_whole(name: str) -> None:
    """Every trainable parameter is in one layer, and its matrix is that part of the whole one."""
    problem = case(name).problem
    whole, space = estimate(problem, "empirical_fisher", "dense").to_dense(), problem.space
    matrices = per_layer(problem, "empirical_fisher", "dense")
    assert sorted(n for matrix in matrices.values() for n in matrix.space.names) == sorted(space.names)
    for layer, matrix in matrices.items():
        assert {n.rpartition(".")[0] for n in matrix.space.names} == {layer}
        rows = torch.cat([torch.arange(space.total)[space.slices[n]] for n in matrix.space.names])
        assert torch.allclose(matrix.to_dense(), whole[rows][:, rows], rtol=1e-10, atol=1e-14)


def test_names_and_order() -> None:
    assert list(per_layer(case("tied").problem, "ggn")) == ["first", "second", "out"]
    tied = per_layer(case("tied").problem, "ggn")
    assert tied["first"].space.names == ("first.weight", "first.bias")
    assert tied["second"].space.names == ("second.bias",)
    assert list(per_layer(case("one layer").problem, "ggn")) == [""]
    assert list(per_layer(case("frozen").problem, "ggn")) == ["0", "4"]
    raw = per_layer(case("raw parameters").problem, "ggn")
    assert raw[""].space.names == ("scale", "matrix", "unused")
    selected = per_layer(case("mlp").problem, "ggn", params=["*.weight"])
    assert [matrix.space.names for matrix in selected.values()] == [("0.weight",), ("2.weight",)]


def test_names_are_no_patterns() -> None:
    """A parameter whose name looks like a pattern selects only itself."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ParameterDict({"w*": torch.eye(4), "w[ab]": torch.zeros(4)})
            self.second = nn.ParameterDict({"wa": torch.zeros(4), "w*": torch.ones(4, CLASSES)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.first["w*"] + self.first["w[ab]"] + self.second["wa"]).tanh() @ self.second["w*"]

    problem = Problem(Odd().double(), data=(torch.randn(N, 4).double(), torch.randint(CLASSES, (N,))))
    matrices = per_layer(problem, "empirical_fisher", "diag")
    assert {layer: set(matrix.space.names) for layer, matrix in matrices.items()} == {
        "first": {"first.w*", "first.w[ab]"},
        "second": {"second.wa", "second.w*"},
    }


def test_structures_and_backends() -> None:
    problem = case("mlp").problem
    matrices = per_layer(problem, "fisher", "kfac", backend="nngeometry", batch_size=3)
    assert all(isinstance(matrix, KFAC) for matrix in matrices.values())
    assert {(matrix.info.backend, matrix.info.batch_size) for matrix in matrices.values()} == {("nngeometry", 3)}
    block = case("transformer block").problem
    with pytest.raises(UnsupportedError, match="needs Kronecker factors for every parameter: norm1"):
        per_layer(block, "fisher", "kfac:rest=none")
    kinds = {name: matrix.kind for name, matrix in per_layer(block, "fisher", "kfac").items()}
    assert (kinds["norm1"], kinds["up"]) == ("diag", "kfac")
    rest = per_layer(block, "fisher", "kfac", params=["up.*", "out.*"])
    assert list(rest) == ["up", "out"]
    with pytest.raises(CurvlabError, match="no trainable parameter matches"):
        per_layer(problem, "fisher", params="fc9.*")


def test_spectra_of_layers() -> None:
    problem = case("mlp").problem
    for layer, matrix in per_layer(problem, "hessian").items():
        dense = estimate(problem, "hessian", "dense", params=[f"{layer}.*"]).to_dense()
        assert torch.allclose(spectral_density(matrix).nodes[0], torch.linalg.eigvalsh(dense), atol=1e-12)
        assert float(trace(matrix).value) == pytest.approx(float(dense.trace()), rel=1e-10)
