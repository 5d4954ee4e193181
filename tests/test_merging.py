"""Averages of models weighted by their curvature, against their closed form in dense linear algebra."""

from typing import Any

import pytest
import test_matrices as made
import torch
from test_damping import MAKERS, damp_factors
from test_matrices import INFO, LAYERS, SPACE, P, close, dense_of, factors, vector
from torch import Tensor, nn

import curvlab
from curvlab import CurvlabError, Problem, UnsupportedError, estimate, merge
from curvlab.matrices import KFAC, BlockDiagonal, Composite, CurvatureMatrix, Dense, Diagonal, FactoredDamping
from curvlab.parameters import ParameterSpace

#: Structures whose matrices of different seeds can be added.
ADDED = [name for name in MAKERS if name != "SumOfKFAC"]


def several(name: str, count: int = 3) -> tuple[list[CurvatureMatrix], list[Tensor]]:
    pairs = [getattr(made, f"Test{name}")().make(seed) for seed in range(count)]
    return [matrix for matrix, _ in pairs], [dense for _, dense in pairs]


def closed_form(dense: list[Tensor], thetas: list[Tensor], damping: float = 0.0) -> Tensor:
    added = damping * torch.eye(len(thetas[0]), dtype=torch.float64)
    pulled = sum(f @ theta for f, theta in zip(dense, thetas, strict=True)) + added @ torch.stack(thetas).mean(dim=0)
    return torch.linalg.solve(sum(dense) + added, pulled)


def flat(matrix: CurvatureMatrix, merged: dict[str, Tensor]) -> Tensor:
    assert tuple(merged) == matrix.space.names
    return matrix.space.flatten(merged)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("name", ADDED)
def test_against_the_closed_form(name: str, damping: float) -> None:
    matrices, dense = several(name)
    thetas = [vector(seed) for seed in range(3)]
    expected = closed_form(dense, thetas, damping)
    assert close(flat(matrices[0], merge(thetas, matrices, damping)), expected)
    named = [matrices[0].space.unflatten(theta) | {"other": torch.ones(1)} for theta in thetas]
    assert close(flat(matrices[0], merge(named, matrices, damping)), expected)
    weighted = closed_form([dense[0], 0.5 * dense[1], 2 * dense[2]], thetas, damping)
    found = merge(thetas, [matrices[0], 0.5 * matrices[1], 2 * matrices[2]], damping)
    assert close(flat(matrices[0], found), weighted)


