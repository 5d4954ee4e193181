"""Tests of implicit products for many kinds of networks: equal to plain loops over the model, or refused."""

import pytest
import torch
from kinds_under_test import (
    REFUSED,
    RIGHT,
    CheckpointedLocked,
    Locked,
    layer_of,
    mlp,
    plainly,
    problem_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from curvlab.diagonality import diagonality
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate, products
from curvlab.estimators.snapshots import SnapshotProblem, snapshot
from curvlab.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QUANTITIES = ("empirical_fisher", "ggn", "hessian", "masq:batch_size=2")


def vectors_of(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(problem.space.total, 2, dtype=torch.float64, generator=generator)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert bool(expected.any())
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


def train_on(model: nn.Module) -> None:
    model.train()
    with torch.no_grad():
        for index, tensor in enumerate([*model.parameters(), *model.buffers()]):
            if tensor.is_floating_point():
                tensor.add_(0.1 + 0.01 * index)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("kind", RIGHT)
def test_right_and_it_stays_so(kind: str, quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kept and new graphs, while the model is trained further."""
    problem = problem_of(RIGHT[kind])
    vectors = vectors_of(problem)
    if kind == "weight_norm" and quantity == "hessian":
        with pytest.raises(UnsupportedError, match="not symmetric"):
            estimate(problem, quantity, "implicit")
        return
    expected = plainly(problem, quantity) @ vectors_of(problem)
    kept = estimate(problem, quantity, "implicit")
    monkeypatch.setattr(products, "_KEPT_BYTES", 0)
    new = estimate(problem, quantity, "implicit", batch_size=4)
    assert_same(kept @ vectors, expected)
    train_on(problem.model)
    assert_same(kept @ vectors, expected)
    assert_same(new @ vectors, expected)


@pytest.mark.parametrize("kind", ["pruned", "a forward patched by a method", "checkpoint", "not copyable"])
def test_what_can_be_copied_is(kind: str) -> None:
    problem = problem_of(RIGHT[kind])
    assert isinstance(snapshot(problem, problem.space), SnapshotProblem) == (kind == "not copyable")


def test_a_copy_that_uses_a_frozen_part_of_the_original() -> None:
    """Gradients do not show it, but other values of parameters and buffers do."""
    for frozen in (nn.Linear(4, 5), nn.BatchNorm1d(4, affine=False).eval()):
        model = mlp()
        model.add_module("frozen", nn.Identity())
        layer_of(model).frozen = frozen.requires_grad_(False)
        model[0].register_forward_pre_hook(lambda _, given, frozen=frozen: frozen(given[0])[:, :4])
        problem = problem_of(lambda model=model: model)
        assert isinstance(snapshot(problem, problem.space), SnapshotProblem)
        expected = plainly(problem, "ggn") @ vectors_of(problem)
        matrix = estimate(problem, "ggn", "implicit")
        train_on(model)
        assert_same(matrix @ vectors_of(problem), expected)


def test_a_copy_that_uses_a_part_that_is_zero_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values close to these do not show it, but the graph does."""
    monkeypatch.setattr(products, "_KEPT_BYTES", 0)
    problem = problem_of(RIGHT["a low rank by a closure"])
    matrix = estimate(problem, "ggn", "implicit", params="2.weight")
    part = problem.space.slices["2.weight"]
    expected = plainly(problem, "ggn")[part, part] @ vectors_of(problem)[part]
    train_on(problem.model)
    assert_same(matrix @ vectors_of(problem)[part], expected)


def test_nothing_changes_where_the_model_itself_is_used() -> None:
    problem = problem_of(Locked)
    model = problem.model
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrix = estimate(problem, "hessian", "implicit")
    model.train()
    matrix @ vectors_of(problem)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is grad and bool((grad == 1).all()) for p, grad in zip(model.parameters(), grads, strict=True))


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, quantity: str) -> None:
    build, told = REFUSED[kind]
    problem = problem_of(build)
    with pytest.raises(UnsupportedError, match=told) as caught:
        estimate(problem, quantity, "implicit")
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("kind", ["checkpoint", "a forward patched by a closure", "in place on views"])
def test_some_parameters(kind: str) -> None:
    problem = problem_of(RIGHT[kind])
    part = problem.space.slices[problem.space.names[0]]
    matrix = estimate(problem, "ggn", "implicit", params=problem.space.names[0])
    assert_same(matrix.to_dense(), plainly(problem, "ggn")[part, part])


class TestWhatCannotBeHeld:
    @pytest.mark.parametrize("kept", [True, False])
    def test_a_module_outside(self, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """It does not belong to the model: the products stay the same, or an error says that it has changed."""
        outside = nn.Linear(4, 4).double()
        model = mlp()
        model[0].register_forward_pre_hook(lambda _, given: outside(given[0]))
        problem = problem_of(lambda: model)
        if not kept:
            monkeypatch.setattr(products, "_KEPT_BYTES", 0)
        matrix = estimate(problem, "ggn", "implicit")
        vectors = vectors_of(problem)
        expected = matrix @ vectors
        assert_same(matrix @ vectors, expected)
        with torch.no_grad():
            outside.weight.mul_(1 + 1e-6)
        if kept:
            assert_same(matrix @ vectors, expected)
        else:
            with pytest.raises(CurvlabError, match=r"Sequential has changed since.*estimate the matrix again"):
                matrix @ vectors

    def test_what_a_kept_graph_has_saved(self) -> None:
        outside = nn.Linear(4, 4).double()
        model = mlp()
        model[2].register_forward_pre_hook(lambda _, given: given[0] * outside.bias.sum())
        matrix = estimate(problem_of(lambda: model), "ggn", "implicit")
        vectors = torch.ones(matrix.shape[0], dtype=torch.float64)
        expected = matrix @ vectors
        with torch.no_grad():
            outside.bias.add_(1)
        assert_same(matrix @ vectors, expected)

    @pytest.mark.parametrize("kept", [True, False])
    def test_a_checkpoint_that_computes_again(self, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = problem_of(CheckpointedLocked)
        if not kept:
            monkeypatch.setattr(products, "_KEPT_BYTES", 0)
        matrix = estimate(problem, "ggn", "implicit")
        vectors = vectors_of(problem)
        assert_same(matrix @ vectors, plainly(problem, "ggn") @ vectors_of(problem))
        train_on(problem.model)
        with pytest.raises(CurvlabError, match="CheckpointedLocked has changed since this matrix was estimated"):
            matrix @ vectors

    def test_a_changed_structure(self) -> None:
        problem = problem_of(Locked)
        matrix = estimate(problem, "hessian", "implicit")
        problem.model.net.append(nn.Tanh())
        with pytest.raises(CurvlabError, match="Locked has changed since"):
            matrix @ vectors_of(problem)


# What the caller has set ---------------------------------------------------------------------------------------------


def test_cached_parametrizations() -> None:
    problem = problem_of(lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), mlp()))
    expected = plainly(problem, "ggn") @ vectors_of(problem)
    with parametrize.cached():
        assert_same(estimate(problem, "ggn", "implicit") @ vectors_of(problem), expected)
        problem.model(problem.data[0])  # fills the cache
        matrix = estimate(problem, "ggn", "implicit")
        assert_same(matrix @ vectors_of(problem), expected)
        assert parametrize._cache


def test_a_product_within_autocast() -> None:
    problem = problem_of(mlp)
    expected = plainly(problem, "hessian") @ vectors_of(problem)
    single = estimate(Problem(problem.model.float(), "cross_entropy", problem.data), "hessian", "implicit")
    with torch.autocast("cpu", torch.bfloat16):
        found = single @ vectors_of(problem).float()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class OnlyBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), 3)


