"""Runs on the workers of a Dask cluster."""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed import Client, KilledWorker, Security, Worker, WorkerPlugin, as_completed, get_worker, rpc

from curvlab import data as data_sets
from curvlab.errors import CurvlabError, first_line
from curvlab.grid import processes
from curvlab.grid.code import fingerprints
from curvlab.grid.functions import find_function
from curvlab.grid.run_spec import Outcome
from curvlab.grid.supervision import Task, forget_software, supervise
from curvlab.software import describe_software

_BATCH = 1000  # tasks sent at once
_CONNECT = 10  # seconds to wait for a scheduler or a worker


def run_tasks(
    tasks: Sequence[Task], address: str, data: Mapping[str, str], functions: Iterable[str] = ()
) -> Iterator[Outcome]:
    """Execute tasks on a cluster and yield their outcomes in the order in which they end.

    Args:
        tasks: Tasks for ``supervise``.
        address: Address of the scheduler.
        data: Names of data sets and files -> their fingerprints on this machine.
        functions: Functions that the runs call, in addition to those of the tasks.

    Raises:
        CurvlabError: The scheduler cannot be reached or goes away, or a worker does not meet the requirements.
    """
    log = logging.getLogger("distributed.client")  # the errors below report the same in one sentence
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield from _run_tasks(tasks, address, data, functions)
    finally:
        log.setLevel(level)


def _run_tasks(
    tasks: Sequence[Task], address: str, data: Mapping[str, str], functions: Iterable[str]
) -> Iterator[Outcome]:
    _require_scheduler(address)
    try:
        client: Client = _Client(address)
    except Exception as error:  # of any type, since any service may answer
        raise _make_scheduler_error(address, error) from error
    sweep = f"curvlab-sweep-{secrets.token_hex(4)}"  # a name of its own, since the cluster may run other sweeps
    try:
        _prepare_workers(client, address, sweep, tasks, data, functions)
        for future, result, task in _collect_results(client, sweep, tasks):
            if future.status == "finished":
                yield result
            elif future.status == "error":
                yield _make_lost_outcome(task, result[1])
            else:
                raise CurvlabError(
                    f"the connection to the scheduler {address} was lost; finished runs are in the store: "
                    "start the scheduler again and repeat the command"
                )
    finally:
        if client.status == "running":  # a lost scheduler would be waited for
            with suppress(Exception):  # the connection may be lost now
                client.unregister_worker_plugin(sweep)
        client.close(timeout=_CONNECT)


def _collect_results(client: Client, sweep: str, tasks: Sequence[Task]) -> Iterator[tuple[Any, Any, Task]]:
    """Yield the future, the result and the task of each, in the order in which they end.

    A task that a worker has rejected, because it does not meet the requirements, is sent to another worker.
    """
    run = _make_remote_function(sweep)
    given: dict[tuple[str, ...], Task] = {(sweep, task["key"]): task for task in tasks}
    # All at once, since workers may join later. As text, since Dask searches other arguments for its own futures.
    futures = client.map(run, [json.dumps(task) for task in tasks], key=list(given), pure=False, batch_size=_BATCH)
    done = as_completed(futures, loop=client.loop, with_results=True, raise_errors=False)
    del futures  # so that no worker keeps results that are stored
    reported = set()
    for future, result in done:
        task = given.pop(future.key)
        if future.status != "finished" or not isinstance(result, str):
            yield future, result, task
            continue
        if result not in reported:
            logging.getLogger(__name__).warning("%s; it gets no runs", result)
            reported.add(result)
        key = (sweep, task["key"], secrets.token_hex(4))
        given[key] = task
        fit = []
        with suppress(OSError):  # the connection is lost, which the next future reports
            fit = [worker for worker, is_fit in _ask_fitness(client, sweep).items() if is_fit]
        # On another worker if all of these are gone: it may be fit.
        where = {"workers": fit, "allow_other_workers": True} if fit else {}
        done.add(client.submit(run, json.dumps(task), key=key, pure=False, **where))


def _ask_fitness(client: Client, sweep: str) -> dict[str, bool]:
    """Return for each worker whether it meets the requirements of a sweep."""

    def is_fit(dask_worker: Any) -> bool:
        return getattr(dask_worker.plugins.get(sweep), "fit", False)

    found: dict[str, bool] = client.run(is_fit, on_error="ignore")
    return found


def _require_scheduler(address: str) -> None:
    """Refuse an address where no scheduler answers in time; Dask's client waits longer and accepts other services.

    Raises:
        CurvlabError: No scheduler answers.
    """

    async def ask() -> Any:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
            return await there.identity()

    async def in_time() -> Any:
        return await asyncio.wait_for(ask(), _CONNECT)

    with ThreadPoolExecutor(1) as thread:  # this thread may have an event loop, as in a notebook
        try:
            kind = thread.submit(lambda: asyncio.run(in_time())).result()["type"]
        except Exception as error:  # of any type: the answer of another service cannot be decoded
            raise _make_scheduler_error(address, error) from error
    if kind != "Scheduler":
        raise CurvlabError(f"{address} is the address of a {kind} of Dask; give the address of the scheduler")


def _make_scheduler_error(address: str, error: Exception) -> CurvlabError:
    if isinstance(error, TimeoutError):
        reason = f"no answer in {_CONNECT} seconds"
    elif isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError):
        reason = first_line(error)
    else:
        reason = "another service answers"
    return CurvlabError(
        f"cannot reach a Dask scheduler at {address} ({reason}); start one (dask scheduler), or run without --scheduler"
    )


