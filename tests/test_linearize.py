"""The linearized model against plain reverse-mode Jacobians at the point of linearization, in float64."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import count

import pytest
import torch
from models_under_test import CLASSES, ZOO, case
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import CurvlabError, EmpiricalFisher, Penalty, Problem, UnsupportedError, estimate, linearize
from curvlab.estimators.rows import linear_layers, row_batches
from curvlab.linearize import Linearized, augmented
from curvlab.models import ResNet20, cnn, freeze_batch_norm, merge_batch_norm, mlp
from curvlab.parameters import ParameterSpace
from curvlab.training import fit

N = 5


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> bool:
    """Equal relative to the largest entry."""
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= rtol * expected.abs().max())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def settled(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with statistics and biases of its own."""
    torch.manual_seed(0)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model


def images(*layers: nn.Module) -> nn.Module:
    return settled(nn.Sequential(*layers))


def frozen_norm() -> nn.Module:
    model = images(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    freeze_batch_norm(model)
    return model.eval()


def half_norm(missing: str) -> nn.Module:
    model = images(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    model[1].register_parameter(missing, None)
    return model


def partly_frozen() -> nn.Module:
    model = images(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU())
    model.append(nn.Linear(6, 3).double())
    for name in ("0.weight", "1.bias", "4.bias", "6.weight"):
        model.get_parameter(name).requires_grad_(False)
    return model


CONV = {"kernel_size": 3, "padding": 1}
RULED: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: images(nn.Flatten(), nn.Linear(72, 3)),
    "without bias": lambda: images(nn.Flatten(), nn.Linear(72, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)),
    "Conv2d": lambda: images(nn.Conv2d(2, 4, 3, stride=2), nn.Conv2d(4, 3, 2, groups=1, bias=False), nn.Flatten()),
    "other paddings": lambda: images(
        *(nn.Conv2d(2, 4, **CONV, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding="same", groups=2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ),
    "ReLU": lambda: images(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten()),
    "LeakyReLU": lambda: images(nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 3), nn.Flatten()),
    "MaxPool2d": lambda: images(
        nn.Conv2d(2, 4, 3), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.Conv2d(4, 3, 2), nn.Flatten()
    ),
    "MaxPool2d first": lambda: images(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3)),
    "AvgPool2d": lambda: images(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 3, 2), nn.Flatten()),
    "BatchNorm2d": lambda: images(
        *(nn.Conv2d(2, 4, **CONV), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, **CONV)),
        *(nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 3)),
    ),
    "BatchNorm2d first": lambda: images(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.Flatten()),
    "frozen BatchNorm2d": frozen_norm,
    "BatchNorm2d without weight": lambda: half_norm("weight"),
    "BatchNorm2d without bias": lambda: half_norm("bias"),
    "partly frozen": partly_frozen,
    "Identity, Dropout in eval mode": lambda: images(nn.Flatten(), nn.Identity(), nn.Linear(72, 4), nn.Dropout()),
    "nothing to linearize last": lambda: images(nn.Flatten(), nn.Linear(72, 3), nn.ReLU()),
    "mlp": lambda: settled(mlp(72, (5, 4), 3)),
    "cnn": lambda: settled(cnn((2, 6, 6), 3)),
}
RESIDUAL = "resnet-20"  # of the zoo: narrow


def inputs_of(_: nn.Module) -> Tensor:
    return randn(N, 2, 6, 6, seed=1)


def every_model() -> list[str]:
    return [*RULED, *(f"zoo: {name}" for name in ZOO)]


def model_and_inputs(name: str) -> tuple[nn.Module, Tensor]:
    if name in RULED:
        model = RULED[name]()
        return model, inputs_of(model)
    whole = case(name.removeprefix("zoo: "))
    return whole.model, whole.inputs


def moved(linear: nn.Module, scale: float = 0.5, seed: int = 2) -> nn.Module:
    """The same module elsewhere in its parameters."""
    seeds = count(seed)
    with torch.no_grad():
        for p in linear.parameters():
            if p.requires_grad:
                p.add_(scale * randn(*p.shape, seed=next(seeds)))
    return linear


