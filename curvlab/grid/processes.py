"""Processes for cells: forked, within milliseconds, from one that has torch behind it, and watched to their end.

The standard library's fork server would do, but for three things: it starts no children in Dask's workers, which are
daemonic; every child runs the program's main module again; and it does not tell how much memory a child has taken,
which of one that was killed is what matters. The server is this module run as a program, with one socket to it. For
each cell it is sent three descriptors: a socket, on which the child receives the request and answers; a pipe, to
which the server writes the child's process id and, when it has ended, how, and its peak of memory; and a pipe for what
the child writes to its console.
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
_LOOK = 0.5  # seconds between two looks at whether a cell is still wanted
_PATIENCE = 2.0  # seconds for the end of a server, which may be importing something
# What torch's optimizers import at their first step, for more than a second, and what digits are read with.
_PRELOADED = ("curvlab.grid.cell", "torch._dynamo", "sklearn.datasets")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        answer: What it sent; None if it sent nothing.
        code: Its exit code, or minus the number of the signal that ended it.
        peak_bytes: The peak of its memory.
        seconds: Its wall time.
        stopped: Why it was killed here: ``timeout``, ``unwanted`` or ``orphaned`` (what starts the processes has
            ended, which is then not known of this one).
    """

    answer: bytes | None
    code: int
    peak_bytes: int | None
    seconds: float
    stopped: str | None = None


class Server:
    """A process that has imported what cells need and forks one for each of them.

    Args:
        threads: Of the libraries that count them when they are loaded.
        modules: What is imported beforehand.

    Attributes:
        running: How many cells it has, counted by those who give them to it.
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
            # -P: what is in the current folder has no precedence. Not -m, which would load this module twice.
            [sys.executable, "-P", "-c", f"import {__name__} as p; p.main()", str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # ours is for tables, not for what a module prints when it is imported
            env={**os.environ, **count, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the one that runs the sweep
        )
        theirs.close()

    def alive(self) -> bool:
        """Say whether it can start processes."""
        return self._process.poll() is None and self._socket.fileno() >= 0

    def close(self) -> None:
        """End it, and all that it has started."""
        with self._lock:
            self._socket.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, request: bytes, file: Path, timeout: float | None, wanted: Callable[[], bool]) -> Ended:
        """Do a request in a process of its own.

        Args:
            request: What the process is sent.
            file: Where the beginning and the end of what it writes to its console are kept; none if it writes nothing.
            timeout: Seconds from its start after which it is killed.
            wanted: Asked twice a second; it is killed when it is not.

        Raises:
            ConnectionError: The server has ended before it could start one.
            OSError: It could not start one.
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
                raise ConnectionError("the process that starts the cells has ended")
            if pid[0] < 0:
                raise OSError(-pid[0], os.strerror(-pid[0]))
            started = time.perf_counter()
            try:
                with suppress(OSError):  # it has ended already, which is then what there is to say
                    connection.send_bytes(request)
                answer, stopped = _watched(connection, end.fileno(), output, timeout, wanted)
                if stopped:
                    _kill(pid[0])
                seconds = time.perf_counter() - started
                status = _read(end.fileno(), _END)
            except BaseException:
                _kill(pid[0])
                raise
        if status is None:  # the server was killed, which leaves the process behind
            _kill(pid[0])
            return Ended(answer, -signal.SIGKILL, None, seconds, stopped or (None if answer else "orphaned"))
        return Ended(answer, os.waitstatus_to_exitcode(status[0]), status[1], seconds, stopped)


def _watched(
    connection: Connection, end: int, output: Output, timeout: float | None, wanted: Callable[[], bool]
) -> tuple[bytes | None, str | None]:
    """Wait for the answer of a process, its end, its time, or until it is not wanted; say which of the last two."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    look = time.monotonic() + _LOOK
    watched: list[Connection | int] = [connection, end, output.descriptor]
    while True:
        ready: Sequence[object] = wait(watched, max(min(look, deadline) - time.monotonic(), 0.0))
        if output.descriptor in ready and not output.read():
            watched.remove(output.descriptor)  # nothing can write there any more
        if connection in ready:
            try:
                return connection.recv_bytes(), None
            except (EOFError, OSError):
                return None, None
        if end in ready:
            return None, None
        if time.monotonic() >= deadline:
            return None, "timeout"
        if time.monotonic() >= look:
            look = time.monotonic() + _LOOK
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
    """Kill a process and those that it has started."""
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


# In the server -------------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Fork a process for each message until the other end is closed; then kill those that still run."""
    from curvlab.grid.cell import work

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only a handler makes it wake up
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    running: dict[int, int] = {}  # process id -> where to say how it ended
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
            faulthandler.enable()  # a crash is then told in what the cell has written
            code = 1
            try:
                work(Connection(theirs), output)
                code = 0
            finally:
                os._exit(code)  # none of what the server has to do at its end
        with suppress(OSError):
            os.setpgid(pid, pid)  # here too: whoever is first
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
        _kill(pid)  # what it has started and left behind
        peak = usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        with suppress(OSError):  # whoever wanted to know has ended
            os.write(end, _END.pack(status, peak))
        os.close(end)


def main() -> None:
    """Import what cells need, and serve."""
    for module in sys.argv[2:]:
        with suppress(Exception):  # a cell will tell it better
            import_module(module)
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # at Python's own end some libraries print what they have not tidied up


# The servers of this process -----------------------------------------------------------------------------------------

_servers: dict[tuple[int, str, str], Server] = {}  # by number of threads, module and code
_lock = threading.Lock()


def run(
    function: str,
    threads: int,
    code: str,
    request: bytes,
    file: Path,
    timeout: float | None,
    wanted: Callable[[], bool],
) -> Ended:
    """Do a request for a function in a process of its own; the first one starts the server.

    Args:
        function: ``module:name``; its module is imported beforehand.
        threads: Of the process.
        code: What is known of the code: a server that has imported another one is not used.
        request: As ``Server.run`` takes it, and all that follows.
        file: Likewise.
        timeout: Likewise.
        wanted: Likewise.

    Raises:
        CurvlabError: No process can be started.
    """
    module = function.partition(":")[0]
    name = threads, module, code
    ended = None
    for _ in range(2):  # a server may have been killed: memory is short where cells are
        if not wanted():
            return Ended(None, 0, None, 0.0, "unwanted")
        with _lock:
            server = _servers.get(name)
            if server is None or not server.alive():
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
                f"no process can be started for a cell: {error.strerror}; are too many at work?"
            ) from error
        finally:
            with _lock:
                server.running -= 1
        with _lock:  # it has ended, even if that is not yet to be seen of the process
            if _servers.get(name) is server:
                del _servers[name]
    if ended is not None:
        return ended
    if not wanted():
        return Ended(None, 0, None, 0.0, "unwanted")
    raise CurvlabError(
        "the process that starts the cells has ended twice without starting one; "
        f"is there memory left, and can {module} be imported?"
    )


def close_idle() -> None:
    """End the servers of this process that have no cell running."""
    with _lock:
        for key in [key for key, server in _servers.items() if not server.running]:
            _servers.pop(key).close()


def close() -> None:
    """End the servers of this process."""
    with _lock:
        while _servers:
            _servers.popitem()[1].close()