class _Client(Client):
    """A client that is closed at once if it cannot connect, and never by the garbage collector.

    The garbage collector runs in any thread. If it closed a client in a thread that is starting the event loop of
    another client, it would wait for a lock that is released only after the start: a deadlock.
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


def _prepare_workers(
    client: Client,
    address: str,
    name: str,
    tasks: Sequence[Task],
    data: Mapping[str, str],
    called: Iterable[str],
) -> None:
    """Register a plugin that checks every worker, including workers that join later.

    Raises:
        CurvlabError: There is no worker, or one does not meet the requirements.
    """
    first = tasks[0]
    functions = sorted({*called, *(task["function"] for task in tasks)})
    requirements = Requirements(
        describe_software(), fingerprints(functions), functions, data, first["data_root"], first["offline"]
    )
    try:
        client.wait_for_workers(1, timeout=_CONNECT)
    except TimeoutError as error:
        raise CurvlabError(f"the scheduler {address} has no workers: start some (dask worker {address})") from error
    try:
        client.register_plugin(requirements, name=name)
    except Exception as error:  # of any type: the worker may not even have the module of the plugin
        raise CurvlabError(f"a worker of {address} cannot execute the runs: {first_line(error, 1000)}") from error

    for worker, fit in _ask_fitness(client, name).items():
        if not fit:  # its version of the plugin differs from the one below
            raise CurvlabError(
                f"worker {worker} has another version of curvlab: start the workers in the environment of the sweep"
            )


class Requirements(WorkerPlugin):
    """Requirements on a worker: the same versions and code, the functions, and the same data.

    Args:
        software: Software of this machine, as returned by ``curvlab.software.describe_software``.
        code: Fingerprints of the source files on this machine.
        functions: Functions of the runs, as ``module:name``.
        data: Names of data sets and files -> their fingerprints.
        data_root: Folder of the data sets; None for the default one.
        offline: Whether the data must not be downloaded.

    Attributes:
        fit: Whether the worker meets the requirements.
        fault: The requirement that it does not meet.
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
        """Check a worker; one that does not meet the requirements gets no runs.

        Raises:
            CurvlabError: The worker does not meet a requirement.
        """
        try:
            self._require(worker)
        except CurvlabError as error:  # Dask only logs it if the worker joins after the start
            self.fault = str(error)
            raise
        self.fit = True

    def _require(self, worker: Worker) -> None:
        # The code may be newer than what the servers of an earlier sweep have imported.
        processes.close_idle()
        forget_software()
        where = f"worker {worker.address} on {worker.name}" if worker.name != worker.address else worker.address
        theirs = describe_software()
        for package, ours in self.software["versions"].items():
            if theirs["versions"].get(package) != ours:
                raise CurvlabError(
                    f"{where} has {package} {theirs['versions'].get(package)}, and {ours} is needed: "
                    "start the workers in the environment of the sweep"
                )
        for name, here in fingerprints(self.functions).items():
            if self.code.get(name) != here:
                raise CurvlabError(
                    f"{where} has other source files of {name} than the process of the sweep: copy them to the worker"
                )
        for function in self.functions:
            try:
                find_function(function)
            except CurvlabError as error:
                raise CurvlabError(f"{where}: {error}") from error
        for name, fingerprint in self.data.items():
            try:
                root = None if self.data_root is None else Path(self.data_root)
                found = data_sets.fingerprint(name, root=root, offline=self.offline)
            except CurvlabError as error:
                raise CurvlabError(f"{where}: {error}") from error
            if found != fingerprint:
                raise CurvlabError(f"{where} has other data for {name!r}: give all workers the same --data-root")

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        """End the servers that start runs."""
        processes.close_idle()


def _make_remote_function(sweep: str) -> Callable[[str], Any]:
    """Return a function that executes a task on a fit worker, and returns the fault of any other worker.

    It is a local function, so that Dask sends its code to the worker, which may have another curvlab or none.
    """

    def run(task: str) -> Any:
        import json
        import time

        from distributed import get_worker

        worker = get_worker()
        plugin = worker.plugins.get(sweep)
        if not getattr(plugin, "fit", False):
            time.sleep(1)  # there may be no other worker at the moment
            return getattr(plugin, "fault", "") or f"worker {worker.address} has another version of curvlab, or none"
        from curvlab.grid.cluster import supervise_on_worker

        return supervise_on_worker(json.loads(task))

    return run


def supervise_on_worker(task: Task) -> Outcome:
    """Execute a run on the worker of the current Dask task, as long as the sweep waits for it."""
    worker = get_worker()
    key = worker.get_current_task()

    def is_wanted() -> bool:
        """Return whether the sweep still waits; the scheduler cancels the tasks of a killed sweep."""
        state = worker.state.tasks.get(key)
        return state is not None and state.state != "cancelled"

    return supervise(task, is_wanted)


def _make_lost_outcome(task: Task, error: BaseException) -> Outcome:
    """Return the outcome of a task whose workers have died; raise any other error, which stops the sweep."""
    if not isinstance(error, KilledWorker):
        raise error
    why = "every worker that executed it has died, most likely because memory ran out"
    return Outcome(task["key"], "killed", why, str(error))
