"""The networks of Laplace's tests: two outputs on ten samples, several dimensions, and ResNets.

Its losses are sums over samples. Of the ResNet the last layer and one convolution are selected, as in its tests of a
part of the parameters; a WideResNet-50 is only made there, never fitted.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn, randn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.cases import Case, classes
from benchmarks.peers.suites import KFAC, SEPARATE, each

KRONECKER = each(KFAC, SEPARATE)

CrossEntropy, MSE = partial(nn.CrossEntropyLoss, reduction="sum"), partial(nn.MSELoss, reduction="sum")


def small(between: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 20), between(), nn.Linear(20, 2))


def middle() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 2))
    return nn.Sequential(*layers)


def large() -> nn.Module:
    return import_module("torchvision.models").resnet18(num_classes=2).eval()


def loader(*shape: int, regression: bool, number: int = 10, size: int = 3) -> Callable[[], Any]:
    def make() -> DataLoader:
        targets = randn(number, 2) if regression else classes(number, number=2)
        return DataLoader(TensorDataset(randn(number, *shape), targets), batch_size=size)

    return make


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for regression in (False, True):
        loss, kind = (MSE, "regression") if regression else (CrossEntropy, "classification")
        data = partial(loader, regression=regression)
        yield Case(f"small, {kind}", small, loss, data(3))
        yield Case(f"small, {kind}, tanh", partial(small, nn.Tanh), loss, data(3))
        yield Case(f"small, {kind}, one sample", partial(small, nn.Tanh), loss, data(3, number=1), exact=(KFAC,))
        yield Case(f"small, {kind}, the last layer", small, loss, data(3), params=("2.*",))
        yield Case(f"small, {kind}, weights", small, loss, data(3), params=("*weight",))
        yield Case(f"several dimensions, {kind}", middle, loss, data(3, 4, 4))
        large_data = data(3, 16, 16, number=2, size=1)
        yield Case(f"large, {kind}", large, loss, large_data, params=("fc.*", "layer1.0.conv1.*"))
