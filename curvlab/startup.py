"""Handling of Ctrl-C during the imports of a program, which take seconds: one line instead of a traceback."""

import os
import signal
import sys
import threading
from pathlib import Path

_PROGRAMS = ("curvlab", "curvlab.analyze", "curvlab.sweep")


def _is_program() -> bool:
    """Return whether Python was started for a program of this package, by its name or with ``-m``."""
    if sys.argv[:1] == ["-m"]:  # while Python locates the module
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return bool(after) and after[0] in _PROGRAMS
    # Not from sys.argv, which the child processes of a program have, too.
    return [Path(path).name for path in sys.orig_argv[1:2]] == ["curvlab"]


def _exit(*_: object) -> None:
    # There is nothing to clean up yet, and a module that is being imported may catch an exception.
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def handle_interrupt() -> None:
    """Let Ctrl-C exit with one line and code 130 until ``restore_interrupt``; do nothing outside a program."""
    if (
        _is_program()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _exit)


def restore_interrupt() -> None:
    """Let Ctrl-C raise ``KeyboardInterrupt`` again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
