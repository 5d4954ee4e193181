"""Which published items have a command, and what are the verdicts on their claims? From the kept results."""

from pathlib import Path
from typing import Any

from rich.console import Console

from curvlab.analyze import ANALYSES, ROOMS, load_analysis
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Tool
from curvlab.analyze.frame.pages import VERDICTS, write_pages
from curvlab.analyze.frame.results import Result, keep_result, read_results
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


_COLUMNS = (
    Column("paper", "paper"),
    Column("items", "item"),
    Column("command", "analysis"),
    Column("preset", "preset"),
    Column("minutes", "minutes", format=lambda value: f"{value:g}"),
    Column("needs", "needs"),
    *(Column(verdict, verdict) for verdict in VERDICTS),
)


def run(config: PapersConfig, options: RunOptions, console: Console) -> None:
    """Keep results, write pages, and print the list.

    Raises:
        CurvlabError: A folder is not a finished run directory, or ``root`` is not a folder.
    """
    del options
    if (config.keep or config.write) and not config.root.is_dir():
        raise CurvlabError(f"{config.root} is not a folder: run this command in the repository, or set root")
    for folder in config.keep:
        console.print(str(keep_result(folder, config.root)), soft_wrap=True)
    if config.write:
        for page in write_pages(config.root, config.root.parent / "docs"):
            console.print(str(page), soft_wrap=True)
    console.print(render(_list(config.root), _COLUMNS, "Published items and their analyses"), crop=False)


def _list(root: Path) -> list[Record]:
    rows: list[Record] = []
    for name, entry in ANALYSES.items():
        if entry.room not in ROOMS:
            continue
        analysis: Analysis[Any] = load_analysis(name)
        kept = {result.preset: result for result in read_results(root, entry.room) if result.name == name}
        for preset, one in analysis.presets.items():
            rows.append(
                {
                    "paper": ROOMS[entry.room].partition(":")[0],
                    "items": ", ".join(analysis.items),
                    "command": name,
                    "preset": preset,
                    "minutes": one.minutes,
                    "needs": ", ".join(one.needs) or None,
                    **_counts(kept.get(preset)),
                }
            )
    return rows


def _counts(result: Result | None) -> Record:
    if result is None:
        return {}
    verdicts = [claim.verdict for claim in result.report.claims]
    return {verdict: sum(one == verdict for one in verdicts) for verdict in VERDICTS}


ANALYSIS = Tool(
    config=PapersConfig,
    question="Which published items have a command, what does it cost, and what are the verdicts on the claims? Prints "
    "one row per analysis and preset, with the verdicts of the kept results.",
    presets={"default": Preset(PapersConfig())},
    run=run,
)
