"""Configuration of a sweep, read from its YAML file, and the runs of the sweep."""

import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from curvlab.analyze import ANALYSES, load_analysis
from curvlab.analyze.frame.analysis import Analysis, Tool
from curvlab.analyze.frame.functions import fill_defaults
from curvlab.analyze.frame.subject import check_distinct
from curvlab.commandline.config import Config
from curvlab.commandline.parser import read_yaml, replace_values
from curvlab.errors import CurvlabError
from curvlab.grid import RunSpec, draw, expand
from curvlab.grid.run_spec import canonical
from curvlab.text import did_you_mean


class Samples(Config):
    """Values drawn at random."""

    count: int = Field(ge=1, le=1_000_000)
    """Number of draws; a larger number begins with the same draws."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    ranges: dict[str, dict[str, list[Any]]]
    """Key -> {uniform: [low, high]}, {log_uniform: [low, high]}, {integers: [low, high]} or {choice: [value, ...]}."""


class SweepConfig(Config):
    """A base configuration and axes; the runs are all combinations of the axes."""

    analysis: str | None = None
    """Name of the analysis to run; give either this or ``function``."""
    function: str | None = None
    """module:name of a function of a configuration and a ``curvlab.grid.Place`` that returns flat records."""
    version: int = Field(default=1, ge=1)
    """Version of the function; raise it when its numbers change. An analysis has its own version."""
    preset: str = "default"
    """Preset of the analysis that ``base`` starts from."""
    base: dict[str, Any] = Field(default={})
    """Values that all runs share."""
    grid: dict[str, list[Any]] = Field(default={})
    """Key -> list of values."""
    points: list[dict[str, Any]] = Field(default=[])
    """Partial configurations, for values that belong together."""
    random: Samples | None = None
    """Values drawn at random."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63, strict=True)], ...] | None = None
    """Seeds; every combination is run once with each. Without them, the seed is a key like any other."""


def read(file: Path) -> list[RunSpec]:
    """Return the runs of the sweep that a file describes.

    Raises:
        CurvlabError: The file cannot be read, or a value is invalid; the message names the key.
    """
    values = read_yaml(file)
    sweep = replace_values(SweepConfig(), values, file)
    if (sweep.analysis is None) == (sweep.function is None):
        raise CurvlabError(f"{file} needs either analysis or function, and not both")
    for key, owner, other in (("version", "function", "analysis"), ("preset", "analysis", "function")):
        if key in values and getattr(sweep, owner) is None:
            raise CurvlabError(f"{file}: {key} applies to {owner} and not to {other}; remove it")
    analysis = None if sweep.analysis is None else find_analysis(sweep.analysis, file)
    try:
        combined = _combine(sweep, "seed" if analysis is None else analysis.seed)
    except CurvlabError as error:
        raise CurvlabError(f"{file}: {error}") from error
    if analysis is None:
        seeded = [{"seed": seed} for seed in sweep.seeds] if sweep.seeds is not None else [{}]
        specs = [
            RunSpec(str(sweep.function), {**config, **seed}, version=sweep.version)
            for config in combined
            for seed in seeded
        ]
    else:
        specs = _make_analysis_specs(analysis, sweep, combined, file)
    if sweep.random is None:  # equal draws are one run
        _require_distinct(specs, file)
    return specs


def _make_analysis_specs(
    analysis: Analysis[Any], sweep: SweepConfig, combined: list[dict[str, Any]], file: Path
) -> list[RunSpec]:
    if sweep.preset not in analysis.presets:
        raise CurvlabError(f"{file}: unknown preset {sweep.preset!r}{did_you_mean(sweep.preset, analysis.presets)}")
    base = analysis.presets[sweep.preset].config
    filled = (fill_defaults(type(base), {**base.model_dump(), **config}, config.keys()) for config in combined)
    specs = analysis.run_specs((replace_values(base, config, file) for config in filled), sweep.seeds)
    if not specs:
        raise CurvlabError(f"{file} has no runs: {analysis.seed} is empty; give at least one seed")
    return specs


def _require_distinct(specs: list[RunSpec], file: Path) -> None:
    """Refuse combinations that are equal once they are completed by the base and the defaults."""
    seen: dict[str, int] = {}
    for number, spec in enumerate(specs, 1):
        if (first := seen.setdefault(spec.key, number)) != number:
            raise CurvlabError(
                f"{file}: the combinations {first} and {number} are equal, {reprlib.repr(dict(spec.config))}; "
                "remove one of them"
            )


def _combine(sweep: SweepConfig, seed: str) -> list[dict[str, Any]]:
    """Return the combinations of all axes except the seeds, whose key is ``seed``."""
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
                raise CurvlabError(f"{name!r} is set by seeds and by {part}; remove it from one of them")
    if sweep.seeds is not None:
        check_distinct(seeds=sweep.seeds)
    return list(expand(sweep.base, grid=sweep.grid, points=sweep.points, samples=drawn))


def find_analysis(name: str, file: Path) -> Analysis[Any]:
    """Return the analysis of a name.

    Raises:
        CurvlabError: The name is unknown, or belongs to a tool, which has no runs.
    """
    if name in ANALYSES:
        analysis: Analysis[Any] | Tool[Any] = load_analysis(name)
        if not isinstance(analysis, Tool):
            return analysis
        raise CurvlabError(f"{file}: the analysis {name} has no runs to sweep; choose another one")
    raise CurvlabError(f"{file}: unknown analysis {name!r}{did_you_mean(name, ANALYSES)}")
