"""Which published items have a command, and what are the verdicts on their claims? From the kept results."""

from pathlib import Path

from rich.console import Console

from curvlab.analyze import ANALYSES, ROOMS, load_analysis
from curvlab.analyze.frame.analysis import Preset, Record, Tool
from curvlab.analyze.frame.pages import list_items, write_pages
from curvlab.analyze.frame.results import keep_result
from curvlab.commandline.config import Config
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.results import Column, render


class PapersConfig(Config):
    """List the papers, and keep results."""

    root: Path = Path("analyses")
    """Folder of the repository with one folder per paper."""
    keep: tuple[Path, ...] = ()
    """Finished run directories whose results are to be kept."""
    write: bool = False
    """Write the README of every paper, and docs/papers."""


_ITEMS = (
    Column("number", "no."),
    Column("room", "paper"),
    Column("item", "item"),
    Column("command", "command"),
    Column("kept", "reproduced claims of the kept result"),
)
_PRESETS = (
    Column("command", "analysis"),
    Column("preset", "preset"),
    Column("minutes", "minutes", format=lambda value: f"{value:g}"),
    Column("needs", "needs"),
)


def run(config: PapersConfig, options: RunOptions, console: Console) -> None:
    """Keep results and write pages, or else print the lists.

    Raises:
        CurvlabError: A folder is not a finished run directory, or ``root`` is not a folder.
    """
    del options
    if (config.keep or config.write) and not config.root.is_dir():
        raise CurvlabError(f"{config.root} is not a folder: run this command in the repository, or set --root")
    for folder in config.keep:
        file, replaced = keep_result(folder, config.root)
        console.print(f"{folder} is kept as {file}{', which it replaces' * replaced}", soft_wrap=True)
    if config.write:
        for page in write_pages(config.root, config.root.parent / "docs"):
            console.print(str(page), soft_wrap=True)
    if config.keep or config.write:
        return
    title = "Published items, with the verdicts of the kept results"
    if not config.root.is_dir():
        title += f" (none here: {config.root} is not a folder; run this command in the repository, or set --root)"
    console.print(render([_shorten(row) for row in list_items(config.root)], _ITEMS, title), crop=False)
    console.print(render(_list_presets(), _PRESETS, "Presets"), crop=False)


def _shorten(row: Record) -> Record:
    """Return a record of ``list_items`` for the width of a terminal."""
    if "preset" not in row:
        return row
    tested = row["reproduced"] + row["not reproduced"]
    return {**row, "kept": f"{row['preset']}: {row['reproduced']} of {tested}"}


def _list_presets() -> list[Record]:
    return [
        {"command": name, "preset": preset, "minutes": one.minutes, "needs": ", ".join(one.needs) or None}
        for name, entry in ANALYSES.items()
        if entry.room in ROOMS
        for preset, one in load_analysis(name).presets.items()
    ]


ANALYSIS = Tool(
    config=PapersConfig,
    question="Which published items have a command, what does it cost, and what are the verdicts on the claims? Prints "
    "one row per item, with the verdicts of the kept results, and one row per analysis and preset.",
    presets={"default": Preset(PapersConfig())},
    run=run,
)