@pytest.mark.parametrize("quantity", [*QUANTITIES, "fisher:samples=2"])
def test_an_output_that_all_samples_share(quantity: str) -> None:
    torch.manual_seed(0)
    problem = Problem(OnlyBias(), "cross_entropy", (torch.randn(5, 2).double(), torch.arange(5) % 3))
    vectors = torch.randn(3, 2, dtype=torch.float64)
    expected = estimate(problem, quantity, "dense", backend="torch") @ vectors
    torch.testing.assert_close(estimate(problem, quantity, "implicit") @ vectors, expected)


class AsksForItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        assert self.net[0].weight.dtype == torch.bfloat16
        return self.net(x)


class TestHalfPrecision:
    @pytest.mark.parametrize("quantity", [*QUANTITIES, "fisher:samples=2"])
    @pytest.mark.parametrize("kind", ["plain", "a forward patched by a closure", "checkpoint"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_products_are_those_of_the_weights(self, dtype: torch.dtype, kind: str, quantity: str) -> None:
        """Products are in float32 and linear: systems can be solved, and all entries computed."""
        problem = problem_of(mlp if kind == "plain" else RIGHT[kind])
        half = Problem(problem.model.to(dtype), "cross_entropy", problem.data)
        matrix = estimate(half, quantity, "implicit", batch_size=4)
        assert matrix.dtype == torch.float32
        formed = matrix.to_dense()
        solution = matrix.solve(vectors_of(problem).float(), damping=5.0)
        expected = estimate(Problem(problem.model.double(), "cross_entropy", problem.data), quantity, "implicit")
        assert (formed - expected.to_dense()).abs().max() <= 1e-5 * expected.to_dense().abs().max()
        exact = expected.solve(vectors_of(problem), damping=5.0)
        assert (solution - exact).abs().max() <= 1e-4 * exact.abs().max()

    @pytest.mark.parametrize("quantity", ["ggn", "masq:batch_size=1"])
    def test_a_model_that_asks_for_its_own_dtype(self, quantity: str) -> None:
        """Accurate up to rounding, also for a sum of three hundred equal terms."""
        problem = problem_of(AsksForItsOwn)
        x, y = (tensor[:2].repeat(150, *[1] * (tensor.ndim - 1)) for tensor in problem.data)
        half = Problem(problem.model.to(torch.bfloat16), "cross_entropy", (x, y))
        found = estimate(half, quantity, "implicit", batch_size=1) @ vectors_of(problem).float()
        plain = Problem(problem.model.net.double(), "cross_entropy", (x, y))
        expected = estimate(plain, quantity, "implicit") @ vectors_of(problem)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 3 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


class BeforeNormalisation(nn.Module):
    """Network with biases on which the outputs do not depend: before a normalisation, and an attention's key."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4)
        self.q, self.k, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).mT
        out: Tensor = self.head(((self.q(h) @ self.k(h).mT / 2).softmax(dim=-1) @ h).square().mean(dim=1))
        return out


@pytest.mark.parametrize("params", ["k.bias", "conv.bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_that_is_zero_is_no_wrong_derivative(params: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = BeforeNormalisation().to(dtype)
    problem = Problem(model, "cross_entropy", (torch.randn(9, 2, 5).to(dtype), torch.arange(9) % 3))
    vector = torch.ones(4, dtype=dtype)
    for quantity in ("hessian", "ggn", "fisher"):
        for structure in ("dense", "implicit"):
            product = estimate(problem, quantity, structure, params=params) @ vector
            assert float(product.abs().max()) < 1e3 * torch.finfo(dtype).eps
    assert float(diagonality(problem, "hessian", params=params).diag_sum.abs().max()) < 1e3 * torch.finfo(dtype).eps
