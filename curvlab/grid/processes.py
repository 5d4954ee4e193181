"""Processes of runs: forked in milliseconds from a server that has imported torch, and watched until they end.

The fork server of the standard library has three drawbacks: it starts no children in the workers of Dask, which are
daemonic; every child executes the main module of the program again; and it does not report the peak memory of a
child, which matters most for a killed one. The server here is this module executed as a program, with one socket to
it. For each run it receives three descriptors: a socket, on which the child receives the request and sends its
answer; a pipe, to which the server writes the process id of the child and later its wait status and peak memory; and
a pipe for the console output of the child.
"""

import faulthandler
import gc
import math
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path

from curvlab.errors import CurvlabError
from curvlab.grid.output import Output

_PID = struct.Struct("q")
_END = struct.Struct("qq")  # wait status, peak memory in bytes
_CHECK_INTERVAL = 0.5  # seconds between two checks whether a run is still wanted
_CLOSE_TIMEOUT = 2.0  # seconds that a server has to end; it may be importing a module
# The first step of torch's optimizers imports torch._dynamo, which takes more than a second; the digits need sklearn.
_PRELOADED = ("curvlab.grid.run_process", "torch._dynamo", "sklearn.datasets")


@dataclass(frozen=True)
class ProcessEnd:
    """End of a process.

    Attributes:
        answer: Answer of the process; None if it sent nothing.
        code: Exit code, or minus the number of the signal that ended the process.
        peak_bytes: Peak memory.
        seconds: Wall time.
        stopped: Reason for which the process was killed here: ``timeout``, ``unwanted`` or ``orphaned`` (the server
            has ended, so that the exit code is unknown); None if it was not.
    """

    answer: bytes | None
    code: int
    peak_bytes: int | None
    seconds: float
    stopped: str | None = None


