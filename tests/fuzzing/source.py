"""A cell as source code: the network, the data, and the call."""

from collections.abc import Iterable
from math import prod
from textwrap import indent

from .cells import Cell
from .draft import Draft

_IMPORTS = """\
import types

import torch
import torch.utils.checkpoint
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

from curvlab import Problem, diagonality, estimate
from curvlab.losses import LOSSES, Loss
"""
_THROUGH = '''\
class Through(torch.autograd.Function):
    """Rounds; its derivative is that of the identity."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, slope):
        return slope
'''
_GROWING = '''\
class Growing:
    """Another number of batches at every pass."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches * self.passes)
'''
_POISSON = '''\
class Poisson(Loss):
    """A likelihood that curvlab does not know."""

    name = "poisson"

    def values(self, outputs, targets):
        return (outputs.exp() - targets * outputs).sum(dim=1)

    def check(self, outputs, targets):
        pass

    def gradients(self, outputs, targets):
        return outputs.exp() - targets

    def num_factors(self, num_outputs):
        return num_outputs

    def factor_scales(self, outputs):
        return outputs.exp().sqrt()

    def some_factors(self, scales, part):
        return torch.diag_embed(scales)[:, part.start : part.stop]

    def fisher_product(self, outputs, vectors):
        return outputs.exp() * vectors

    def sample(self, outputs, count, rng):
        rates = outputs.detach().exp().unsqueeze(1).repeat(1, count, 1)
        return torch.from_numpy(rng.poisson(rates.numpy())).to(outputs)


LOSSES["poisson"] = Poisson()
'''


_TARGETS = {
    "cross_entropy": "torch.randint({classes}, (count,))",
    "squared_error": "torch.randn(count, {classes})",
    "binary_cross_entropy": "torch.randint(2, (count, {classes})).float()",
    "poisson": "torch.randint(4, (count, {classes})).float()",
}


def source(cell: Cell) -> str:
    """Return a module with ``make()``, ``samples()``, ``data()`` and ``ask(model, given)``."""
    return "\n\n".join([_IMPORTS, *_helpers(cell), _network(cell), _making(cell), _data(cell), _question(cell)])


def _helpers(cell: Cell) -> list[str]:
    written = {"Through": _THROUGH, "Growing": _GROWING, "poisson": _POISSON}
    where = " ".join([*cell.draft().forward, cell.data, cell.loss])
    return [text for name, text in written.items() if name in where]


def _block(lines: Iterable[str], depth: int) -> str:
    return indent("\n".join(lines), depth * " ")


def _network(cell: Cell) -> str:
    draft = cell.draft()
    init, forward = ["super().__init__()", *draft.init], list(draft.forward)
    if draft.shape != (cell.classes,):  # an average over positions, and a layer
        init.append(f"self.head = nn.Linear({_features(draft)}, {cell.classes})")
        forward += ["x = x.to(self.head.weight.dtype)"] if draft.whole else []
        forward += ["x = x.flatten(2).mean(2)" if len(draft.shape) > 2 else "x = x.flatten(1)", "x = self.head(x)"]
    return f"""\
class Net(nn.Module):
    def __init__(self):
{_block(init, 8)}

    def forward(self, x):
{_block(forward, 8)}
        return x
"""


def _features(draft: Draft) -> int:
    return draft.shape[0] if len(draft.shape) > 2 else prod(draft.shape)


def _making(cell: Cell) -> str:
    draft, sizes = cell.draft(), ", ".join(map(str, cell.shape))
    drawn = f"torch.randint(5, (count, {sizes}))" if cell.whole else f"torch.randn(count, {sizes})"
    after = list(draft.after)
    first = [after.pop(0)] if any("Lazy" in line for line in draft.init) else []  # it has no parameters before
    lines = [
        f"torch.manual_seed({cell.seed % 2**31})",
        f"torch.set_default_dtype(torch.{'float64' if cell.dtype == 'float64' else 'float32'})",
        "model = Net().eval()",
        *first,
        "with torch.no_grad():  # no parameter shall be zero or one",
        "    for p in model.parameters():",
        "        p += 0.2 * torch.randn_like(p)",
        *after,
        "torch.set_default_dtype(torch.float32)",
        f"return model.to(torch.{cell.dtype})",
    ]
    return f"""\
def inputs(count):
    return {drawn}


def make():
{_block(lines, 4)}
"""


def _data(cell: Cell) -> str:
    lines = [
        f"torch.manual_seed({(cell.seed + 1) % 2**31})",
        f"count = {cell.count}",
        "x = inputs(count)" + ("" if cell.whole else f".to(torch.{cell.dtype})"),
        "y = " + _TARGETS[cell.loss].format(classes=cell.classes),
        *([] if cell.loss == "cross_entropy" else [f"y = y.to(torch.{cell.dtype})"]),
        *([f"x, y = torch.cat([x] * {cell.repeats}), torch.cat([y] * {cell.repeats})"] if cell.repeats > 1 else []),
        "return x, y",
    ]
    return f"""\
def samples():
{_block(lines, 4)}


def data():
    x, y = samples()
    return {cell.data}
"""


def _question(cell: Cell) -> str:
    problem = f"Problem(model, {cell.loss!r}, given)"
    if cell.structure == "diagonality":
        lines = [f"return diagonality({problem}, {cell.quantity!r})"]
    else:
        options = {"backend": cell.backend, "params": cell.params, "batch_size": cell.batch_size}
        given = "".join(f", {key}={value!r}" for key, value in options.items() if value not in (None, "auto"))
        lines = [f"return estimate({problem}, {cell.quantity!r}, {cell.structure!r}{given})"]
    if cell.around:
        lines = [f"with {cell.around}:", *(f"    {line}" for line in lines)]
    return "def ask(model, given):\n" + _block(lines, 4) + "\n"
