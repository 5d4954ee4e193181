"""Tests of implicit products against the reference's dense matrices, for every model and quantity."""

import gc
import inspect
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from models_under_test import CLASSES, ZOO, N, case
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as older_weight_norm
from torch.utils.data import DataLoader, TensorDataset

from curvlab.errors import UnsupportedError
from curvlab.estimators import estimate, products, torch_func
from curvlab.estimators.products import product
from curvlab.matrices import CurvatureMatrix, Implicit
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import no_progress
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity
from curvlab.structures import DenseStructure

QUANTITIES = (
    EmpiricalFisher(),
    Fisher(),
    Fisher(samples=2, seed=1),
    GGN(),
    Hessian(),
    MaSQ(3, "sumsq"),
    MaSQ(3, "mean"),
    MaSQ(3, "scaled"),
)


def vectors_of(problem: Problem, size: int, columns: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, columns, dtype=torch.float64, generator=generator).to(problem.dtype)


def reference(problem: Problem, quantity: Quantity, params: list[str] | None = None) -> Tensor:
    """Return the dense matrix times vectors."""
    space = ParameterSpace.of(problem.model, params)
    matrix = torch_func.compute(problem, quantity, DenseStructure(), space, None, no_progress).tensors["matrix"]
    return matrix @ vectors_of(problem, space.total)


def multiplied(
    problem: Problem, quantity: Quantity, params: list[str] | None = None, size: int | None = None
) -> Tensor:
    """Return the products with the same vectors."""
    space = ParameterSpace.of(problem.model, params)
    return product(problem, quantity, space, size)(vectors_of(problem, space.total))


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert bool(expected.any())
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


def problem_of(model: nn.Module, inputs: Tensor | None = None, loss: str = "cross_entropy") -> Problem:
    generator = torch.Generator().manual_seed(5)
    if inputs is None:
        inputs = torch.randn(N, 4, dtype=torch.float64, generator=generator)
    targets = torch.randint(CLASSES, (len(inputs),), generator=generator)
    return Problem(model, loss, (inputs, targets))


@pytest.mark.parametrize(
    ("name", "quantity"), [(name, QUANTITIES[(i + 3 * j) % 8]) for i, name in enumerate(ZOO) for j in range(2)]
)
def test_products_are_those_of_the_reference(name: str, quantity: Quantity) -> None:
    """Every model with two quantities; test_estimator_matrix.py has more."""
    problem = case(name).problem
    assert_same(multiplied(problem, quantity, size=3), reference(problem, quantity))


class Picked(nn.Module):
    """The features are computed without gradients, which forward mode does not respect."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(x).tanh()
        return self.out(features)


class Cells(nn.Module):
    """Any recurrent module, on sequences of two."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.cells = kind(2, 3, batch_first=True, **options)
        self.out = nn.LazyLinear(CLASSES)
        self(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x.view(-1, 2, 2))[0][:, -1])


