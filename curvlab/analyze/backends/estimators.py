"""Which backend computes what, of which modules? Tables that come from the registry and from trying."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from curvlab.analyze.frame.analysis import Preset, Tool
from curvlab.commandline.config import Config
from curvlab.commandline.options import RunOptions
from curvlab.errors import UnsupportedError
from curvlab.estimators import BACKENDS, estimate
from curvlab.estimators.verification import kronecker_layers
from curvlab.problem import Problem
from curvlab.progress import progress
from curvlab.quantities import QUANTITIES
from curvlab.results import Column, open_run, render
from curvlab.results.tables import to_markdown
from curvlab.structures import STRUCTURES

Record = dict[str, Any]

_YES, _NO = "yes", "–"


class EstimatorsConfig(Config):
    """Show what the backends compute."""

    format: Literal["console", "markdown"] = "console"
    """console: tables for a terminal; markdown: the page of the documentation."""


# What the registry has -----------------------------------------------------------------------------------------------


def cells() -> list[Record]:
    """Return the support matrix: a record a quantity and structure, with ``yes`` or a dash for every backend."""
    return [
        {"quantity": quantity, "structure": structure}
        | {name: _YES if structure in b.cells.get(kind, ()) else _NO for name, b in BACKENDS.items()}
        for quantity, kind in QUANTITIES.items()
        for structure in STRUCTURES
        if any(structure in b.cells.get(kind, ()) for b in BACKENDS.values())
    ]


# What the backends take ----------------------------------------------------------------------------------------------


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.fc(x).tanh())
        return out


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


class _Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc(x).tanh()
        return out


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.fc(x))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


_VECTOR, _TOKENS, _SIGNAL, _IMAGE, _VOLUME, _WORDS = (4,), (3, 4), (2, 6), (2, 4, 4), (2, 3, 3, 3), (2,)
#: What stands before a module that takes samples of a shape: only so do gradients have to go through the module.
_BEFORE: dict[tuple[int, ...], Callable[[], nn.Module]] = {
    _VECTOR: lambda: nn.Linear(4, 4),
    _TOKENS: lambda: nn.Linear(4, 4),
    _SIGNAL: lambda: nn.Conv1d(2, 2, 1),
    _IMAGE: lambda: nn.Conv2d(2, 2, 1),
    _VOLUME: lambda: nn.Conv3d(2, 2, 1),
}

#: What it is called; how it is made; the shape of a sample that it takes.
MODULES: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
    ("Linear", lambda: nn.Linear(4, 4), _VECTOR),
    ("Linear on (N, T, d)", lambda: nn.Linear(4, 4), _TOKENS),
    ("Conv1d", lambda: nn.Conv1d(2, 3, 3, padding=1), _SIGNAL),
    ("Conv2d", lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), _IMAGE),
    ("Conv2d, dilation", lambda: nn.Conv2d(2, 3, 2, dilation=2), _IMAGE),
    ("Conv2d, groups", lambda: nn.Conv2d(2, 4, 3, groups=2), _IMAGE),
    ("Conv2d, padding='same'", lambda: nn.Conv2d(2, 3, 3, padding="same"), _IMAGE),
    ("Conv2d, circular padding", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), _IMAGE),
    ("Conv3d", lambda: nn.Conv3d(2, 2, 2), _VOLUME),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(2, 2, 2), _IMAGE),
    ("BatchNorm2d, eval", lambda: nn.BatchNorm2d(2), _IMAGE),
    ("GroupNorm", lambda: nn.GroupNorm(1, 2), _IMAGE),
    ("LayerNorm", lambda: nn.LayerNorm(4), _VECTOR),
    ("Embedding", lambda: nn.Embedding(5, 4), _WORDS),
    ("MultiheadAttention", _Attention, _TOKENS),
    ("LSTM", _Recurrent, _TOKENS),
    ("ReLU", nn.ReLU, _VECTOR),
    ("ReLU in place", lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), _VECTOR),
    ("ReLU, functional", _Functional, _VECTOR),
    ("LeakyReLU", nn.LeakyReLU, _VECTOR),
    ("GELU", nn.GELU, _VECTOR),
    ("SiLU", nn.SiLU, _VECTOR),
    ("Softplus", nn.Softplus, _VECTOR),
    ("Tanh", nn.Tanh, _VECTOR),
    ("MaxPool2d", lambda: nn.MaxPool2d(2), _IMAGE),
    ("AvgPool2d", lambda: nn.AvgPool2d(2), _IMAGE),
    ("AdaptiveAvgPool2d", lambda: nn.AdaptiveAvgPool2d(2), _IMAGE),
    ("residual add", _Residual, _VECTOR),
    ("module used twice", _Twice, _VECTOR),
    ("tied weight", _Tied, _VECTOR),
    ("bare nn.Parameter", _Bare, _VECTOR),
)

_SAMPLES, _CLASSES = 4, 3


def network_with(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Problem:
    """Return a small network with a module between two layers, on a few samples of a shape."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        before = [_BEFORE[shape]()] if shape in _BEFORE else []
        x = torch.randn(_SAMPLES, *shape) if before else torch.randint(5, (_SAMPLES, *shape))
        model = nn.Sequential(*before, make(), nn.Flatten()).eval()
        with torch.no_grad():
            width = model(x).shape[1]
        model.append(nn.Linear(width, _CLASSES))
    return Problem(model, "cross_entropy", (x, torch.arange(_SAMPLES) % _CLASSES))


