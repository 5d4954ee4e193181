"""Is forgetting bounded by curvature and distance? Mirzadeh et al. (2020), over training regimes."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from statistics import fmean, median

from torch import nn

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Report, Results, Table, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import by_seed, where
from curvlab.analyze.regimes import claims as published
from curvlab.analyze.regimes import options as regimes
from curvlab.analyze.regimes.expansion import expansion, quadratic_difference
from curvlab.analyze.regimes.options import Record, RegimesConfig
from curvlab.continual import Regime, Task
from curvlab.continual.regimes import describe_regime
from curvlab.data import Dataset
from curvlab.plots import bound_scatter
from curvlab.problem import Problem
from curvlab.results import Claim, Column, Identity, aggregate
from curvlab.training import evaluate, fit
from curvlab.training.state import derived_seed


class ForgettingBoundConfig(RegimesConfig):
    """Train a network on one task after another under several regimes, and expand what it forgets to second order."""


PRESETS = {
    # The plastic regime's own rate would leave 1,437 images half learnt.
    "default": Preset(ForgettingBoundConfig(hidden=(100, 100), epochs=10, plastic_lr=0.05), minutes=2),
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
    Column("forgetting", "F1", spread="forgetting_std"),
    Column("gradient_term", "g'd", spread="gradient_term_std"),
    Column("quadratic", "1/2 d'Hd", spread="quadratic_std"),
    Column("bound", "1/2 lambda_max |d|²", spread="bound_std"),
    Column("lambda_max", "lambda_max", spread="lambda_max_std"),
    Column("distance", "|d|", spread="distance_std"),
)
_ACCURACY = (
    Column("accuracy", "at the end", spread="accuracy_std"),
    Column("accuracy_lost", "forgetting", spread="accuracy_lost_std"),
    Column("learning_accuracy", "of each new task", spread="learning_accuracy_std"),
)
CORRELATED = ("bound", "quadratic", "second_order", "lambda_max", "distance")
_CORRELATIONS = (
    Column("stream", "stream"),
    Column("bound", "1/2 lambda_max |d|²", spread="bound_std"),
    Column("quadratic", "1/2 d'Hd", spread="quadratic_std"),
    Column("second_order", "g'd + 1/2 d'Hd", spread="second_order_std"),
    Column("lambda_max", "lambda_max", spread="lambda_max_std"),
    Column("distance", "|d|", spread="distance_std"),
)


def measure(config: ForgettingBoundConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train the network of the one stream, regime and seed; yield its accuracies and, with ``forgetting``, expansions.

    A task whose training is in its checkpoint is not trained again.
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
            batch_size=regime.batch_size,
            seed=derived_seed(seed, number),
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


# What is made of the records ------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record], accuracies: Sequence[Record]) -> list[Record]:
    """Return a record a stream and regime: mean over its pairs of tasks, then mean and deviation over the seeds.

    Args:
        found: Records as ``table.json`` has them.
        accuracies: Records as ``accuracies.json`` has them.
    """
    by = ("stream", "regime", "seed")
    units = []
    for names in dict.fromkeys(tuple(record[key] for key in by) for record in found):
        pairs, mine = (where(records, **dict(zip(by, names, strict=True))) for records in (found, accuracies))
        means = {key: fmean(pair[key] for pair in pairs) for key in _VALUES if None not in [p[key] for p in pairs]}
        units.append(dict(zip(by, names, strict=True)) | means | accuracy_metrics(mine))
    return aggregate(units, by[:2], [*_VALUES, "accuracy", "accuracy_lost", "learning_accuracy"])


def accuracy_metrics(accuracies: Sequence[Record]) -> Record:
    """Return what is made of a network's accuracies ``a[t, i]`` on task ``i`` after task ``t``, ``T`` tasks in all.

    Keys: ``accuracy`` (mean of ``a[T, i]``), ``accuracy_lost`` (the forgetting of Chaudhry et al. 2018: the best before
    the end minus ``a[T, i]``, mean over ``i < T``), ``learning_accuracy`` (mean of ``a[i, i]``).
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
    """Return Spearman's rank correlation of F1 with its expansion, bound and factors, a record a stream and seed.

    It is over regimes and pairs of tasks; None where there are fewer than three points, or one does not vary.
    """
    groups = dict.fromkeys((record["stream"], record["seed"]) for record in found)
    return [
        {"stream": stream, "seed": seed, "points": len(points)}
        | {
            key: published.rank_correlation([p["forgetting"] for p in points], [p[key] for p in points])
            for key in CORRELATED
        }
        for stream, seed in groups
        for points in [where(found, stream=stream, seed=seed)]
    ]