class Server:
    """A process that has imported what runs need, and forks one process per run.

    Args:
        threads: Number of threads of the libraries that read it from the environment when they are loaded.
        modules: Modules to import beforehand.

    Attributes:
        running: Number of runs in progress, counted by the callers.
    """

    def __init__(self, threads: int, modules: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        count = dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), str(threads)
        )
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._socket, self._lock = ours, threading.Lock()
        self.running = 0
        self._process = subprocess.Popen(
            # -P: modules in the current folder have no precedence. Not -m, which would load this module twice.
            [sys.executable, "-P", "-c", f"import {__name__} as p; p.main()", str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # standard output is for tables, not for messages of imported modules
            env={**os.environ, **count, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the process that runs the sweep
        )
        theirs.close()

    def is_alive(self) -> bool:
        """Return whether the server can start processes."""
        return self._process.poll() is None and self._socket.fileno() >= 0

    def close(self) -> None:
        """End the server and all processes that it has started."""
        with self._lock:
            self._socket.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, request: bytes, file: Path, timeout: float | None, wanted: Callable[[], bool]) -> ProcessEnd:
        """Execute a request in a new process.

        Args:
            request: Request that is sent to the process.
            file: File for the beginning and the end of its console output; not created without output.
            timeout: Seconds after its start at which the process is killed; None for no limit.
            wanted: Called twice a second; the process is killed if it returns False.

        Raises:
            ConnectionError: The server ended before it could start the process.
            OSError: The server could not start the process.
        """
        ours, theirs = socket.socketpair()
        ending, ended = os.pipe()
        reading, writing = os.pipe()
        with (
            Connection(ours.detach()) as connection,
            os.fdopen(ending, "rb") as end,
            os.fdopen(reading, "rb"),
            closing(Output(reading, file)) as output,
        ):
            try:
                with self._lock:
                    socket.send_fds(self._socket, [b"."], [theirs.fileno(), ended, writing])
            finally:
                theirs.close()
                os.close(ended)
                os.close(writing)
            pid = _read(end.fileno(), _PID)
            if pid is None:
                raise ConnectionError("the process that starts the runs has ended")
            if pid[0] < 0:
                raise OSError(-pid[0], os.strerror(-pid[0]))
            started = time.perf_counter()
            try:
                with suppress(OSError):  # it has ended already; its exit code tells the rest
                    connection.send_bytes(request)
                answer, stopped = _watch(connection, end.fileno(), output, timeout, wanted)
                if stopped:
                    _kill(pid[0])
                seconds = time.perf_counter() - started
                status = _read(end.fileno(), _END)
            except BaseException:
                _kill(pid[0])
                raise
        if status is None:  # the server was killed, and the process may still run
            _kill(pid[0])
            return ProcessEnd(answer, -signal.SIGKILL, None, seconds, stopped or (None if answer else "orphaned"))
        return ProcessEnd(answer, os.waitstatus_to_exitcode(status[0]), status[1], seconds, stopped)


def _watch(
    connection: Connection, end: int, output: Output, timeout: float | None, wanted: Callable[[], bool]
) -> tuple[bytes | None, str | None]:
    """Wait for an answer, the end, the timeout, or ``wanted`` to be False; return the answer and why to kill it."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    next_check = time.monotonic() + _CHECK_INTERVAL
    watched: list[Connection | int] = [connection, end, output.descriptor]
    while True:
        ready: Sequence[object] = wait(watched, max(min(next_check, deadline) - time.monotonic(), 0.0))
        if output.descriptor in ready and not output.read():
            watched.remove(output.descriptor)  # all writers have closed the pipe
        if connection in ready:
            try:
                return connection.recv_bytes(), None
            except (EOFError, OSError):
                return None, None
        if end in ready:
            return None, None
        if time.monotonic() >= deadline:
            return None, "timeout"
        if time.monotonic() >= next_check:
            next_check = time.monotonic() + _CHECK_INTERVAL
            if not wanted():
                return None, "unwanted"


def _read(descriptor: int, form: struct.Struct) -> tuple[int, ...] | None:
    content = b""
    while len(content) < form.size:
        piece = os.read(descriptor, form.size - len(content))
        if not piece:
            return None
        content += piece
    return form.unpack(content)


def _kill(pid: int) -> None:
    """Kill a process and the processes that it has started."""
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


# In the server -------------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Fork a process for each message until the other end is closed; then kill the remaining processes."""
    from curvlab.grid.run_process import execute_request

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler the signal would not wake the loop
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    running: dict[int, int] = {}  # process id -> pipe for its wait status
    gc.collect()
    gc.freeze()
    while True:
        ready: Sequence[object] = wait([control, woken])
        if woken in ready:
            with suppress(BlockingIOError):
                os.read(woken, 4096)
            _reap(running)
        if control not in ready:
            continue
        message, descriptors, *_ = socket.recv_fds(control, 1, 3)
        if not message:
            break
        theirs, end, output = descriptors
        try:
            pid = os.fork()
        except OSError as error:  # no memory, or too many processes
            os.write(end, _PID.pack(-(error.errno or 1)))
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        if pid == 0:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            control.close()
            for descriptor in (woken, wake, end, *running.values()):
                os.close(descriptor)
            faulthandler.enable()  # a crash writes its traceback to the output of the run
            code = 1
            try:
                execute_request(Connection(theirs), output)
                code = 0
            finally:
                os._exit(code)  # skip the exit handlers of the server
        with suppress(OSError):
            os.setpgid(pid, pid)  # in the parent too, since either may be first
        os.close(theirs)
        os.close(output)
        running[pid] = end
        with suppress(OSError):
            os.write(end, _PID.pack(pid))
    for pid in running:
        _kill(pid)


def _reap(running: dict[int, int]) -> None:
    while running:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        end = running.pop(pid, None)
        if end is None:
            continue
        _kill(pid)  # processes that it has started and left behind
        peak = usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        with suppress(OSError):  # the caller has ended
            os.write(end, _END.pack(status, peak))
        os.close(end)


def main() -> None:
    """Import the modules that runs need, and serve."""
    for module in sys.argv[2:]:
        with suppress(Exception):  # the run reports the error better
            import_module(module)
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # some libraries print messages in their exit handlers


# The servers of this process -----------------------------------------------------------------------------------------

_servers: dict[tuple[int, str, str], Server] = {}  # by number of threads, module and fingerprints of the code
_lock = threading.Lock()


def run(
    function: str,
    threads: int,
    code: str,
    request: bytes,
    file: Path,
    timeout: float | None,
    wanted: Callable[[], bool],
) -> ProcessEnd:
    """Execute a request for a function in a new process; the first request starts a server.

    Args:
        function: ``module:name``; the server imports the module beforehand.
        threads: Number of threads of the process.
        code: Fingerprints of the code; a server that has imported other code is not used.
        request: As for ``Server.run``.
        file: As for ``Server.run``.
        timeout: As for ``Server.run``.
        wanted: As for ``Server.run``.

    Raises:
        CurvlabError: No process can be started.
    """
    module = function.partition(":")[0]
    name = threads, module, code
    ended = None
    for _ in range(2):  # the server may have been killed for want of memory
        if not wanted():
            return ProcessEnd(None, 0, None, 0.0, "unwanted")
        with _lock:
            server = _servers.get(name)
            if server is None or not server.is_alive():
                server = _servers[name] = Server(threads, [*_PRELOADED, module])
            server.running += 1
        try:
            ended = server.run(request, file, timeout, wanted)
            if ended.stopped != "orphaned":
                return ended
        except ConnectionError:
            pass
        except OSError as error:
            if not wanted():
                break
            raise CurvlabError(
                f"cannot start a process for a run: {error.strerror}; end other processes, or use fewer --jobs"
            ) from error
        finally:
            with _lock:
                server.running -= 1
        with _lock:  # it has ended, even if poll does not show it yet
            if _servers.get(name) is server:
                del _servers[name]
    if ended is not None:
        return ended
    if not wanted():
        return ProcessEnd(None, 0, None, 0.0, "unwanted")
    raise CurvlabError(
        "the process that starts the runs has ended twice without starting one; "
        f"check that there is memory left and that {module} can be imported"
    )


def close_idle() -> None:
    """End the servers of this process that have no run in progress."""
    with _lock:
        for key in [key for key, server in _servers.items() if not server.running]:
            _servers.pop(key).close()


def close() -> None:
    """End the servers of this process."""
    with _lock:
        while _servers:
            _servers.popitem()[1].close()