def modules(structure: str) -> list[Record]:
    """Return which modules a network may hold, by trying: a record a module, with what every backend says.

    For a Kronecker structure it is asked of the layers with factors, which the module is not always.

    Args:
        structure: ``diag`` or ``kfac``.
    """
    quantities = ("fisher", "empirical_fisher")
    backends = [b.name for b in BACKENDS.values() if any(structure in names for names in b.cells.values())]
    records = []
    with warnings.catch_warnings(), progress(f"modules, {structure}", total=len(MODULES)) as advance:
        warnings.simplefilter("ignore")  # of torch's, about the speed of what is tried here on four samples
        for module, make, shape in MODULES:
            problem = network_with(make, shape)
            params = None
            if structure == "kfac":
                params = [p for layer in kronecker_layers(problem, problem.space)[0].values() for p in layer.parameters]
            record: Record = {"module": module}
            for backend in backends:
                able = []
                for quantity in quantities:
                    with suppress(UnsupportedError):
                        estimate(problem, quantity, structure, backend=backend, params=params)
                        able.append(quantity)
                record[backend] = _YES if len(able) == len(quantities) else ", ".join(able) or _NO
            records.append(record)
            advance()
    return records


# How it is shown -----------------------------------------------------------------------------------------------------

_TITLES = {
    "cells": "Quantity and structure",
    "diag": "Diagonal: which modules",
    "kfac": "K-FAC: which modules",
}


def tables() -> dict[str, list[Record]]:
    """Return the three tables by name: ``cells``, and the modules of ``diag`` and ``kfac``."""
    return {"cells": cells(), "diag": modules("diag"), "kfac": modules("kfac")}


def page() -> str:
    """Return the page of the documentation."""
    made = tables()
    text = {name: to_markdown(records, _columns(records)) for name, records in made.items()}
    return f"""# What computes what

Made by `python -m curvlab.analyze estimators --format markdown` from the registry and by trying; a test keeps it true.
For a model of yours, ask [`curvlab.doctor`](../how-to/doctor.md). Where a backend has a dash, it raises
`UnsupportedError`. `backend="auto"` takes the first, from the left, that can; of `implicit` it takes `torch`.

## {_TITLES["cells"]}

{text["cells"]}
For cross-entropy, squared error and binary cross-entropy alike, unless a message says otherwise. `hessian` and `masq`
have no Kronecker factors.

## {_TITLES["diag"]}

Which networks a backend takes that hold a module: `yes` is the exact and the empirical Fisher; a name is that alone.

{text["diag"]}
## {_TITLES["kfac"]}

K-FAC is of Linear and convolution layers, each called once and with a weight of its own. The question here is whether a
network that holds the module gets K-FAC of such layers; parameters without factors are left out
(`params=`) or get their diagonal (`kfac:rest=diag`).

{text["kfac"]}"""


def _columns(records: Sequence[Record]) -> list[Column]:
    return [Column(key, key) for key in records[0]]


def run(config: EstimatorsConfig, options: RunOptions, console: Console) -> None:
    """Print the tables; with a folder for the results, write the page there, too.

    Raises:
        CurvlabError: Nothing can be written into the folder.
    """
    directory = None if options.out is None else open_run(options.out, "estimators", config.to_yaml())
    try:
        if config.format == "markdown":
            print(page(), end="")
        else:
            for name, records in tables().items():
                console.print(render(records, _columns(records), _TITLES[name]), crop=False)
        if directory is not None:
            directory.write_text("support.md", page())
    except BaseException:
        if directory is not None:
            directory.discard_if_empty()
        raise


ANALYSIS = Tool(
    config=EstimatorsConfig,
    question="Which backend computes what, of which modules? Prints tables: what each has, from the registry, and "
    "which modules it takes, by trying small networks. It saves only with --out.",
    presets={"default": Preset(EstimatorsConfig(), minutes=0.2)},
    run=run,
)
