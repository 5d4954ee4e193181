"""Cells on the workers of a Dask cluster, through joblib's Dask backend."""

import logging
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import joblib
from distributed import Client, KilledWorker, Worker, WorkerPlugin, get_worker
from joblib._dask import DaskDistributedBackend

from curvlab import data as data_sets
from curvlab.errors import CurvlabError
from curvlab.grid import processes
from curvlab.grid.cell import Outcome, find
from curvlab.grid.running import Task, forget, supervised
from curvlab.results.provenance import software

_CONNECT = 10  # seconds until a scheduler or worker that does not answer is not there


def distributed(tasks: Sequence[Task], address: str, data: Mapping[str, str]) -> Iterator[Outcome]:
    """Run tasks on a cluster and yield their outcomes as they come.

    Args:
        tasks: As ``supervised`` takes them.
        address: Of the scheduler.
        data: Names of data sets and files, and their fingerprints here.

    Raises:
        CurvlabError: The scheduler is not there or goes away, or a worker is not fit for the tasks.
    """
    log = logging.getLogger("distributed.client")  # what it says is said below, in a sentence
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield from _distributed(tasks, address, data)
    finally:
        log.setLevel(level)


def _distributed(tasks: Sequence[Task], address: str, data: Mapping[str, str]) -> Iterator[Outcome]:
    try:
        client: Client = _Client(address)
    except (OSError, ValueError) as error:
        raise CurvlabError(
            f"there is no Dask scheduler at {address} ({_first_line(error)}); start one (dask scheduler), "
            "or run without --scheduler"
        ) from error
    plugin = f"curvlab-sweep-{secrets.token_hex(4)}"  # of this sweep: there may be another one on the cluster
    try:
        _prepared(client, address, plugin, tasks, data)
        call = joblib.delayed(_on_worker)
        with joblib.parallel_config(backend=_Backend(client=client)):
            # All at once: workers may join later.
            parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")
            outcomes = parallel(call(task) for task in tasks)
        try:
            for outcome in outcomes:  # noqa: UP028
                # Not yield from, which would close it without what is below.
                yield outcome
        finally:
            with warnings.catch_warnings(action="ignore"):  # that tasks are not finished: it is why we are here
                outcomes.close()
    except _Lost as error:
        raise CurvlabError(
            f"the scheduler {address} has gone; what is finished is in the store: "
            "repeat the command when there is a scheduler again"
        ) from error
    finally:
        if client.status == "running":  # one that has gone would be waited for
            with suppress(Exception):  # it may go now
                client.unregister_worker_plugin(plugin)
        client.close(timeout=_CONNECT)


class _Client(Client):
    """A client that is closed at once if it could not connect, and never by the garbage collector.

    The collector runs in any thread. In the thread in which the loop of another client is starting, the closing that
    Dask does there would wait for a lock that is held until that loop has started.
    """

    def __init__(self, address: str) -> None:
        try:
            Client.__init__(self, address, timeout=_CONNECT, set_as_default=False)
        except BaseException:
            with suppress(Exception):
                self.close(timeout=_CONNECT)  # type: ignore[no-untyped-call]
            raise

    def __del__(self) -> None:
        pass


def _prepared(client: Client, address: str, name: str, tasks: Sequence[Task], data: Mapping[str, str]) -> None:
    """Have each worker checked, those that join later too, by a plugin of that name."""
    first = tasks[0]
    requirements = Requirements(
        software(), sorted({task["function"] for task in tasks}), data, first["data_root"], first["offline"]
    )
    try:
        client.wait_for_workers(1, timeout=_CONNECT)
    except TimeoutError as error:
        raise CurvlabError(f"the scheduler {address} has no worker: start some (dask worker {address})") from error
    try:
        client.register_plugin(requirements, name=name)
    except Exception as error:  # of whatever kind: the worker may not even have the plugin's module
        raise CurvlabError(f"a worker of {address} cannot do it: {_first_line(error)}") from error


