"""Is forgetting bounded by curvature and distance? Mirzadeh et al. (2020), over training regimes."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from statistics import fmean, median

from torch import nn

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Report, Results, Table, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import rank_correlation, where
from curvlab.analyze.regimes import claims as published
from curvlab.analyze.regimes import options as regimes
from curvlab.analyze.regimes.expansion import expansion, quadratic_difference
from curvlab.analyze.regimes.options import Record, RegimesConfig
from curvlab.continual import Regime, Task
from curvlab.continual.regimes import describe_regime
from curvlab.data import Dataset
from curvlab.problem import Problem
from curvlab.results import Claim, Column, Identity, aggregate, mean_column
from curvlab.training import evaluate, fit
from curvlab.training.state import derive_seed


class ForgettingBoundConfig(RegimesConfig):
    """Train a network on a sequence of tasks under several regimes, and expand forgetting to second order."""


PRESETS = {
    # At the paper's plastic learning rate, 1,000 images are underfitted.
    "default": Preset(
        ForgettingBoundConfig(hidden=(100, 100), task_samples=1000, epochs=10, plastic_lr=0.05), minutes=1
    ),
    "cpu": Preset(
        ForgettingBoundConfig(data="mnist", hidden=(100, 100), tasks=5, task_samples=10_000, samples=2000),
        minutes=8,
        needs=("mnist",),
    ),
    "paper": Preset(
        ForgettingBoundConfig(data="mnist", hidden=(100, 100), tasks=5, seeds=(0, 1, 2, 3, 4)), needs=("mnist",)
    ),
}

_VALUES = ["forgetting", "gradient_term", "quadratic", "bound", "lambda_max", "distance", "tightness"]
_NAMES = (Column("stream", "stream"), Column("regime", "regime"))
_EXPANSION = (
    *_NAMES,
    mean_column("forgetting", "F1"),
    mean_column("gradient_term", "g'd"),
    mean_column("quadratic", "1/2 d'Hd"),
    mean_column("bound", "1/2 lambda_max |d|²"),
    mean_column("lambda_max", "lambda_max"),
    mean_column("distance", "|d|"),
)
_ACCURACY = (
    mean_column("accuracy", "accuracy"),
    mean_column("accuracy_lost", "forgetting"),
    mean_column("learning_accuracy", "learning accuracy"),
)
CORRELATED = ("bound", "quadratic", "second_order", "lambda_max", "distance")
_CORRELATIONS = (
    Column("stream", "stream"),
    mean_column("bound", "1/2 lambda_max |d|²"),
    mean_column("quadratic", "1/2 d'Hd"),
    mean_column("second_order", "g'd + 1/2 d'Hd"),
    mean_column("lambda_max", "lambda_max"),
    mean_column("distance", "|d|"),
)


def measure(config: ForgettingBoundConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train the network of one stream, regime and seed; yield accuracies, and expansions, which have ``forgetting``.

    Tasks with a finished checkpoint are not trained again.
    """
    (stream,), (name,), (seed,) = config.streams, config.regimes, config.seeds
    keys = {"stream": stream, "regime": name, "seed": seed}
    regime = Regime.of(config, name)
    model = regimes.make_network(config, dataset, regime)
    tasks = regimes.make_tasks(config, dataset, stream)
    before: Problem | None = None
    for number, task in enumerate(tasks, start=1):
        fit(
            model,
            task.train,
            optimizer="sgd",
            lr=regime.rate(number),
            momentum=config.momentum,
            epochs=config.epochs,
            batch_size=regime.size(number),
            seed=derive_seed(seed, number),
            checkpoint=workspace.folder / f"task-{number}.pt",
            progress=False,
        )
        after = Problem(deepcopy(model), "cross_entropy", regimes.take_samples(config, task))
        for i, old in enumerate(tasks[:number], start=1):
            yield {**keys, "after": number, "task": i, "accuracy": _accuracy(model, old)}
        if before is not None:
            pair = expansion(before, after.model, solver=config.solver, tol=config.tol)
            yield {**keys, "task": number - 1, **pair}
        before = after


def _accuracy(model: nn.Module, task: Task) -> float:
    accuracy = evaluate(model, *task.test).accuracy
    assert accuracy is not None
    return accuracy


# Summaries of the records ---------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record], accuracies: Sequence[Record]) -> list[Record]:
    """Return one record per stream and regime: mean over pairs of tasks, then mean and standard deviation over seeds.

    Args:
        found: Records of ``table.json``.
        accuracies: Records of ``accuracies.json``.
    """
    by = ("stream", "regime", "seed")
    units = []
    for names in dict.fromkeys(tuple(record[key] for key in by) for record in found):
        pairs, mine = (where(records, **dict(zip(by, names, strict=True))) for records in (found, accuracies))
        means = {key: fmean(pair[key] for pair in pairs) for key in _VALUES if None not in [p[key] for p in pairs]}
        units.append(dict(zip(by, names, strict=True)) | means | accuracy_metrics(mine))
    return aggregate(units, by[:2], [*_VALUES, "accuracy", "accuracy_lost", "learning_accuracy"])


def accuracy_metrics(accuracies: Sequence[Record]) -> Record:
    """Return metrics of the accuracies ``a[t, i]`` on task ``i`` after task ``t``, with ``T`` tasks.

    Keys: ``accuracy`` (mean of ``a[T, i]``), ``accuracy_lost`` (forgetting of Chaudhry et al. 2018: the best value
    before the last task minus ``a[T, i]``, mean over ``i < T``), ``learning_accuracy`` (mean of ``a[i, i]``).
    """
    a = {(record["after"], record["task"]): record["accuracy"] for record in accuracies}
    last = max(after for after, _ in a)
    lost = [max(a[t, i] for t in range(i, last)) - a[last, i] for i in range(1, last)]
    return {
        "accuracy": fmean(a[last, i] for i in range(1, last + 1)),
        "accuracy_lost": fmean(lost),
        "learning_accuracy": fmean(a[i, i] for i in range(1, last + 1)),
    }


