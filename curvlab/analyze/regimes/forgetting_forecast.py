"""Does stored curvature forecast forgetting, and which structure is worth its cost? Over streams and methods."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Report, Results, Table, Workspace
from curvlab.analyze.frame.values import rank_correlation, split_config, where
from curvlab.analyze.regimes import options as regimes
from curvlab.analyze.regimes.claims import CORRELATED
from curvlab.analyze.regimes.forecast_claims import claims
from curvlab.analyze.regimes.options import Record, StreamsConfig
from curvlab.commandline.config import Readers
from curvlab.continual import Regime
from curvlab.continual import run as learn
from curvlab.continual.forecast import expand_loss, load_expansion, loss_and_gradient
from curvlab.continual.learner import Learner
from curvlab.continual.strategies import ER, EWC, Naive, Strategy
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.problem import Problem
from curvlab.results import Column, aggregate, mean_column
from curvlab.structures import parse_structure


@dataclass(frozen=True)
class ForecastMethod:
    """How the network learns the stream.

    Attributes:
        label: Name in tables and figures.
        regime: Name of its regime.
        make: Makes the strategy from the configuration.
    """

    label: str
    regime: Literal["plastic", "stable"]
    make: Callable[["ForgettingForecastConfig"], Strategy]


METHODS = {
    "naive": ForecastMethod("naive", "plastic", lambda _: Naive()),
    "stable": ForecastMethod("stable SGD", "stable", lambda _: Naive()),
    "ewc": ForecastMethod("EWC", "plastic", lambda config: EWC(config.ewc_strength, samples=config.samples)),
    "er": ForecastMethod("ER", "plastic", lambda config: ER(config.memory)),
}
#: Products with the exact matrices, which go through the samples of the past task.
EXACT = {"ggn": "GGN products", "hessian": "Hessian products"}
_LABELS = {"diag": "diagonal", "block_diag": "blocks", "kfac": "K-FAC", "ekfac": "EK-FAC", "tkfac": "TK-FAC"}


class ForgettingForecastConfig(StreamsConfig):
    """Train a network on one task after another by several methods, and forecast what it forgets from curvature."""

    titles: ClassVar[Mapping[str, str]] = {**StreamsConfig.titles, "methods": "methods", "quantity": "curvature"}
    only_for: ClassVar[Mapping[str, Readers]] = {
        **StreamsConfig.only_for,
        "ewc_strength": ("methods", ("ewc",)),
        "memory": ("methods", ("er",)),
        **{
            name: ("methods", tuple(m for m, method in METHODS.items() if name.startswith(method.regime)))
            for name in StreamsConfig.model_fields
            if name.startswith(("stable", "plastic"))
        },
    }

    methods: tuple[Literal["naive", "stable", "ewc", "er"], ...] = ("naive", "stable", "ewc", "er")
    """naive, ewc and er train as the plastic regime does, stable as the stable one."""
    ewc_strength: float = Field(default=30.0, gt=0)
    """Strength of EWC's penalty."""
    memory: int = Field(default=100, ge=1)
    """Samples that ER keeps of all tasks together."""
    quantity: str = "fisher"
    """Curvature that is stored of each task: fisher, fisher:samples=K, empirical_fisher or ggn."""
    structures: tuple[str, ...] = ("diag", "kfac", "ekfac")
    """Structures that it is stored in: diag, block_diag, kfac, ekfac, tkfac."""


PRESETS = {
    "default": Preset(
        ForgettingForecastConfig(hidden=(64, 64), tasks=4, epochs=10, plastic_lr=0.05, task_samples=1000), minutes=1
    ),
    "cpu": Preset(
        ForgettingForecastConfig(data="mnist", hidden=(100, 100), tasks=5, task_samples=10_000, samples=2000),
        minutes=10,
        needs=("mnist",),
    ),
    "paper": Preset(
        ForgettingForecastConfig(data="mnist", hidden=(100, 100), tasks=10, seeds=(0, 1, 2, 3, 4)), needs=("mnist",)
    ),
}


