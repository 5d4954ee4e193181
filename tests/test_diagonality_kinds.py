"""Tests of diagonality for many kinds of networks: statistics of the blocks from plain loops, or refused."""

from math import isnan

import pytest
import torch
from kinds_under_test import REFUSED, RIGHT, mlp, plainly, problem_of
from torch import Tensor, nn

from curvlab.diagonality import diagonality, submatrix
from curvlab.errors import UnsupportedError
from curvlab.estimators import estimate
from curvlab.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def statistics(block: Tensor) -> dict[str, float]:
    rest = block - block.diagonal().diag()
    return {
        "diag_sum": float(block.trace()),
        "diag_max": float(block.diagonal().max()),
        "offdiag_abs_sum": float(rest.abs().sum()),
        "offdiag_signed_sum": float(rest.sum()),
        "frobenius": float(block.norm()),
    }


@pytest.mark.parametrize("quantity", ["empirical_fisher", "ggn"])
@pytest.mark.parametrize("kind", RIGHT)
def test_blocks_of_tensors_layers_and_the_network(kind: str, quantity: str) -> None:
    problem = problem_of(RIGHT[kind])
    table = diagonality(problem, quantity, per=["tensor", "layer", "network"]).set_index("parameter")
    matrix, slices = plainly(problem, quantity), problem.space.slices
    groups = {name: [part] for name, part in slices.items()} | {"network": [slice(0, problem.space.total)]}
    for name, part in slices.items():
        groups.setdefault(name.rpartition(".")[0] or type(problem.model).__name__, []).append(part)
    assert set(table.index) == set(groups)
    for name, parts in groups.items():
        index = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        expected = statistics(matrix[index][:, index])
        for column, value in expected.items():
            scale = expected["offdiag_abs_sum"] + expected["diag_sum"]
            assert table.loc[name, column] == pytest.approx(value, rel=1e-10, abs=1e-10 * scale), (name, column)


@pytest.mark.parametrize("kind", ["parameters in a list", "its own backward passes", "re-entrant checkpoint"])
def test_refused(kind: str) -> None:
    build, told = REFUSED[kind]
    problem = problem_of(build)
    for measure in (diagonality, submatrix):
        with pytest.raises(UnsupportedError, match=told):
            measure(problem)


class WithEmpty(nn.Module):
    """Empty parameters, one of which is the only one of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.nothing = mlp(), nn.Linear(0, 5, bias=False)
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0](x) + self.nothing(x[:, :0]))) + self.none.sum()


@pytest.mark.parametrize("quantity", ["ggn", "hessian", "masq:batch_size=2"])
def test_an_empty_parameter(quantity: str) -> None:
    problem = problem_of(WithEmpty)
    table = diagonality(problem, quantity, per=["tensor", "layer", "network"]).set_index("parameter")
    for name in ("nothing.weight", "nothing", "none", "WithEmpty"):
        assert table.loc[name, "size"] == table.loc[name, "diag_sum"] == table.loc[name, "frobenius"] == 0
        assert isnan(table.loc[name, "diag_mean"])
    whole = statistics(plainly(problem, quantity))
    assert table.loc["network", "frobenius"] == pytest.approx(whole["frobenius"], rel=1e-10)
    part = submatrix(problem, quantity)
    assert dict(zip(part.names, part.counts, strict=True))["none"] == 0
    assert part.matrix.shape == (sum(part.counts), sum(part.counts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Sums of six hundred equal terms are in float32, accurate up to the rounding of the model."""
    problem = problem_of(mlp)
    x, y = (tensor[:2].repeat(300, *[1] * (tensor.ndim - 1)) for tensor in problem.data)
    double = Problem(mlp().double(), "cross_entropy", (x.to(dtype).double(), y))
    half = Problem(problem.model.to(dtype), "cross_entropy", list(zip(x.split(7), y.split(7), strict=True)))
    double.model.load_state_dict(half.model.state_dict())
    found = diagonality(half, "ggn", per=["tensor", "network"])
    right = diagonality(double, "ggn", per=["tensor", "network"])
    for column in ("diag_sum", "offdiag_abs_sum", "frobenius"):
        assert list(found[column]) == pytest.approx(list(right[column]), rel=5 * torch.finfo(dtype).eps), column


@pytest.mark.parametrize("seed", [0, 16, 28])
def test_a_replaced_forward_that_clamps_some_samples(seed: int) -> None:
    """With these seeds the samples of the verification do not show it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)).double()
    model[0].forward = lambda x, plain=model[0].forward: plain(x).clamp(-1)  # type: ignore[method-assign]
    problem = Problem(model, "squared_error", (torch.randn(4, 4).double(), torch.randn(4, 3).double()))
    table = diagonality(problem, "empirical_fisher")
    whole = estimate(problem, "empirical_fisher", "dense", backend="torch").to_dense()
    for row in table.to_dict("records"):
        part = problem.space.slices[row["parameter"]]
        assert row["diag_sum"] == pytest.approx(float(whole[part, part].trace()), rel=1e-10)