def correlate(found: Sequence[Record]) -> list[Record]:
    """Return Spearman's rank correlation of F1 with its expansion, bound and factors, one record per stream and seed.

    The correlation is over regimes and pairs of tasks; None for fewer than three points, or if a value is constant.
    """
    groups = dict.fromkeys((record["stream"], record["seed"]) for record in found)
    return [
        {"stream": stream, "seed": seed, "points": len(points)}
        | {key: rank_correlation([p["forgetting"] for p in points], [p[key] for p in points]) for key in CORRELATED}
        for stream, seed in groups
        for points in [where(found, stream=stream, seed=seed)]
    ]


def identities(found: Sequence[Record], seeds: Sequence[int]) -> list[Identity]:
    """Return the statements that hold for every network, with our values.

    Args:
        found: Records of ``table.json``.
        seeds: All seeds.
    """

    def largest_excess(seed: int) -> float:
        pairs = where(found, seed=seed)
        return float(max((p["quadratic"] - p["bound"]) / max(abs(p["bound"]), 1e-300) for p in pairs))

    return [
        Identity(
            "1/2 d'H d is at most 1/2 λmax |d|² for every pair of tasks (largest relative violation)",
            [largest_excess(seed) for seed in seeds if where(found, seed=seed)],
        ),
        Identity(
            "For a quadratic loss and the minimum of the old task, F1 equals 1/2 d'H d (relative difference, two "
            "linear regressions in float64)",
            [quadratic_difference(seed) for seed in seeds],
        ),
    ]


def claims(
    found: Sequence[Record], accuracies: Sequence[Record], config: ForgettingBoundConfig, data: Subject
) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records of ``table.json``.
        accuracies: Records of ``accuracies.json``.
        config: The configuration.
        data: Description of the data.
    """

    def judge(stream: str, found: Sequence[Record], accuracies: Sequence[Record]) -> list[Claim]:
        ranks = {row["seed"]: row for row in correlate(found)}
        gate = partial(published.gate, config, data, stream)

        def correlation(key: str, text: str) -> Claim:
            return published.judge_correlation(text, stream, found, lambda seed: ranks[seed][key], gate("hypothesis"))

        def value(metric: str, seed: int, regime: str) -> float:
            if metric in ("lambda_max", "distance"):
                return fmean(pair[metric] for pair in where(found, seed=seed, regime=regime))
            name = {"forgetting": "accuracy_lost"}.get(metric, metric)
            return float(accuracy_metrics(where(accuracies, seed=seed, regime=regime))[name])

        return [
            correlation("lambda_max", "wider minima forget less (rank correlation of F1 and λmax"),
            correlation("bound", "forgetting correlates with its bound (rank correlation of F1 and 1/2 λmax |d|²"),
            *published.judge_stability(stream, [*found, *accuracies], value, gate("figure3")).values(),
        ]

    return published.judge_streams(judge, found, accuracies)


def report(results: Results[ForgettingBoundConfig]) -> Report:
    """Return the expansions, accuracies and correlations, the claims, and the figure."""
    config, found, accuracies = results.config, results.records["table"], results.records["accuracies"]
    table, correlations = summarise(found, accuracies), correlate(found)
    name = f"{subject.describe_network(config, results.subject)} on {results.subject.data}"
    title = f"Forgetting of a {name}, {config.tasks} tasks; mean over pairs of tasks, {results.spread}"
    labels: dict[str, str] = {regime: describe_regime(regime) for regime in config.regimes}
    below = sum(pair["forgetting"] <= pair["bound"] for pair in found)
    tightness = median(pair["tightness"] for pair in found if pair["tightness"] is not None)
    missed = median(abs(pair["forgetting"] - pair["second_order"]) for pair in found)
    return Report(
        Table(title, (*_EXPANSION, *_ACCURACY), table),
        [
            Table(title, _EXPANSION, table),
            Table("Test accuracy, mean over tasks", (*_NAMES, *_ACCURACY), table),
            Table(
                "Spearman's rank correlation with F1, over regimes and pairs of tasks",
                _CORRELATIONS,
                aggregate(correlations, ["stream"], list(CORRELATED)),
            ),
        ],
        claims(found, accuracies, config, results.subject),
        identities(found, config.seeds),
        {
            "bound_and_factors": lambda: plots.bound_scatter(
                found, labels, f"{name}: forgetting of a task after the next"
            )
        },
        {"correlations": correlations},
        published.deviations(config, results.subject),
        [
            "stable-X is the stable regime with the X of the plastic one, plastic+X the reverse. d is the change of "
            "the weights during the next task; g, H and λmax belong to the training loss of the old task at the end of "
            f"its training. F1 is at most 1/2 λmax |d|² for {below} of {len(found)} pairs; the median of 1/2 d'Hd over "
            f"1/2 λmax |d|² is {tightness:.2g}, and the median error of g'd + 1/2 d'Hd is {missed:.2g}."
        ],
    )


ANALYSIS = Analysis(
    config=ForgettingBoundConfig,
    question="Is forgetting bounded by curvature and distance? Trains a network on a sequence of tasks under several "
    "regimes, and compares the forgetting of each task with 1/2 d'H d and 1/2 λmax |d|², where H is the Hessian of the "
    "old task's loss at the end of its training and d the change of the weights during the next task.",
    presets=PRESETS,
    check=regimes.check,
    measure=measure,
    report=report,
    parts=regimes.parts,
    kinds={"table": "forgetting", "accuracies": "accuracy"},
)
