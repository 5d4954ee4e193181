"""``python -m curvlab.analyze``: list the analyses, or run one."""

import sys
from importlib import import_module

from curvlab.analyze import ANALYSES
from curvlab.analyze.program import ended

PROGRAM = "python -m curvlab.analyze"


def main(arguments: list[str] | None = None) -> int:
    """Run an analysis by name and return the exit code: 0 done, 1 cells have failed, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: _main(given))


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} ANALYSIS [OPTIONS]\n\nanalyses:")
        width = max(map(len, ANALYSES))
        for name, line in ANALYSES.items():
            print(f"  {name:{width}}  {line}")
        print(f"\n{PROGRAM} ANALYSIS --help shows the options of an analysis.")
        return 0
    # Imported here, as the analysis is: the list needs neither.
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