class Functional(nn.Module):
    """The attention kernel and functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.out = nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.spread(x).view(-1, 1, 2, 6).split(2, dim=-1)
        return self.out(F.silu(F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "no_grad within": Picked,
    "gru": lambda: Cells(nn.GRU),
    "rnn": lambda: Cells(nn.RNN),
    "lstm of two layers, both ways": lambda: Cells(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm with projection": lambda: Cells(nn.LSTM, proj_size=2),
    "attention kernel": Functional,
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, CLASSES)
    ),
}


def of(name: str) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return problem_of(MODELS[name]().double().eval())


@pytest.mark.parametrize("quantity", [Fisher(samples=2), Hessian(), MaSQ(3)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_other_models(name: str, quantity: Quantity) -> None:
    problem = of(name)
    assert_same(multiplied(problem, quantity, size=3), reference(problem, quantity))


@pytest.mark.parametrize("quantity", [EmpiricalFisher(), GGN(), Hessian()], ids=str)
@pytest.mark.parametrize("name", ["lstm", "attention", "tied", "embedding", "mlp binary"])
def test_float32(name: str, quantity: Quantity) -> None:
    """The fused kernels of recurrent modules have no second derivative; other kernels have one."""
    double = case(name)
    inputs = double.inputs.float() if double.inputs.is_floating_point() else double.inputs
    single = Problem(deepcopy(double.model).float(), double.loss, (inputs, double.targets))
    actual = multiplied(single, quantity)
    assert actual.dtype == torch.float32
    assert_same(actual.double(), reference(double.problem, quantity), rtol=2e-5)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
@pytest.mark.parametrize("params", [["2.*"], ["0.bias"], ["0.weight", "2.bias"]], ids=str)
def test_some_parameters(params: list[str], quantity: Quantity) -> None:
    problem = case("mlp").problem
    assert_same(multiplied(problem, quantity, params), reference(problem, quantity, params))


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
def test_batches_do_not_matter(quantity: Quantity) -> None:
    whole = case("mlp")
    loader = DataLoader(TensorDataset(whole.inputs, whole.targets), batch_size=2, drop_last=True)
    uneven = list(zip(whole.inputs.split([4, 1, 2]), whole.targets.split([4, 1, 2]), strict=True))
    for data, n in ((loader, N - 1), (uneven, N)):
        expected = reference(Problem(whole.model, whole.loss, (whole.inputs[:n], whole.targets[:n])), quantity)
        for size in (None, 1, 5):
            assert_same(multiplied(Problem(whole.model, whole.loss, data), quantity, size=size), expected)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
def test_a_matrix_of_zeros(quantity: Quantity) -> None:
    """No output depends on the selected parameter."""
    assert not multiplied(case("raw parameters").problem, quantity, ["unused"]).any()


def test_the_same_labels_at_every_product() -> None:
    problem = case("mlp").problem
    multiply = product(problem, Fisher(samples=1, seed=3), problem.space, None)
    vectors = vectors_of(problem, problem.space.total)
    assert torch.equal(multiply(vectors), multiply(vectors))


@pytest.mark.parametrize("quantity", [Fisher(samples=2), Hessian(), MaSQ(3)], ids=str)
def test_it_stays_what_it_is_while_the_model_trains_on(quantity: Quantity) -> None:
    whole = case("convolutions, eval batch norm, in-place relu")
    problem = whole.problem
    expected = reference(problem, quantity)
    multiply = product(problem, quantity, problem.space, None)
    vectors = vectors_of(problem, problem.space.total)
    whole.model.train()
    F.cross_entropy(whole.model(whole.inputs), whole.targets).backward()
    torch.optim.SGD(whole.model.parameters(), lr=0.1).step()
    whole.model[1].requires_grad_(False)
    assert_same(multiply(vectors), expected)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_the_caller_has_gradients_off(mode: Callable[[], torch.no_grad], quantity: Quantity) -> None:
    problem = case("mlp").problem
    expected = reference(problem, quantity)
    with mode():
        assert_same(multiplied(problem, quantity), expected)


@pytest.mark.parametrize("quantity", [Fisher(samples=2), Hessian(), MaSQ(3)], ids=str)
@pytest.mark.parametrize("name", ["convolutions, eval batch norm, in-place relu", "lstm", "frozen"])
def test_nothing_of_the_users_changes(name: str, quantity: Quantity) -> None:
    whole = case(name)
    model = whole.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = deepcopy(model)
    flags = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.cuda.math_sdp_enabled()
    random = torch.get_rng_state()
    multiplied(whole.problem, quantity)
    assert torch.equal(torch.get_rng_state(), random)
    assert flags == (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.math_sdp_enabled(),
    )
    for (parameter, old), (module, was) in zip(
        zip(model.parameters(), before.parameters(), strict=True),
        zip(model.modules(), before.modules(), strict=False),
        strict=False,
    ):
        assert torch.equal(parameter, old)
        assert parameter.requires_grad == old.requires_grad
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert module.training == was.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))


def test_a_module_with_two_names_keeps_its_parameters() -> None:
    shared = nn.Linear(4, 4)
    problem = problem_of(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, CLASSES)).double())
    parameters = list(problem.model.parameters())
    multiplied(problem, Hessian())
    problem.forward({}, next(problem.batches())[0])
    assert all(p is q for p, q in zip(problem.model.parameters(), parameters, strict=True))


def test_a_module_with_two_names() -> None:
    shared = nn.Linear(4, 4)
    problem = problem_of(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, CLASSES)).double())
    for quantity in QUANTITIES:
        assert_same(multiplied(problem, quantity, size=3), reference(problem, quantity))


class TestBothWaysToMultiplyWithTheJacobian:
    @pytest.mark.parametrize("name", ["mlp", "lstm", "attention", "embedding", "tied"])
    @pytest.mark.parametrize("way", [products._forward_mode, products._double_backward])
    def test_are_right(self, way: Callable[..., products.Push], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "_select_pushforwards", lambda *_: (way, way))
        problem = case(name).problem
        assert_same(multiplied(problem, Fisher()), reference(problem, Fisher()))

    @pytest.mark.parametrize(
        ("problem", "rebuilt"),
        [
            (case("mlp").problem, products._forward_mode),
            (of("no_grad within"), products._double_backward),
            (problem_of(parametrizations.weight_norm(nn.Linear(4, CLASSES).double())), products._double_backward),
        ],
        ids=["plain", "no_grad within", "weight_norm"],
    )
    def test_the_right_ones_are_taken(self, problem: Problem, rebuilt: products.Pushing) -> None:
        found = products._select_pushforwards(problem, problem.space)
        assert found == (products._double_backward, rebuilt)


class TestKeptGraphs:
    QUANTITIES = ("hessian", "ggn", "fisher:samples=2,seed=3", "empirical_fisher")

    @pytest.mark.parametrize("quantity", QUANTITIES)
    @pytest.mark.parametrize("batches", [0, 1, 2])
    def test_some_batches_fit(self, quantity: str, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Batches of 3, 3 and 1, of which some are kept; the drawn labels are the same in every product."""
        problem = case("mlp").problem
        whole = estimate(problem, quantity, "implicit", batch_size=3)
        whole.to_dense()
        kept = kept_by(whole)
        assert len(kept._kept) == 3
        assert kept._whole
        used = (products._KEPT_BYTES - kept._room) / 2.5  # and a little: for two and one smaller batches
        monkeypatch.setattr(products, "_KEPT_BYTES", 1.2 * batches * used)
        matrix = estimate(problem, quantity, "implicit", batch_size=3)
        vectors = torch.randn(problem.space.total, 2, dtype=torch.float64)
        reference = estimate(problem, quantity, "dense").to_dense() @ vectors
        for _ in range(3):
            assert_same(matrix @ vectors, reference)
        assert len(kept_by(matrix)._kept) == batches

    def test_bytes(self) -> None:
        """The graph of a Linear layer: its input, its output and the results, each counted once."""
        x = torch.randn(10, 4)
        weight = torch.randn(3, 4, requires_grad=True)
        y = (x @ weight.T).tanh()
        z = y * y + x.sum()
        assert products._graph_bytes([z, y], {weight.untyped_storage().data_ptr()}) == 4 * (10 * 4 + 2 * 10 * 3)
        assert products._graph_bytes([x], set()) == 4 * 10 * 4

    def test_a_graph_lives_as_long_as_its_matrix(self) -> None:
        matrix = estimate(case("mlp").problem, "hessian", "implicit")
        matrix.to_dense()
        term = weakref.ref(kept_by(matrix)._kept[0])
        del matrix
        gc.collect()
        assert term() is None


