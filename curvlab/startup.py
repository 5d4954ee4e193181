"""Ctrl-C while a program loads what it needs, which takes seconds: one line instead of a traceback from the middle."""

import os
import signal
import sys
import threading
from pathlib import Path

_PROGRAMS = ("curvlab", "curvlab.analyze", "curvlab.sweep")


def _program() -> bool:
    """Return whether Python was started for one of the programs of this package, by its name or with ``-m``."""
    if sys.argv[:1] == ["-m"]:  # as long as the module is looked for
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return bool(after) and after[0] in _PROGRAMS
    # Not of sys.argv, which the processes that a program starts have, too.
    return [Path(path).name for path in sys.orig_argv[1:2]] == ["curvlab"]


def _stop(*_: object) -> None:
    # Nothing is begun that would have to be given back; an exception may be caught by what is half loaded.
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def wait_for_program() -> None:
    """End at Ctrl-C with one line and exit code 130 until ``begin_program``, if this is a program and not a library."""
    if (
        _program()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _stop)


def begin_program() -> None:
    """Have Ctrl-C raise ``KeyboardInterrupt`` again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
