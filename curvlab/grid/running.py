"""The engine of sweeps: execute the missing runs, each in its own process, and store their outcomes.

joblib distributes the runs over threads of this process, or Dask distributes them over the workers of a cluster. Both
call ``supervise`` of ``curvlab.grid.supervision``, which starts the process of a run and waits until it ends. Only the
process that called ``run`` writes the store. The process of a run has the same number of threads however many runs
are executed at once, so that no number depends on it.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import joblib

from curvlab.errors import CurvlabError
from curvlab.grid import processes
from curvlab.grid.code import fingerprints
from curvlab.grid.run_spec import Outcome, RunSpec, canonical
from curvlab.grid.store import Store, write_store
from curvlab.grid.supervision import Task, forget_software, supervise
from curvlab.progress import progress


def run(
    specs: Sequence[RunSpec],
    store: Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    scheduler: str | None = None,
    run_timeout: float | None = None,
    retry_failed: bool = False,
    data_root: Path | None = None,
    offline: bool = False,
    data: Mapping[str, str] | None = None,
    functions: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Execute the runs of a sweep that the store does not have yet.

    Args:
        specs: Runs of the sweep; equal ones are one run.
        store: File of the store; created if it does not exist. The folders of the runs are in ``STORE.runs`` beside it.
        jobs: Number of runs at once; None for the number of cores divided by ``threads``.
        threads: Number of threads of the process of a run.
        scheduler: Address of a Dask scheduler whose workers execute the runs, one run per thread of a worker.
        run_timeout: Seconds after which a run is killed; None for no limit.
        retry_failed: Execute the failed runs again.
        data_root: Folder of the data sets; None for the default one.
        offline: Do not use the network.
        data: Names of the data sets and files that the runs read -> their fingerprints. A store is not continued with
            other data, and the workers of a cluster must have the same.
        functions: Other functions of the user that the runs call, as ``module:name`` -> a hash of what they return, or
            an empty text. A store is not continued if this hash or a source file of the function has changed.

    Returns:
        The numbers of runs that are ``done``, ``failed`` and ``absent``, and of those of ``earlier`` sweeps.

    Raises:
        CurvlabError: The store or the cluster cannot be used, or no longer; finished runs are in the store.
    """
    if jobs is None:
        jobs = max(1, joblib.cpu_count() // threads)
    forget_software()
    unique = {spec.key: spec for spec in specs}
    with write_store(store) as opened:
        calls = functions or {}
        sources = fingerprints(calls) if calls else {}
        versions = {name: f"{sources.get(name.partition(':')[0], '')} {hashed}" for name, hashed in calls.items()}
        opened.register(list(unique.values()), data or {}, versions)
        keys = opened.pending_runs(retry_failed)
        pending = [spec for spec in unique.values() if spec.key in keys]
        code = canonical(fingerprints({*calls, *(spec.function for spec in pending)}))
        tasks = [_make_task(spec, store, threads, run_timeout, data_root, offline, code) for spec in pending]
        if tasks:
            outcomes = (
                _run_here(tasks, jobs) if scheduler is None else _run_on_cluster(tasks, scheduler, data or {}, calls)
            )
            _store_outcomes(opened, outcomes, len(tasks), jobs if scheduler is None else None)
        return opened.tally()


def run_folder(store: Path, key: str) -> Path:
    """Return the folder of a run, which exists if the run has left files in it."""
    store = store.resolve()  # under any name of the store a run must find its checkpoint
    return store.with_name(f"{store.name}.runs") / key


def _make_task(
    spec: RunSpec, store: Path, threads: int, timeout: float | None, data_root: Path | None, offline: bool, code: str
) -> dict[str, Any]:
    return {
        "key": spec.key,
        "function": spec.function,
        "config": dict(spec.config),
        "folder": str(run_folder(store, spec.key)),
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

    # Always closed: an unfinished iterator still has processes running.
    with progress("sweep", total) as advance, closing(outcomes):  # type: ignore[type-var]
        advance(0, note=note())
        for outcome in outcomes:
            store.finish(outcome)
            left -= 1
            failed += outcome.kind is not None
            advance(note=note())


def _run_here(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    stopping = threading.Event()
    call = joblib.delayed(supervise)
    parallel = joblib.Parallel(jobs, backend="threading", return_as="generator_unordered", batch_size=1)
    outcomes = parallel(call(task, lambda: not stopping.is_set()) for task in tasks)
    try:
        for outcome in outcomes:  # noqa: UP028
            # Not yield from: the processes must be killed before joblib waits for their threads.
            yield outcome
    finally:
        stopping.set()
        processes.close()
        with warnings.catch_warnings(action="ignore"):  # joblib warns of unfinished tasks
            outcomes.close()


def _run_on_cluster(
    tasks: Sequence[Task], address: str, data: Mapping[str, str], functions: Iterable[str]
) -> Iterator[Outcome]:
    try:
        from curvlab.grid.cluster import run_tasks
    except ImportError as error:
        raise CurvlabError(
            f"--scheduler needs Dask, and {error.name} is not installed: pip install 'curvlab[cluster]'"
        ) from error
    yield from run_tasks(tasks, address, data, functions)
