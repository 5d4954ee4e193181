"""Exit codes of commands, and error messages of one sentence in place of tracebacks."""

import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from curvlab.errors import CurvlabError
from curvlab.startup import restore_interrupt
from curvlab.text import to_printable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class RunsFailed(CurvlabError):
    """The command has finished, but some runs have failed."""


def run_program(program: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a program and return its exit code.

    Args:
        program: Function that returns the exit code.
        interrupted: Message after Ctrl-C.

    Returns:
        The exit code of the program; 0 if the reader of its output has gone, 2 if the output cannot be written, and
        130 after Ctrl-C.
    """
    restore_interrupt()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters such as the plus-minus sign
    try:
        code = program()
        if sys.stdout is not None:  # it is None if the caller has closed it
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(interrupted, *getattr(interrupt, "__notes__", ()), sep="\n", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        reader_gone = isinstance(error, BrokenPipeError)  # as with | head, which is not an error
        if not reader_gone and (error.errno not in _FULL or error.filename is not None):
            raise
        # Python must not raise the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if reader_gone:
            return 0
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    return code


def report_errors(action: Callable[[], int | None], debug: bool) -> int:
    """Call an action, and print an error as one sentence on standard error.

    Args:
        action: Function that returns an exit code, or None for 0.
        debug: Whether to print the traceback as well.

    Returns:
        The exit code of the action; 1 if runs have failed, 2 for any other error.
    """
    try:
        return action() or 0
    except CurvlabError as error:
        if debug:
            traceback.print_exc()
        print("error:", to_printable(" ".join(str(error).split())), file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(to_printable(note), file=sys.stderr)
        return 1 if isinstance(error, RunsFailed) else 2
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch raises a plain RuntimeError when memory runs out.
        if debug or not (isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error))):
            raise
        size = re.search(r"[\d.]+ ?(?:bytes|.iB)", str(error))
        what = f" for an array of {size[0]}" if size else ""
        print(f"error: not enough memory{what}; use a smaller network or fewer samples", file=sys.stderr)
        return 2
