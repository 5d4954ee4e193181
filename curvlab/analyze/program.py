"""How a program of commands ends: with an exit code, and without a traceback for what its caller does to it."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable

from curvlab.startup import begin_program

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def ended(program: Callable[[], int], interrupted: str = "interrupted") -> int:
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
