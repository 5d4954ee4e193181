"""Cells on the workers of a Dask cluster."""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed import Client, KilledWorker, Security, Worker, WorkerPlugin, as_completed, get_worker, rpc

from curvlab import data as data_sets
from curvlab.errors import CurvlabError, first_line
from curvlab.grid import processes
from curvlab.grid.cell import Outcome, find
from curvlab.grid.code import fingerprints
from curvlab.grid.supervision import Task, forget_software, supervise
from curvlab.software import describe_software

_BATCH = 1000  # tasks that are sent at once
_CONNECT = 10  # seconds until a scheduler or worker that does not answer is not there


def distributed(tasks: Sequence[Task], address: str, data: Mapping[str, str]) -> Iterator[Outcome]:
    """Run tasks on a cluster and yield their outcomes as they come.

    Args:
        tasks: As ``supervise`` takes them.
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
    _require_scheduler(address)
    try:
        client: Client = _Client(address)
    except Exception as error:  # of whatever kind: anything may answer there
        raise _no_scheduler(address, error) from error
    sweep = f"curvlab-sweep-{secrets.token_hex(4)}"  # this one: there may be another one on the cluster
    try:
        _prepared(client, address, sweep, tasks, data)
        for future, result, task in _results(client, sweep, tasks):
            if future.status == "finished":
                yield result
            elif future.status == "error":
                yield _given_up(task, result[1])
            else:
                raise CurvlabError(
                    f"the scheduler {address} has gone; what is finished is in the store: "
                    "repeat the command when there is a scheduler again"
                )
    finally:
        if client.status == "running":  # one that has gone would be waited for
            with suppress(Exception):  # it may go now
                client.unregister_worker_plugin(sweep)
        client.close(timeout=_CONNECT)


def _results(client: Client, sweep: str, tasks: Sequence[Task]) -> Iterator[tuple[Any, Any, Task]]:
    """Yield the future, the result and the task of each as they come; one that an unfit worker had, from a fit one."""
    run = _gate(sweep)
    given: dict[tuple[str, ...], Task] = {(sweep, task["key"]): task for task in tasks}
    # All at once: workers may join later. As text: Dask looks into other arguments for results of its own.
    futures = client.map(run, [json.dumps(task) for task in tasks], key=list(given), pure=False, batch_size=_BATCH)
    done = as_completed(futures, loop=client.loop, with_results=True, raise_errors=False)
    del futures  # what is stored is kept by no worker
    told = set()
    for future, result in done:
        task = given.pop(future.key)
        if future.status != "finished" or not isinstance(result, str):
            yield future, result, task
            continue
        if result not in told:
            logging.getLogger(__name__).warning("%s; no cell runs there", result)
            told.add(result)
        key = (sweep, task["key"], secrets.token_hex(4))
        given[key] = task
        fit = []
        with suppress(OSError):  # the scheduler has just gone, which the future below then tells
            fit = [worker for worker, fit in _fit(client, sweep).items() if fit]
        # On another one if these are gone: it may be fit.
        where = {"workers": fit, "allow_other_workers": True} if fit else {}
        done.add(client.submit(run, json.dumps(task), key=key, pure=False, **where))


def _fit(client: Client, sweep: str) -> dict[str, bool]:
    """Say of each worker whether it is fit for a sweep."""

    def is_fit(dask_worker: Any) -> bool:
        return getattr(dask_worker.plugins.get(sweep), "fit", False)

    found: dict[str, bool] = client.run(is_fit, on_error="ignore")
    return found


def _require_scheduler(address: str) -> None:
    """Refuse an address where no scheduler answers in time: Dask's client waits longer, and takes any answer for one.

    Raises:
        CurvlabError: There is none.
    """

    async def ask() -> Any:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
            return await there.identity()

    async def in_time() -> Any:
        return await asyncio.wait_for(ask(), _CONNECT)

    with ThreadPoolExecutor(1) as thread:  # this one may have an event loop, as in a notebook
        try:
            kind = thread.submit(lambda: asyncio.run(in_time())).result()["type"]
        except Exception as error:  # of whatever kind: another service's answer is read as anything
            raise _no_scheduler(address, error) from error
    if kind != "Scheduler":
        raise CurvlabError(f"at {address} is a {kind} of Dask, not a scheduler; give the address of the scheduler")


def _no_scheduler(address: str, error: Exception) -> CurvlabError:
    if isinstance(error, TimeoutError):
        reason = f"no answer in {_CONNECT} seconds"
    elif isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError):
        reason = first_line(error)
    else:
        reason = "the answer is that of another service"
    return CurvlabError(
        f"there is no Dask scheduler at {address} ({reason}); start one (dask scheduler), or run without --scheduler"
    )


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
    functions = sorted({task["function"] for task in tasks})
    requirements = Requirements(
        describe_software(), fingerprints(functions), functions, data, first["data_root"], first["offline"]
    )
    try:
        client.wait_for_workers(1, timeout=_CONNECT)
    except TimeoutError as error:
        raise CurvlabError(f"the scheduler {address} has no worker: start some (dask worker {address})") from error
    try:
        client.register_plugin(requirements, name=name)
    except Exception as error:  # of whatever kind: the worker may not even have the plugin's module
        raise CurvlabError(f"a worker of {address} cannot do it: {first_line(error, 1000)}") from error

    for worker, fit in _fit(client, name).items():
        if not fit:  # its plugin is not the one below
            raise CurvlabError(
                f"worker {worker} has another curvlab: start the workers from the environment that the sweep is "
                "started from"
            )


class Requirements(WorkerPlugin):
    """What a worker has to have: the same versions and code, the functions, the data.

    Args:
        software: As ``curvlab.software.describe_software`` tells it here.
        code: Fingerprints of the source files here.
        functions: ``module:name`` of the cells.
        data: Names of data sets and files, and their fingerprints.
        data_root: Where they are kept; None for the default place.
        offline: Whether they must be there already.

    Attributes:
        fit: Whether the worker has been found to have it all.
        fault: What it lacks.
    """

    def __init__(
        self,
        software: Mapping[str, Any],
        code: Mapping[str, str],
        functions: Sequence[str],
        data: Mapping[str, str],
        data_root: str | None,
        offline: bool,
    ) -> None:
        self.software, self.code, self.functions, self.data = software, code, functions, data
        self.data_root, self.offline = data_root, offline
        self.fit, self.fault = False, ""

    def setup(self, worker: Worker) -> None:
        """Find out whether a worker has it; one that has not gets no cell.

        Raises:
            CurvlabError: It lacks something.
        """
        try:
            self._require(worker)
        except CurvlabError as error:  # Dask only logs it there, of one that joins when the sweep has begun
            self.fault = str(error)
            raise
        self.fit = True

    def _require(self, worker: Worker) -> None:
        # Another sweep has begun: its code may be newer than what the processes of an earlier one have imported.
        processes.close_idle()
        forget_software()
        where = f"worker {worker.address} on {worker.name}" if worker.name != worker.address else worker.address
        theirs = describe_software()
        for package, ours in self.software["versions"].items():
            if theirs["versions"].get(package) != ours:
                raise CurvlabError(
                    f"{where} has {package} {theirs['versions'].get(package)}, and {ours} is needed: "
                    "start the workers from the environment that the sweep is started from"
                )
        for name, here in fingerprints(self.functions).items():
            if self.code.get(name) != here:
                raise CurvlabError(
                    f"{where} has other source files of {name} than the process that runs the sweep: give both the same"
                )
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


def _gate(sweep: str) -> Callable[[str], Any]:
    """Return what runs a task on a worker that is fit for a sweep, and on another one says why it does not.

    A local function, which goes to the worker whole: an unfit one may have another curvlab, or none.
    """

    def run(task: str) -> Any:
        import json
        import time

        from distributed import get_worker

        worker = get_worker()
        plugin = worker.plugins.get(sweep)
        if not getattr(plugin, "fit", False):
            time.sleep(1)  # there may be no other one at the moment
            return getattr(plugin, "fault", "") or f"worker {worker.address} has another curvlab, or none"
        from curvlab.grid.cluster import on_fit_worker

        return on_fit_worker(json.loads(task))

    return run


def on_fit_worker(task: Task) -> Outcome:
    """Run a cell on the worker that has this task, as long as the sweep waits for it."""
    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        """Say whether the sweep still waits for it; the scheduler cancels the tasks of one that was killed."""
        state = worker.state.tasks.get(key)
        return state is not None and state.state != "cancelled"

    return supervise(task, wanted)


def _given_up(task: Task, error: BaseException) -> Outcome:
    """Return what is to be stored of a task that has no result, or raise what stops the sweep."""
    if not isinstance(error, KilledWorker):
        raise error
    why = "every worker that ran it has died with it, most likely because memory ran out"
    return Outcome(task["key"], "killed", why, str(error))
