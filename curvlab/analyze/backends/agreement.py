"""Do the backends agree? The same curvature of one network from each backend: differences, time and memory."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.functions import OwnProblem
from curvlab.analyze.frame.memory import Peak
from curvlab.analyze.frame.subject import AS_IT_IS, TrainedSubjectConfig
from curvlab.data import Dataset
from curvlab.errors import CurvlabError, type_and_line
from curvlab.estimators import BACKENDS, estimate
from curvlab.matrices import CurvatureMatrix
from curvlab.problem import Problem
from curvlab.quantities import parse_quantity
from curvlab.results import Column, aggregate, format_number, mean_column
from curvlab.structures import parse_structure
from curvlab.text import write_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "torch"

_VECTORS = 8  # number of vectors whose products are compared
_SKETCH = 512  # rows of a sketch of the products; norms have an error of 3 %
_ROWS = 4096  # rows of the products that are sketched at a time
_FEW = 8  # samples of the warm-up call, which is not measured


class AgreementConfig(TrainedSubjectConfig):
    """Train a network, and compute its curvature with every backend."""

    titles: ClassVar[dict[str, str]] = {**TrainedSubjectConfig.titles, "quantities": "curvature"}

    with_function: ClassVar[Mapping[str, Mapping[str, Any]]] = AS_IT_IS

    steps: int = Field(default=500, ge=0)
    """Training steps (mini-batches); 0 analyses the network without training, the default for a network of yours."""
    quantities: tuple[str, ...] = ("fisher", "fisher:samples=1", "empirical_fisher")
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B, ggn or hessian; one or several."""
    structures: tuple[str, ...] = ("diag", "block_diag", "kfac", "ekfac")
    """dense, block_diag, diag, kfac, ekfac, tkfac or implicit, with their options; one or several."""
    backends: tuple[str, ...] = tuple(BACKENDS)
    """Backends to compare."""
    params: tuple[str, ...] | None = None
    """Patterns of parameter names, such as 'fc*.weight'; none means all trainable ones."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0,)
    """One network is trained per seed; the table has the largest difference, and the mean of seconds and memory."""


_COLUMNS = (
    Column("quantity", "quantity"),
    Column("structure", "structure"),
    Column("backend", "backend"),
    mean_column("seconds", "seconds"),
    mean_column("peak_mb", "peak MB"),
    Column("reference_difference", f"difference from {REFERENCE}", lambda value: format_number(value, 2)),
    Column("reference_trace_difference", "difference of trace", lambda value: format_number(value, 2)),
)
_KEYS = ("quantity", "structure", "backend")


def check(config: AgreementConfig, dataset: Dataset | OwnProblem) -> None:
    """Check the configuration, the data and the curvature options.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_subject(config, dataset)
    subject.check_distinct(structures=config.structures, backends=config.backends)
    if unknown := [backend for backend in config.backends if backend not in BACKENDS]:
        raise CurvlabError(f"unknown backend {unknown[0]!r}; backends: {', '.join(BACKENDS)}")
    problem = subject.problem(config, dataset, subject.network(config, dataset, config.seeds[0]))
    subject.check_curvature(problem, config.quantities, config.params)
    for structure in config.structures:
        parse_structure(structure)
    problem.check()


def split(config: AgreementConfig) -> list[AgreementConfig]:
    """Return one run per seed, quantity and backend, so that memory is measured in a separate process."""
    return [
        config.model_copy(update={"quantities": (quantity,), "backends": (backend,), "seeds": (seed,)})
        for seed in config.seeds
        for quantity in config.quantities
        for backend in config.backends
    ]


def measure(config: AgreementConfig, dataset: Dataset | OwnProblem, workspace: Workspace) -> Iterator[Record]:
    """Train the network, and yield one record per quantity, backend and structure; save the sketches."""
    (seed,) = config.seeds
    model, _ = subject.train_network(config, dataset, seed, workspace.folder / "checkpoint.pt")
    problem = subject.problem(config, dataset, model)
    sketches = []
    for quantity in map(str, map(parse_quantity, config.quantities)):
        for backend in config.backends:
            for structure in map(str, map(parse_structure, config.structures)):
                names = {"quantity": quantity, "structure": structure, "backend": backend, "seed": seed}
                found, sketch = _compute(problem, quantity, structure, backend, config.params)
                yield names | found
                sketches.append({**names, "sketch": sketch})
    workspace.save("sketches", sketches)


