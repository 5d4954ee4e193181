"""The tasks of NNGeometry (``tests/tasks.py``), on random images and on 12 samples in place of 70.

Its loss is given by its metrics: ``classif_logits`` is the cross entropy; here with as many classes as outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn, rand
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.cases import Case, Composed, classes
from benchmarks.peers.suites import EKFAC, KFAC, SEPARATE, each

KRONECKER = each(KFAC, EKFAC, SEPARATE)


class CosineLinear(nn.Linear):
    """Cosines of the rows of a weight and the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_of_length_one(x, 1), _of_length_one(self.weight, 1))


class WeightNormLinear(nn.Linear):
    """A linear layer whose weight has rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _of_length_one(self.weight, 1))


class WeightNormConv(nn.Conv2d):
    """A convolution whose kernels have length one."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _of_length_one(self.weight, (1, 2, 3)), None)


class Affine(nn.Module):
    """A scale, and perhaps a shift, for each feature."""

    def __init__(self, features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if self.bias is None else x * self.weight + self.bias


def _of_length_one(weight: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return weight / (weight.square().sum(dim=dims, keepdim=True) + 1e-5).sqrt()


LINEAR: dict[str, Callable[[int, int], nn.Module]] = {
    "": nn.Linear,
    "batch norm": partial(nn.Linear, bias=False),
    "weight norm": partial(WeightNormLinear, bias=False),
    "cosine": partial(CosineLinear, bias=False),
    "affine": partial(nn.Linear, bias=False),
    "a subclass of Linear": nn.modules.linear.NonDynamicallyQuantizableLinear,
}


def fully_connected(kind: str = "", outputs: int = 3) -> nn.Module:
    sizes = (144, 10, 10, outputs)
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(3):
        layers.append(LINEAR[kind](sizes[i], sizes[i + 1]))
        if kind == "batch norm":
            layers.append(nn.BatchNorm1d(sizes[i + 1]))
        elif kind == "affine":
            layers.append(Affine(sizes[i + 1], bias=i % 2 == 0))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


def convolutions(kind: str = "", outputs: int = 3) -> nn.Module:
    first = WeightNormConv if kind == "weight norm" else nn.Conv2d
    norm = {"batch norm": nn.BatchNorm2d, "group norm": partial(nn.GroupNorm, 2)}.get(kind, lambda _: nn.Identity())
    head = WeightNormLinear(7, 4, bias=False) if kind == "weight norm" else nn.Linear(7, 4)
    return nn.Sequential(
        *(first(1, 6, 3, 2, bias=not kind), norm(6), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 5, 4, bias=False), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), head),
        *(nn.BatchNorm1d(4) if kind == "batch norm" else nn.Identity(), nn.ReLU(), nn.Linear(4, outputs)),
    )


def two_convolutions(transposed: bool) -> nn.Module:
    if transposed:
        first, second = nn.ConvTranspose2d(1, 6, (3, 2), 2), nn.ConvTranspose2d(6, 3, (2, 3), 3, bias=False)
    else:
        first, second = WeightNormConv(1, 6, 3, 2, bias=False), WeightNormConv(6, 3, 2, 3, bias=False)
    crop, total = Composed(lambda x: x[:, :, 5:-5, 5:-5]), Composed(lambda x: x.sum(dim=(2, 3)))
    return nn.Sequential(crop, first, nn.ReLU(), second, nn.ReLU(), total)


class Branches(nn.Module):
    """Two layers whose outputs are summed to one number each, after a first layer or none."""

    def __init__(self, one: nn.Module, two: nn.Module, first: nn.Module | None = None, sign: float = 1.0) -> None:
        super().__init__()
        self.first, self.one, self.two, self.sign = first, one, two, sign

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first is None else self.first(x)
        return torch.stack([self.one(x).flatten(1).sum(dim=1), self.two(self.sign * x).flatten(1).sum(dim=1)], dim=1)


def flat(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), layer)


