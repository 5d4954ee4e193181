"""The cases of curvlinops (``test/cases.py``, ``test/kfac_cases.py`` and the U-Net of ``test/utils.py``).

Images are smaller than there (4 x 4 for 32 x 32): the reference takes a backward pass for every output. The empirical
Fisher of curvlinops has a gradient per term for every reduction, so the unit is the term also for ``reduction="sum"``.
"""

from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn, rand, rand_like
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.cases import Case, Composed, classes, zeros_and_ones
from benchmarks.peers.suites import EKFAC, INPUTS, KFAC, REDUCE, SEPARATE, SEPARATE_REDUCE, each

KRONECKER = (*each(KFAC, REDUCE, EKFAC, SEPARATE, SEPARATE_REDUCE), ("fisher", INPUTS))

CrossEntropy, MSE, Binary = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
BY_TERM = {"unit": "term"}


def two_layers(inputs: int, hidden: int, outputs: int, between: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), between(), nn.Linear(hidden, outputs))


class ByName(nn.Module):
    """A network whose input is under the key ``x``."""

    def __init__(self, outputs: int, between: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.net = two_layers(10, 5, outputs, between)

    def forward(self, data: Any) -> Tensor:
        return self.net(data["x"])


def two_batches(inputs: Callable[[int], Any], targets: Callable[[int], Tensor], *sizes: int) -> Callable[[], Any]:
    return lambda: [(inputs(size), targets(size)) for size in sizes]


def named(size: int) -> Any:
    return UserDict({"x": rand(size, 10)}) if size == 3 else {"x": rand(size, 10)}


def pixels(outputs: int, *, last: bool, flat: bool) -> nn.Module:
    """A network that goes down, up and out again; ``last``: its channels are the last dimension."""
    dims = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    layers = [
        nn.Conv2d(3, 2, 3, padding=1, stride=2),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(2, outputs, 3, padding=1),
        Composed(lambda x: x.permute(dims)),
    ]
    return nn.Sequential(*layers, nn.Flatten()) if flat else nn.Sequential(*layers)


def on_positions(layers: int) -> nn.Module:
    return nn.Sequential(*([nn.Linear(5, 3)] if layers == 1 else [nn.Linear(5, 4), nn.Linear(4, 3)]))


def shuffled(loader: Callable[[TensorDataset], DataLoader]) -> Callable[[], Any]:
    return lambda: loader(TensorDataset(rand(12, 10), classes(12, number=2)))


def normed() -> nn.Module:
    norm = nn.BatchNorm1d(5)
    norm.weight.data, norm.bias.data = rand_like(norm.weight.data), rand_like(norm.bias.data)
    return nn.Sequential(nn.Linear(10, 5), norm, nn.ReLU(), nn.Linear(5, 2))


def cases() -> Iterator[Case]:
    """Yield the cases."""
    yield from _cases()
    for case in _cases():
        if case.name in ("cross entropy, mean", "squared error, positions, mean", "convolutions"):
            for part in ("weight", "bias"):
                yield replace(case, name=f"{case.name}, {part} only", params=(f"*{part}",))
    yield from _cases_of_kfac()
    yield from _not_deterministic()


def _cases() -> Iterator[Case]:
    labels, targets = (lambda n: classes(n, number=3)), (lambda n: rand(n, 3))
    for reduction in ("mean", "sum"):
        how = {"reduction": reduction}
        ce, mse, bce = partial(CrossEntropy, **how), partial(MSE, **how), partial(Binary, **how)
        term = BY_TERM if reduction == "sum" else {}
        wide = partial(two_layers, 10, 5)
        yield Case(
            f"cross entropy, {reduction}", partial(wide, 3), ce, two_batches(lambda n: rand(n, 10), labels, 3, 4)
        )
        for outputs in (1, 2) if reduction == "mean" else (2,):
            data = two_batches(lambda n: rand(n, 10), lambda n, c=outputs: zeros_and_ones(n, c), 3, 4)
            yield Case(f"binary cross entropy, {outputs} outputs, {reduction}", partial(wide, outputs), bce, data)
        data = two_batches(lambda n: rand(n, 8), targets, 2, 6)
        yield Case(f"squared error, {reduction}", partial(two_layers, 8, 5, 3), mse, data)
        yield Case(
            f"cross entropy, positions, {reduction}",
            lambda: nn.Sequential(*two_layers(10, 5, 3), Composed(lambda x: x.transpose(1, 2))),
            ce,
            two_batches(lambda n: rand(n, 5, 10), lambda n: classes(n, 5, number=3), 3, 4),
            options=term,
        )
        yield Case(
            f"binary cross entropy, positions, {reduction}",
            partial(wide, 2),
            bce,
            two_batches(lambda n: rand(n, 5, 10), lambda n: zeros_and_ones(n, 5, 2), 3, 4),
            options=term,
        )
        yield Case(
            f"squared error, positions, {reduction}",
            partial(two_layers, 8, 5, 3),
            mse,
            two_batches(lambda n: rand(n, 5, 8), lambda n: rand(n, 5, 3), 2, 6),
            options=term,
        )
    for name, loss, outputs, y in (
        ("cross entropy", CrossEntropy, 2, lambda n: classes(n, number=2)),
        ("binary cross entropy", Binary, 1, lambda n: zeros_and_ones(n, 1)),
        ("squared error", MSE, 2, lambda n: rand(n, 2)),
    ):
        yield Case(f"{name}, inputs by name", partial(ByName, outputs), loss, two_batches(named, y, 3, 4))
    yield Case(
        "convolutions",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * 4 * 4, 10)),
        ),
        CrossEntropy,
        two_batches(lambda n: rand(n, 1, 28, 28), lambda n: classes(n, number=10), 5, 5),
    )


