"""Do the backends agree? The same curvature from each, on one network: differences, time and memory."""

import ctypes
import multiprocessing
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import Field
from rich.console import Console
from torch import Tensor

from curvlab.analyze.command import Analysis, RunOptions
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.subject import TrainedSubjectConfig
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import BACKENDS, estimate
from curvlab.matrices import CurvatureMatrix
from curvlab.problem import Problem
from curvlab.progress import progress
from curvlab.quantities import parse_quantity
from curvlab.results import Column, RunDirectory, Stopwatch, collect, open_run, render, significant, write_tables
from curvlab.results.plots import difference_maps
from curvlab.structures import parse_structure

Record = dict[str, Any]

_CONTEXT: Any = multiprocessing.get_context(
    # Children of a process that has the imports behind it and nothing else: quick, and clean for torch.
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)

REFERENCE = "torch"

_VECTORS = 8  # on which matrices are compared
_FEW = 8  # samples of the first, unmeasured call


class AgreementConfig(TrainedSubjectConfig):
    """Train a network, and compute its curvature with every backend."""

    titles: ClassVar[Mapping[str, str]] = {**TrainedSubjectConfig.titles, "quantities": "curvature"}

    quantities: tuple[str, ...] = ("fisher", "fisher:samples=1", "empirical_fisher")
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B, ggn or hessian; one or several."""
    structures: tuple[str, ...] = ("diag", "block_diag", "kfac", "ekfac")
    """dense, block_diag, diag, kfac, ekfac, tkfac or implicit, with their options; one or several."""
    params: tuple[str, ...] | None = None
    """Patterns of parameter names, such as 'fc*.weight'; none means all trainable ones."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the network and its training."""


_COLUMNS = (
    Column("quantity", "quantity"),
    Column("structure", "structure"),
    Column("backend", "backend"),
    Column("seconds", "seconds"),
    Column("peak_mb", "peak MB"),
    Column("reference_difference", f"difference to {REFERENCE}", lambda value: significant(value, 2)),
    Column("reference_trace_difference", "of its trace", lambda value: significant(value, 2)),
)
_SAVED = (*_COLUMNS, Column("obstacle", "obstacle"))


