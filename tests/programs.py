"""Programs in their own processes, forked from a process that has imported torch, which takes seconds.

Each behaves like ``python -m MODULE`` or ``python -c SCRIPT`` in everything that a test observes: console, folder,
signals and exit code. So does the server of its runs, which is forked before the program starts threads or
differentiates anything.
"""

import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_NUMBER = struct.Struct("q")


class Program:
    """A program that runs or has ended.

    Args:
        end: Pipe with the process id of the program and, when it has ended, its wait status.
        out: File with its standard output; None if nobody reads it.
        err: File with its standard error.
    """

    def __init__(self, end: IO[bytes], out: IO[str] | None, err: IO[str]) -> None:
        self._end, self._out, self._err = end, out, err
        (self.pid,) = _NUMBER.unpack(end.read(_NUMBER.size))

    def send_signal(self, sign: int) -> None:
        os.kill(self.pid, sign)

    def wait(self) -> tuple[int, str, str]:
        """Wait until it ends, and return its exit code (or minus the signal that killed it), output and errors."""
        (status,) = _NUMBER.unpack(self._end.read(_NUMBER.size))
        self._end.close()
        texts = []
        for file in (self._out, self._err):
            if file is None:
                texts.append("")
            else:
                with file:
                    file.seek(0)
                    texts.append(file.read())
        return (os.waitstatus_to_exitcode(status), *texts)


class Starter:
    """The process that programs are forked from; it starts with the first program."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], before: str = "", unread: bool = False) -> Program:
        """Start a program.

        Args:
            command: Arguments of ``python``: ``-m`` and a module, or ``-c`` and a script, and further arguments.
            before: Script to execute first, in the process of the program and in those of its runs; the variable
                ``PROGRAM`` is the process id of the program.
            unread: Whether its standard output is a pipe that nobody reads.
        """
        if self._process is None:
            self._socket, theirs = socket.socketpair()
            path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
            script = f"import sys, {__name__} as p; sys.exit(p.serve({theirs.fileno()})())"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", script],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            theirs.close()
        request = {"command": list(command), "before": before, "cwd": str(Path.cwd()), "environment": dict(os.environ)}
        ending, ended = os.pipe()
        reading, writing = os.pipe()
        out = None if unread else tempfile.TemporaryFile("w+")  # noqa: SIM115 - the program's, as the next
        err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        os.close(reading)
        descriptors = [writing if out is None else out.fileno(), err.fileno(), ended]
        with tempfile.TemporaryFile() as content:  # a message of a socket may come in pieces
            content.write(json.dumps(request).encode())
            content.flush()
            socket.send_fds(self._socket, [b"."], [content.fileno(), *descriptors])
        os.close(writing)
        os.close(ended)
        return Program(os.fdopen(ending, "rb"), out, err)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._socket.close()
            self._process.wait()


# In that process -----------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> Callable[[], object]:
    """Fork a process for each request; return the work of the child in the child, and a no-op at the end here."""
    from curvlab.analyze.frame import command  # noqa: F401
    from curvlab.analyze.masq import fim_diagonality  # noqa: F401
    from curvlab.grid import processes

    for module in processes._PRELOADED:
        __import__(module)
    control = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 1, 4)
        if not message:
            with suppress(ChildProcessError):
                while True:
                    os.wait()  # so that their CPU time is counted as its own
            return lambda: None
        content, out, err, end = descriptors
        if os.fork():
            for number in descriptors:
                os.close(number)
            continue
        control.close()
        pid = os.fork()
        if pid:  # this process reports the exit of the program
            os.write(end, _NUMBER.pack(pid))
            os.write(end, _NUMBER.pack(os.waitpid(pid, 0)[1]))
            os._exit(0)
        with os.fdopen(content, "rb") as file:
            file.seek(0)
            request = json.loads(file.read())
        os.dup2(out, 1)
        os.dup2(err, 2)
        for number in (out, err, end):
            os.close(number)
        # The old objects belong to a file where there may be a pipe now.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(request["before"], {"PROGRAM": os.getpid()})
        processes.Server = _fork_server(processes)
        return lambda: _run(*request["command"])


def _run(kind: str, what: str, *arguments: str) -> None:
    """Do what ``python`` does with these arguments."""
    sys.argv[:] = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _fork_server(processes: object) -> type:
    """Fork a server of runs now, and return a ``Server`` class whose first instance uses it."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        processes.serve(theirs)
        os._exit(0)
    theirs.close()
    left = [(ours, pid)]

    class Server(processes.Server):
        def __init__(self, threads: int, modules: Sequence[str]) -> None:
            if not left:
                super().__init__(threads, modules)
                return
            self._socket, pid = left.pop()
            self._lock, self.running, self._process = threading.Lock(), 0, _Forked(pid)

    return Server


class _Forked:
    """The part of ``Popen`` that a server uses."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended = pid, False

    def poll(self) -> int | None:
        if not self._ended:
            self._ended = os.waitpid(self._pid, os.WNOHANG)[0] != 0
        return 0 if self._ended else None

    def wait(self, timeout: float | None = None) -> None:
        if not self._ended:
            os.waitpid(self._pid, 0)
            self._ended = True
