"""``python -m curvlab.analyze``: list the analyses, or run one."""

import io
import os
import signal
import sys
from importlib import import_module

from curvlab.analyze import ANALYSES

PROGRAM = "python -m curvlab.analyze"


def main(arguments: list[str] | None = None) -> int:
    """Run an analysis by name and return the exit code: 0 done, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have the plus-minus sign
    try:
        code = _main(given)
        if sys.stdout is not None:  # it is None where the caller has closed it
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print("interrupted", *getattr(interrupt, "__notes__", ()), sep="\n", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has left (| head): not an error, and Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} ANALYSIS [OPTIONS]\n\nanalyses:")
        width = max(map(len, ANALYSES))
        for name, line in ANALYSES.items():
            print(f"  {name:{width}}  {line}")
        print(f"\n{PROGRAM} ANALYSIS --help shows the options of an analysis.")
        return 0
    # Imported here, as the analysis is: Ctrl-C may come while they are, and the list needs neither.
    from curvlab.analyze.command import execute, nearest

    name, rest = given[0], given[1:]
    if name not in ANALYSES:
        print(
            f"error: there is no analysis {name!r}; the nearest is {nearest(name, ANALYSES)!r} "
            f"({PROGRAM} lists them all)",
            file=sys.stderr,
        )
        return 2
    return execute(import_module(f"curvlab.analyze.{name}").ANALYSIS, rest, f"{PROGRAM} {name}")


if __name__ == "__main__":
    sys.exit(main())