@pytest.mark.parametrize("name", ADDED)
def test_it_minimises_the_sum_of_the_penalties(name: str) -> None:
    matrices, _ = several(name)
    thetas = [vector(seed) for seed in range(3)]
    penalty = curvlab.Penalty()
    for matrix, theta in zip(matrices, thetas, strict=True):
        penalty.add(matrix, theta)
    merged = {name: t.requires_grad_() for name, t in merge(thetas, matrices).items()}
    gradients = torch.autograd.grad(penalty.value(merged), list(merged.values()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-10


@pytest.mark.parametrize("name", ADDED)
def test_equal_models_stay_what_they_are(name: str) -> None:
    matrices, _ = several(name)
    theta = vector() / 3
    for damping in (0.0, 0.1):
        assert torch.equal(flat(matrices[0], merge([theta] * 3, matrices, damping)), theta)
    assert torch.equal(flat(matrices[0], merge([theta], matrices[:1])), theta)


def zeros(name: str, seed: int) -> CurvatureMatrix:
    """Matrices whose rows 1, 6, 7 and 8 are zero: a part of w, and all of b."""
    dense = made.positive(P, seed) * 1e-12  # whose eigenvalues are small beside 1
    dense[[1, 6, 7, 8]] = 0
    dense[:, [1, 6, 7, 8]] = 0
    if name == "Dense":
        return Dense(dense, SPACE, INFO)
    if name == "Diagonal":
        return Diagonal(dense.diagonal().clone(), SPACE, INFO)
    blocks = {n: dense[SPACE.slices[n], SPACE.slices[n]].clone() for n in SPACE.names}
    if name == "BlockDiagonal":
        return BlockDiagonal(blocks, SPACE, INFO)
    parts = [Dense(blocks[n], SPACE.restrict([n]), INFO) for n in "wv"]
    return Composite([*parts, Diagonal(blocks["b"].diagonal(), SPACE.restrict("b"), INFO)], SPACE, INFO)


@pytest.mark.parametrize("name", ["Dense", "BlockDiagonal", "Diagonal", "Composite"])
def test_parameters_without_curvature_have_the_plain_mean(name: str) -> None:
    matrices, thetas = [zeros(name, seed) for seed in range(3)], [vector(seed) for seed in range(3)]
    dead = torch.zeros(P, dtype=torch.bool)
    dead[[1, 6, 7, 8]] = True
    found = flat(matrices[0], merge(thetas, matrices))
    assert close(found[dead], torch.stack(thetas).mean(dim=0)[dead])
    expected = closed_form([m.to_dense()[~dead][:, ~dead] for m in matrices], [theta[~dead] for theta in thetas])
    assert torch.allclose(found[~dead], expected, rtol=1e-8)
    # A parameter with curvature in one model is that model's.
    one = Diagonal(torch.where(dead, 2.0, 0.0).double(), SPACE, INFO)
    none = Diagonal(torch.zeros(P).double(), SPACE, INFO)
    found = flat(none, merge(thetas[:2], [one, none]))
    assert close(found, torch.where(dead, thetas[0], (thetas[0] + thetas[1]) / 2))
    # A damping counts where it is not zero.
    entries = torch.linspace(1, 2, P).double() * 1e-12
    entries[6] = 0
    found = flat(matrices[0], merge(thetas, matrices, entries))
    mean = torch.stack(thetas).mean(dim=0)
    assert torch.allclose(found[dead], mean[dead], rtol=1e-10)
    dense = [m.to_dense() for m in matrices]
    pulled = sum(f @ theta for f, theta in zip(dense, thetas, strict=True)) + entries * mean
    damped = (sum(dense) + entries.diag())[~dead][:, ~dead]
    assert torch.allclose(found[~dead], torch.linalg.solve(damped, pulled[~dead]), rtol=1e-8)


def test_a_zero_diagonal_entry_is_not_a_zero_row() -> None:
    indefinite = torch.tensor([[0.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    space = ParameterSpace(("w",), ((2,),))
    matrices = [Dense(indefinite, space, INFO)] * 2
    with pytest.raises(CurvlabError, match="not positive definite"):
        merge([torch.zeros(2).double(), torch.ones(2).double()], matrices)


@pytest.mark.parametrize("name", ADDED)
def test_a_singular_sum_needs_damping(name: str) -> None:
    matrix, dense = getattr(made, f"Test{name}")().make(singular=True)
    thetas = [vector(0), vector(1)]
    if name != "Diagonal":  # its only zero is a zero row
        with pytest.raises(CurvlabError, match=r"not positive definite.*increase the damping"):
            merge(thetas, [matrix, matrix])
    found = flat(matrix, merge(thetas, [matrix, matrix], 0.1))
    assert torch.allclose(found, closed_form([dense, dense], thetas, 0.1), rtol=1e-8)
    with pytest.raises(CurvlabError, match="not positive definite"):
        merge(thetas, [matrix, -2.0 * matrix], 0.1)


def test_factored_damping_of_one_pair() -> None:
    first, second = factors(0), factors(1)
    merged = (KFAC.from_tensors(t, LAYERS, INFO) for t in (first, second))
    with pytest.raises(UnsupportedError, match="fc has 2: merge them"):
        merge([vector(0), vector(1)], list(merged), FactoredDamping(0.1))
    matrix, theta = KFAC.from_tensors(first, LAYERS, INFO), vector(0)
    assert torch.equal(flat(matrix, merge([theta], [matrix], FactoredDamping(0.1))), theta)
    assert not close(damp_factors(first, dict.fromkeys(made.SIZES, 0.1)), dense_of(first))


def test_models_are_merged_and_not_changed() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval() for _ in range(2)]
    data = (torch.randn(20, 2), torch.arange(20) % 2)
    matrices = [estimate(Problem(model, "cross_entropy", data), "fisher", "diag") for model in models]
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    merged = merge(models, matrices)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(t.requires_grad for t in merged.values())
    f, g = (matrix.space.unflatten(matrix.entries) for matrix in matrices)
    for name, t in merged.items():
        a, b = (model.get_parameter(name).detach() for model in models)
        expected = torch.where(f[name] + g[name] > 0, (f[name] * a + g[name] * b) / (f[name] + g[name]), (a + b) / 2)
        assert torch.allclose(t, expected, rtol=1e-4, atol=1e-5)
    target = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    missing = target.load_state_dict(merged, strict=False)
    assert not missing.unexpected_keys
    assert all("running" in key or "tracked" in key for key in missing.missing_keys)


def test_half_precision_is_merged_in_float32() -> None:
    space = ParameterSpace(("w",), ((2,),))
    matrices = [Diagonal(torch.tensor(e), space, INFO) for e in ([1.0, 3.0], [1.0, 1.0])]
    thetas = [torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])]
    merged = merge([{"w": theta.bfloat16()} for theta in thetas], matrices)["w"]
    assert torch.equal(merged, torch.tensor([0.5, 0.25], dtype=torch.bfloat16))
    with pytest.raises(CurvlabError, match=r"not accurate in torch\.bfloat16"):
        merge([theta.bfloat16() for theta in thetas], [m.to(dtype=torch.bfloat16) for m in matrices])


MATRIX = Diagonal(torch.ones(P).double(), SPACE, INFO)


@pytest.mark.parametrize(
    ("models", "matrices", "told"),
    [
        ([], [], r"a list of models and one of matrices, not \[\]"),
        (vector(), [MATRIX], "a list of models and one of matrices, not a torch.strided tensor"),
        ([vector()], MATRIX, "a list of models and one of matrices, not Diagonal"),
        ([vector(), vector()], [MATRIX], "one matrix for each model, but got 2 and 1"),
        ([vector()], [torch.ones(P)], "a curvature matrix for each model, not a torch.strided tensor"),
        ([vector()[:-1]], [MATRIX], r"shape \(11,\)"),
        ([vector(columns=2)], [MATRIX], r"one vector for each model, not a tensor of shape \(11, 2\)"),
        ([vector().float()], [MATRIX], "float32"),
        ([{"w": torch.ones(3, 2).double()}], [MATRIX], "missing for parameters of the matrix: b, v"),
        ([nn.Linear(2, 3)], [MATRIX], "missing for parameters of the matrix"),
        ([None], [MATRIX], "expected a dict of tensors by parameter name, not None"),
        ([vector() * float("nan")], [MATRIX], "the parameters of a model hold NaN"),
        ([vector()] * 2, [MATRIX, Dense(torch.eye(P).double(), SPACE, INFO)], "the sum of a diag and a dense matrix"),
        ([vector(), vector().float()], [MATRIX, MATRIX.to(dtype=torch.float32)], "different dtypes or devices"),
        ([vector()] * 2, [MATRIX, -1.0 * MATRIX + 0.5 * MATRIX - MATRIX], "not positive definite"),
    ],
)
def test_what_cannot_be_merged(models: Any, matrices: Any, told: str) -> None:
    with pytest.raises(CurvlabError, match=told):
        merge(models, matrices)


def test_different_eigenbases_cannot_be_merged() -> None:
    matrix = MAKERS["EKFAC"]()[0]
    turned = {n: t.flip(1) if n == "fc|U_A" else t for n, t in matrix.tensors().items()}
    with pytest.raises(CurvlabError, match=r"different eigenbases for fc.*kfac"):
        merge([vector()] * 2, [matrix, type(matrix).from_tensors(turned, LAYERS, INFO)])
