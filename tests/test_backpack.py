"""Tests of the BackPACK backend: correct results or a refusal that names the module, and no changes of state.

Losses, splits of the data and float32 are in test_estimator_matrix.py, for every backend.
"""

import warnings

import pytest
import torch
from backpack.context import CTX
from models_under_test import CLASSES, Case, N, case
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from curvlab.errors import UnsupportedError
from curvlab.estimators import BACKENDS, estimate
from curvlab.estimators.backpack import compute
from curvlab.problem import Problem
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, Quantity
from curvlab.structures import KFACStructure, parse_structure

ROWS = ("dense", "block_diag", "diag", "kfac")
COMBINATIONS = [(q, s) for q in (EmpiricalFisher(), Fisher(), Fisher(samples=2, seed=1), GGN()) for s in ROWS]
COMBINATIONS.append((Hessian(), "diag"))
SECOND_ORDER = [(Fisher(), "diag"), (GGN(), "diag"), (Hessian(), "diag")]


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= rtol * expected.abs().max())


def silent(_: float = 1, /, *, note: str = "") -> None:
    pass


def images(*layers: nn.Module, shape: tuple[int, ...] = (2, 3, 3), seed: int = 0) -> Case:
    """Return a model of images with flat inputs, and data for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Unflatten(1, shape), *layers).double().eval()
        inputs = torch.randn(N, torch.Size(shape).numel(), dtype=torch.float64)
        for module in model:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return Case(model, inputs, case("mlp").targets, "cross_entropy", frozenset(), frozenset())


def agree(problem: Problem, quantity: Quantity | str, structure: str, rtol: float = 1e-10, **options: object) -> bool:
    actual, expected = (estimate(problem, quantity, structure, backend=b, **options) for b in ("backpack", "torch"))
    return close(actual.to_dense(), expected.to_dense(), rtol)


class TestRight:
    @pytest.mark.parametrize(
        ("name", "structure"),
        [
            ("one layer", "dense"),
            ("convolutions, eval batch norm, in-place relu", "block_diag"),
            ("embedding", "diag"),
            ("frozen", "dense"),
            ("input changed in place", "block_diag"),
            ("residual", "diag"),
            ("conv1d, stride, dilation", "dense"),
            ("conv3d", "block_diag"),
            ("transposed convolution", "diag"),
            ("batch norm", "dense"),
        ],
    )
    def test_first_order(self, name: str, structure: str) -> None:
        assert agree(case(name).problem, "empirical_fisher", structure)

    def test_first_order_on_tokens(self) -> None:
        problem = images(nn.Linear(3, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, CLASSES), shape=(2, 3)).problem
        assert agree(problem, "empirical_fisher", "diag")
        assert agree(problem, "fisher", "dense")

    @pytest.mark.parametrize(("quantity", "structure"), SECOND_ORDER, ids=str)
    @pytest.mark.parametrize(
        "act",
        [nn.ReLU(inplace=True), nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.3), nn.LogSigmoid(), nn.ELU(0.5), nn.SELU()],
        ids=lambda act: type(act).__name__,
    )
    def test_activations(self, act: nn.Module, quantity: Quantity, structure: str) -> None:
        layers = [nn.Linear(3, 2), act, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, CLASSES)]
        assert agree(images(*layers, shape=(2, 3)).problem, quantity, structure)

    @pytest.mark.parametrize(("quantity", "structure"), SECOND_ORDER, ids=str)
    @pytest.mark.parametrize(
        ("shape", "layers"),
        [
            ((2, 6), [nn.Conv1d(2, 4, 2, groups=2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, CLASSES)]),
            ((2, 6), [nn.ConvTranspose1d(2, 2, 2, stride=2), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(8, CLASSES)]),
            ((1, 3, 3), [nn.Conv2d(1, 2, 2, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, CLASSES)]),
            ((1, 3, 3), [nn.Conv2d(1, 2, 2, stride=2), nn.ZeroPad2d(1), nn.Flatten(), nn.Linear(18, CLASSES)]),
            ((1, 3, 3), [nn.Conv2d(1, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, CLASSES)]),
            ((1, 3, 3), [nn.ConvTranspose2d(1, 2, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, CLASSES)]),
            ((1, 3, 3, 3), [nn.Conv3d(1, 2, 2), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(2, CLASSES)]),
            ((1, 2, 2, 2), [nn.ConvTranspose3d(1, 2, 2), nn.AvgPool3d(3), nn.Flatten(), nn.Linear(2, CLASSES)]),
        ],
    )
    def test_layers(self, shape: tuple[int, ...], layers: list[nn.Module], quantity: Quantity, structure: str) -> None:
        assert agree(images(*layers, shape=shape).problem, quantity, structure)

    @pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.Identity()])
    def test_only_with_positive_curvature(self, norm: nn.Module) -> None:
        problem = images(nn.Conv2d(2, 2, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)).problem
        assert agree(problem, "fisher", "diag")
        with pytest.raises(UnsupportedError, match=r"no second-order rule for \w+ \(2\)"):
            estimate(problem, "hessian", "diag", backend="backpack")

    def test_embedding(self) -> None:
        assert agree(case("embedding").problem, "fisher", "diag")

    def test_hessian_by_torch_func(self) -> None:
        whole = case("mlp")
        space = whole.problem.space
        flat = space.flatten({n: p.detach() for n, p in whole.model.named_parameters()})

        def mean_loss(vector: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(whole.model, space.unflatten(vector), whole.inputs), whole.targets)

        actual = estimate(whole.problem, "hessian", "diag", backend="backpack", batch_size=3)
        assert close(actual.diagonal(), hessian(mean_loss)(flat).diagonal())


class TestFactors:
    @pytest.mark.parametrize("bias", [True, False])
    def test_factors(self, bias: bool) -> None:
        """Each of the two factors, not only their product, in closed form."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, CLASSES, bias=bias)).double()
        whole = case("mlp")
        problem = Problem(model, whole.loss, (whole.inputs, whole.targets))
        tensors = compute(problem, Fisher(), KFACStructure(), problem.space, 3, silent).tensors
        hidden = model[:2](whole.inputs).detach()
        p = model(whole.inputs).detach().softmax(dim=1)
        s = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        back = model[2].weight.detach() * (1 - hidden.square()).unsqueeze(1)
        for name, x, of_outputs in (("0", whole.inputs, back.mT @ s @ back), ("2", hidden, s)):
            a = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if bias else x
            assert close(tensors[f"{name}|A"], a.mT @ a / N)
            assert close(tensors[f"{name}|S"], of_outputs.mean(dim=0))

    def test_reduce_is_expand_where_there_is_one_position(self) -> None:
        problem = case("mlp").problem
        one, other = (estimate(problem, "ggn", s, backend="backpack") for s in ("kfac", "kfac:sharing=reduce"))
        assert close(other.to_dense(), one.to_dense())

    @pytest.mark.parametrize("quantity", ["empirical_fisher", "fisher:samples=2", "ggn"])
    def test_linear_layers_behind_convolutions(self, quantity: str) -> None:
        layers = (nn.Conv2d(2, 2, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 4), nn.Sigmoid(), nn.Linear(4, 3))
        assert agree(images(*layers).problem, quantity, "kfac", params=["4.*", "6.*"])