def test_many_batches_add_up_in_float64() -> None:
    """In float32, a sum of three thousand terms would lose two digits."""
    x = torch.rand(3000, 1)
    problem = Problem(nn.Linear(1, 1, bias=False), "squared_error", (x, torch.zeros(3000, 1)))
    found = estimate(problem, "ggn", "implicit", batch_size=1) @ torch.ones(1)
    assert float(found[0]) == pytest.approx(float(x.double().square().mean()), rel=2e-7)


def kept_by(matrix: CurvatureMatrix) -> products._Passes:
    """Return the object that keeps the graphs of an implicit matrix."""
    assert isinstance(matrix, Implicit)
    cells = inspect.getclosurevars(matrix._product).nonlocals
    passes = cells["passes"].__self__
    assert isinstance(passes, products._Passes)
    return passes


class Once(Function):
    """Function with a first derivative only."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g * ctx.saved_tensors[0].cos()


class Skewed(Function):
    """Function whose forward-mode derivative differs from its backward pass."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x @ torch.ones(x.shape[1], x.shape[1]).triu().to(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return _Transposed.apply(g)

    @staticmethod
    def jvp(ctx, t):  # type: ignore[no-untyped-def]
        return t.clone()


class _Transposed(Function):
    @staticmethod
    def forward(ctx, g):  # type: ignore[no-untyped-def]
        return g @ torch.ones(g.shape[1], g.shape[1]).tril().to(g)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g


