"""Which backend computes what, for which modules? Tables from the registry and from trial runs."""

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


# Combinations in the registry ----------------------------------------------------------------------------------------


def list_combinations() -> list[Record]:
    """Return the support matrix: one record per quantity and structure, with ``yes`` or a dash for each backend."""
    return [
        {"quantity": quantity, "structure": structure}
        | {name: _YES if structure in b.structures.get(kind, ()) else _NO for name, b in BACKENDS.items()}
        for quantity, kind in QUANTITIES.items()
        for structure in STRUCTURES
        if any(structure in b.structures.get(kind, ()) for b in BACKENDS.values())
    ]


# Supported modules --------------------------------------------------------------------------------------------------


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
#: Sample shape -> module placed before the tested one, so that gradients must pass through the tested module.
_BEFORE: dict[tuple[int, ...], Callable[[], nn.Module]] = {
    _VECTOR: lambda: nn.Linear(4, 4),
    _TOKENS: lambda: nn.Linear(4, 4),
    _SIGNAL: lambda: nn.Conv1d(2, 2, 1),
    _IMAGE: lambda: nn.Conv2d(2, 2, 1),
    _VOLUME: lambda: nn.Conv3d(2, 2, 1),
}

#: Name, constructor and sample shape of each module.
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


def make_network(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Problem:
    """Return a small network with a module between two layers, on a few samples of the given shape."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        before = [_BEFORE[shape]()] if shape in _BEFORE else []
        x = torch.randn(_SAMPLES, *shape) if before else torch.randint(5, (_SAMPLES, *shape))
        model = nn.Sequential(*before, make(), nn.Flatten()).eval()
        with torch.no_grad():
            width = model(x).shape[1]
        model.append(nn.Linear(width, _CLASSES))
    return Problem(model, "cross_entropy", (x, torch.arange(_SAMPLES) % _CLASSES))


def list_modules(structure: str) -> list[Record]:
    """Try every module, and return one record per module with the result of each backend.

    For a Kronecker structure, only the layers that have factors are tried; the module itself may not be among them.

    Args:
        structure: ``diag`` or ``kfac``.
    """
    quantities = ("fisher", "empirical_fisher")
    backends = [b.name for b in BACKENDS.values() if any(structure in names for names in b.structures.values())]
    records = []
    with warnings.catch_warnings(), progress(f"modules, {structure}", total=len(MODULES)) as advance:
        warnings.simplefilter("ignore")  # torch warns about speed, which does not matter for four samples
        for module, make, shape in MODULES:
            problem = make_network(make, shape)
            params = None
            if structure == "kfac":
                layers = kronecker_layers(problem, problem.space)[0].values()
                params = list(dict.fromkeys(name for layer in layers for name in layer.parameters))
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


# Output --------------------------------------------------------------------------------------------------------------

_TITLES = {
    "combinations": "Quantity and structure",
    "diag": "Diagonal: supported modules",
    "kfac": "K-FAC: supported modules",
}


def make_tables() -> dict[str, list[Record]]:
    """Return the three tables by name: ``combinations``, and the modules of ``diag`` and ``kfac``."""
    return {"combinations": list_combinations(), "diag": list_modules("diag"), "kfac": list_modules("kfac")}


def make_page() -> str:
    """Return the page of the documentation."""
    tables = make_tables()
    text = {name: to_markdown(records, _columns(records)) for name, records in tables.items()}
    return f"""# Supported combinations

This page is generated by `python -m curvlab.analyze estimators --format markdown`, from the registry and from trial
runs; a test checks that it is up to date. For your own model, use [`curvlab.doctor`](../how-to/doctor.md). A dash means
that the backend raises `UnsupportedError`. `backend="auto"` takes the first backend from the left that supports the
combination; for `implicit` it takes `torch`.

## {_TITLES["combinations"]}

{text["combinations"]}
The table holds for cross-entropy, squared error and binary cross-entropy, unless an error message says otherwise.
`hessian` and `masq` have no Kronecker factors.

## {_TITLES["diag"]}

Whether a backend supports networks that contain a module: `yes` means the exact and the empirical Fisher; a name means
only that quantity.

{text["diag"]}
## {_TITLES["kfac"]}

Linear layers, convolutions, embeddings and the projections of attention have Kronecker factors. The table
shows whether a network that contains the module gets K-FAC for such layers; the parameters without factors are
left out (`params=`), while by default they get their diagonal.

{text["kfac"]}"""


def _columns(records: Sequence[Record]) -> list[Column]:
    return [Column(key, key) for key in records[0]]


def run(config: EstimatorsConfig, options: RunOptions, console: Console) -> None:
    """Print the tables; with ``--out``, also write the page into that folder.

    Raises:
        CurvlabError: The folder is not writable.
    """
    directory = None if options.out is None else open_run(options.out, "estimators", config.to_yaml())
    try:
        if config.format == "markdown":
            print(make_page(), end="")
        else:
            for name, records in make_tables().items():
                console.print(render(records, _columns(records), _TITLES[name]), crop=False)
        if directory is not None:
            directory.write_text("support.md", make_page())
    except BaseException:
        if directory is not None:
            directory.discard_if_empty()
        raise


ANALYSIS = Tool(
    config=EstimatorsConfig,
    question="Which backend computes what, for which modules? Prints the combinations in the registry, and the modules "
    "that each backend supports, found by trying small networks. It saves the page only with --out.",
    presets={"default": Preset(EstimatorsConfig(), minutes=0.2)},
    run=run,
)