def parts(config: ForgettingForecastConfig) -> list[ForgettingForecastConfig]:
    """Return the configuration of each run: one stream, seed and method."""
    return split_config(config, "streams", "seeds", "methods")


def check(config: ForgettingForecastConfig, dataset: Dataset) -> None:
    """Refuse an unusable configuration before anything is written.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable.
    """
    subject.check_distinct(methods=config.methods, structures=config.structures)
    names = [METHODS[method].regime for method in config.methods]
    regimes.check_streams(config, dataset, names)
    model = regimes.make_network(config, dataset, Regime.of(config, names[0]))
    few = Problem(model, "cross_entropy", (dataset.x_train[:4], dataset.y_train[:4]))
    for structure in config.structures:
        if parse_structure(structure).name == "implicit":
            raise CurvlabError(
                "structures are stored matrices, and implicit is not; Hessian and GGN products are always compared"
            )
        estimate(few, config.quantity, structure)


def measure(config: ForgettingForecastConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train the network of the one stream, method and seed, and yield records.

    With ``forgetting``: a past task after a later one, and the terms of its forecasts. With ``bytes``: the cost of a
    structure for a task.
    """
    (stream,), (name,), (seed,) = config.streams, config.methods, config.seeds
    method = METHODS[name]
    regime = Regime.of(config, method.regime)
    result = learn(
        regimes.make_tasks(config, dataset, stream),
        regimes.make_network(config, dataset, regime),
        method.make(config),
        **regime.options(),
        momentum=config.momentum,
        epochs=config.epochs,
        seed=seed,
        observe=lambda learner: _observe(config, learner, workspace.folder),
        checkpoint=workspace.folder / "checkpoint.pt",
        progress=False,
    )
    keys = {"stream": stream, "method": name, "seed": seed}
    accuracy = result.accuracy.tolist()
    for after, task in enumerate(result.tasks):
        for pair in task["pairs"]:
            past = pair["task"] - 1
            lost = accuracy[past][past] - accuracy[after][past]
            yield {**keys, "after": after + 1, **pair, "accuracy_lost": lost}
    for after, task in enumerate(result.tasks):
        yield from ({**keys, "task": after + 1, **cost} for cost in task["costs"])


def _observe(config: ForgettingForecastConfig, learner: Learner, folder: Path) -> dict[str, Any]:
    """Forecast the loss of each past task, measure it, and store the expansion of the task that has just ended."""
    pairs = [_compare(config, learner, past, folder / f"task-{past}") for past in range(learner.task)]
    here = folder / f"task-{learner.task}"
    expansion = expand_loss(_problem(config, learner.model, learner, learner.task), config.structures, config.quantity)
    expansion.save(here)
    torch.save(learner.model.state_dict(), here / "model.pt")
    costs = [
        {
            "structure": name,
            "seconds": matrix.info.seconds,
            "bytes": sum(tensor.nbytes for tensor in matrix.tensors().values()),
        }
        for name, matrix in expansion.matrices.items()
    ]
    kept = sum(tensor.nbytes for tensor in regimes.take_samples(config, learner.stream[learner.task]))
    costs += [{"structure": name, "seconds": 0.0, "bytes": kept} for name in EXACT]
    return {"pairs": pairs, "costs": costs}


def _compare(config: ForgettingForecastConfig, learner: Learner, past: int, folder: Path) -> Record:
    """Return the forgetting of a past task at the present weights, and the terms of its forecasts."""
    stored = load_expansion(folder)
    now = _problem(config, learner.model, learner, past)
    weights = now.space.flatten(now.parameters())
    model = deepcopy(learner.model)
    model.load_state_dict(torch.load(folder / "model.pt"))
    then, step = _problem(config, model, learner, past), weights - stored.weights
    exact = {}
    for name in EXACT:
        started = time.perf_counter()
        exact[name] = 0.5 * float(estimate(then, name, "implicit").quadratic_form(step))
        exact[f"{name}_seconds"] = time.perf_counter() - started
    return {
        "task": past + 1,
        "forgetting": loss_and_gradient(now)[0] - stored.loss,
        "distance": float(step.double().norm()),
        **stored.forecast(weights),
        **exact,
    }


def _problem(config: ForgettingForecastConfig, model: nn.Module, learner: Learner, task: int) -> Problem:
    return Problem(model.eval(), "cross_entropy", regimes.take_samples(config, learner.stream[task]))


# Summaries of the records ---------------------------------------------------------------------------------------------

_NEAR = 0.02  # rank correlations that differ by less count as equal
_SCORES = ["rank", "accuracy_rank", "ratio", "within"]


def score(points: Sequence[Record], forecasts: Sequence[float]) -> Record:
    """Return how good forecasts of forgetting are.

    Keys: ``rank`` and ``accuracy_rank`` (Spearman's correlation with the loss and the test accuracy that is lost, None
    where one does not vary), ``ratio`` (median of forecast over measured, over the points where both are positive) and
    ``within`` (share of the points with positive forgetting whose forecast is within a factor of two), None without
    such points.

    Args:
        points: Records with ``forgetting`` and ``accuracy_lost``.
        forecasts: The forecast of each.
    """
    lost = [point["forgetting"] for point in points]
    ratios = [forecast / loss for forecast, loss in zip(forecasts, lost, strict=True) if loss > 0]
    positive = [ratio for ratio in ratios if ratio > 0]
    return {
        "rank": rank_correlation(forecasts, lost),
        "accuracy_rank": rank_correlation(forecasts, [point["accuracy_lost"] for point in points]),
        "ratio": median(positive) if positive else None,
        "within": sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios) if ratios else None,
    }


def score_all(points: Sequence[Record], structures: Sequence[str]) -> list[Record]:
    """Return ``score`` for each stream, seed, curvature, and with and without the gradient's term.

    Args:
        points: Records as ``table.json`` has them.
        structures: Stored structures; the exact products follow.
    """
    groups = _list_complete_groups(points)
    return [
        {"stream": stream, "seed": seed, "structure": name, "gradient": gradient, "points": len(mine)}
        | score(mine, [point[name] + (point["gradient"] if gradient else 0.0) for point in mine])
        for stream, seed in groups
        for mine in [where(points, stream=stream, seed=seed)]
        for name in (*structures, *EXACT)
        for gradient in (False, True)
    ]


def _list_complete_groups(points: Sequence[Record]) -> list[tuple[str, int]]:
    """Return the streams and seeds without those that lack points of another seed, whose runs failed."""
    counts = Counter((point["stream"], point["seed"]) for point in points)
    most = {stream: max(n for (other, _), n in counts.items() if other == stream) for stream, _ in counts}
    return [(stream, seed) for (stream, seed), n in counts.items() if n == most[stream]]


def score_horizons(points: Sequence[Record], structures: Sequence[str]) -> list[Record]:
    """Return the rank correlation of ``score`` for each stream, seed, curvature and number of tasks learnt since.

    Args:
        points: Records as ``table.json`` has them.
        structures: Stored structures; the exact products follow.
    """
    since = [{**point, "horizon": point["after"] - point["task"]} for point in points]
    groups = dict.fromkeys((point["stream"], point["seed"], point["horizon"]) for point in since)
    return [
        {"stream": stream, "seed": seed, "horizon": horizon, "structure": name, "points": len(mine)}
        | {"rank": score(mine, [point[name] for point in mine])["rank"]}
        for stream, seed, horizon in sorted(groups)
        for mine in [where(since, stream=stream, seed=seed, horizon=horizon)]
        for name in (*structures, *EXACT)
    ]


def summarise(scores: Sequence[Record], costs: Sequence[Record], points: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation of the scores over the seeds, with the median cost of each structure.

    ``kilobytes`` is the memory that a structure takes for a task; exact products keep the samples. ``seconds`` is the
    estimation of a stored structure for a task, or one exact product.
    """
    rows = aggregate(scores, ["stream", "structure", "gradient"], _SCORES)
    for row in rows:
        mine = [cost for cost in costs if cost["structure"] == row["structure"]]
        exact = [point[f"{row['structure']}_seconds"] for point in points] if row["structure"] in EXACT else []
        row["kilobytes"] = median(cost["bytes"] for cost in mine) / 1000
        row["seconds"] = median(exact or [cost["seconds"] for cost in mine])
        row["curvature"] = label_structure(row["structure"])
        row["terms"] = "g'd + 1/2 d'Cd" if row["gradient"] else "1/2 d'Cd"
    return rows


def label_structure(name: str) -> str:
    """Return the name of a structure in tables and figures."""
    return EXACT.get(name) or _LABELS.get(name, name)


_COLUMNS = (
    Column("stream", "stream"),
    Column("curvature", "curvature"),
    Column("terms", "forecast"),
    mean_column("rank", "rank correlation"),
    mean_column("accuracy_rank", "with accuracy lost"),
    mean_column("ratio", "forecast / measured"),
    mean_column("within", "within a factor of 2"),
    Column("kilobytes", "kB per task"),
    Column("seconds", "seconds"),
)


def report(results: Results[ForgettingForecastConfig]) -> Report:
    """Return the scores of each curvature, the claims, and the figures."""
    config, points, costs = results.config, results.records["table"], results.records["costs"]
    scores, horizons = score_all(points, config.structures), score_horizons(points, config.structures)
    table = summarise(scores, costs, points)
    labels = {name: label_structure(name) for name in (*config.structures, *EXACT)}
    methods: dict[str, str] = {name: METHODS[name].label for name in config.methods}
    what = f"{subject.describe_network(config, results.subject)} on {results.subject.data}"
    return Report(
        Table(
            f"Forgetting of past tasks, forecast and measured: {what}, {config.tasks} tasks; {results.spread}",
            _COLUMNS,
            table,
        ),
        claims=claims(scores, points, config, results.subject),
        figures={
            "forecast": lambda: plots.forecast_scatter(points, labels, methods, what),
            "forecast_with_gradient": lambda: plots.forecast_scatter(points, labels, methods, what, gradient=True),
            "worth": lambda: plots.forecast_value(horizons, table, labels, what),
        },
        files={"scores": scores, "horizons": horizons},
        notes=[
            "d is the step from the weights at the end of a past task to the present ones; g and C are the gradient "
            f"and the curvature ({config.quantity}) of its training loss there. Measured forgetting is the increase of "
            "that loss. Rank correlations are over methods and pairs of tasks, for each seed.",
            *_choose(table),
        ],
    )


def _choose(table: Sequence[Record]) -> list[str]:
    """Return a sentence per stream: the smallest stored curvature that forecasts nearly as well as the best."""
    lines = []
    for stream in dict.fromkeys(row["stream"] for row in table):
        rows = [row for row in where(table, stream=stream) if row["rank"] is not None and row["structure"] not in EXACT]
        best = max((row["rank"] for row in rows), default=-1.0)
        if best < CORRELATED:
            lines.append(f"{stream}: no stored curvature forecasts the order of forgetting.")
        else:
            near = [row for row in rows if row["rank"] >= best - _NEAR]
            smallest = min(near, key=lambda row: (row["kilobytes"], row["gradient"]))
            lines.append(
                f"{stream}: the smallest stored curvature within {_NEAR:g} of the best rank correlation ({best:.2f}) "
                f"is {smallest['curvature']} with {smallest['terms']} ({smallest['kilobytes']:,.0f} kB per task)."
            )
    return lines


ANALYSIS = Analysis(
    config=ForgettingForecastConfig,
    question="Does curvature forecast forgetting? Trains a network on a stream of tasks by several methods, and "
    "compares the forgetting of each past task with the forecast of its stored curvature: diagonal, K-FAC, EK-FAC and "
    "exact products, with and without the gradient, at their cost.",
    presets=PRESETS,
    check=check,
    measure=measure,
    report=report,
    parts=parts,
    kinds={"table": "forgetting", "costs": "bytes"},
)