def general(linear: Linearized) -> Linearized:
    """The same module, kept from the rules by a hook that does nothing."""
    linear = deepcopy(linear)
    next(m for m in linear.modules() if not list(m.children())).register_forward_hook(lambda *_: None)
    return linear


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """``(N C, P)`` by backward passes."""
    parameters = list(trainable(model).values())
    rows = []
    for f in model(x.clone()).flatten():
        found = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(model).values()])


# The function --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every_model())
def test_is_the_expansion(name: str) -> None:
    """The outputs and their gradient are those of ``f + J delta``, with a Jacobian by backward passes."""
    model, x = model_and_inputs(name)
    linear = linearize(model)
    assert (linear(x.clone()) - model(x.clone())).abs().max() <= 1e-12
    J, before = jacobian(model, x), flat(model)
    moved(linear)
    out = linear(x.clone())
    expected = (model(x.clone()).flatten() + J @ (flat(linear) - before)).view_as(out)
    assert close(out, expected)
    seed = randn(*out.shape, seed=3)
    out.backward(seed)
    gradient = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainable(linear).values()]
    )
    assert close(gradient, J.mT @ seed.flatten())
    assert torch.equal(before, flat(model)), "the model itself has moved"


@pytest.mark.parametrize("name", [*RULED, "zoo: resnet-20", "zoo: transformer encoder layer"])
def test_is_affine(name: str) -> None:
    model, x = model_and_inputs(name)
    linear = linearize(model)
    outputs = [linear(x)]
    seed = 7
    for _ in range(2):
        outputs.append(moved(linear, seed=seed)(x))
    assert (outputs[2] - 2 * outputs[1] + outputs[0]).abs().max() <= 1e-10 * outputs[2].abs().max()


def central_difference(model: nn.Module, x: Tensor, direction: dict[str, Tensor], step: float = 1e-6) -> Tensor:
    values = []
    for sign in (1, -1):
        at = deepcopy(model)
        with torch.no_grad():
            for name, p in trainable(at).items():
                p.add_(sign * step * direction[name])
            values.append(at(x.clone()))
    return (values[0] - values[1]) / (2 * step)


def whole_resnet20() -> nn.Module:
    return settled(ResNet20(CLASSES))


def transformer_block() -> nn.Module:
    block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return settled(nn.Sequential(block, nn.Flatten(), nn.Linear(24, CLASSES)))


@pytest.mark.parametrize("name", [*RULED, "resnet20", "transformer"])
def test_jacobian_is_the_difference_quotient(name: str) -> None:
    if name in RULED:
        model, x = model_and_inputs(name)
    else:
        model, x = {
            "resnet20": (whole_resnet20(), randn(2, 3, 32, 32)),
            "transformer": (transformer_block(), randn(3, 4, 6)),
        }[name]
    direction = {n: randn(*p.shape, seed=i) / p.numel() ** 0.5 for i, (n, p) in enumerate(trainable(model).items())}
    linear = linearize(model)
    with torch.no_grad():
        for n, p in trainable(linear).items():
            p.add_(direction[n])
    assert close(linear(x) - model(x), central_difference(model, x, direction), rtol=1e-6)