def _compute(
    problem: Problem, quantity: str, structure: str, backend: str, params: Sequence[str] | None
) -> tuple[Record, Tensor | None]:
    """Return the cost of a backend, or the reason why it fails, and a sketch of products with its matrix."""
    nothing = dict.fromkeys(("seconds", "peak_mb", "trace"))
    if parse_structure(structure).name not in BACKENDS[backend].structures.get(type(parse_quantity(quantity)), ()):
        obstacle = f"backend {backend} does not compute {quantity} as {parse_structure(structure).name}"
        return {"supported": "absent", **nothing, "obstacle": obstacle}, None
    try:
        found, products = _time(problem, quantity, structure, backend, params)
    except CurvlabError as error:
        return {"supported": "no", **nothing, "obstacle": str(error)}, None
    except Exception as error:  # a library can raise anything, and the failure is a result
        text = f"backend {backend} fails: {type_and_line(error)}"
        return {"supported": "no", **nothing, "obstacle": text}, None
    return {"supported": "yes", **found, "obstacle": ""}, make_sketch(products)


def _time(
    problem: Problem, quantity: str, structure: str, backend: str, params: Sequence[str] | None
) -> tuple[Record, Tensor]:
    implicit = parse_structure(structure).name == "implicit"

    def compute(part: Problem) -> tuple[CurvatureMatrix, float]:
        started = time.perf_counter()
        matrix = estimate(part, quantity, structure, backend=backend, params=params)
        if implicit:
            vector = make_vectors(matrix)[:, 0]
            matrix.matvec(vector)  # the first product includes checks
            started = time.perf_counter()
            matrix.matvec(vector)
        if matrix.device.type == "cuda":
            torch.cuda.synchronize()
        return matrix, time.perf_counter() - started

    compute(problem.with_data([next(problem.batches(_FEW))]))  # imports, first allocations
    peak = Peak(problem.device)
    matrix, seconds = compute(problem)
    peak_bytes = peak.bytes()
    taken = [seconds]
    while len(taken) < 3 and sum(taken) < 0.5:
        taken.append(compute(problem)[1])
    found = {
        "seconds": median(taken),
        "peak_mb": None if peak_bytes is None else peak_bytes / 1e6,
        "trace": None if implicit else float(matrix.trace()),
    }
    return found, matrix @ make_vectors(matrix)


def make_vectors(matrix: CurvatureMatrix) -> Tensor:
    """Return vectors of random signs ``(P, K)``, the same for all matrices of equal size.

    ``|F V|^2 / K`` equals the squared Frobenius norm of ``F`` in expectation, and exactly if ``F`` is diagonal.
    """
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (matrix.shape[0], _VECTORS), generator=generator) - 1
    return signs.to(device=matrix.device, dtype=matrix.dtype)


def make_sketch(products: Tensor) -> Tensor:
    """Return the products ``(P, K)`` if ``P`` is at most 512, otherwise random combinations ``(512, K)`` of their rows.

    The norm of the difference of two sketches estimates the norm of the difference of the products, with an error of
    3 %. The size of a sketch does not depend on the network.
    """
    wide: Tensor = products.double().cpu()
    if len(wide) <= _SKETCH:
        return wide
    generator = torch.Generator().manual_seed(0)
    sketch = torch.zeros(_SKETCH, wide.shape[1], dtype=torch.float64)
    for rows in wide.split(_ROWS):
        signs = 2.0 * torch.randint(2, (_SKETCH, len(rows)), generator=generator, dtype=torch.float64) - 1
        sketch += signs @ rows
    sketch /= _SKETCH**0.5
    return sketch


def difference(first: ArrayLike | None, second: ArrayLike | None) -> float | None:
    """Return the norm of the difference over the larger norm; None if one of the two is missing."""
    if first is None or second is None:
        return None
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    largest = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / largest) if largest else 0.0


