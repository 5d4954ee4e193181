"""Commands of ``python -m curvlab.sweep``."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import ClassVar, TypeVar

from curvlab import grid
from curvlab.commandline.config import Config
from curvlab.commandline.console import make_console
from curvlab.commandline.options import EXIT_CODES, GridOptions
from curvlab.commandline.parser import Parser, option_name, select_fields, validate
from curvlab.errors import CurvlabError
from curvlab.grid import report
from curvlab.grid.functions import find_function
from curvlab.sweep import config


class SweepOptions(GridOptions):
    """Options of ``run``."""

    out: Path | None = None
    """Folder for the store CONFIG.sqlite. Without it, the folder of CONFIG.yaml."""
    debug: bool = False
    """Show the traceback of an error."""


class StoreOptions(Config):
    """Options of ``status`` and ``failed``."""

    debug: bool = False
    """Show the traceback of an error."""


class ExportOptions(StoreOptions):
    """Options of ``export``."""

    titles: ClassVar[dict[str, str]] = {"to": "table"}

    to: Path | None = None
    """File for the table, .csv or .parquet. Without it, the table is printed as CSV."""
    summary: bool = False
    """Export means and standard deviations over the seeds instead of all records."""
    by: tuple[str, ...] = ()
    """Record keys that define the rows of the summary, beside the axes and every key with string values."""
    values: tuple[str, ...] | None = None
    """Record keys of the numbers in the summary; none means all."""


C = TypeVar("C", bound=Config)


def run(arguments: list[str], program: str) -> int:
    """Execute the runs of a sweep that its store does not have, and show their status."""
    given = _parse(SweepOptions(), run, arguments, program, ["CONFIG.yaml"])
    if given is None:
        return 0
    options, (name,) = given
    file = Path(name)
    specs = config.read(file)
    with redirect_stdout(sys.stderr):  # messages of imported modules must not be mixed with the output
        for function in {spec.function for spec in specs}:
            find_function(function)
    store = (options.out or file.parent) / f"{file.stem}.sqlite"
    tally = options.run(specs, store)
    with grid.read_store(store) as opened:
        report.print_status(make_console(), opened)
        report.print_failures(make_console(), opened)
    make_console().print(f"Saved in {store}.", markup=False, highlight=False, soft_wrap=True)
    return 1 if tally["failed"] else 0


def status(arguments: list[str], program: str) -> int:
    """Show how many runs are done, failed and absent."""
    given = _parse(StoreOptions(), status, arguments, program, ["STORE"])
    if given is not None:
        with grid.read_store(Path(given[1][0])) as store:
            report.print_status(make_console(), store)
    return 0


def list_failed(arguments: list[str], program: str) -> int:
    """List the failed runs with their errors; with a KEY, show one with its traceback."""
    given = _parse(StoreOptions(), list_failed, arguments, program, ["STORE", "[KEY]"])
    if given is not None:
        with grid.read_store(Path(given[1][0])) as store:
            if given[1][1:]:
                report.print_failure(make_console(), store, given[1][1])
            else:
                report.print_failures(make_console(), store)
    return 0


def export(arguments: list[str], program: str) -> int:
    """Export the records of a store, with their configurations, or a summary of them."""
    given = _parse(ExportOptions(), export, arguments, program, ["STORE"])
    if given is None:
        return 0
    options, (name,) = given
    if not options.summary and (options.by or options.values):
        raise CurvlabError("--by and --values need --summary; add it")
    if options.to is not None and options.to.exists() and options.to.samefile(name):
        raise CurvlabError(f"{options.to} is the store itself; choose another file for the table")
    with grid.read_store(Path(name)) as store:
        table = store.summary(options.by, options.values) if options.summary else store.table()
    if options.to is None:
        print(report.write_csv(table), end="")
    else:
        report.save(table, options.to)
    return 0


#: Name -> command, a function of the arguments after the name and the name of the program.
COMMANDS: dict[str, Callable[[list[str], str], int]] = {
    "run": run,
    "status": status,
    "failed": list_failed,
    "export": export,
}


def _parse(
    defaults: C, command: Callable[[list[str], str], int], arguments: list[str], program: str, names: list[str]
) -> tuple[C, list[str]] | None:
    """Return the options and the positional arguments; print the help and return None if it is asked for.

    Raises:
        CurvlabError: An argument is missing or unknown, or an option has an invalid value.
    """
    words = list(arguments)
    files: list[str] = []
    while words and not words[0].startswith("-") and len(files) < len(names):
        files.append(words.pop(0))
    usage = f"{program} {' '.join(names)}"
    parser = Parser(usage, str(command.__doc__))
    parser.epilog = EXIT_CODES
    parser.add(defaults)
    if "-h" in words or "--help" in words:
        print(parser.format_help(), end="")
        return None
    if len(files) < sum(not name.startswith("[") for name in names):
        raise CurvlabError(
            f"{program} needs {names[len(files)]} as its first argument ({program} --help shows the options)"
        )
    options = validate(
        type(defaults), select_fields(parser.parse_options(words, [defaults]), type(defaults)), option_name
    )
    return options, files
