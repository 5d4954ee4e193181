"""What a sweep is, as its YAML file says it, and the cells that it has."""

import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from curvlab.analyze import ANALYSES, load_analysis
from curvlab.analyze.frame.analysis import Analysis, Tool
from curvlab.analyze.frame.subject import check_distinct
from curvlab.commandline.config import Config
from curvlab.commandline.parser import change, did_you_mean, read_yaml
from curvlab.errors import CurvlabError
from curvlab.grid import Cell, draw, expand
from curvlab.grid.cell import canonical


class Samples(Config):
    """Values drawn at random."""

    count: int = Field(ge=1, le=1_000_000)
    """How many; a larger number begins with the same ones."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    ranges: dict[str, dict[str, list[Any]]]
    """Key -> {uniform: [low, high]}, {log_uniform: [low, high]}, {integers: [low, high]} or {choice: [value, ...]}."""


class SweepConfig(Config):
    """A base configuration and axes; the cells are all combinations of the axes."""

    analysis: str | None = None
    """Name of the analysis that a cell is; or else"""
    function: str | None = None
    """module:name of a function of a configuration and a curvlab.grid.Place that returns flat records."""
    version: int = Field(default=1, ge=1)
    """Of the function: raise it when its numbers change. An analysis has its own."""
    preset: str = "default"
    """Of the analysis: what the base starts from."""
    base: dict[str, Any] = Field(default={})
    """What all cells have in common."""
    grid: dict[str, list[Any]] = Field(default={})
    """Key -> values."""
    points: list[dict[str, Any]] = Field(default=[])
    """Configurations in part, each of keys that go together."""
    random: Samples | None = None
    """Values drawn at random."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63, strict=True)], ...] | None = None
    """Each is one cell of every combination; else the seed is as any other key."""


def read(file: Path) -> list[Cell]:
    """Return the cells of the sweep that a file describes.

    Raises:
        CurvlabError: It cannot be read, or is not right; the message names the key.
    """
    values = read_yaml(file)
    sweep = change(SweepConfig(), values, file)
    if (sweep.analysis is None) == (sweep.function is None):
        raise CurvlabError(f"{file} needs either analysis or function")
    for key, owner, other in (("version", "function", "analysis"), ("preset", "analysis", "function")):
        if key in values and getattr(sweep, owner) is None:
            raise CurvlabError(f"{file}: {key} is for {owner}, and does nothing beside {other}; leave it out")
    analysis = None if sweep.analysis is None else find_analysis(sweep.analysis, file)
    try:
        combined = _combined(sweep, "seed" if analysis is None else analysis.seed)
    except CurvlabError as error:
        raise CurvlabError(f"{file}: {error}") from error
    if analysis is None:
        seeded = [{"seed": seed} for seed in sweep.seeds] if sweep.seeds is not None else [{}]
        cells = [
            Cell(str(sweep.function), {**config, **seed}, version=sweep.version)
            for config in combined
            for seed in seeded
        ]
    else:
        cells = _of_analysis(analysis, sweep, combined, file)
    if sweep.random is None:  # what is drawn twice is one cell
        _require_distinct(cells, file)
    return cells


def _of_analysis(analysis: Analysis[Any], sweep: SweepConfig, combined: list[dict[str, Any]], file: Path) -> list[Cell]:
    if sweep.preset not in analysis.presets:
        raise CurvlabError(f"{file}: there is no preset {sweep.preset!r}{did_you_mean(sweep.preset, analysis.presets)}")
    base = analysis.presets[sweep.preset].config
    cells = analysis.cells((change(base, config, file) for config in combined), sweep.seeds)
    if not cells:
        raise CurvlabError(f"{file}: there are no cells: {analysis.seed} is empty")
    return cells


def _require_distinct(cells: list[Cell], file: Path) -> None:
    """Refuse combinations that are the same once the base and every default are in them: each is run once."""
    seen: dict[str, int] = {}
    for number, cell in enumerate(cells, 1):
        if (first := seen.setdefault(cell.key, number)) != number:
            raise CurvlabError(
                f"{file}: the combinations {first} and {number} are the same, {reprlib.repr(dict(cell.config))}; "
                "leave one of them out"
            )


def _combined(sweep: SweepConfig, seed: str) -> list[dict[str, Any]]:
    """Return the combinations of the axes but the seeds, whose key is ``seed``."""
    drawn = None
    if sweep.random is not None:
        drawn = draw(sweep.random.count, sweep.random.ranges, sweep.random.seed)
    parts = {"base": [sweep.base], "grid": [sweep.grid], "points": sweep.points, "random": drawn or []}
    for part, given in parts.items():
        for name, value in (item for values in given for item in values.items()):
            try:
                canonical(value)
            except CurvlabError as error:
                raise CurvlabError(f"{part}: {name!r}: {error}") from error
            if name == seed and sweep.seeds is not None:
                raise CurvlabError(f"{name!r} is set by seeds and by {part}; let one of them do it")
    if sweep.seeds is not None:
        check_distinct(seeds=sweep.seeds)
    return list(expand(sweep.base, grid=sweep.grid, points=sweep.points, samples=drawn))


def find_analysis(name: str, file: Path) -> Analysis[Any]:
    """Return an analysis whose runs are grids.

    Raises:
        CurvlabError: There is none of that name.
    """
    if name in ANALYSES:
        analysis: Analysis[Any] | Tool[Any] = load_analysis(name)
        if not isinstance(analysis, Tool):
            return analysis
        raise CurvlabError(f"{file}: the analysis {name} has no runs to sweep")
    raise CurvlabError(f"{file}: there is no analysis {name!r}{did_you_mean(name, ANALYSES)}")
