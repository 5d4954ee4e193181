"""Tests of the NNGeometry backend: correct results or a refusal that names the module, and no changes of state.

Losses, splits of the data and float32 are in test_estimator_matrix.py, for every backend.
"""

from collections.abc import Callable

import pytest
import torch
from models_under_test import CLASSES, Case, N, case
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import UnsupportedError
from curvlab.estimators import BACKENDS, estimate
from curvlab.estimators.nngeometry import compute
from curvlab.problem import Problem
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Quantity
from curvlab.structures import EKFACStructure, KFACStructure, parse_structure

QUANTITIES = (EmpiricalFisher(), Fisher(), Fisher(samples=2, seed=1), GGN())
STORED = ("dense", "block_diag", "diag")
ALL = (*STORED, "kfac", "ekfac")


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= rtol * expected.abs().max())


def silent(_: float = 1, /, *, note: str = "") -> None:
    pass


def images(*layers: nn.Module, size: int = 18, loss: str = "cross_entropy", seed: int = 0) -> Case:
    """Return a model of images ``(2, 3, 3)`` with flat inputs, and data for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Unflatten(1, (2, 3, 3)), *layers).double().eval()
        inputs = torch.randn(N, size, dtype=torch.float64)
    whole = case("mlp", loss=loss)
    return Case(model, inputs, whole.targets, loss, frozenset(), frozenset())


def agree(problem: Problem, quantity: Quantity | str, structure: str, rtol: float = 1e-10, **options: object) -> bool:
    actual, expected = (estimate(problem, quantity, structure, backend=b, **options) for b in ("nngeometry", "torch"))
    return close(actual.to_dense(), expected.to_dense(), rtol)


class TestRight:
    @pytest.mark.parametrize("structure", STORED)
    @pytest.mark.parametrize(
        "name",
        ["one layer", "frozen", "residual", "input changed in place", "conv1d, stride, dilation", "batch norm"],
    )
    def test_models(self, name: str, structure: str) -> None:
        assert agree(case(name).problem, "empirical_fisher", structure)

    @pytest.mark.parametrize("structure", ["kfac", "ekfac"])
    @pytest.mark.parametrize("name", ["one layer", "frozen", "residual", "conv1d, stride, dilation"])
    def test_models_with_factors(self, name: str, structure: str) -> None:
        problem = case(name).problem
        names = [n for n in problem.space.names if "norm" not in n]
        assert agree(problem, "fisher", structure, params=names)

    @pytest.mark.parametrize("structure", STORED)
    @pytest.mark.parametrize(
        "layers",
        [
            [nn.GroupNorm(2, 2), nn.Flatten(), nn.Linear(18, CLASSES)],
            [nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, CLASSES)],
            [nn.LayerNorm((2, 3, 3), bias=False), nn.Flatten(), nn.Linear(18, CLASSES)],
            [nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, CLASSES)],
            [nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 1, 2, bias=False), nn.Flatten(), nn.Linear(4, CLASSES)],
        ],
        ids=["group norm", "layer norm", "layer norm over images", "batch norm", "batch norm without parameters"],
    )
    def test_normalisation(self, layers: list[nn.Module], structure: str) -> None:
        for layer in layers:
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.running_mean.uniform_(-1, 1), layer.running_var.uniform_(0.5, 2)
        assert agree(images(*layers).problem, "fisher", structure)

    @pytest.mark.parametrize("structure", ["diag", "kfac", "ekfac"])
    @pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3)])
    def test_any_activation(self, act: nn.Module, structure: str) -> None:
        problem = images(nn.Conv2d(2, 2, 2), act, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, CLASSES)).problem
        assert agree(problem, "fisher", structure)


class TestFactors:
    """Each of the two factors of a layer, not only their product, against plain loops."""

    def by_loops(self, problem: Case, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Factors of the exact Fisher with cross-entropy."""
        a, s = 0, 0
        for x in problem.inputs.split(1):
            seen = []
            handle = layer.register_forward_hook(lambda _, given, output: seen.extend((given[0], output)))  # noqa: B023
            outputs = problem.model(x)[0]
            handle.remove()
            given, output = seen
            if isinstance(layer, nn.Conv2d):
                given = F.unfold(given.detach(), layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT[0]
            positions = torch.cat([given, torch.ones_like(given[:, :1])], dim=1) if layer.bias is not None else given
            a += positions.mT @ positions / len(positions) / N
            p = outputs.softmax(dim=0).detach()
            for c in range(CLASSES):
                value = -p[c].sqrt() * outputs.log_softmax(dim=0)[c]
                (gradient,) = torch.autograd.grad(value, output, retain_graph=True)
                gradient = gradient.flatten(2)[0].mT if isinstance(layer, nn.Conv2d) else gradient
                s += gradient.mT @ gradient / N
        return a.detach(), s

    @pytest.mark.parametrize("bias", [True, False])
    def test_factors(self, bias: bool) -> None:
        convolution = nn.Conv2d(2, 4, 2, stride=2, padding=1, bias=bias)
        problem = images(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES, bias=bias))
        whole = problem.problem
        tensors = compute(whole, Fisher(), KFACStructure(), whole.space, 3, silent).tensors
        for name, layer in (("1", convolution), ("4", problem.model[4])):
            a, s = self.by_loops(problem, layer)
            assert close(tensors[f"{name}|A"], a)
            assert close(tensors[f"{name}|S"], s)

    def test_eigenvalues_are_second_moments_in_the_eigenbasis(self) -> None:
        whole = case("mlp")
        tensors = compute(whole.problem, EmpiricalFisher(), EKFACStructure(), whole.problem.space, None, silent).tensors
        gradients = whole.gradients()[:, :25]  # of the first layer, (5, 4) and (5,)
        homogeneous = torch.cat([gradients[:, :20].view(N, 5, 4), gradients[:, 20:].unsqueeze(2)], dim=2)
        rotated = tensors["0|U_S"].mT @ homogeneous @ tensors["0|U_A"]
        assert close(tensors["0|values"], rotated.square().mean(dim=0))

    def test_reduce_is_expand_where_there_is_one_position(self) -> None:
        problem = case("mlp").problem
        one, other = (estimate(problem, "ggn", s, backend="nngeometry") for s in ("kfac", "kfac:sharing=reduce"))
        assert close(other.to_dense(), one.to_dense())

    @pytest.mark.parametrize("quantity", ["fisher", "fisher:samples=2", "empirical_fisher"])
    @pytest.mark.parametrize("structure", ["kfac", "ekfac"])
    def test_batches_of_images_of_two_sizes(self, structure: str, quantity: str) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        generator = torch.Generator().manual_seed(0)
        data = [
            (torch.randn(n, 1, size, size, generator=generator), torch.arange(n) % 3) for n, size in ((8, 3), (3, 5))
        ]
        assert agree(Problem(model.double(), data=data), quantity, structure)


