"""The commands of ``python -m curvlab.sweep``."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import ClassVar, TypeVar

from curvlab import grid
from curvlab.commandline.config import Config
from curvlab.commandline.console import make_console
from curvlab.commandline.options import EXIT_CODES, GridOptions
from curvlab.commandline.parser import Parser, option_name, part, validate
from curvlab.errors import CurvlabError
from curvlab.grid import report
from curvlab.grid.cell import find
from curvlab.sweep import config


class RunSweep(GridOptions):
    """Options of ``run``."""

    out: Path | None = None
    """Folder for the store, which has the name of CONFIG.yaml with the ending .sqlite. Else that of CONFIG.yaml."""
    debug: bool = False
    """Show the traceback of an error."""


class Look(Config):
    """Options of ``status`` and ``failed``."""

    debug: bool = False
    """Show the traceback of an error."""


class Export(Look):
    """Options of ``export``."""

    titles: ClassVar[dict[str, str]] = {"to": "table"}

    to: Path | None = None
    """File for the table, .csv or .parquet; else it is printed as CSV."""
    summary: bool = False
    """Means and standard deviations over the seeds instead of every record."""
    by: tuple[str, ...] = ()
    """Keys that make a row of the summary, beside the axes and every key whose values are words."""
    values: tuple[str, ...] | None = None
    """Keys of the numbers in the summary; none means all."""


C = TypeVar("C", bound=Config)


def run(arguments: list[str], program: str) -> int:
    """Run the cells of a sweep that its store does not have, and say what became of them."""
    given = _given(RunSweep(), run, arguments, program, ["CONFIG.yaml"])
    if given is None:
        return 0
    options, (name,) = given
    file = Path(name)
    cells = config.read(file)
    with redirect_stdout(sys.stderr):  # what a module prints when it is imported is no table
        for function in {cell.function for cell in cells}:
            find(function)
    store = (options.out or file.parent) / f"{file.stem}.sqlite"
    tally = options.run(cells, store)
    with grid.reading(store) as opened:
        report.print_status(make_console(), opened)
        report.print_failures(make_console(), opened)
    make_console().print(f"In {store}.", markup=False, highlight=False, soft_wrap=True)
    return 1 if tally["failed"] else 0


def status(arguments: list[str], program: str) -> int:
    """Say how many cells are done, failed and absent."""
    given = _given(Look(), status, arguments, program, ["STORE"])
    if given is not None:
        with grid.reading(Path(given[1][0])) as store:
            report.print_status(make_console(), store)
    return 0


def failed(arguments: list[str], program: str) -> int:
    """Say which cells have failed and why; of one of them, all, with its traceback."""
    given = _given(Look(), failed, arguments, program, ["STORE", "[CELL]"])
    if given is not None:
        with grid.reading(Path(given[1][0])) as store:
            if given[1][1:]:
                report.print_failure(make_console(), store, given[1][1])
            else:
                report.print_failures(make_console(), store)
    return 0


def export(arguments: list[str], program: str) -> int:
    """Give the records of a store, with their cells, or their summary, as a table."""
    given = _given(Export(), export, arguments, program, ["STORE"])
    if given is None:
        return 0
    options, (name,) = given
    if not options.summary and (options.by or options.values):
        raise CurvlabError("--by and --values are of the summary: add --summary")
    if options.to is not None and options.to.exists() and options.to.samefile(name):
        raise CurvlabError(f"{options.to} is the store itself: choose another file for the table")
    with grid.reading(Path(name)) as store:
        table = store.summary(options.by, options.values) if options.summary else store.table()
    if options.to is None:
        print(report.write_csv(table), end="")
    else:
        report.save(table, options.to)
    return 0


#: Name -> what does it, given the arguments after it and what to call the program.
COMMANDS: dict[str, Callable[[list[str], str], int]] = {
    "run": run,
    "status": status,
    "failed": failed,
    "export": export,
}


def _given(
    defaults: C, command: Callable[[list[str], str], int], arguments: list[str], program: str, names: list[str]
) -> tuple[C, list[str]] | None:
    """Return the options and the arguments that are none; None if the help was asked for and is shown.

    Raises:
        CurvlabError: An argument is missing or too many, or an option is not right.
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
            f"{program} needs {names[len(files)]} as its first word ({program} --help shows the options)"
        )
    options = validate(type(defaults), part(parser.known(words, [defaults]), type(defaults)), option_name)
    return options, files