def identities(found: Sequence[Record], seeds: Sequence[int]) -> list[Identity]:
    """Return what holds of any network, with what it comes to here.

    Args:
        found: Records as ``table.json`` has them.
        seeds: All of them.
    """

    def largest_excess(seed: int) -> float:
        pairs = where(found, seed=seed)
        return float(max((p["quadratic"] - p["bound"]) / max(abs(p["bound"]), 1e-300) for p in pairs))

    return [
        Identity(
            "1/2 d'H d is at most 1/2 λmax |d|² for every pair of tasks (largest relative excess)",
            [largest_excess(seed) for seed in seeds if where(found, seed=seed)],
        ),
        Identity(
            "Where the loss is quadratic and the old task at its minimum, F1 is 1/2 d'H d (relative difference, of two "
            "linear regressions in float64)",
            [quadratic_difference(seed) for seed in seeds],
        ),
    ]


def claims(
    found: Sequence[Record], accuracies: Sequence[Record], config: ForgettingBoundConfig, data: Subject
) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records as ``table.json`` has them.
        accuracies: Records as ``accuracies.json`` has them.
        config: Of the run.
        data: Of the run.
    """
    answers = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        answers += _claims(stream, where(found, stream=stream), where(accuracies, stream=stream), config, data)
    return answers


def _claims(
    stream: str,
    found: Sequence[Record],
    accuracies: Sequence[Record],
    config: ForgettingBoundConfig,
    data: Subject,
) -> list[Claim]:
    seeds = list(dict.fromkeys(record["seed"] for record in found))
    ranks = {row["seed"]: row for row in correlate(found)}

    def compare_metric(key: str, compare: Callable[[float, float], float]) -> list[float]:
        if key in ("lambda_max", "distance"):
            return published.compare_regimes(
                seeds, found, lambda seed, name: fmean(p[key] for p in where(found, seed=seed, regime=name)), compare
            )
        metric = {"forgetting": "accuracy_lost"}.get(key, key)
        return published.compare_regimes(
            seeds,
            accuracies,
            lambda seed, name: float(accuracy_metrics(where(accuracies, seed=seed, regime=name))[metric]),
            compare,
        )

    def correlation(key: str, text: str) -> Claim:
        values = by_seed(found, seeds, lambda seed: ranks[seed][key])
        return published.judge_correlation(text, stream, values, gate("hypothesis"))

    gate = partial(published.gate, config, data, stream)
    return [
        correlation(
            "lambda_max", "the wider the minimum, the less is forgotten (rank correlation of F1 and λmax alone"
        ),
        correlation("bound", "forgetting goes with its bound (rank correlation of F1 and 1/2 λmax |d|²"),
        *published.judge_stability(stream, compare_metric, gate("figure3")).values(),
    ]


def report(run: Results[ForgettingBoundConfig]) -> Report:
    """Return the expansions, accuracies and correlations, the claims, and the figure."""
    config, found, accuracies = run.config, run.records["table"], run.records["accuracies"]
    table, correlations = summarise(found, accuracies), correlate(found)
    name = f"{subject.describe_network(config, run.subject)} on {run.subject.data}"
    title = f"What a {name} forgets, {config.tasks} tasks; mean over pairs of tasks, {run.spread}"
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
        claims(found, accuracies, config, run.subject),
        identities(found, config.seeds),
        {"bound_and_factors": lambda: bound_scatter(found, labels, f"{name}: forgetting of a task by the next")},
        {"correlations": correlations},
        published.deviations(config, run.subject),
        [
            "stable-X is the stable regime with the plastic one's X, plastic+X the reverse. d is the step to the "
            "weights after the next task; g, H and λmax are of the old task's training loss at its end. F1 is at most "
            f"1/2 λmax |d|² for {below} of {len(found)} pairs; 1/2 d'Hd is {tightness:.2g} of that in the median, and "
            f"g'd + 1/2 d'Hd misses F1 by {missed:.2g}."
        ],
    )


ANALYSIS = Analysis(
    config=ForgettingBoundConfig,
    question="Is forgetting bounded by curvature and distance? Trains a network on one task after another under "
    "several regimes, and sets what it forgets of each task beside 1/2 d'H d and 1/2 λmax |d|², with the Hessian of "
    "the old task's loss at its end and the step d to the weights after the next one.",
    presets=PRESETS,
    check=regimes.check,
    measure=measure,
    report=report,
    parts=regimes.parts,
    kinds={"table": "forgetting", "accuracies": "accuracy"},
    items=("main hypothesis", "bound on forgetting"),
)