@pytest.mark.parametrize(("i", "quantity", "structure"), [(i, *pair) for i, pair in enumerate(COMBINATIONS)], ids=str)
class TestBatches:
    def test_regrouped(self, quantity: Quantity, structure: str, i: int) -> None:
        assert agree(case("mlp").problem, quantity, structure, batch_size=4)

    def test_selected_parameters(self, quantity: Quantity, structure: str, i: int) -> None:
        params = (["0.weight"], ["0.bias"], ["0.bias", "2.weight"], ["2.*"])[(i + i // 4) % 4]
        assert agree(case("mlp").problem, quantity, structure, params=params)


class Sometimes(nn.Module):
    """A layer that only some samples use, and so only some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        answer, own = self.first(x), x[:, 0] < 10
        return answer.index_add(0, own.nonzero()[:, 0], self.second(x[own])) if own.any() else answer


class TestNothingIsLeft:
    @pytest.mark.parametrize("structure", ["diag", "dense"])
    def test_of_the_batch_before(self, structure: str) -> None:
        whole = case("mlp")
        x = whole.inputs.clone()
        x[4:, 0] += 100
        batches = list(zip(x.split(4), whole.targets.split(4), strict=True))
        problem = Problem(Sometimes().double(), whole.loss, batches)
        (actual,) = compute(
            problem, EmpiricalFisher(), parse_structure(structure), problem.space, None, silent
        ).tensors.values()
        expected = estimate(problem, "empirical_fisher", structure, backend="torch").to_dense()
        assert close(actual if structure == "dense" else actual.diag(), expected)

    def test_of_its_hooks(self) -> None:
        before = len(CTX.hook_handles)
        estimate(case("mlp").problem, "fisher", "diag", backend="backpack")
        assert len(CTX.hook_handles) == before

    def test_of_warnings(self) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            estimate(case("mlp").problem, "fisher", "diag", backend="backpack")
        assert not told

    @pytest.mark.parametrize(("quantity", "structure"), [("fisher", "diag"), ("fisher", "dense"), ("ggn", "kfac")])
    def test_of_a_failure_at_the_second_batch(self, quantity: str, structure: str) -> None:
        whole = case("mlp")

        def fail(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if len(given[0]) == 3 and torch.equal(given[0], whole.inputs[4:]):
                raise ValueError("three samples")

        whole.model.register_forward_pre_hook(fail)
        hooks = {name: dict(m._forward_hooks) for name, m in whole.model.named_modules()}
        extensions = CTX.get_active_exts()
        problem = Problem(whole.model, whole.loss, (whole.inputs, whole.targets))
        asked = {"fisher": Fisher(), "ggn": GGN()}[quantity]
        with pytest.raises(ValueError, match="three samples"):
            compute(problem, asked, parse_structure(structure), problem.space, 4, silent)
        assert {name: dict(m._forward_hooks) for name, m in whole.model.named_modules()} == hooks
        assert not any(m._backward_hooks for m in whole.model.modules())
        assert all(p.grad is None and not vars(p) for p in whole.model.parameters())
        assert (CTX.get_active_exts(), torch.get_default_dtype()) == (extensions, torch.float32)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fc(x)


class Reused(nn.Module):
    """One activation that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, CLASSES), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


class Overwritten(nn.Module):
    """An in-place activation overwrites a tensor that is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.out = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.out(self.act(hidden) + hidden)


class Increment(nn.Module):
    """An in-place addition that is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += 1
        return self.out(hidden)


def on_floats(model: nn.Module) -> Problem:
    whole = case("mlp")
    return Problem(model.double(), whole.loss, (whole.inputs, whole.targets))


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("tied", "first.weight is shared with second"),
            ("raw parameters", r"no rule for Raw \(the model\)"),
            ("module used twice", "shared.weight belongs to Linear shared, which is called 2 times"),
            ("also functional", "fc.weight belongs to Linear fc, but is also used elsewhere"),
            ("lstm", r"no rule for LSTM \(lstm\)"),
            ("attention", r"no rule for MultiheadAttention \(attention\)"),
            ("linear subclass", r"no rule for Doubling \(0\)"),
            ("keyword argument", "it fails on Keyword"),
            ("hypernetwork", "maker.weight belongs to Linear maker, which mixes the samples of a batch"),
            ("same padding", r"Conv2d \(1\) is wrong with 'same' padding"),
            ("circular padding", r"Conv2d \(1\) is wrong with 'circular' padding"),
            ("group norm, layer norm", r"no rule for GroupNorm \(2\)"),
        ],
    )
    @pytest.mark.parametrize("structure", ["dense", "block_diag", "diag"])
    def test_models(self, name: str, told: str, structure: str) -> None:
        with pytest.raises(UnsupportedError, match=f"backend backpack cannot: .*{told}.*; backend .*torch can"):
            estimate(case(name).problem, "empirical_fisher", structure, backend="backpack")

    @pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
    @pytest.mark.parametrize(("quantity", "structure"), [("empirical_fisher", "diag"), ("fisher", "diag")])
    def test_padding(self, mode: str, quantity: str, structure: str) -> None:
        problem = images(nn.Conv2d(2, 2, 2, padding=1, padding_mode=mode), nn.Flatten(), nn.Linear(32, 3)).problem
        with pytest.raises(UnsupportedError, match=rf"Conv2d \(1\) is wrong with '{mode}' padding"):
            estimate(problem, quantity, structure, backend="backpack")

    @pytest.mark.parametrize(("quantity", "structure"), [*SECOND_ORDER, (Fisher(), "kfac")], ids=str)
    @pytest.mark.parametrize(
        ("model", "told"),
        [
            (Functional(), r"chain of modules, and the input of Linear \(second\) is not the output"),
            (Scaled(), "chain of modules, and the model's outputs are not the output of the last module"),
            (Reused(), r"chain of modules, and Tanh \(act\) is called more than once"),
        ],
        ids=["functional", "scaled", "reused"],
    )
    def test_second_order(self, model: nn.Module, told: str, quantity: Quantity, structure: str) -> None:
        with pytest.raises(UnsupportedError, match=told):
            estimate(on_floats(model), quantity, structure, backend="backpack")
        assert agree(on_floats(model), "empirical_fisher", "diag")

    @pytest.mark.parametrize(("quantity", "structure"), [*SECOND_ORDER, (Fisher(), "kfac")], ids=str)
    @pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Softplus()], ids=lambda act: type(act).__name__)
    def test_activations(self, act: nn.Module, quantity: Quantity, structure: str) -> None:
        model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, CLASSES))
        with pytest.raises(UnsupportedError, match=rf"no second-order rule for {type(act).__name__} \(1\)"):
            estimate(on_floats(model), quantity, structure, backend="backpack")
        # In front of what is asked for, anything may stand.
        assert agree(on_floats(model), quantity, structure, params=["2.*"])

    def test_factors_of_convolutions(self) -> None:
        problem = images(nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, CLASSES)).problem
        with pytest.raises(UnsupportedError, match=r"factors of Conv2d \(1\) use another approximation"):
            estimate(problem, "fisher", "kfac", backend="backpack")

    def test_factors_on_tokens(self) -> None:
        problem = images(nn.Linear(3, 2), nn.Flatten(), nn.Linear(4, CLASSES), shape=(2, 3)).problem
        with pytest.raises(UnsupportedError, match=r"factors of Linear \(1\) need inputs \(N, d\)"):
            estimate(problem, "fisher", "kfac", backend="backpack")
        assert agree(problem, "fisher", "diag")

    def test_rare_options(self) -> None:
        layers = nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1), nn.Flatten(), nn.Linear(98, CLASSES)
        with pytest.raises(UnsupportedError, match="it fails on Sequential"):
            estimate(images(*layers).problem, "empirical_fisher", "diag", backend="backpack")

    @pytest.mark.parametrize(
        ("model", "told"),
        [(Increment(), "it fails on Increment .*modified inplace"), (Overwritten(), "gives a wrong result")],
        ids=["increment", "overwritten"],
    )
    def test_what_only_its_answer_shows(self, model: nn.Module, told: str) -> None:
        with pytest.raises(UnsupportedError, match=told):
            estimate(on_floats(model), "empirical_fisher", "diag", backend="backpack")

    def test_the_cells(self) -> None:
        assert BACKENDS["backpack"].structures == dict.fromkeys((EmpiricalFisher, Fisher, GGN), ROWS) | {
            Hessian: ("diag",)
        }