class Custom(nn.Module):
    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.fc, self.out, self.function = nn.Linear(4, 4), nn.Linear(4, CLASSES), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function.apply(self.fc(x)).tanh())


class TestRefusals:
    @pytest.mark.parametrize("quantity", [Fisher(), EmpiricalFisher(), Hessian()], ids=str)
    def test_a_missing_derivative(self, quantity: Quantity) -> None:
        problem = problem_of(Custom(Once).double())
        with pytest.raises(UnsupportedError, match="Custom"):
            multiplied(problem, quantity)
        assert_same(multiplied(problem, MaSQ(2)), reference(problem, MaSQ(2)))
        assert_same(multiplied(problem, quantity, ["out.*"]), reference(problem, quantity, ["out.*"]))

    def test_a_wrong_derivative_in_the_jacobian(self) -> None:
        with pytest.raises(UnsupportedError, match="Custom: its forward and backward derivatives are not adjoint"):
            multiplied(problem_of(Custom(Skewed).double()), Fisher())

    def test_a_wrong_second_derivative(self) -> None:
        with pytest.raises(UnsupportedError, match="Custom that torch computes is not symmetric"):
            multiplied(problem_of(Custom(Skewed).double()), Hessian())

    def test_a_module_without_a_rule(self) -> None:
        model = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Tanh(), nn.Linear(3, CLASSES)).double()
        problem = problem_of(model, torch.randint(5, (N, 2)))
        for quantity in (GGN(), Hessian()):
            with pytest.raises(UnsupportedError, match="Sequential: the derivative for '_embedding_bag_backward'"):
                multiplied(problem, quantity)

    @pytest.mark.parametrize("norm", [parametrizations.weight_norm, older_weight_norm])
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_weight_norm(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        """Torch's double backward is wrong; quantities that do not need it are correct."""
        problem = problem_of(nn.Sequential(norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, CLASSES)).double())
        problem.forward({}, next(problem.batches())[0])  # the older one holds a tensor that it computed
        with pytest.raises(UnsupportedError, match=r"not symmetric.*weight_norm's fused kernel, in 0, is known"):
            multiplied(problem, Hessian())
        direction = next(name for name in problem.space.names if name.endswith(("original1", "weight_v")))
        others = [name for name in problem.space.names if name != direction]
        assert_same(multiplied(problem, Hessian(), others), reference(problem, Hessian(), others))
        assert_same(multiplied(problem, GGN()), reference(problem, GGN()))


@pytest.mark.parametrize("quantity", [Fisher(samples=1), MaSQ(2)], ids=str)
def test_a_shuffled_loader_gives_one_matrix(quantity: Quantity) -> None:
    """Random numbers drawn between two products do not matter."""
    whole = case("mlp")
    loader = DataLoader(TensorDataset(whole.inputs, whole.targets), batch_size=3, shuffle=True)
    problem = Problem(whole.model, whole.loss, loader)
    multiply = product(problem, quantity, problem.space, None)
    vectors = vectors_of(problem, problem.space.total)
    first = multiply(vectors)
    torch.rand(5)
    assert torch.equal(multiply(vectors), first)
