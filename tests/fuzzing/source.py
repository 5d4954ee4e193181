"""Source code of a case: the network, the data and the call."""

from collections.abc import Iterable
from math import prod
from textwrap import indent

from .cases import Case
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
    """Data with a different number of batches in every pass."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches * self.passes)
'''


_TARGETS = {
    "cross_entropy": "torch.randint({classes}, (count,))",
    "squared_error": "torch.randn(count, {classes})",
    "binary_cross_entropy": "torch.randint(2, (count, {classes})).float()",
    "poisson": "torch.randint(4, (count, {classes})).float()",
}


def source(case: Case) -> str:
    """Return a module with ``make()``, ``samples()``, ``data()`` and ``ask(model, given)``."""
    return "\n\n".join([_IMPORTS, *_helpers(case), _network(case), _make_function(case), _data(case), _call(case)])


def _helpers(case: Case) -> list[str]:
    written = {"Through": _THROUGH, "Growing": _GROWING}
    where = " ".join([*case.draft().forward, case.data, case.loss])
    return [text for name, text in written.items() if name in where]


def _block(lines: Iterable[str], depth: int) -> str:
    return indent("\n".join(lines), depth * " ")


def _network(case: Case) -> str:
    draft = case.draft()
    init, forward = ["super().__init__()", *draft.init], list(draft.forward)
    if draft.shape != (case.classes,):  # average over positions, then a Linear layer
        init.append(f"self.head = nn.Linear({_features(draft)}, {case.classes})")
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


def _make_function(case: Case) -> str:
    draft, sizes = case.draft(), ", ".join(map(str, case.shape))
    drawn = f"torch.randint(5, (count, {sizes}))" if case.whole else f"torch.randn(count, {sizes})"
    after = list(draft.after)
    first = (
        [after.pop(0)] if any("Lazy" in line for line in draft.init) else []
    )  # a lazy layer has no parameters before
    lines = [
        f"torch.manual_seed({case.seed % 2**31})",
        f"torch.set_default_dtype(torch.{'float64' if case.dtype == 'float64' else 'float32'})",
        "model = Net().eval()",
        *first,
        "with torch.no_grad():  # no parameter should be exactly zero or one",
        "    for p in model.parameters():",
        "        p += 0.2 * torch.randn_like(p)",
        *after,
        "torch.set_default_dtype(torch.float32)",
        f"return model.to(torch.{case.dtype})",
    ]
    return f"""\
def inputs(count):
    return {drawn}


def make():
{_block(lines, 4)}
"""


def _data(case: Case) -> str:
    lines = [
        f"torch.manual_seed({(case.seed + 1) % 2**31})",
        f"count = {case.count}",
        "x = inputs(count)" + ("" if case.whole else f".to(torch.{case.dtype})"),
        "y = " + _TARGETS[case.loss].format(classes=case.classes),
        *([] if case.loss == "cross_entropy" else [f"y = y.to(torch.{case.dtype})"]),
        *([f"x, y = torch.cat([x] * {case.repeats}), torch.cat([y] * {case.repeats})"] if case.repeats > 1 else []),
        "return x, y",
    ]
    return f"""\
def samples():
{_block(lines, 4)}


def data():
    x, y = samples()
    return {case.data}
"""


def _call(case: Case) -> str:
    problem = f"Problem(model, {case.loss!r}, given)"
    if case.structure == "diagonality":
        lines = [f"return diagonality({problem}, {case.quantity!r})"]
    else:
        options = {"backend": case.backend, "params": case.params, "batch_size": case.batch_size}
        given = "".join(f", {key}={value!r}" for key, value in options.items() if value not in (None, "auto"))
        lines = [f"return estimate({problem}, {case.quantity!r}, {case.structure!r}{given})"]
    if case.around:
        lines = [f"with {case.around}:", *(f"    {line}" for line in lines)]
    return "def ask(model, given):\n" + _block(lines, 4) + "\n"