def _cases_of_kfac() -> Iterator[Case]:
    for reduction in ("mean", "sum"):
        mse, term = partial(MSE, reduction=reduction), BY_TERM if reduction == "sum" else {}
        for name, model, inputs, outputs, sizes in (
            ("one output", lambda: nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1)), 6, 1, (2, 5)),
            ("three outputs", lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), 5, 3, (1, 7)),
            ("one layer, one output", lambda: nn.Linear(6, 1), 6, 1, (5, 5)),
            ("one layer, three outputs", lambda: nn.Linear(5, 3), 5, 3, (7, 7)),
        ):
            data = two_batches(lambda n, d=inputs: rand(n, d), lambda n, c=outputs: rand(n, c), *sizes)
            yield Case(f"linear, {name}, {reduction}", model, mse, data, exact=(KFAC, REDUCE))
        yield Case(
            f"linear, inputs by name, {reduction}",
            partial(ByName, 3, nn.Identity),
            mse,
            two_batches(lambda n: {"x": rand(n, 10)}, lambda n: rand(n, 3), 1, 7),
            exact=(KFAC, REDUCE),
        )
        for layers in (1, 2):
            net = partial(on_positions, layers)
            tokens = lambda n: rand(n, 4, 3, 5)  # noqa: E731
            yield Case(
                f"linear on positions, {layers} layers, expand, {reduction}",
                net,
                mse,
                two_batches(tokens, lambda n: rand(n, 4, 3, 3), 2, 7),
                options=term,
                exact=(KFAC,),
            )
            yield Case(
                f"linear on positions, {layers} layers, reduce, {reduction}",
                lambda net=net: nn.Sequential(net(), Composed(lambda x: x.mean(dim=(1, 2)))),
                mse,
                two_batches(tokens, lambda n: rand(n, 3), 1, 7),
                exact=(REDUCE,),
            )
        for name, after, shape in (
            ("expand", Composed(lambda x: x.permute(0, 2, 3, 1)), (5, 5, 2)),
            ("reduce", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2,)),
        ):
            yield Case(
                f"one convolution, {name}, {reduction}",
                lambda after=after: nn.Sequential(nn.Conv2d(3, 2, 4, padding=2), after),
                mse,
                two_batches(lambda n: rand(n, 3, 4, 4), lambda n, shape=shape: rand(n, *shape), 2, 7),
                options=term if name == "expand" else {},
                exact=(KFAC,) if name == "expand" else (REDUCE,),
            )
        for name, loss, y, outputs in (
            ("cross entropy", CrossEntropy, lambda n: classes(n, number=3), 3),
            ("binary cross entropy", Binary, lambda n: zeros_and_ones(n, 2), 2),
        ):
            yield Case(
                f"linear, one sample, {name}, {reduction}",
                lambda c=outputs: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, c)),
                partial(loss, reduction=reduction),
                two_batches(lambda n: rand(n, 5), y, 1),
                exact=(KFAC, REDUCE),
            )
    images = lambda n: rand(n, 3, 4, 4)  # noqa: E731
    for flat in (False, True):
        shape = (48,) if flat else (4, 4, 3)
        for name, loss, make in (("squared error", MSE, rand), ("binary cross entropy", Binary, zeros_and_ones)):
            yield Case(
                f"U-Net, {name}{', flat' * flat}",
                partial(pixels, 3, last=True, flat=flat),
                loss,
                two_batches(images, lambda n, shape=shape, make=make: make(n, *shape), 2),
            )
    data = two_batches(images, lambda n: classes(n, 4, 4, number=3), 2)
    yield Case("U-Net, cross entropy", partial(pixels, 3, last=False, flat=False), CrossEntropy, data)
    yield Case(
        "U-Net, cross entropy, flat",
        partial(pixels, 3, last=False, flat=False),
        CrossEntropy,
        data,
        rewritten="the peer's network returns (N H W, C), rows that are no samples: here (N, C, H, W)",
    )


def _not_deterministic() -> Iterator[Case]:
    yield Case(
        "dropout",
        lambda: nn.Sequential(nn.Linear(10, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2)),
        CrossEntropy,
        shuffled(lambda data: DataLoader(data, batch_size=3)),
        refused_by_peer=True,
    )
    yield Case(
        "batch norm",
        normed,
        CrossEntropy,
        shuffled(lambda data: DataLoader(data, batch_size=3, shuffle=True)),
        refused_by_peer=True,
    )
    yield Case(
        "dropped samples",
        partial(two_layers, 10, 5, 2),
        CrossEntropy,
        shuffled(lambda data: DataLoader(data, batch_size=5, shuffle=True, drop_last=True)),
        refused_by_peer=True,
    )
