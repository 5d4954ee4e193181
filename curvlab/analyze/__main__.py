"""``python -m curvlab.analyze``: list the analyses, or run one."""

import sys

from curvlab.analyze import ANALYSES, load_analysis
from curvlab.commandline.program import run_program

PROGRAM = "python -m curvlab.analyze"


def main(arguments: list[str] | None = None) -> int:
    """Run an analysis by name and return the exit code: 0 done, 1 runs failed, 2 invalid input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_program(lambda: _main(given))


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} ANALYSIS [OPTIONS]\n\nanalyses:")
        width = max(map(len, ANALYSES))
        for name, entry in ANALYSES.items():
            print(f"  {name:{width}}  {entry.question}")
        print(f"\n{PROGRAM} ANALYSIS --help shows the options of an analysis.")
        return 0
    # Imported here because the list of analyses needs neither of them.
    from curvlab.analyze.frame.command import execute
    from curvlab.text import did_you_mean

    name, rest = given[0], given[1:]
    if name not in ANALYSES:
        print(
            f"error: unknown analysis {name!r}{did_you_mean(name, ANALYSES)} ({PROGRAM} lists all analyses)",
            file=sys.stderr,
        )
        return 2
    return execute(load_analysis(name), rest, f"{PROGRAM} {name}")


if __name__ == "__main__":
    sys.exit(main())
