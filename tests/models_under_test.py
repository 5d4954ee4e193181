"""A small zoo: one model for each way in which a network's curvature is easily got wrong, in float64."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.models import BasicBlock
from curvlab.problem import Problem

N, CLASSES = 7, 3


@dataclass(frozen=True)
class Case:
    """A model with data, and the names of the Linear layers with rank-one rows and of all with Kronecker factors."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: str
    linear: frozenset[str] = frozenset()
    kronecker: frozenset[str] = frozenset()

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


class Residual(nn.Module):
    """Residual adds, one of them in place, and functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.first(x))
        x = x + F.silu(self.second(F.leaky_relu(x)))
        x += F.softplus(self.third(F.relu(x)))
        return self.out(torch.tanh(x))


class Block(nn.Module):
    """A transformer block: attention and a network a token, each behind a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(3), nn.MultiheadAttention(3, 1, batch_first=True)
        self.norm2, self.up, self.down = nn.LayerNorm(3), nn.Linear(3, 4), nn.Linear(4, 3)
        self.out = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 6, 3)
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(x.mean(dim=1))


class Hyper(nn.Module):
    """A layer that makes a weight for all samples from a constant: its outputs are no sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.out = nn.Linear(2, 16), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(torch.ones(len(x), 2, dtype=x.dtype)).mean(dim=0).view(4, 4)
        return self.out((x @ weight).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def image(shape: tuple[int, ...], *layers: nn.Module) -> nn.Module:
    """The layers on images of that shape, in eval mode, batch normalisations with statistics of their own."""
    model = nn.Sequential(nn.Unflatten(1, shape), *layers).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, CLASSES)]


def conv1d() -> nn.Module:
    conv = nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2)
    return image((2, 9), conv, nn.GELU(), nn.AdaptiveAvgPool1d(2), *head(6))


def same_padding() -> nn.Module:
    layers = [nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(2, 1)), nn.LeakyReLU(), nn.MaxPool2d(2)]
    return image((2, 3, 3), *layers, *head(3))


def circular_padding() -> nn.Module:
    circular = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    reflected = nn.Conv2d(3, 2, 2, padding=1, padding_mode="reflect", bias=False)
    return image((2, 3, 3), circular, nn.SiLU(), reflected, nn.AvgPool2d(2), *head(8))


def conv3d() -> nn.Module:
    conv = nn.Conv3d(1, 2, 2, padding=(1, 0, 0), stride=(2, 1, 1))
    return image((1, 2, 3, 3), conv, nn.Softplus(), nn.MaxPool3d((2, 1, 1)), *head(8))


def transposed() -> nn.Module:
    return image((2, 3, 3), nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Tanh(), nn.AvgPool2d(3), *head(8))


def batch_norm() -> nn.Module:
    layers = [nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return image((2, 3, 3), *layers, nn.Flatten(), nn.Dropout(), nn.BatchNorm1d(3), nn.Linear(3, CLASSES))


def norms() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Flatten(), nn.LayerNorm(16)]
    return image((2, 3, 3), *layers, nn.Linear(16, CLASSES))


def resnet20() -> nn.Module:
    """The depth and the shortcuts of ResNet-20, very narrow, on small images."""
    widths = [1] * 7 + [3] * 3
    blocks = [BasicBlock(widths[i], widths[i + 1], 2 if i in (3, 6) else 1) for i in range(9)]
    first = [nn.Conv2d(3, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.ReLU()]
    model = image((3, 4, 4), *first, *blocks, nn.AdaptiveAvgPool2d(1), *head(3))
    for name, parameter in model.named_parameters():
        if "bn" in name:  # no channel shall be dead
            nn.init.uniform_(parameter, 0.5, 1.0)
    return model


def encoder() -> nn.Module:
    return image((6, 3), nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True), *head(18))


def convolutional() -> nn.Module:
    return image(
        (2, 3, 3),
        nn.Conv2d(2, 4, 2, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        *head(4),
    )


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    model.append(nn.Linear(4, CLASSES, bias=False))
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


_FLOAT, _IMAGE, _PICTURE = 4, 18, 48  # features of an input
_TOKENS = 0  # two words of five
_BLOCKS = {f"{4 + block}.{conv}" for block in range(9) for conv in ("conv1", "conv2")}

# How it is made, its inputs, its loss, its rank-one Linear layers, and what else has Kronecker factors.
_ZOO: dict[str, tuple[Callable[[], nn.Module], int, str, set[str], set[str]]] = {
    "mlp": (mlp, _FLOAT, "cross_entropy", {"0", "2"}, set()),
    "mlp squared error": (mlp, _FLOAT, "squared_error", {"0", "2"}, set()),
    "mlp binary": (mlp, _FLOAT, "binary_cross_entropy", {"0", "2"}, set()),
    "one layer": (lambda: nn.Linear(4, CLASSES), _FLOAT, "cross_entropy", {""}, set()),
    "convolutions, eval batch norm, in-place relu": (convolutional, _IMAGE, "cross_entropy", {"6"}, set()),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, CLASSES)),
        _TOKENS,
        "cross_entropy",
        {"2"},
        set(),
    ),
    "tied": (Tied, _FLOAT, "cross_entropy", {"out"}, set()),
    "frozen": (frozen, _FLOAT, "cross_entropy", {"0", "2", "4"}, set()),
    "raw parameters": (Raw, _FLOAT, "squared_error", set(), set()),
    "module used twice": (Twice, _FLOAT, "cross_entropy", {"out"}, {"shared"}),
    "also functional": (AlsoFunctional, _FLOAT, "squared_error", {"out"}, set()),
    "lstm": (Recurrent, _FLOAT, "cross_entropy", {"out"}, set()),
    "attention": (Attention, _FLOAT, "cross_entropy", {"out"}, set()),
    "tokens": (Tokens, _FLOAT, "cross_entropy", {"out"}, {"spread"}),
    "linear subclass": (lambda: nn.Sequential(Doubling(4, CLASSES)), _FLOAT, "cross_entropy", set(), set()),
    "keyword argument": (Keyword, _FLOAT, "cross_entropy", {"fc"}, set()),
    "input changed in place": (Shifting, _FLOAT, "cross_entropy", {"fc"}, set()),
    "residual": (Residual, _FLOAT, "squared_error", {"first", "second", "third", "out"}, set()),
    "hypernetwork": (Hyper, _FLOAT, "cross_entropy", {"out"}, set()),
    "conv1d, stride, dilation": (conv1d, _IMAGE, "cross_entropy", {"5"}, {"1"}),
    "same padding": (same_padding, _IMAGE, "binary_cross_entropy", {"5"}, {"1"}),
    "circular padding": (circular_padding, _IMAGE, "squared_error", {"6"}, {"1", "3"}),
    "conv3d": (conv3d, _IMAGE, "cross_entropy", {"5"}, {"1"}),
    "transposed convolution": (transposed, _IMAGE, "cross_entropy", {"5"}, set()),
    "batch norm": (batch_norm, _IMAGE, "cross_entropy", {"8"}, {"1"}),
    "group norm, layer norm": (norms, _IMAGE, "binary_cross_entropy", {"6"}, {"1"}),
    "transformer block": (Block, _IMAGE, "cross_entropy", {"out"}, {"up", "down"}),
    "transformer encoder layer": (encoder, _IMAGE, "squared_error", {"3"}, {"1.linear1", "1.linear2"}),
    "resnet-20": (resnet20, _PICTURE, "cross_entropy", {"15"}, {"1", *_BLOCKS}),
}
ZOO = tuple(_ZOO)


def case(name: str, seed: int = 0, loss: str | None = None) -> Case:
    """Return a member of the zoo, drawn from a seed, with its own loss or another."""
    make, features, own_loss, linear, more = _ZOO[name]
    loss = loss or own_loss
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        inputs = torch.randn(N, features, dtype=torch.float64) if features else torch.randint(5, (N, 2))
        if loss == "cross_entropy":
            targets = torch.randint(CLASSES, (N,))
        elif loss == "squared_error":
            targets = torch.randn(N, CLASSES, dtype=torch.float64)
        else:
            targets = torch.randint(2, (N, CLASSES)).double()
    trainable = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    return Case(model, inputs, targets, loss, frozenset(linear), frozenset((linear | more) & trainable))
