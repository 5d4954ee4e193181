"""The module lists of BackPACK (``test/extensions/*/*_settings.py`` and ``test/converter``), with its shapes.

The layers that BackPACK writes as classes of its own (``Permute``, ``Slicing``, ``Pad``, ``Parallel``) are functions in
a module here, and the converter is not needed. Of ResNet-18 the first convolution and the last layer are selected.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn, rand
from torch.nn import functional as F

from benchmarks.peers.cases import Case, Composed, classes, zeros_and_ones
from benchmarks.peers.suites import KFAC, SEPARATE

KRONECKER = (("fisher", KFAC), ("fisher", SEPARATE))

CrossEntropy, MSE = nn.CrossEntropyLoss, nn.MSELoss
Summed = partial(nn.CrossEntropyLoss, reduction="sum")


def layers(*makers: Any) -> Callable[[], nn.Module]:
    """Return a function that makes a sequence: each part is a function, or a tuple of a class and its arguments."""
    return lambda: nn.Sequential(*(m[0](*m[1:]) if isinstance(m, tuple) else m() for m in makers)).eval()


def linear(inputs: int, outputs: int) -> tuple[Any, ...]:
    return nn.Linear, inputs, outputs


def apply(function: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Composed(function)


def permute(*dims: int) -> Callable[[], nn.Module]:
    return apply(lambda x: x.permute(dims))


def case(name: str, model: Callable[[], nn.Module], loss: Any, shape: tuple[int, ...], targets: Any) -> Case:
    """Return a case; targets: a number of classes, or a function."""
    make = targets if callable(targets) else lambda: classes(shape[0], number=targets)
    return Case(name, model, loss, lambda: [(rand(shape), make())])


def ending(name: str, first: Callable[[], nn.Module], shape: tuple[int, ...], loss: Any = Summed) -> Case:
    """Return a case of some layers, flattened, and a linear layer of five outputs."""

    def model() -> nn.Module:
        start = first()
        with torch.no_grad():
            size = start(rand(shape)).flatten(1).shape[1]
        return nn.Sequential(start, nn.Flatten(), nn.Linear(size, 5)).eval()

    return case(name, model, loss, shape, 5)


#: By class, the shapes of the inputs and the arguments.
CONVOLUTIONS: dict[type[nn.Module], list[tuple[tuple[int, ...], tuple[Any, ...]]]] = {
    nn.Conv1d: [
        ((3, 3, 7), (3, 2, 2)),
        ((3, 2, 7), (2, 3, 2, 2, 0, 2)),
        ((3, 3, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 8), (3, 6, 2, 4, 2, 3)),
        ((3, 3, 7), (3, 2, 2, 4, 2, 1, 1, False)),
        ((3, 6, 7), (6, 4, 2, 1, 0, 1, 2)),
    ],
    nn.Conv2d: [
        ((3, 3, 7, 7), (3, 2, 2)),
        ((3, 2, 7, 7), (2, 3, 2, 2, 0, 2)),
        ((3, 3, 7, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 8, 8), (3, 6, 2, 4, 2, 3)),
        ((3, 3, 7, 7), (3, 2, 2, 4, 2, 1, 1, False)),
        ((3, 6, 7, 5), (6, 3, 2, 1, 0, 1, 3)),
    ],
    nn.Conv3d: [
        ((3, 3, 2, 7, 7), (3, 2, 2)),
        ((3, 2, 3, 7, 7), (2, 3, 2, 2, 0, 2)),
        ((3, 3, 2, 7, 7), (3, 2, 2, 3, 2)),
        ((3, 3, 4, 8, 8), (3, 6, 2, 4, 2, 3)),
        ((3, 3, 2, 7, 7), (3, 2, 2, 4, 2, 1, 1, False)),
        ((3, 4, 7, 5, 6), (4, 2, 2, 1, 0, 2, 2)),
    ],
    nn.ConvTranspose1d: [
        ((3, 3, 7), (3, 2, 2)),
        ((3, 2, 7), (2, 3, 2, 2, 0, 0, 1, True, 2)),
        ((3, 3, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 8), (3, 6, 2, 4, 2, 0, 1, True, 3)),
        ((3, 3, 7), (3, 2, 2, 4, 2, 0, 1, False)),
        ((3, 6, 8), (6, 3, 2, 4, 2, 0, 3, True, 3)),
    ],
    nn.ConvTranspose2d: [
        ((3, 3, 7, 7), (3, 2, 2)),
        ((3, 2, 9, 9), (2, 4, 2, 1, 0, 0, 1, True, 2)),
        ((3, 3, 7, 7), (3, 2, 2, 2, 1)),
        ((3, 3, 7, 7), (3, 2, 2, 4, 2, 0, 1, False)),
        ((3, 4, 9, 9), (4, 2, 2, 1, 0, 0, 2, True, 2)),
    ],
    nn.ConvTranspose3d: [
        ((3, 3, 2, 7, 7), (3, 2, 2)),
        ((3, 2, 3, 5, 5), (2, 3, 2, 2, 2, 0, 1, True, 2)),
        ((3, 3, 2, 7, 7), (3, 2, 2, 4, 2, 0, 1, False)),
        ((3, 4, 3, 5, 5), (4, 2, (2, 2, 1), 2, 2, 0, 2, True, 2)),
    ],
}
ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU)
POOLS = {
    1: ((3, 3, 7), (3, 3, 7), nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d),
    2: ((3, 3, 11, 11), (3, 3, 7, 7), nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d),
    3: ((3, 3, 7, 7, 7), (3, 3, 7, 7, 7), nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d),
}


class Recurrent(nn.Module):
    """The states of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Plus(nn.Module):
    """The sum of what some modules return."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(dim=0)


def recurrent(kind: type[nn.RNNBase], *sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Recurrent(kind(*sizes, **options))


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def block(channels: int, inside: int, activation: type[nn.Module]) -> list[nn.Module]:
    return [convolution(channels, inside), activation(), convolution(inside, channels)]


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for part in (_linear, _convolutions, _norms_and_sequences, _branches, _converted):
        for found in part():
            yield replace(found, seed=int(found.name == "several activations"))  # with 0 they let nothing through


def _linear() -> Iterator[Case]:
    short = layers(linear(10, 7), linear(7, 5))
    yield case("example", layers(linear(10, 5)), CrossEntropy, (3, 10), 5)
    yield case("example, sum", layers(linear(10, 5)), Summed, (3, 10), 5)
    yield case("linear", short, CrossEntropy, (3, 10), 5)
    yield case("linear, ReLU", layers(linear(10, 7), nn.ReLU, linear(7, 5)), Summed, (3, 10), 5)
    sigmoid = layers(linear(10, 7), nn.Sigmoid, linear(7, 5))
    yield case("linear, sigmoid", sigmoid, MSE, (3, 10), lambda: rand(3, 5))
    yield case("linear, binary cross entropy", sigmoid, nn.BCEWithLogitsLoss, (3, 10), lambda: zeros_and_ones(3, 5))
    for dims, between, loss, loss_of_classes in (
        ((4,), nn.Identity, MSE, CrossEntropy),
        ((4, 2), nn.Sigmoid, MSE, CrossEntropy),
        ((4, 2, 3), nn.ReLU, partial(MSE, reduction="sum"), Summed),
    ):
        name, size = f"linear on {len(dims)} dimensions", 2 * torch.Size(dims).numel()
        net = (linear(5, 3), between, linear(3, 2))
        shape = (3, *dims, 5)
        yield case(name, layers(*net), loss, shape, lambda dims=dims: rand(3, *dims, 2))
        yield case(f"{name}, flat", layers(*net, nn.Flatten), loss, shape, lambda size=size: rand(3, size))
        yield case(f"{name}, classes", layers(*net, nn.Flatten), loss_of_classes, shape, size)
    net = layers(linear(5, 3), nn.ReLU, linear(3, 2))
    yield case("classes in four dimensions", net, Summed, (3, 4, 2, 3, 5), lambda: classes(3, 2, 3, 2, number=4))
    net = layers(linear(7, 3), nn.ReLU, nn.Flatten, linear(3, 1))
    yield case("one sample", net, MSE, (1, 7), lambda: rand(1, 1))


def _convolutions() -> Iterator[Case]:
    for activation in ACTIVATIONS:
        for bias in (True, False):
            first = layers((partial(nn.Conv2d, bias=bias), 3, 2, 2), activation)
            name = f"{activation.__name__}{'' if bias else ', no bias'}"
            yield ending(name, first, (3, 3, 7, 7), CrossEntropy)
    for kind, settings in CONVOLUTIONS.items():
        for shape, arguments in settings:
            yield ending(f"{kind.__name__}{arguments}", layers((kind, *arguments), nn.ReLU), shape)
    for shape, smaller, convolve, maximum, average in POOLS.values():
        for size, pool, arguments in (
            (shape, maximum, (2, 1)),
            (smaller, maximum, (2, 1, 0, 2)),
            (smaller, maximum, (2, 1, 0, 2, False, True)),
            (shape, average, (2, 1)),
            (smaller, average, (2, 1, 0, True)),
            (smaller, average, (2, 1, 0, False)),
        ):
            first = layers((convolve, 3, 2, 2), nn.ReLU, (pool, *arguments))
            yield ending(f"{pool.__name__}{arguments}", first, size)
    for pool, shape, size in (
        (nn.AdaptiveAvgPool1d, (2, 2, 9), (3,)),
        (nn.AdaptiveAvgPool2d, (2, 2, 6, 8), (3, 4)),
        (nn.AdaptiveAvgPool3d, (2, 2, 9, 5, 4), (3, 5, 2)),
    ):
        width = shape[-1]
        net = layers(linear(width, width), (pool, size), nn.Flatten)
        outputs = 2 * torch.Size(size).numel()
        yield case(pool.__name__, net, MSE, shape, lambda outputs=outputs: rand(2, outputs))
    pad = layers(
        (nn.Conv2d, 3, 2, 2), apply(lambda x: F.pad(x, (1, 1, 0, 2))), (nn.Conv2d, 2, 2, 3, 2), nn.Flatten, linear(8, 2)
    )
    yield case("padded", pad, MSE, (5, 3, 4, 4), lambda: rand(5, 2))
    pad = layers(
        *((nn.Conv2d, 3, 2, 3, 1, 1), nn.ReLU, apply(lambda x: F.pad(x, (1, 1, 2, 0, 1, 2), value=1.0))),
        *((nn.Conv2d, 5, 2, 3, 2), nn.ReLU, nn.Flatten, linear(8, 3)),
    )
    yield case("padded, also channels", pad, CrossEntropy, (5, 3, 4, 4), 3)
    first = (nn.Conv2d, 3, 2, 2, 1, 1)
    net = layers(first, apply(lambda x: x[:, 0, ::2, 0:2]), nn.ReLU, nn.Flatten, linear(6, 4))
    yield case("sliced", net, CrossEntropy, (3, 3, 4, 5), 4)
    net = layers(first, apply(lambda x: x[:, :, 2]), nn.ReLU, apply(lambda x: x[:, 1]), linear(6, 4))
    yield case("sliced twice", net, MSE, (3, 3, 4, 5), lambda: rand(3, 4))


def _norms_and_sequences() -> Iterator[Case]:
    for norm, shape in (
        ((nn.BatchNorm1d, 3), (2, 3, 4)),
        ((nn.BatchNorm2d, 2), (3, 2, 4, 3)),
        ((nn.BatchNorm3d, 3), (3, 3, 4, 1, 2)),
    ):
        number, terms = shape[1], shape[2:]
        name, size = norm[0].__name__, torch.Size(shape[1:]).numel()
        targets = partial(classes, shape[0], *terms, number=number)
        yield case(f"{name}, classes", layers(norm), CrossEntropy, shape, targets)
        yield case(name, layers(norm, nn.Flatten), MSE, shape, partial(rand, shape[0], size))
    norm, shape = (nn.BatchNorm3d, 3), (3, 3, 4, 1, 2)
    net = (norm, linear(2, 3), norm, nn.ReLU, norm)
    yield case("three norms, classes", layers(*net), CrossEntropy, shape, lambda: classes(3, 4, 1, 3, number=3))
    yield case("three norms", layers(*net, nn.Flatten), MSE, shape, lambda: rand(3, 36))
    states = (permute(1, 0, 2), recurrent(nn.RNN, 6, 3), permute(1, 2, 0))
    yield case("RNN, classes", layers(*states), CrossEntropy, (8, 5, 6), lambda: classes(8, 5, number=3))
    yield case("RNN", layers(*states, nn.Flatten), MSE, (8, 5, 6), lambda: rand(8, 15))
    net = layers(recurrent(nn.RNN, 6, 3, batch_first=True), linear(3, 3), permute(0, 2, 1))
    yield case("RNN and a linear layer", net, CrossEntropy, (8, 5, 6), lambda: classes(8, 5, number=3))
    net = layers(recurrent(nn.LSTM, 5, 4, batch_first=True), nn.Flatten)
    yield case("LSTM", net, CrossEntropy, (4, 3, 5), 12)
    indices = lambda number, *shape: lambda: [(torch.randint(number, shape), classes(shape[0], number=4))]  # noqa: E731
    net = layers((nn.Embedding, 5, 3), linear(3, 4))
    yield Case("embedding", net, CrossEntropy, indices(5, 6))
    yield Case("embedding of four indices", layers((nn.Embedding, 3, 2), nn.Flatten), CrossEntropy, indices(3, 3, 2, 2))


def _branches() -> Iterator[Case]:
    def skip(*parts: nn.Module) -> list[nn.Module]:
        return [nn.Linear(10, 5), nn.ReLU(), Plus(*parts, nn.Linear(5, 5)), nn.Sigmoid(), nn.Linear(5, 4)]

    yield case("branches", lambda: nn.Sequential(*skip(nn.Identity())), CrossEntropy, (3, 10), 4)
    scaled = lambda: nn.Sequential(*skip(Composed(lambda x: 3.0 * x)))  # noqa: E731
    yield case("branches, one scaled", scaled, CrossEntropy, (3, 10), 4)
    last = lambda size: [nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(size, 5)]  # noqa: E731
    net = lambda: nn.Sequential(  # noqa: E731
        *(convolution(2, 3), nn.ReLU(), Plus(nn.Identity(), nn.Sequential(*block(3, 5, nn.ReLU))), *last(12))
    )
    yield case("branches of convolutions", net, CrossEntropy, (4, 2, 6, 6), 5)
    nested = lambda: nn.Sequential(  # noqa: E731
        *(convolution(3, 2), nn.ReLU()),
        Plus(
            nn.Identity(),
            nn.Sequential(
                *block(2, 4, nn.Sigmoid),
                Plus(nn.Identity(), nn.Sequential(*block(2, 4, nn.ReLU))),
            ),
        ),
        *last(8),
    )
    yield case("branches in branches", nested, CrossEntropy, (4, 3, 6, 6), 5)


class Converted(nn.Module):
    """Layers and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleList(parts), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def _converted() -> Iterator[Case]:
    def converted(name: str, shape: tuple[int, ...], function: Any, *sizes: tuple[int, int], targets: Any) -> Case:
        net = lambda: Converted(function, *(nn.Linear(*size) for size in sizes))  # noqa: E731
        return case(name, net, MSE if targets().is_floating_point() else CrossEntropy, shape, targets)

    two = lambda: rand(3, 2)  # noqa: E731
    inplace = lambda x, one, other: other(F.relu(one(x), inplace=True))  # noqa: E731
    yield converted("in-place activation", (3, 3), inplace, (3, 2), (2, 2), targets=two)
    relus = lambda x, one, other: other(one(x.relu()).relu()).relu()  # noqa: E731
    yield converted("several activations", (3, 3), relus, (3, 2), (2, 2), targets=two)
    flattened = lambda x, one, other: other(one(x).flatten(2)).flatten(1)  # noqa: E731
    yield converted("flattened", (3, 2, 2, 4), flattened, (4, 3), (6, 3), targets=lambda: rand(3, 6))
    scaled = lambda x, one: (0.5 * one(x * 2.5)).multiply(3.1415)  # noqa: E731
    yield converted("multiplied", (2, 4), scaled, (4, 3), targets=lambda: rand(2, 3))

    def added(x: Tensor, first: nn.Module, one: nn.Module, other: nn.Module) -> Tensor:
        x = first(x)
        return (one(x) + other(x)).relu().add(other(x))

    yield converted("added", (3, 3), added, (3, 3), (3, 2), (3, 2), targets=two)
    turned = lambda x, one, other: other(one(x).mT).mT  # noqa: E731
    yield converted("permuted", (3, 5, 3), turned, (3, 2), (5, 2), targets=lambda: classes(3, 2, number=2))
    yield converted("transposed", (3, 5, 3), turned, (3, 2), (5, 3), targets=lambda: classes(3, 2, number=3))
    step = lambda: Plus(nn.Identity(), nn.Sequential(*_euler(), Composed(lambda x: 0.1 * x)))  # noqa: E731
    yield case("a step of a residual network", step, MSE, (1, 2), lambda: rand(1, 2))
    for kind in (nn.LSTM, nn.RNN):
        yield Case(
            f"characters, {kind.__name__}",
            partial(characters, kind),
            CrossEntropy,
            lambda: [(torch.randint(25, (8, 15)), classes(8, 15, number=25))],
            params=("3.*",),
        )
    yield Case("small ResNet", small_resnet, MSE, lambda: [(rand(2, 3, 7, 7), rand(2, 3))])
    yield Case(
        "ResNet-18",
        lambda: import_module("torchvision.models").resnet18(num_classes=4).eval(),
        MSE,
        lambda: [(rand(2, 3, 7, 7), rand(2, 4))],
        params=("conv1.*", "fc.*"),
    )


def _euler() -> list[nn.Module]:
    return [nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 2)]


def characters(kind: type[nn.RNNBase]) -> nn.Module:
    states = recurrent(kind, 64, 64, num_layers=2, dropout=0.36, batch_first=True)
    return layers((nn.Embedding, 25, 64), (nn.Dropout, 0.2), states, linear(64, 25), permute(0, 2, 1))()


def small_resnet() -> nn.Module:
    resnet = import_module("torchvision.models.resnet")

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        down = None
        if stride != 1:
            down = nn.Sequential(resnet.conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        return [resnet.BasicBlock(inputs, outputs, stride, down), resnet.BasicBlock(outputs, outputs)]

    return nn.Sequential(
        *(nn.Conv2d(3, 2, 7, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)),
        *(*stage(2, 2, 1), *stage(2, 4, 2), *stage(4, 8, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    ).eval()
