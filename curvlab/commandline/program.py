"""How a command ends: with an exit code, and with one sentence in place of a traceback."""

import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from curvlab.errors import CurvlabError
from curvlab.startup import begin_program
from curvlab.text import readable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class RunsFailed(CurvlabError):
    """The work is at its end, but some of its runs have failed."""


def exit_code_of(program: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a program.

    Args:
        program: Returns its exit code.
        interrupted: What is said after Ctrl-C.

    Returns:
        The exit code: that of the program, 0 too if nobody reads its output any more; 2 if the output cannot be
        written, and 130 after Ctrl-C.
    """
    begin_program()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have the plus-minus sign
    try:
        code = program()
        if sys.stdout is not None:  # it is None where the caller has closed it
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(interrupted, *getattr(interrupt, "__notes__", ()), sep="\n", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        left = isinstance(error, BrokenPipeError)  # the reader of our output (| head): not an error
        if not left and (error.errno not in _FULL or error.filename is not None):
            raise
        # Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if left:
            return 0
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    return code


def report_errors(action: Callable[[], int | None], debug: bool) -> int:
    """Do something, and turn an error into one sentence on standard error.

    Returns:
        The exit code: that of the action or 0; 1 if only runs have failed, 2 for any other error.
    """
    try:
        return action() or 0
    except CurvlabError as error:
        if debug:
            traceback.print_exc()
        print("error:", readable(" ".join(str(error).split())), file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(readable(note), file=sys.stderr)
        return 1 if isinstance(error, RunsFailed) else 2
    except (MemoryError, RuntimeError) as error:
        # What torch raises has no class of its own on the CPU.
        if debug or not (isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error))):
            raise
        size = re.search(r"[\d.]+ ?(?:bytes|.iB)", str(error))
        what = f" for an array of {size[0]}" if size else ""
        print(f"error: there is not enough memory{what}; take a smaller network or fewer samples", file=sys.stderr)
        return 2