class Requirements(WorkerPlugin):
    """What a worker has to have: the same versions and code, the functions, the data.

    Args:
        software: As ``curvlab.results.provenance.software`` tells it here.
        functions: ``module:name`` of the cells.
        data: Names of data sets and files, and their fingerprints.
        data_root: Where they are kept; None for the default place.
        offline: Whether they must be there already.
    """

    def __init__(
        self,
        software: Mapping[str, Any],
        functions: Sequence[str],
        data: Mapping[str, str],
        data_root: str | None,
        offline: bool,
    ) -> None:
        self.software, self.functions, self.data = software, functions, data
        self.data_root, self.offline = data_root, offline

    def setup(self, worker: Worker) -> None:
        """Refuse a worker that does not have it; one that joins is then closed.

        Raises:
            CurvlabError: It lacks something.
        """
        # Another sweep has begun: its code may be newer than what the processes of an earlier one have imported.
        processes.close_idle()
        forget()
        where = f"worker {worker.address} on {worker.name}" if worker.name != worker.address else worker.address
        theirs = software()
        for package, ours in self.software["versions"].items():
            if theirs["versions"].get(package) != ours:
                raise CurvlabError(
                    f"{where} has {package} {theirs['versions'].get(package)}, and {ours} is needed: "
                    "start the workers from the environment that the sweep is started from"
                )
        commits = [described["git"] and described["git"]["commit"] for described in (self.software, theirs)]
        if None not in commits and commits[0] != commits[1]:
            raise CurvlabError(f"{where} runs the code of commit {commits[1]}, and {commits[0]} is needed: update it")
        for function in self.functions:
            try:
                find(function)
            except CurvlabError as error:
                raise CurvlabError(f"{where}: {error}") from error
        for name, fingerprint in self.data.items():
            try:
                root = None if self.data_root is None else Path(self.data_root)
                found = data_sets.fingerprint(name, root=root, offline=self.offline)
            except CurvlabError as error:
                raise CurvlabError(f"{where}: {error}") from error
            if found != fingerprint:
                raise CurvlabError(f"{where} has other data under {name!r}: give all the same --data-root")

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        """End the processes that start cells."""
        processes.close_idle()


def _on_worker(task: Task) -> Outcome:
    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        """Say whether the sweep still waits for it; the scheduler cancels the tasks of one that was killed."""
        state = worker.state.tasks.get(key)
        return state is not None and state.state != "cancelled"

    return supervised(task, wanted)


class _Lost(Exception):
    """The scheduler has gone."""


class _Backend(DaskDistributedBackend):  # type: ignore[misc]
    """joblib's backend, in the three cases that it leaves out.

    On a cluster of one thread it would run the tasks in this process. A task that Dask gives up, since every worker
    that had it has died, it would wait for without end; so it would if the scheduler goes away.
    """

    def effective_n_jobs(self, n_jobs: int = 1) -> int:
        return max(2, int(super().effective_n_jobs(n_jobs)))

    def submit(self, func: Any, callback: Callable[[Any], None] | None = None) -> Any:
        ((_, (task, *_), _),) = func.items
        future = super().submit(func, callback)

        def give_up(done: "Future[Any]") -> None:
            error = done.exception()
            if error is not None and callback is not None:
                callback(_GivenUp(task, error))

        future.add_done_callback(give_up)
        return future

    def retrieve_result_callback(self, out: Any) -> Any:
        if isinstance(out, _GivenUp):
            return [out.outcome()]
        if isinstance(out, BaseException):  # in place of a result: it was cancelled
            raise _Lost from out
        return super().retrieve_result_callback(out)


class _GivenUp:
    """A task that has no result."""

    def __init__(self, task: Task, error: BaseException) -> None:
        self.task, self.error = task, error

    def outcome(self) -> Outcome:
        """Return what is to be stored, or raise what stops the sweep."""
        if not isinstance(self.error, KilledWorker):
            raise self.error
        return Outcome(
            self.task["key"],
            "killed",
            "every worker that ran it has died with it, most likely because memory ran out",
            str(self.error),
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