@pytest.mark.parametrize("name", [*RULED, "resnet20", "merged resnet20", "zoo: resnet-20"])
def test_rules_give_what_forward_mode_gives(name: str) -> None:
    if "resnet20" in name:
        model, x = whole_resnet20(), randn(2, 3, 32, 32)
        model = merge_batch_norm(model) if "merged" in name else model
    elif name in RULED:
        model, x = model_and_inputs(name)
    else:
        model, x = case(RESIDUAL).model[1:], case(RESIDUAL).inputs.view(-1, 3, 4, 4)
    linear = moved(linearize(model), scale=0.1)
    other = general(linear)
    assert augmented.has_rule(linear._features())
    assert not augmented.has_rule(other._features())
    seed = randn(*model(x).shape)
    gradients = []
    for module in (linear, other):
        out = module(x)
        out.backward(seed)
        gradients.append((out.detach(), *(p.grad for p in trainable(module).values())))
    assert all(close(a, b) or not b.any() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("path", [lambda linear: linear, general])
def test_derivative_in_the_inputs(path: Callable[[Linearized], Linearized]) -> None:
    """Not only in the parameters: through both parts."""
    model = images(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    linear = path(moved(linearize(model)))
    x = randn(2, 2, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(linear, (x,))


def test_dropout_in_train_mode_is_one_mask_for_both() -> None:
    model = settled(mlp(6, (8, 8), 3, dropout=0.5)).train()
    x = randn(N, 6)
    torch.manual_seed(1)
    thinned = model(x)
    for linear in (linearize(model, head="fc3"), linearize(model)):
        torch.manual_seed(1)
        assert close(linear(x), thinned, 1e-12), "the same draws as those of the model, also at the first call"
    moved(linear)
    for path in (linear, general(linear)):
        torch.manual_seed(1)
        J = jacobian(model, x)
        torch.manual_seed(1)
        expected = thinned.flatten() + J @ (flat(linear) - flat(model))
        torch.manual_seed(1)
        assert close(path(x).flatten(), expected)


class Tricky(nn.Module):
    """Changes its input and a buffer in place, and takes a way that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.fc = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.fc(x.add_(self.shift))
        return x.exp() if x.sum() > 0 else x.sin()


def test_tricks_in_forward() -> None:
    torch.manual_seed(0)
    model, x = Tricky().double(), randn(N, 4)
    linear = linearize(model)
    J = jacobian(model, x.clone())
    given = x.clone()
    expected = model(x.clone()).flatten() + J @ (flat(moved(linear)) - flat(model))
    assert close(linear(given).flatten(), expected)
    assert torch.equal(given, x)
    assert linear.calls == 0


# The module ----------------------------------------------------------------------------------------------------------


def test_parameters_are_the_models() -> None:
    model = partly_frozen()
    linear = linearize(model)
    assert ParameterSpace.of(linear) == ParameterSpace.of(model)
    theirs = dict(model.named_parameters())
    for name, p in linear.named_parameters():
        assert p.requires_grad == theirs[name].requires_grad
        assert torch.equal(p, theirs[name])
        assert p.data_ptr() != theirs[name].data_ptr()
    assert not linear.training
    assert linear.get_submodule("4").in_features == 48


def test_model_is_not_shared() -> None:
    model, x = model_and_inputs("cnn")
    expected = model(x)
    linear = linearize(model)
    moved(model)
    assert torch.equal(linear(x), expected)
    moved(linear)
    assert not hasattr(model.conv1, "weight_at")


@pytest.mark.parametrize("general_path", [False, True])
def test_state_dict_holds_the_function(general_path: bool) -> None:
    first, x = model_and_inputs("BatchNorm2d")
    torch.manual_seed(3)
    other = RULED["BatchNorm2d"]()
    moved(other)
    other.get_buffer("1.running_mean").add_(1.0)
    linear, loaded = moved(linearize(first)), linearize(other)
    if general_path:
        linear, loaded = general(linear), general(loaded)
    assert not close(loaded(x), linear(x))
    loaded.load_state_dict(linear.state_dict())
    assert torch.equal(loaded(x), linear(x))
    with pytest.raises(RuntimeError, match="weight_at"):
        loaded.load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", ["cnn", "zoo: transformer encoder layer", "zoo: tied"])
def test_copies(name: str) -> None:
    model, x = model_and_inputs(name)
    linear = moved(linearize(model))
    expected = linear(x)
    for copy in (deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(copy(x), expected)
        moved(copy)
        assert not torch.equal(copy(x), expected)
    assert torch.equal(linear(x), expected)
    single = deepcopy(linear).float()
    assert close(single(x.float()).double(), expected, 1e-4)
    assert single(x.float()).dtype == torch.float32
    assert close(single.double()(x), expected, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cnn", "zoo: transformer encoder layer", "zoo: resnet-20"])
def test_device(name: str) -> None:
    model, x = model_and_inputs(name)
    linear = moved(linearize(model))
    assert close(deepcopy(linear).cuda()(x.cuda()).cpu(), linear(x))


def test_at_another_point() -> None:
    model, x = model_and_inputs("BatchNorm2d")
    there = RULED["BatchNorm2d"]()
    moved(there)
    space = ParameterSpace.of(model)
    dictionary = {name: p.detach() for name, p in there.named_parameters()}
    for at in (there.state_dict(), dictionary, space.flatten(dictionary)):
        linear = linearize(model, at)
        assert torch.equal(linear(x), there(x))
        assert close(moved(linear)(x), moved(linearize(there))(x))


@pytest.mark.parametrize(
    ("at", "told"),
    [
        ({"fc1.weight": torch.zeros(5, 6)}, ["no fc1.bias", "no fc2.weight"]),
        ({"fc9": torch.zeros(1)}, ["no fc1.weight", "2 more"]),
        (torch.zeros(3), ["(53,)", "(3,)"]),
        (torch.zeros(53, 1), ["(53,)", "(53, 1)"]),
    ],
)
def test_points_that_do_not_fit(at: object, told: list[str]) -> None:
    model = mlp(6, (5,), 3)
    assert ParameterSpace.of(model).total == 53
    with pytest.raises(CurvlabError) as error:
        linearize(model, at)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in told)
    state = model.state_dict()
    with pytest.raises(CurvlabError, match=r"fc1.weight of shape \(1,\) instead of \(5, 6\), |an unexpected x"):
        linearize(model, state | {"fc1.weight": torch.zeros(1), "x": torch.zeros(1)})


def test_hooks_on_the_module_change_its_outputs() -> None:
    model, x = model_and_inputs("mlp")
    linear = moved(linearize(model))
    expected = linear(x)[:, :2]
    linear.register_forward_hook(lambda _, __, out: out[:, :2])
    assert torch.equal(linear(x), expected)


@contextmanager
def tf32() -> Iterator[None]:
    """The old switch; without a GPU it changes no number."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", ["bfloat16", "half", "autocast"])
def test_small_changes_are_not_lost_where_products_are_rounded(kind: str) -> None:
    """The difference of two products would be that of their rounding errors, some 1e-3 of the product itself."""
    torch.manual_seed(0)
    exact = linearize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double())
    x = randn(32, 64)
    low = torch.float32 if kind == "autocast" else getattr(torch, kind)
    exact, x = exact.to(low).double(), x.to(low).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.mul_(1 + 2.0**-7)  # which bfloat16 can tell from 1
    exact = exact.to(low).double()
    changes = {}
    for dtype in (torch.float64, low):
        model = deepcopy(exact).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            changes[dtype] = model.push((x.to(dtype),), {})[1].double()
    expected, found = changes.values()
    assert close(found, expected, 0.02)


def test_products_are_taken_of_the_change_where_torch_may_round_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(2, 3)
    assert not augmented.rounds(x)
    assert not augmented.rounds(x.float())
    with tf32():
        assert augmented.rounds(x.float())
        assert not augmented.rounds(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert augmented.rounds(x.float())

    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert augmented.rounds(x.float())


def test_frozen_later_keeps_its_displacement() -> None:
    model, x = model_and_inputs("mlp")
    linear = moved(linearize(model))
    expected = linear(x)
    for p in linear.parameters():
        p.requires_grad_(False)
    assert torch.equal(linear(x), expected)


def test_training() -> None:
    """Squared error and a linearized network: the least squares solution of its features."""
    model = settled(mlp(3, (4,), 2))
    x, y = randn(40, 3), randn(40, 2, seed=4)
    linear = linearize(model)
    fit(
        linear,
        (x, y),
        loss="squared_error",
        optimizer="sgd",
        lr=0.05,
        momentum=0.9,
        steps=1000,
        batch_size=40,
        progress=False,
    )
    J = jacobian(model, x)
    best = torch.linalg.lstsq(J, (y - model(x)).flatten().detach(), driver="gelsd").solution
    least = (y - model(x) - (J @ best).view_as(y)).square().sum()
    assert least <= (y - linear(x)).square().sum() < 1.02 * least
    assert (y - model(x)).square().sum() > 1.3 * least
    assert linear.training == model.training


def test_training_continues_from_its_checkpoint(tmp_path) -> None:
    model = settled(mlp(3, (4,), 2))
    x, y = randn(40, 3), torch.arange(40) % 2
    options = {"lr": 0.01, "batch_size": 8, "progress": False}
    whole, part = linearize(model), linearize(model)
    fit(whole, (x, y), steps=20, **options)
    fit(part, (x, y), steps=20, checkpoint=tmp_path / "run", checkpoint_every=5, **options)
    other = linearize(settled(mlp(3, (4,), 2)), at={n: p + 1 for n, p in model.state_dict().items()})
    fit(other, (x, y), steps=20, checkpoint=tmp_path / "run", **options)  # takes up the last step
    assert torch.equal(whole(x), part(x))
    assert torch.equal(other(x), whole(x))


# The head ------------------------------------------------------------------------------------------------------------


def test_head_outside_is_bilinear() -> None:
    model, x = model_and_inputs("cnn")
    linear = linearize(model, head="fc")
    assert close(linear(x), model(x), 1e-12)
    body = nn.Sequential(*list(model.children())[:-1])
    J, before = jacobian(body, x), flat(body)
    moved(linear)
    after = torch.cat([p.detach().flatten() for n, p in linear.named_parameters() if not n.startswith("fc.")])
    features = (body(x).flatten() + J @ (after - before)).view(N, -1)
    assert close(linear(x), F.linear(features, linear.fc.weight, linear.fc.bias))
    assert not hasattr(linear.fc, "weight_at")
    assert ParameterSpace.of(linear) == ParameterSpace.of(model)


@pytest.mark.parametrize("outside", [None, "head"])
def test_a_module_may_be_called_head(outside: str | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x).relu())
            return out

    model = settled(Model())
    linear, x = linearize(model, head=outside), randn(N, 3)
    assert isinstance(linear.head, nn.Linear)
    assert torch.equal(linear(x), model(x))
    assert [name for name, _ in linear.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_head_deep_inside_and_a_new_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
            self.classifier = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.0), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(F.dropout(self.body(x), training=self.training))

    model, x = settled(Net()), randn(N, 4)
    linear = moved(linearize(model, head="classifier.2"))
    features = linearize(nn.Sequential(model.body, model.classifier[0]))
    features.load_state_dict(
        {
            key.replace("body.", "0.").replace("classifier.0", "1"): value
            for key, value in linear.state_dict().items()
            if "classifier.2" not in key
        }
    )
    assert close(linear(x), linear.classifier[2](features(x)), 1e-12)
    linear.classifier[2] = nn.Linear(6, 9).double()
    assert close(linear(x), linear.classifier[2](features(x)), 1e-12)
    linear.train()
    assert not torch.equal(linear(x), linear(x)), "the mode of every part is that of the module"


def test_what_is_no_head() -> None:
    model = mlp(4, (5,), 3)
    with pytest.raises(CurvlabError, match="no module 'fc' for the head; did you mean 'fc"):
        linearize(model, head="fc")
    with pytest.raises(UnsupportedError, match=r"fc1 cannot be the head: the outputs of Sequential"):
        linearize(model, head="fc1")(torch.randn(2, 4))
    for name in ("tied", "module used twice"):
        whole = case(name)
        head = "second" if name == "tied" else "shared"
        with pytest.raises(CurvlabError, match=rf"{head}.*head|head {head}"):
            linearize(whole.model, head=head)(whole.inputs)
    with pytest.raises(CurvlabError, match="no trainable parameter outside of fc1"):
        linearize(mlp(4, (), 3), head="fc1")


# What cannot be right ------------------------------------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo[CurvlabError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_batch_norm_in_train_mode() -> None:
    for model in (RULED["BatchNorm2d"](), images(nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 3))):
        linear = linearize(model).train()
        with pytest.raises(UnsupportedError) as error:
            linear(inputs_of(model))
        one_sentence(error, "1 (BatchNorm", "train mode", "freeze_batch_norm", "merge_batch_norm")
    with pytest.raises(UnsupportedError, match="freeze_batch_norm"):
        fit(linearize(RULED["BatchNorm2d"]()), (inputs_of(model), torch.zeros(N).long()), steps=1, progress=False)


