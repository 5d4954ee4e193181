"""How long is the Fisher's tail, and how much of it is clipped? Carta's lecture, "Importance weights follow a ...".

The slide shows Figure 4 of Maltoni and Lomonaco (2019), Continuous learning in single-incremental-task scenarios.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.values import divide, number, where
from curvlab.continual import Learner, run, split_classes
from curvlab.continual.strategies import EWC
from curvlab.data import Dataset
from curvlab.estimators import estimate
from curvlab.results import Claim, Column, aggregate, mean_column, require, require_direction

_LONG = 10.0  # 99th percentile over the median from which on a tail is long
_SMALL = 0.01  # share of saturated weights that is small
_PER_DECADE = 5  # bins


class ClippedFisherConfig(subject.TrainedSubjectConfig):
    """Train on batches of new classes with EWC; compute the Fisher's diagonal after each, and its clipped average."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (256,)
    """Hidden sizes of the mlp; no number for a linear model."""
    batches: int = Field(default=3, ge=1, le=5)
    """Number of training batches (B1, B2, ...); each has the next fifth of the classes."""
    strength: float = Field(default=100.0, ge=0)
    """Strength of EWC, whose penalty uses the average of the Fisher matrices so far."""
    clip: float = Field(default=1e-3, gt=0)
    """Upper bound of the averaged Fisher."""
    steps: int = Field(default=500, ge=1)
    """Training steps (mini-batches) of each batch of training."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Seeds; the table has the mean and the standard deviation over them."""


PRESETS = {
    "default": Preset(ClippedFisherConfig(), minutes=0.5),
    "cpu": Preset(ClippedFisherConfig(data="mnist", samples=2000), minutes=1, needs=("mnist",)),
}
_VALUES = {
    "zero_fraction": "F exactly zero",
    "median": "median of the others",
    "p99_over_median": "99th percentile / median",
    "largest": "largest",
    "saturated": "saturated share of the average",
    "spike": "saturated / in the bin below",
}
_COLUMNS = (Column("batch", "batch"), *(mean_column(key, head) for key, head in _VALUES.items()))


def check(config: ClippedFisherConfig, dataset: Dataset) -> None:
    """Check the network, and that the classes can be split.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_network(config, dataset)
    split_classes(dataset, tasks=5)


def measure(config: ClippedFisherConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Yield statistics of F and of the clipped average after every training batch, and their bins without zeros."""
    del workspace
    (seed,) = config.seeds
    diagonals: list[Any] = []

    def keep(learner: Learner) -> dict[str, Any]:
        with learner.problem(learner.samples(limit=config.samples)) as problem:
            diagonals.append(estimate(problem, "fisher", "diag").diagonal().double().cpu().numpy())
        return {}

    run(
        split_classes(dataset, tasks=5)[: config.batches],
        subject.network(config, dataset, seed),
        EWC(config.strength, quantity="fisher", samples=config.samples, mode="average"),
        head="growing",
        observe=keep,
        seed=seed,
        progress=False,
        **subject.fit_options(config),
    )
    for batch, diagonal in enumerate(diagonals, start=1):
        average = np.mean(diagonals[:batch], axis=0)
        clipped, entries = np.minimum(average, config.clip), diagonal[diagonal > 0]
        median = float(np.median(entries))
        below = (average < config.clip) & (average >= config.clip * 10 ** (-1 / _PER_DECADE))
        yield {
            "seed": seed,
            "batch": batch,
            "zero_fraction": 1 - len(entries) / len(diagonal),
            "median": median,
            "p99_over_median": divide(float(np.quantile(entries, 0.99)), median),
            "largest": float(entries.max()),
            "saturated": float((average >= config.clip).mean()),
            "spike": float((average >= config.clip).sum() / below.sum()) if below.any() else None,
        }
        for kind, values in (("F", entries), ("average, clipped", clipped[clipped > 0])):
            for one in plots.log_bins(values, per_decade=_PER_DECADE):
                yield {"seed": seed, "row": kind, "column": f"after B{batch}", **one}


def claims(found: Sequence[Record], config: ClippedFisherConfig, data: str) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records as ``table.json`` has them.
        config: Configuration of the run.
        data: Name of the data set.
    """
    slide = read_published("lecture")["clipped_fisher"]
    ours = {
        "data": data,
        "network": config.model,
        "batches": config.batches,
        "clip": config.clip,
        "steps": config.steps,
    }
    direction = require_direction(ours, slide["conditions"], slide["direction"])
    last = where(found, batch=config.batches)

    def judge(text: str, values: list[float], test: Callable[[float], bool]) -> Claim:
        return Claim.of(text, slide["source"], values, test, None, direction)

    def smallest(key: str) -> list[float]:
        return [min(row[key] for row in where(found, seed=seed)) for seed in config.seeds if where(found, seed=seed)]

    share = [row["saturated"] for row in last]
    published = slide["rows"]["saturated"]
    return [
        judge(
            f"F has a long tail: its 99th percentile is {_LONG:g} medians or more after every batch (the smallest)",
            smallest("p99_over_median"),
            lambda x: x >= _LONG,
        ),
        judge(
            f"Saturation at {config.clip:g} is evident: more weights there than in the bin below (ratio, last batch)",
            [number(row["spike"]) for row in last],
            lambda x: x > 1,
        ),
        judge(
            f"After the last batch the share of saturated weights is small: at most {_SMALL:g}",
            share,
            lambda x: x <= _SMALL,
        ),
        Claim.of(
            "After B3 about one weight in a thousand is saturated (within a factor of three)",
            slide["source"],
            share,
            lambda x: published / 3 <= x <= published * 3,
            published,
            require(ours, slide["conditions"]),
        ),
    ]


def report(results: Results[ClippedFisherConfig]) -> Report:
    """Return the table, the claims of the slide, and the histograms."""
    config, found = results.config, results.records["table"]
    title = f"{subject.describe(config, results.subject, 'fisher')} on {results.subject.data}"
    return Report(
        Table(
            f"Diagonal of the {title}, clipped at {config.clip:g}; {results.spread}",
            _COLUMNS,
            aggregate(found, ["batch"], list(_VALUES)),
        ),
        claims=claims(found, config, results.subject.data),
        figures={
            "histograms": lambda: plots.log_histogram_grid(
                results.records["histogram"],
                f"Diagonal of the {title}",
                "nonzero entry (nats)",
                config.clip,
            )
        },
    )


ANALYSIS = Analysis(
    config=ClippedFisherConfig,
    question="How long is the Fisher's tail, and how much of it is clipped? Its diagonal after batches of new classes, "
    "and the average, clipped at 0.001.",
    presets=PRESETS,
    check=check,
    measure=measure,
    report=report,
    kinds={"table": "p99_over_median", "histogram": "count"},
)