@pytest.mark.parametrize("structure", ALL)
@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
def test_regrouped(quantity: Quantity, structure: str) -> None:
    assert agree(case("mlp").problem, quantity, structure, batch_size=4)


@pytest.mark.parametrize("structure", ALL)
@pytest.mark.parametrize("params", [["0.weight"], ["0.bias"], ["0.bias", "2.weight"], ["2.*"]], ids=str)
def test_selected_parameters(params: list[str], structure: str) -> None:
    assert agree(case("mlp").problem, Fisher(samples=1), structure, params=params)
    model = images(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES))
    renamed = [p.replace("0", "1").replace("2", "4") for p in params]
    assert agree(model.problem, EmpiricalFisher(), structure, params=renamed)


class Constants(nn.Module):
    """Records the default dtype in the forward pass, outside the model, whose attributes are restored."""

    def __init__(self, seen: Callable[[torch.dtype], None]) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(1, 2, 2), nn.Linear(6, CLASSES)
        self.note = seen

    def forward(self, x: Tensor) -> Tensor:
        self.note(torch.tensor(1.0).dtype)
        return self.fc(self.conv(x.unsqueeze(1)).tanh().flatten(1))


class TestNothingIsLeftBehind:
    def test_the_default_dtype_is_the_users(self) -> None:
        whole = case("mlp")
        seen: list[torch.dtype] = []
        model = Constants(seen.append).double()
        model.register_forward_hook(lambda *_: seen.append(torch.get_default_dtype()))
        assert agree(Problem(model, whole.loss, (whole.inputs, whole.targets)), "fisher", "block_diag")
        assert set(seen) == {torch.get_default_dtype()} == {torch.float32}

    def test_the_data_do_not_require_gradients(self) -> None:
        whole = case("mlp")
        batches = list(zip(whole.inputs.split(3), whole.targets.split(3), strict=True))
        estimate(Problem(whole.model, whole.loss, batches), "fisher", "dense", backend="nngeometry")
        assert not any(x.requires_grad for x, _ in batches)

    def test_the_random_state(self) -> None:
        problem = case("mlp").problem
        before = torch.get_rng_state()
        compute(problem, Fisher(samples=1), parse_structure("diag"), problem.space, None, silent)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_model_that_fails_at_the_second_batch(self) -> None:
        whole = case("mlp")

        def fail(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if len(given[0]) == 3 and torch.equal(given[0], whole.inputs[4:]):
                raise ValueError("three samples")

        whole.model[2].register_forward_pre_hook(lambda *_: None)
        whole.model.register_forward_pre_hook(fail)
        hooks = {name: dict(m._forward_hooks) for name, m in whole.model.named_modules()}
        problem = Problem(whole.model, whole.loss, (whole.inputs, whole.targets))
        with pytest.raises(ValueError, match="three samples"):
            compute(problem, Fisher(), parse_structure("block_diag"), problem.space, 4, silent)
        assert {name: dict(m._forward_hooks) for name, m in whole.model.named_modules()} == hooks
        assert torch.get_default_dtype() == torch.float32


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("convolutions, eval batch norm, in-place relu", r"Conv2d is wrong with groups \(1\)"),
            ("embedding", "differentiates with respect to the inputs, and these are integers"),
            ("tied", "first.weight is shared with second"),
            ("raw parameters", r"no rule for Raw \(the model\)"),
            ("module used twice", "shared.weight belongs to Linear shared, which is called 2 times"),
            ("also functional", "fc.weight belongs to Linear fc, but is also used elsewhere"),
            ("lstm", r"no rule for LSTM \(lstm\)"),
            ("attention", r"no rule for MultiheadAttention \(attention\)"),
            ("linear subclass", r"no rule for Doubling \(0\)"),
            ("keyword argument", "it fails on Keyword"),
            ("hypernetwork", "maker.weight belongs to Linear maker, which mixes the samples of a batch"),
            ("same padding", r"zero padding of a given width, not 'same' \(1\)"),
            ("circular padding", r"zero padding of a given width, not 'circular' \(1\)"),
            ("conv3d", r"no rule for Conv3d \(1\)"),
            ("transposed convolution", r"no rule for ConvTranspose2d \(1\)"),
        ],
    )
    @pytest.mark.parametrize("structure", STORED)
    def test_models(self, name: str, told: str, structure: str) -> None:
        with pytest.raises(UnsupportedError, match=f"backend nngeometry cannot: .*{told}.*; backend .*torch can"):
            estimate(case(name).problem, "empirical_fisher", structure, backend="nngeometry")

    @pytest.mark.parametrize(
        ("layer", "told"),
        [
            (nn.Linear(3, 3), r"Linear needs inputs of 2 dimensions, not 4 \(1\)"),
            (nn.LayerNorm(3), r"LayerNorm needs inputs of 2 dimensions, not 4 \(1\)"),
            (nn.Conv2d(2, 2, 1, padding="valid"), r"not 'valid' \(1\)"),
        ],
    )
    def test_inputs(self, layer: nn.Module, told: str) -> None:
        problem = images(layer, nn.Flatten(), nn.Linear(18, CLASSES)).problem
        with pytest.raises(UnsupportedError, match=told):
            estimate(problem, "fisher", "diag", backend="nngeometry")

    @pytest.mark.parametrize("structure", ["kfac:sharing=reduce", "ekfac:sharing=reduce"])
    def test_reduce_of_convolutions(self, structure: str) -> None:
        problem = images(nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, CLASSES)).problem
        with pytest.raises(UnsupportedError, match=r"factors of Conv2d are for sharing=expand, not reduce \(1\)"):
            estimate(problem, "fisher", structure, backend="nngeometry")

    def test_hooks_that_change_outputs(self) -> None:
        whole = case("mlp")
        whole.model[0].register_forward_hook(lambda _, __, output: 2 * output)
        with pytest.raises(
            UnsupportedError, match=r"a hook of Linear \(0\) changes its output; backend hooks or torch can"
        ):
            estimate(whole.problem, "fisher", "diag", backend="nngeometry")

    def test_other_layers_may_be_anything(self) -> None:
        problem = case("module used twice").problem
        assert agree(problem, "fisher", "ekfac", params=["out.*"])
        problem = case("convolutions, eval batch norm, in-place relu").problem
        assert agree(problem, "fisher", "dense", params=["2.*", "6.*"])

    def test_the_cells(self) -> None:
        assert dict(BACKENDS["nngeometry"].structures) == dict.fromkeys((Fisher, EmpiricalFisher, GGN), ALL)