def test_batch_norm_frozen_trains() -> None:
    model = RULED["BatchNorm2d"]()
    for prepared in (merge_batch_norm(model)[:4], frozen_norm()):
        linear = linearize(nn.Sequential(*prepared, nn.Flatten()) if len(prepared) == 4 else prepared)
        x = inputs_of(model)
        assert torch.equal(linear.train()(x), linear.eval()(x))


class NoGrad(nn.Module):
    """Its mean is a constant to backward passes, not to forward derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.no_grad():
            mean = x.mean(dim=1, keepdim=True)
        return self.second(x - mean)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, slope):
        return slope


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Custom.apply(x)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (NoGrad(), ["NoGrad", "no_grad"]),
        (nn.Sequential(nn.Linear(4, 3), Sign()), ["1 (Sign)"]),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), ["weight"]),
    ],
    ids=["no grad", "custom function", "weight norm"],
)
def test_forward_mode_cannot(model: nn.Module, told: list[str]) -> None:
    with pytest.raises(UnsupportedError) as error:
        linearize(model.double())(randn(N, 4))
    one_sentence(error, "cannot be linearized", *told)


def test_a_hook_that_comes_later_is_tried_too() -> None:
    def centred(_: nn.Module, __: object, out: Tensor) -> Tensor:
        with torch.no_grad():
            mean = out.mean(dim=1, keepdim=True)
        return out - mean

    model, x = model_and_inputs("mlp")
    linear = linearize(model)
    linear(x)
    linear.fc1.register_forward_hook(centred)
    with pytest.raises(UnsupportedError, match="no_grad"):
        linear(x)


def test_several_outputs() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    with pytest.raises(UnsupportedError) as error:
        linearize(Net(4, 3))(torch.randn(2, 4))
    one_sentence(error, "Net", "one tensor", "tuple")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["cnn", "zoo: transformer encoder layer", "zoo: lstm"])
def test_first_call_without_gradients(name: str, context: Callable[[], object]) -> None:
    model, x = model_and_inputs(name)
    linear = moved(linearize(model))
    with context():
        out = linear(x.clone())
    assert torch.equal(out, deepcopy(linear)(x))


def test_random_state_is_left_alone() -> None:
    model, x = model_and_inputs("zoo: mlp")
    before = torch.get_rng_state()
    linearize(model)(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_fused_recurrent_kernels() -> None:
    """In single precision torch has some without a forward derivative."""
    whole = case("lstm")
    single = moved(linearize(whole.model))
    expected = single(whole.inputs)
    assert close(single.float()(whole.inputs.float()).double(), expected, 1e-5)


def test_other_errors_are_torchs_own() -> None:
    for model in (nn.Sequential(nn.Linear(4, 3), nn.GELU()), nn.Sequential(nn.Linear(4, 3))):
        linear = linearize(model)
        with pytest.raises(RuntimeError, match="shapes") as error:
            linear(torch.randn(2, 5))
        assert not isinstance(error.value, CurvlabError)


def test_what_is_no_model_to_linearize() -> None:
    with pytest.raises(CurvlabError, match="no trainable parameter"):
        linearize(nn.ReLU())
    with pytest.raises(CurvlabError, match="already"):
        linearize(linearize(mlp(4, (), 3)))
    model = partly_frozen()
    linear = linearize(model)
    linear.requires_grad_(True)
    with pytest.raises(CurvlabError, match=r"0\.weight is trainable, but was frozen"):
        linear(inputs_of(model))
    linear = linearize(mlp(4, (5,), 3))
    linear.fc2 = nn.Linear(5, 7)
    with pytest.raises(CurvlabError, match=r"fc2\.weight is trainable, but was frozen or absent"):
        linear(torch.randn(2, 4))


# Merging batch normalisation -----------------------------------------------------------------------------------------


def test_merged_resnet20() -> None:
    model, x = whole_resnet20(), randn(2, 3, 32, 32)
    merged = merge_batch_norm(model)
    assert close(merged(x), model(x), 1e-12)
    assert torch.equal(merged.train()(x), merged.eval()(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 19
    assert [n for n, _ in merged.named_parameters()][:2] == ["conv1.weight", "conv1.bias"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_pair(affine: bool, bias: bool) -> None:
    model = images(nn.Conv2d(2, 4, 3, bias=bias, padding=1, groups=2), nn.BatchNorm2d(4, affine=affine), nn.ReLU())
    model[0].requires_grad_(False)
    merged = merge_batch_norm(model)
    x = inputs_of(model)
    assert close(merged(x), model(x), 1e-12)
    assert not any(p.requires_grad for p in merged.parameters())
    single = merge_batch_norm(model.float())
    assert all(p.dtype == torch.float32 for p in single.parameters())


def test_what_is_not_merged_stays() -> None:
    class Net(nn.Module):
        """Outputs used again, an activation between, a weight used again or shared, called twice, hooked; right."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(8))
            self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(8))
            self.convs[4].weight = self.convs[3].weight
            self.convs[6].register_forward_hook(lambda _, __, out: 2 * out)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.convs[0](x)
            x = x + self.norms[0](x)
            x = self.norms[1](self.act(self.convs[1](x)))
            x = self.norms[2](self.convs[2](x)) + F.conv2d(x, self.convs[2].weight, padding=1)
            x = self.norms[3](self.convs[3](x))
            x = self.norms[4](self.convs[4](x))
            x = self.norms[5](self.convs[5](self.norms[5](self.convs[5](x))))
            x = self.norms[6](self.convs[6](x))
            return self.norms[7](self.convs[7](x))

    model = settled(Net())
    merged = merge_batch_norm(model)
    assert [type(m).__name__ for m in merged.norms] == ["BatchNorm2d"] * 7 + ["Identity"]
    x = inputs_of(model)
    assert close(merged(x), model(x), 1e-12)


