"""``python -m curvlab.sweep``: run a sweep, and look at what it has in its store."""

import sys

from curvlab.commandline.program import exit_code_of

PROGRAM = "python -m curvlab.sweep"

_USAGE = f"""\
usage: {PROGRAM} run CONFIG.yaml [OPTIONS]

commands:
  run CONFIG.yaml      run the cells of the sweep that its store does not have; the store is CONFIG.sqlite
  status STORE         how many cells are done, failed and absent
  failed STORE [CELL]  the failed cells and why; of one of them, the traceback
  export STORE         every record as CSV; --summary: means and standard deviations over the seeds

{PROGRAM} COMMAND --help shows the options of a command."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0 done, 1 cells have failed, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code_of(lambda: _main(given), "interrupted; the same command continues")


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    # Imported here: the help above needs neither.
    from curvlab.commandline.parser import did_you_mean
    from curvlab.commandline.program import report_errors
    from curvlab.sweep.commands import COMMANDS

    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        print(
            f"error: there is no command {name!r}{did_you_mean(name, COMMANDS)} ({PROGRAM} lists them all)",
            file=sys.stderr,
        )
        return 2
    return report_errors(lambda: COMMANDS[name](rest, f"{PROGRAM} {name}"), debug="--debug" in rest)


if __name__ == "__main__":
    sys.exit(main())
