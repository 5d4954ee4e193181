"""The commands of ``python -m curvlab.sweep``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

from curvlab import grid
from curvlab.analyze.command import Config, GridOptions, Parser, console, option_name, part, validated
from curvlab.errors import CurvlabError
from curvlab.grid import Cell, report
from curvlab.sweep import config


class RunSweep(GridOptions):
    """Run the cells of a sweep that its store does not have."""

    out: Path | None = None
    """Folder for the store, which has the name of CONFIG.yaml with the ending .sqlite. Else that of CONFIG.yaml."""
    debug: bool = False
    """Show the traceback of an error."""


class Look(Config):
    """Say what a store has."""

    debug: bool = False
    """Show the traceback of an error."""


class Export(Look):
    """Give the records of a store, with their cells, as a table."""

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
    """Run a sweep, and say what became of it."""
    given = _given(RunSweep(), arguments, program, ["CONFIG.yaml"])
    if given is None:
        return 0
    options, (name,) = given
    file = Path(name)
    cells = config.read(file)
    store = (options.out or file.parent) / f"{file.stem}.sqlite"
    tally = options.run(cells, store, _data(cells, options) if options.scheduler else {})
    with grid.reading(store) as opened:
        report.print_status(console(), opened)
        report.print_failures(console(), opened)
    console().print(f"In {store}.", markup=False, highlight=False, soft_wrap=True)
    return 1 if tally["failed"] else 0


def status(arguments: list[str], program: str) -> int:
    """Say how many cells are done, failed and absent."""
    given = _given(Look(), arguments, program, ["STORE"])
    if given is not None:
        with grid.reading(Path(given[1][0])) as store:
            report.print_status(console(), store)
    return 0


def failed(arguments: list[str], program: str) -> int:
    """Say which cells have failed and why; of one, all."""
    given = _given(Look(), arguments, program, ["STORE", "[CELL]"])
    if given is not None:
        with grid.reading(Path(given[1][0])) as store:
            if given[1][1:]:
                report.print_failure(console(), store, given[1][1])
            else:
                report.print_failures(console(), store)
    return 0


def export(arguments: list[str], program: str) -> int:
    """Give the records, or their summary, as a table."""
    given = _given(Export(), arguments, program, ["STORE"])
    if given is None:
        return 0
    options, (name,) = given
    if not options.summary and (options.by or options.values):
        raise CurvlabError("--by and --values are of the summary: add --summary")
    with grid.reading(Path(name)) as store:
        table = store.summary(options.by, options.values) if options.summary else store.table()
    if options.to is None:
        sys.stdout.write(report.write_csv(table))
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


def _given(defaults: C, arguments: list[str], program: str, names: list[str]) -> tuple[C, list[str]] | None:
    """Return the options and the arguments that are none; None if the help was asked for and is shown.

    Raises:
        CurvlabError: An argument is missing or too many, or an option is not right.
    """
    words = list(arguments)
    files: list[str] = []
    while words and not words[0].startswith("-") and len(files) < len(names):
        files.append(words.pop(0))
    usage = f"{program} {' '.join(names)}"
    parser = Parser(usage, str(type(defaults).__doc__))
    parser.add(defaults)
    if "-h" in words or "--help" in words:
        print(parser.format_help(), end="")
        return None
    if len(files) < sum(not name.startswith("[") for name in names):
        raise CurvlabError(
            f"{program} needs {names[len(files)]} as its first word ({program} --help shows the options)"
        )
    options = validated(type(defaults), part(parser.known(words, [defaults]), type(defaults)), option_name)
    return options, files


def _data(cells: list[Cell], options: GridOptions) -> dict[str, str]:
    """Return the fingerprints of the data sets that cells of analyses name; a function may call anything ``data``."""
    from curvlab.data import load

    names = {str(cell.config["data"]) for cell in cells if cell.function.startswith("curvlab.analyze.")}
    return {name: load(name, root=options.data_root, offline=options.offline).fingerprint() for name in sorted(names)}