def test_frozen_norms_are_merged_too() -> None:
    model = frozen_norm()
    merged = merge_batch_norm(model)
    x = inputs_of(model)
    assert close(merged(x), model(x), 1e-12)
    assert isinstance(merged[1], nn.Identity)
    assert merged[0].bias.requires_grad


def test_what_cannot_be_traced() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError) as error:
        merge_batch_norm(Net())
    one_sentence(error, "Net", "freeze_batch_norm")


# What looks into layers ----------------------------------------------------------------------------------------------


def test_layers_of_a_linearized_model_are_not_taken_at_their_word() -> None:
    """Whoever looks for layers in it finds none; its rows are right."""
    for name in ("mlp", "zoo: mlp"):
        model, x = model_and_inputs(name)
        linear = moved(linearize(model))
        problem = Problem(linear, "cross_entropy", (x, torch.zeros(len(x)).long()))
        assert linear_layers(problem) == {}
        rows = torch.cat(list(row_batches(problem, EmpiricalFisher(), problem.space.names)))
        slopes = problem.loss.gradients(linear(x), problem.data[1])
        assert close(rows, torch.einsum("ncp,nc->np", jacobian(model, x).view(len(x), CLASSES, -1), slopes))


def test_penalty_takes_its_parameters() -> None:
    model, x = model_and_inputs("mlp")
    y = torch.zeros(len(x)).long()
    linear = linearize(model)
    matrix = estimate(Problem(model, "cross_entropy", (x, y)), "fisher", "kfac")
    penalty = Penalty()
    penalty.add(matrix, {n: p.detach().clone() for n, p in model.named_parameters()})
    delta = flat(moved(linear)) - flat(model)
    assert torch.isclose(penalty.value(dict(linear.named_parameters())), matrix.quadratic_form(delta) / 2)