class TwoNorms(nn.Module):
    """Normalised images and their transposes as channels, and normalised pixels, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.pixels, self.out = nn.BatchNorm2d(2), nn.BatchNorm1d(144), nn.Linear(3 * 144, 5)

    def forward(self, x: Tensor) -> Tensor:
        two = self.channels(torch.cat([x, x.transpose(2, 3)], dim=1))
        return self.out(torch.cat([two.flatten(1), self.pixels(x.flatten(1))], dim=1))


class Skip(nn.Module):
    """Convolutions with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 2), (2, 2), (2, 2), (2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = self.layers
        before = one(x).relu()
        return four(three(two(before).relu()).relu() + before).relu().sum(dim=(2, 3))


class SelfAttention(nn.Module):
    """Attention with one head and four layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self.query(q) @ self.key(k).mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.out(weights @ self.value(v)), weights


class Vision(nn.Module):
    """A transformer on patches of an image, with a raw parameter for their positions."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 9, 8))
        self.attention, self.head = attention, nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.places
        return self.head((x + self.attention(x, x, x)[0]).mean(dim=1))


def image_norm() -> nn.Module:
    crop, total = Composed(lambda x: x[:, :, 5:-5, 5:-5]), Composed(lambda x: x.sum(dim=(2, 3)))
    return nn.Sequential(crop, nn.Conv2d(1, 3, (3, 2), 2), nn.LayerNorm((3, 8, 9)), total)


def loader(inputs: Callable[[int], Tensor], outputs: int, *terms: int) -> Callable[[], DataLoader]:
    def make() -> DataLoader:
        targets = torch.randint(2, (12, 1)).float() if outputs == 1 else classes(12, *terms, number=outputs)
        return DataLoader(TensorDataset(inputs(12), targets), batch_size=5)

    return make


def cases() -> Iterator[Case]:
    """Yield the cases."""
    small, large, middle = (partial(_images, size) for size in (12, 28, 16))

    def case(
        name: str,
        model: Callable[[], nn.Module],
        inputs: Callable[[int], Tensor],
        outputs: int,
        *terms: int,
        params: tuple[str, ...] | None = None,
        seed: int = 0,
    ) -> Case:
        loss = nn.BCEWithLogitsLoss if outputs == 1 else nn.CrossEntropyLoss
        return Case(name, lambda: model().eval(), loss, loader(inputs, outputs, *terms), params, seed=seed)

    yield case("linear", lambda: Branches(flat(nn.Linear(144, 3)), flat(nn.Linear(144, 7, bias=False))), small, 2)
    yield case("linear convolutions", lambda: Branches(nn.Conv2d(1, 5, 3), nn.Conv2d(1, 3, 2, bias=False)), small, 2)
    for name, norm, first in (
        ("linear", lambda: nn.BatchNorm1d(100), lambda: flat(nn.Linear(144, 100))),
        ("convolution", lambda: nn.BatchNorm2d(5), lambda: nn.Conv2d(1, 5, 3, 3)),
        (
            "1d convolution",
            lambda: nn.BatchNorm1d(5),
            lambda: nn.Sequential(Composed(lambda x: x.flatten(2)), nn.Conv1d(1, 5, 3, 3)),
        ),
    ):
        net = lambda norm=norm, first=first: Branches(norm(), norm(), first(), sign=-1.0)  # noqa: E731
        yield case(f"batch norms after a {name}", net, small, 2, params=("one.*", "two.*"))
    yield case("batch norms before a linear layer", TwoNorms, small, 5)
    for kind in LINEAR:
        yield case(f"fully connected, {kind}".rstrip(", "), partial(fully_connected, kind), small, 3)
    yield case("fully connected, one output", partial(fully_connected, outputs=1), small, 1)
    yield case("fully connected, batch norm, one output", partial(fully_connected, "batch norm", 1), small, 1)
    yield case("fully connected, the last layer", fully_connected, small, 3, params=("5.*",))
    segments = lambda: nn.Sequential(fully_connected(outputs=48), nn.Unflatten(1, (3, 4, 4)))  # noqa: E731
    yield case("segmentation", segments, small, 3, 4, 4)
    for kind in ("", "batch norm", "group norm", "weight norm"):
        yield case(f"convolutions, {kind}".rstrip(", "), partial(convolutions, kind), large, 3)
    for kind in ("", "group norm"):
        yield case(f"convolutions, {kind}, one output".replace(", ,", ","), partial(convolutions, kind, 1), large, 1)
    yield case("two convolutions, weight norm", partial(two_convolutions, False), middle, 3)
    yield case("two convolutions, transposed", partial(two_convolutions, True), middle, 3)
    yield case("skip connection", Skip, small, 3, seed=2)
    conv1d = lambda: nn.Sequential(  # noqa: E731
        *(Composed(lambda x: x.flatten(2)), nn.Conv1d(1, 6, 3, 3), nn.ReLU(), nn.Conv1d(6, 5, 4, 8, bias=False)),
        *(nn.ReLU(), nn.Conv1d(5, 2, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)),
    )
    yield case("1d convolutions", conv1d, large, 4)
    for kind, norm in (
        ("layer norm", nn.LayerNorm),
        ("layer norm without bias", partial(nn.LayerNorm, bias=False)),
        ("RMS norm", nn.RMSNorm),
    ):
        yield case(f"{kind}", lambda norm=norm: nn.Sequential(nn.Flatten(), nn.Linear(144, 3), norm((3,))), small, 3)
    yield case("layer norm of images", image_norm, large, 3)
    total = lambda: Composed(lambda x: x.sum(dim=1))  # noqa: E731
    tokens = lambda n: rand(n, 5, 4)  # noqa: E731
    yield case("linear on positions", lambda: nn.Sequential(nn.Linear(4, 3), total()), tokens, 3)
    yield case("layer norm on positions", lambda: nn.Sequential(nn.LayerNorm(4), total()), tokens, 4)
    indices = lambda n: torch.randint(5, (n, 4))  # noqa: E731
    yield case("embedding", lambda: nn.Sequential(nn.Embedding(10, 3), total()), indices, 3)
    ours = lambda: Vision(SelfAttention(8))  # noqa: E731
    theirs = lambda: Vision(nn.MultiheadAttention(8, 1, bias=False, batch_first=True))  # noqa: E731
    yield case("vision transformer", ours, small, 10, params=("patches.*", "attention.*", "head.*"))
    yield case("vision transformer with MultiheadAttention", theirs, small, 10, params=("patches.*", "head.*"))


def _images(size: int, number: int) -> Tensor:
    return rand(number, 1, size, size)
