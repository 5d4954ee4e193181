"""How skewed is the Fisher's diagonal after a task? Carta's lecture on regularization priors, "Training Stability"."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.conditions import lowest_accuracy, training_conditions
from curvlab.analyze.frame.published import read_published
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.results import Claim, Column, aggregate, mean_column, require_direction


class FisherHistogramConfig(subject.TrainedSubjectConfig):
    """Train a network on some classes of a data set, and compute the diagonal of its exact Fisher."""

    classes: tuple[int, ...] | Literal["all"] = (0, 1)
    """Class indices of the task, or all. The network always has one output per class of the data set."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (256,)
    """Hidden sizes of the mlp; no value gives a linear model."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """One network is trained and measured per seed; the table has mean and standard deviation."""


PRESETS = {
    "default": Preset(FisherHistogramConfig(), minutes=0.2),
    "cpu": Preset(FisherHistogramConfig(data="mnist", samples=2000), minutes=0.5, needs=("mnist",)),
    "paper": Preset(FisherHistogramConfig(data="mnist"), minutes=1, needs=("mnist",)),
}
_VALUES = {
    "zero_fraction": "exactly zero",
    "mean": "mean of the nonzero ones",
    "median": "their median",
    "top_share": "share of the largest 1 %",
    "mean_over_median": "mean / median",
    "p99_over_median": "99th percentile / median",
    "test_accuracy": "test accuracy",
}
_COLUMNS = (Column("size", "parameters"), *(mean_column(key, head) for key, head in _VALUES.items()))


def measure(config: FisherHistogramConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Yield statistics and histogram bins of the diagonal without exact zeros (from pixels that are always black)."""
    (seed,) = config.seeds
    model, accuracy = subject.train_network(config, dataset, seed, workspace.folder / "checkpoint.pt")
    diagonal = estimate(subject.problem(config, dataset, model), "fisher", "diag").diagonal().double().cpu()
    entries = diagonal[diagonal > 0].sort(descending=True).values
    if not len(entries):
        raise CurvlabError(
            "every entry of the Fisher's diagonal is zero: the outputs are saturated; train for fewer steps"
        )
    mean, median, p99 = entries.mean(), entries.quantile(0.5), entries.quantile(0.99)
    yield {
        "seed": seed,
        "size": len(diagonal),
        "zero_fraction": 1 - len(entries) / len(diagonal),
        "mean": float(mean),
        "median": float(median),
        "top_share": float(entries[: -(-len(entries) // 100)].sum() / entries.sum()),
        "mean_over_median": float(mean / median),
        "p99_over_median": float(p99 / median),
        "test_accuracy": accuracy,
    }
    yield from ({"seed": seed, **one} for one in plots.log_bins(entries.numpy()))


def report(results: Results[FisherHistogramConfig]) -> Report:
    """Return the table, the claims of the slide, and the histogram."""
    found, slide = results.records["table"], read_published("lecture")["fisher_histogram"]
    classes = results.config.classes if results.config.classes == "all" else list(results.config.classes)
    ours = {"data": results.subject.data, "classes": classes, **training_conditions(results.config)}
    ours["test accuracy"] = lowest_accuracy(found)
    gate = require_direction(ours, slide["conditions"], slide["direction"])
    title = (
        f"{subject.describe(results.config, results.subject, 'fisher')} on {results.subject.data}, classes {classes}"
    )

    def claim(text: str, key: str, least: float) -> Claim:
        return Claim.of(text, slide["source"], [row[key] for row in found], lambda x: x >= least, None, gate)

    return Report(
        Table(f"Diagonal of the {title}; {results.spread}", _COLUMNS, aggregate(found, ["size"], list(_VALUES))),
        claims=[
            claim("Few parameters have a high Fisher information: the largest 1 % hold 40 % or more", "top_share", 0.4),
            claim("Most have a low one: the mean is at least 10 times the median", "mean_over_median", 10),
            claim("The distribution is skewed: its 99th percentile is 10 medians or more", "p99_over_median", 10),
        ],
        figures={"histogram": lambda: plots.log_histogram(results.records["histogram"], f"Diagonal of the {title}")},
    )


ANALYSIS = Analysis(
    config=FisherHistogramConfig,
    question="How skewed is the Fisher? The distribution of its exact diagonal after a task.",
    presets=PRESETS,
    check=subject.check_network,
    measure=measure,
    report=report,
    kinds={"table": "size", "histogram": "count"},
)