def run(config: AgreementConfig, options: RunOptions, console: Console) -> None:
    """Train, compute every cell in a process of its own, compare, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable; nothing is written then.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = subject.load_dataset(config, options)
        data_hash = dataset.fingerprint()
    subject.check_subject(config, dataset)
    subject.check_distinct(structures=config.structures)
    with clock("training"):
        model, _ = subject.train_network(config, dataset, config.seed)
    problem = subject.problem(config, dataset, model)
    subject.check_curvature(problem, config.quantities, config.params)
    pairs = [(str(parse_quantity(q)), str(parse_structure(s))) for q in config.quantities for s in config.structures]
    problem.check()
    directory = open_run(options.out, "agreement", config.to_yaml())
    records: list[Record] = []
    differences: list[Record] = []
    try:
        with clock("curvature"), progress("agreement", total=len(pairs) * len(BACKENDS)) as advance:
            # In one piece: a process is given a copy of its own, not memory that is shared with others.
            given = pickle.dumps((model, problem.loss.name, problem.data, config.params))
            for quantity, structure in pairs:
                found = {}
                for backend in BACKENDS:
                    found[backend] = _measured(given, quantity, structure, backend)
                    advance(note=f"{quantity} {structure} {backend}")
                records += _records(quantity, structure, found)
                differences += _differences(quantity, structure, found)
        write_tables(directory, records, _SAVED)
        directory.write_json("differences.json", differences)
        directory.write_json("claims.json", [])  # there is none of a publication
        with clock("figures"):
            _figures(config, dataset, directory, differences)
        origin = collect(
            seeds=[config.seed], data_hash=data_hash, stages=clock.seconds, started=clock.started, device=config.device
        )
        directory.write_json("provenance.json", origin)
    except (CurvlabError, KeyboardInterrupt) as stop:
        if records:
            with suppress(CurvlabError):  # the disk may be full: that is then what is reported
                write_tables(directory, records, _SAVED)
                stop.add_note(f"{len(records)} finished cells in {directory.path}")
        directory.discard_if_empty()
        raise
    _print(console, config, dataset, records, directory)


# A cell in a process of its own --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """What became of a cell: an obstacle, or what it took and what it gave."""

    obstacle: str = ""
    absent: bool = False
    seconds: float | None = None
    peak_bytes: int | None = None
    trace: float | None = None
    products: np.ndarray | None = None  # (P, K), with vectors of signs


def _measured(given: bytes, quantity: str, structure: str, backend: str) -> _Cell:
    name = parse_structure(structure).name
    if name not in BACKENDS[backend].cells.get(type(parse_quantity(quantity)), ()):
        return _Cell(f"backend {backend} does not compute {quantity} as {name}", absent=True)
    _CONTEXT.set_forkserver_preload([__name__])
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(sender, given, quantity, structure, backend), daemon=True)
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        cell: _Cell = receiver.recv()
    except EOFError:
        process.join()
        return _Cell(f"backend {backend} was killed ({process.exitcode}), most likely because memory ran out")
    except KeyboardInterrupt:
        process.kill()
        raise
    finally:
        receiver.close()
    process.join()
    return cell


def _work(sender: Connection, given: bytes, quantity: str, structure: str, backend: str) -> None:
    try:
        cell = _computed(given, quantity, structure, backend)
    except KeyboardInterrupt:
        return  # the parent says so
    except CurvlabError as error:
        cell = _Cell(str(error))
    except Exception as error:  # a library can fail in any way, and that is then what there is to say
        cell = _Cell(f"backend {backend} fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    sender.send(cell)


def _computed(given: bytes, quantity: str, structure: str, backend: str) -> _Cell:
    model, loss, (inputs, targets), params = pickle.loads(given)
    implicit = parse_structure(structure).name == "implicit"

    def compute(problem: Problem) -> tuple[CurvatureMatrix, float]:
        started = time.perf_counter()
        matrix = estimate(problem, quantity, structure, backend=backend, params=params)
        if implicit:
            vector = _vectors(matrix)[:, 0]
            matrix.matvec(vector)  # the first product comes with checks
            started = time.perf_counter()
            matrix.matvec(vector)
        if matrix.device.type == "cuda":
            torch.cuda.synchronize()
        return matrix, time.perf_counter() - started

    compute(Problem(model, loss, (inputs[:_FEW], targets[:_FEW])))  # what is loaded at a first call is loaded
    problem = Problem(model, loss, (inputs, targets))
    peak = _Peak(problem.device)
    matrix, seconds = compute(problem)
    peak_bytes = peak.bytes()
    taken = [seconds]
    while len(taken) < 3 and sum(taken) < 0.5:
        taken.append(compute(problem)[1])
    products = (matrix @ _vectors(matrix)).double().cpu().numpy()
    trace = None if implicit else float(matrix.trace())
    return _Cell(seconds=median(taken), peak_bytes=peak_bytes, trace=trace, products=products)


def _vectors(matrix: CurvatureMatrix) -> Tensor:
    """Return vectors of random signs, the same for every matrix of a size.

    ``|F V|^2 / K`` is the squared Frobenius norm of ``F`` in expectation, and exactly for a diagonal one.
    """
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (matrix.shape[0], _VECTORS), generator=generator) - 1
    return signs.to(device=matrix.device, dtype=matrix.dtype)


class _Peak:
    """The peak of memory from now on: of the process (on Linux), or what tensors take on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but is still held would hide what is taken
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        except OSError:
            self.before = None

    def bytes(self) -> int | None:
        """Return how far it rose, None where the system does not tell."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _status("VmHWM") - self.before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


# What is made of them ------------------------------------------------------------------------------------------------


def _records(quantity: str, structure: str, cells: Mapping[str, _Cell]) -> list[Record]:
    reference = cells[REFERENCE]
    return [
        {
            "quantity": quantity,
            "structure": structure,
            "backend": backend,
            "supported": "absent" if cell.absent else "no" if cell.obstacle else "yes",
            "seconds": cell.seconds,
            "peak_mb": None if cell.peak_bytes is None else cell.peak_bytes / 1e6,
            "reference_difference": _difference(cell.products, reference.products),
            "reference_trace_difference": _difference(cell.trace, reference.trace),
            "obstacle": cell.obstacle,
        }
        for backend, cell in cells.items()
    ]


def _differences(quantity: str, structure: str, cells: Mapping[str, _Cell]) -> list[Record]:
    return [
        {
            "quantity": quantity,
            "structure": structure,
            "first": first,
            "second": second,
            "difference": _difference(cells[first].products, cells[second].products),
        }
        for first, second in combinations(cells, 2)
    ]


def _difference(first: ArrayLike | None, second: ArrayLike | None) -> float | None:
    """Return the norm of the difference over the larger norm."""
    if first is None or second is None:
        return None
    a, b = np.asarray(first), np.asarray(second)
    largest = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / largest) if largest else 0.0


def _figures(config: AgreementConfig, dataset: Dataset, directory: RunDirectory, differences: Sequence[Record]) -> None:
    names = list(BACKENDS)
    for quantity in dict.fromkeys(record["quantity"] for record in differences):
        panels: dict[str, np.ndarray] = {}
        for record in differences:
            if record["quantity"] != quantity:
                continue
            panel = panels.setdefault(record["structure"], np.full((len(names), len(names)), np.nan))
            if record["difference"] is not None:
                panel[names.index(record["second"]), names.index(record["first"])] = record["difference"]
        title = f"{subject.describe(config, dataset, quantity)}, {config.dtype}: differences between backends"
        directory.write_figure(
            f"agreement-{re.sub('[^a-z0-9_]+', '-', quantity)}", difference_maps(panels, names, title)
        )


def _print(
    console: Console, config: AgreementConfig, dataset: Dataset, records: Sequence[Record], directory: RunDirectory
) -> None:
    samples = len(subject.samples(config, dataset)[0])
    title = f"Curvature by every backend, {samples:,} samples of {config.data}, {config.dtype}"
    done = [record for record in records if record["supported"] == "yes"]
    console.print(render(done, _COLUMNS, title), crop=False)
    for record in records:
        if record["supported"] == "no":
            console.print(f"no: {record['obstacle']}", markup=False, highlight=False, soft_wrap=True)
    notes = [
        "Differences are of products with random vectors, relative to the larger; seconds of implicit are those of a "
        "product; peak MB is what the process took beyond model and data."
    ]
    if any(parse_structure(structure).name == "ekfac" for structure in config.structures):
        notes.append(
            "The basis of EK-FAC is not unique where factors have equal eigenvalues, or nearly so: there the matrices "
            "of two backends may differ by more than rounding; their traces may not."
        )
    notes.append(f"Saved in {directory.path}: table (.json .csv .md .tex), differences, provenance, figures.")
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=AgreementConfig,
    presets={"default": AgreementConfig(samples=100)},
    run=run,
    description="Do the backends agree? Trains a network, and computes the same curvature with each, every cell in a "
    "process of its own: relative differences, seconds and peak memory, as a table and a heat map.",
)
