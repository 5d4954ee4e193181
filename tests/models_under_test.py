"""A small zoo: one model for each way in which a network's curvature is easily got wrong, in float64."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.problem import Problem

N, CLASSES = 7, 3


@dataclass(frozen=True)
class Case:
    """A model with data, and the names of the Linear layers whose rows are rank-one."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: str
    linear: frozenset[str]

    @property
    def problem(self) -> Problem:
        return Problem(self.model, self.loss, (self.inputs, self.targets))

    def gradients(self) -> Tensor:
        """Per-sample gradients ``(N, P)`` of the plainest kind: ``backward()`` on a copy, a sample at a time."""
        model = deepcopy(self.model)
        rows = []
        for x, y in zip(self.inputs.clone().split(1), self.targets.split(1), strict=True):
            model.zero_grad()
            plain_loss(self.loss, model(x), y).sum().backward()
            trainable = [p for p in model.parameters() if p.requires_grad]
            rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainable]))
        return torch.stack(rows)


def plain_loss(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The per-sample losses as torch has them."""
    if name == "cross_entropy":
        return F.cross_entropy(outputs, targets, reduction="none")
    if name == "squared_error":
        return F.mse_loss(outputs, targets, reduction="none").sum(dim=1) / 2
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(dim=1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).tanh()).tanh())


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, CLASSES))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).tanh() @ self.matrix


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.shared(self.shared(x).tanh()).tanh())


class AlsoFunctional(nn.Module):
    """A weight that is used beside its layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x).tanh() + F.linear(x.sin(), self.fc.weight))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.view(-1, 2, 2))[0][:, -1])


class Attention(nn.Module):
    """With a causal mask, which holds minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(2, 2, batch_first=True), nn.Linear(4, CLASSES)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, 2, 2)
        attended, _ = self.attention(tokens, tokens, tokens, attn_mask=self.mask, need_weights=False)
        return self.out(attended.flatten(1))


class Tokens(nn.Module):
    """A Linear layer on 3-D input, and one on tokens folded into the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.folded, self.out = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        spread = self.spread(x.view(-1, 2, 2)).tanh()
        return self.out(self.folded(spread.reshape(-1, 3)).tanh().view(-1, 4))


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=x)


class Shifting(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.sub_(1.0))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def convolutional() -> nn.Module:
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3, 3)),
        nn.Conv2d(2, 4, 2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )
    with torch.no_grad():
        model[2].running_mean.uniform_(-0.1, 0.1)
        model[2].running_var.uniform_(0.5, 2.0)
    return model.eval()


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    model.append(nn.Linear(4, CLASSES, bias=False))
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


_FLOAT, _TOKENS, _IMAGE = "float", "tokens", "image"
_ZOO: dict[str, tuple[Callable[[], nn.Module], str, str, set[str]]] = {
    "mlp": (mlp, _FLOAT, "cross_entropy", {"0", "2"}),
    "mlp squared error": (mlp, _FLOAT, "squared_error", {"0", "2"}),
    "mlp binary": (mlp, _FLOAT, "binary_cross_entropy", {"0", "2"}),
    "one layer": (lambda: nn.Linear(4, CLASSES), _FLOAT, "cross_entropy", {""}),
    "convolutions, eval batch norm, in-place relu": (convolutional, _IMAGE, "cross_entropy", {"6"}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, CLASSES)),
        _TOKENS,
        "cross_entropy",
        {"2"},
    ),
    "tied": (Tied, _FLOAT, "cross_entropy", {"out"}),
    "frozen": (frozen, _FLOAT, "cross_entropy", {"0", "2", "4"}),
    "raw parameters": (Raw, _FLOAT, "squared_error", set()),
    "module used twice": (Twice, _FLOAT, "cross_entropy", {"out"}),
    "also functional": (AlsoFunctional, _FLOAT, "squared_error", {"out"}),
    "lstm": (Recurrent, _FLOAT, "cross_entropy", {"out"}),
    "attention": (Attention, _FLOAT, "cross_entropy", {"out"}),
    "tokens": (Tokens, _FLOAT, "cross_entropy", {"out"}),
    "linear subclass": (lambda: nn.Sequential(Doubling(4, CLASSES)), _FLOAT, "cross_entropy", set()),
    "keyword argument": (Keyword, _FLOAT, "cross_entropy", {"fc"}),
    "input changed in place": (Shifting, _FLOAT, "cross_entropy", {"fc"}),
}
ZOO = tuple(_ZOO)


def case(name: str, seed: int = 0) -> Case:
    """Return a member of the zoo, drawn from a seed."""
    make, kind, loss, linear = _ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        inputs = {
            _FLOAT: lambda: torch.randn(N, 4, dtype=torch.float64),
            _IMAGE: lambda: torch.randn(N, 18, dtype=torch.float64),
            _TOKENS: lambda: torch.randint(5, (N, 2)),
        }[kind]()
        if loss == "cross_entropy":
            targets = torch.randint(CLASSES, (N,))
        elif loss == "squared_error":
            targets = torch.randn(N, CLASSES, dtype=torch.float64)
        else:
            targets = torch.randint(2, (N, CLASSES)).double()
    return Case(model, inputs, targets, loss, frozenset(linear))