def summarise(found: Sequence[Record], sketches: Sequence[Record]) -> list[Record]:
    """Return one record per quantity, structure and backend: means over seeds, and the largest difference of a seed.

    Args:
        found: Records of ``table.json``.
        sketches: Records of ``sketches.json``, from all runs in one list.
    """
    traces = {(*(r[key] for key in _KEYS), r["seed"]): r["trace"] for r in found}
    rows = aggregate([r for r in found if r["supported"] == "yes"], _KEYS, ["seconds", "peak_mb"])
    for row in rows:
        here = (row["quantity"], row["structure"])
        pairs = _pair(sketches, *here, row["backend"], REFERENCE)
        row["reference_difference"] = _largest(difference(a["sketch"], b["sketch"]) for a, b in pairs)
        row["reference_trace_difference"] = _largest(
            difference(*(traces.get((*here, one["backend"], one["seed"])) for one in pair)) for pair in pairs
        )
    return rows


def compare(sketches: Sequence[Record], backends: Sequence[str]) -> list[Record]:
    """Return the largest difference of each pair of backends, one record per quantity, structure and pair."""
    combined = dict.fromkeys((one["quantity"], one["structure"]) for one in sketches)
    return [
        {"quantity": quantity, "structure": structure, "first": first, "second": second}
        | {
            "difference": _largest(
                difference(a["sketch"], b["sketch"]) for a, b in _pair(sketches, quantity, structure, first, second)
            )
        }
        for quantity, structure in combined
        for first, second in combinations(backends, 2)
    ]


def _pair(
    sketches: Sequence[Record], quantity: str, structure: str, first: str, second: str
) -> list[tuple[Record, Record]]:
    by_backend = {
        (one["backend"], one["seed"]): one
        for one in sketches
        if (one["quantity"], one["structure"]) == (quantity, structure)
    }
    seeds = dict.fromkeys(seed for _, seed in by_backend)
    return [
        (by_backend[first, seed], by_backend[second, seed])
        for seed in seeds
        if {(first, seed), (second, seed)} <= by_backend.keys()
    ]


def _largest(differences: Iterator[float | None]) -> float | None:
    return max((value for value in differences if value is not None), default=None)


def report(results: Results[AgreementConfig]) -> Report:
    """Return the table, the failures of backends, and one heat map of differences per quantity."""
    config, found = results.config, results.records["table"]
    sketches = [one for kept in results.artifacts["sketches"] for one in kept]
    samples = config.samples or results.subject.train
    title = f"Curvature by every backend, {write_count(samples, 'sample')} of {results.subject.data}, {config.dtype}"
    differences = compare(sketches, config.backends)
    refused = dict.fromkeys(f"no: {record['obstacle']}" for record in found if record["supported"] == "no")
    notes = [
        "Differences are those of products with random vectors, relative to the larger one; seconds of implicit are "
        "for one product; peak MB excludes model and data. Parallel runs slow each other down: use --jobs 1 to measure "
        "seconds."
    ]
    if any(parse_structure(structure).name == "ekfac" for structure in config.structures):
        notes.append(
            "The basis of EK-FAC is not unique if factors have equal or nearly equal eigenvalues: the matrices of two "
            "backends may then differ by more than rounding, but not their traces."
        )
    return Report(
        Table(title, _COLUMNS, summarise(found, sketches)),
        figures={
            f"agreement-{re.sub('[^a-z0-9_]+', '-', quantity)}": partial(_draw, results, differences, quantity)
            for quantity in dict.fromkeys(record["quantity"] for record in differences)
        },
        files={"differences": differences},
        notes=[*refused, *notes],
    )


def _draw(results: Results[AgreementConfig], differences: Sequence[Mapping[str, Any]], quantity: str) -> "Figure":
    names = list(results.config.backends)
    panels: dict[str, np.ndarray] = {}
    for record in differences:
        if record["quantity"] != quantity:
            continue
        panel = panels.setdefault(record["structure"], np.full((len(names), len(names)), np.nan))
        if record["difference"] is not None:
            panel[names.index(record["second"]), names.index(record["first"])] = record["difference"]
    name = subject.describe(results.config, results.subject, quantity)
    title = f"{name}, {results.config.dtype}: differences between backends"
    return plots.difference_maps(panels, names, title)


ANALYSIS = Analysis(
    config=AgreementConfig,
    question="Do the backends agree? Trains a network, and computes the same curvature with each backend, in a "
    "separate process per quantity and backend: differences, seconds and peak memory, as a table and a heat map.",
    presets={"default": Preset(AgreementConfig(samples=100), minutes=2)},
    check=check,
    load=subject.load_subject,
    measure=measure,
    report=report,
    parts=split,
    artifacts=("sketches",),
)
