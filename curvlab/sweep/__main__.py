"""``python -m curvlab.sweep``: run a sweep, and show or export the contents of its store."""

import sys

from curvlab.commandline.program import run_program

PROGRAM = "python -m curvlab.sweep"

_USAGE = f"""\
usage: {PROGRAM} run CONFIG.yaml [OPTIONS]

commands:
  run CONFIG.yaml      execute the runs of the sweep that its store, CONFIG.sqlite, does not have
  status STORE         show how many runs are done, failed and absent
  failed STORE [KEY]   list the failed runs with their errors; with a KEY, show one with its traceback
  export STORE         print all records as CSV; --summary: means and standard deviations over the seeds

{PROGRAM} COMMAND --help shows the options of a command."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0 done, 1 runs have failed, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_program(lambda: _run_command(given), "interrupted; the same command continues")


def _run_command(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    # Imported here, since the help above does not need them.
    from curvlab.commandline.program import report_errors
    from curvlab.sweep.commands import COMMANDS
    from curvlab.text import did_you_mean

    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        print(
            f"error: unknown command {name!r}{did_you_mean(name, COMMANDS)} ({PROGRAM} lists all commands)",
            file=sys.stderr,
        )
        return 2
    return report_errors(lambda: COMMANDS[name](rest, f"{PROGRAM} {name}"), debug="--debug" in rest)


if __name__ == "__main__":
    sys.exit(main())
