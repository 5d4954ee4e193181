"""The engine: cells that are not done yet are run, each in a process of its own, and what becomes of them is stored.

They are distributed over threads of this process by joblib, or over the workers of a cluster by Dask. Either runs
``supervise`` of ``curvlab.grid.supervision``, which starts the process of a cell and waits for its end, whatever that
is. Only the process that called ``run`` writes the store. All cells have the same number of threads, however many run
at once, so that their numbers do not depend on it.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import joblib

from curvlab.errors import CurvlabError
from curvlab.grid import processes
from curvlab.grid.cell import Cell, Outcome, canonical
from curvlab.grid.code import fingerprints
from curvlab.grid.store import Store, writing
from curvlab.grid.supervision import Task, forget_software, supervise
from curvlab.progress import progress


def run(
    cells: Sequence[Cell],
    store: Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    scheduler: str | None = None,
    cell_timeout: float | None = None,
    retry_failed: bool = False,
    data_root: Path | None = None,
    offline: bool = False,
    data: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Run the cells that the store does not have yet.

    Args:
        cells: The sweep; a cell that comes twice is one.
        store: The file; made where there is none. Beside it comes a folder for the cells' own folders.
        jobs: How many cells run at once; None for as many as the cores bear.
        threads: Of the process of a cell.
        scheduler: Address of a Dask scheduler, whose workers then run the cells, a thread of theirs one cell.
        cell_timeout: Seconds after which a cell is killed; None for no limit.
        retry_failed: Run the failed cells again.
        data_root: Where data sets are kept.
        offline: Never touch the network.
        data: Names of data sets and files that the cells read, and their fingerprints: the store is not continued
            with others, and the workers of a cluster must have the same.

    Returns:
        How many cells are ``done``, ``failed`` and ``absent``, and how many the store has of earlier sweeps.

    Raises:
        CurvlabError: The store or the cluster cannot be used, now or any more; what is finished is in the store.
    """
    if jobs is None:
        jobs = max(1, joblib.cpu_count() // threads)
    forget_software()
    unique = {cell.key: cell for cell in cells}
    with writing(store) as opened:
        opened.register(list(unique.values()), data or {})
        todo = opened.open_cells(retry_failed)
        open_cells = [cell for cell in unique.values() if cell.key in todo]
        code = canonical(fingerprints({cell.function for cell in open_cells}))
        tasks = [_task(cell, store, threads, cell_timeout, data_root, offline, code) for cell in open_cells]
        if tasks:
            outcomes = _local(tasks, jobs) if scheduler is None else _cluster(tasks, scheduler, data or {})
            _store_outcomes(opened, outcomes, len(tasks), jobs if scheduler is None else None)
        return opened.tally()


def folder_of(store: Path, key: str) -> Path:
    """Return the folder that a cell is given, which is there if the cell has left something in it."""
    store = store.resolve()  # not by another name: a cell must find its checkpoint
    return store.with_name(f"{store.name}.cells") / key


def _task(
    cell: Cell, store: Path, threads: int, timeout: float | None, data_root: Path | None, offline: bool, code: str
) -> dict[str, Any]:
    return {
        "key": cell.key,
        "function": cell.function,
        "config": dict(cell.config),
        "folder": str(folder_of(store, cell.key)),
        "cwd": str(Path.cwd()),
        "data_root": None if data_root is None else str(Path(data_root).absolute()),
        "offline": offline,
        "threads": threads,
        "code": code,
        "timeout": timeout,
    }


def _store_outcomes(store: Store, outcomes: Iterator[Outcome], total: int, jobs: int | None) -> None:
    left, failed = total, 0

    def note() -> str:
        running = "" if jobs is None else f"{min(jobs, left)} running, "
        return f"{running}{failed} failed"

    # Closed at the end, whatever that is: an iterator that is not finished has processes under it.
    with progress("sweep", total) as advance, closing(outcomes):  # type: ignore[type-var]
        advance(0, note=note())
        for outcome in outcomes:
            store.finish(outcome)
            left -= 1
            failed += outcome.kind is not None
            advance(note=note())


def _local(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    stopping = threading.Event()
    call = joblib.delayed(supervise)
    parallel = joblib.Parallel(jobs, backend="threading", return_as="generator_unordered", batch_size=1)
    outcomes = parallel(call(task, lambda: not stopping.is_set()) for task in tasks)
    try:
        for outcome in outcomes:  # noqa: UP028
            # Not yield from: what runs is to be ended before joblib waits for it.
            yield outcome
    finally:
        stopping.set()
        processes.close()
        with warnings.catch_warnings(action="ignore"):  # that tasks are not finished: it is why we are here
            outcomes.close()


def _cluster(tasks: Sequence[Task], address: str, data: Mapping[str, str]) -> Iterator[Outcome]:
    try:
        from curvlab.grid.cluster import distributed
    except ImportError as error:
        raise CurvlabError(
            f"--scheduler needs Dask, and there is no {error.name}: pip install 'curvlab[cluster]'"
        ) from error
    yield from distributed(tasks, address, data)
