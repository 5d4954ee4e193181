"""What does a stable training change? Mirzadeh et al. (2020): stable against plastic, over a stream of tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from curvlab.analyze.frame.analysis import Analysis, Preset, Report, Results, Table, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import by_seed, where
from curvlab.analyze.regimes import claims as published
from curvlab.analyze.regimes import options as regimes
from curvlab.analyze.regimes.options import Record, RegimesConfig
from curvlab.continual import Regime, metrics
from curvlab.continual import run as learn
from curvlab.continual.learner import Learner
from curvlab.continual.regimes import describe_regime
from curvlab.continual.strategies import Naive
from curvlab.data import Dataset
from curvlab.estimators import estimate
from curvlab.plots import regime_curves
from curvlab.results import Claim, Column, aggregate
from curvlab.spectrum import deflated_power_iteration, top_eigenvalues
from curvlab.training import evaluate


class TrainingRegimesConfig(RegimesConfig):
    """Train a network on one task after another under several regimes, and follow its curvature and its steps."""


PRESETS = {
    # The plastic regime's own rate would leave 1,437 images half learnt.
    "default": Preset(TrainingRegimesConfig(hidden=(100, 100), tasks=5, epochs=10, plastic_lr=0.05), minutes=2),
    "cpu": Preset(
        TrainingRegimesConfig(data="mnist", hidden=(100, 100), tasks=5, task_samples=10_000, samples=2000),
        minutes=8,
        needs=("mnist",),
    ),
    "paper": Preset(
        TrainingRegimesConfig(data="mnist", hidden=(100, 100), tasks=5, seeds=(0, 1, 2, 3, 4)), needs=("mnist",)
    ),
}

_VALUES = ["acc", "forgetting", "learning_accuracy", "lambda_max", "distance", "loss_forgetting"]
_TABLE = (
    Column("stream", "stream"),
    Column("regime", "regime"),
    Column("acc", "accuracy", spread="acc_std"),
    Column("forgetting", "forgetting", spread="forgetting_std"),
    Column("learning_accuracy", "of each new task", spread="learning_accuracy_std"),
    Column("lambda_max", "lambda_max", spread="lambda_max_std"),
    Column("distance", "|dw|", spread="distance_std"),
    Column("loss_forgetting", "F1", spread="loss_forgetting_std"),
)


def measure(config: TrainingRegimesConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train the network of the one stream, regime and seed, and yield records.

    With ``acc``: of the network. With ``matvecs``: a point, the network after a task. With ``accuracy``: that on a
    ``task`` ``after`` another. Tasks that are in the checkpoint are not trained again.
    """
    (stream,), (name,), (seed,) = config.streams, config.regimes, config.seeds
    checkpoint = workspace.folder / "checkpoint.pt"
    observer = _Observer(config, checkpoint)
    keys = {"stream": stream, "regime": name, "seed": seed}
    regime = Regime.of(config, name)
    result = learn(
        regimes.make_tasks(config, dataset, stream),
        regimes.make_network(config, dataset, regime),
        Naive(),
        **regime.options(),
        momentum=config.momentum,
        epochs=config.epochs,
        seed=seed,
        observe=observer,
        checkpoint=checkpoint,
        progress=False,
    )
    for file in (checkpoint, *map(observer.file, range(config.tasks))):
        file.unlink()  # all that is wanted of it is in the records
    observed = ("lambda_max", "residual", "matvecs", "task_loss", "distance", "loss_forgetting")
    points = [{**keys, "task": t, **{key: r[key] for key in observed}} for t, r in enumerate(result.tasks, start=1)]
    summary = metrics.summary(result.accuracy)
    network = {**keys, **{key: summary[key] for key in ("acc", "forgetting", "learning_accuracy", "bwt")}}
    network["lambda_max"] = fmean(point["lambda_max"] for point in points)
    yield network | {key: fmean(point[key] for point in points[1:]) for key in ("distance", "loss_forgetting")}
    yield from points
    for after, row in enumerate(result.accuracy.tolist(), start=1):
        for task, accuracy in enumerate(row[:after], start=1):
            yield {**keys, "after": after, "task": task, "accuracy": accuracy}


class _Observer:
    """Measures a network after each task: its curvature, its step, and what the step cost the task before.

    What the next measurement needs of one is in a file, which is there before the checkpoint of that task is.
    """

    def __init__(self, config: TrainingRegimesConfig, checkpoint: Path) -> None:
        self._config, self._checkpoint = config, checkpoint

    def file(self, task: int) -> Path:
        """Return the file of a task, counted from 0."""
        return self._checkpoint.with_stem(f"{self._checkpoint.stem}-{task}")

    def __call__(self, learner: Learner) -> Mapping[str, Any]:
        config, task = self._config, learner.task
        samples = [regimes.take_samples(config, learner.stream[t]) for t in range(max(task - 1, 0), task + 1)]
        losses = [evaluate(learner.model, *xy).loss for xy in samples]
        with learner.problem(learner.batch(*samples[-1], task)) as problem:
            hessian = estimate(problem, "hessian", "implicit")
            lanczos = config.solver == "lanczos"
            top = top_eigenvalues(hessian, tol=config.tol) if lanczos else deflated_power_iteration(hessian)
            weights = problem.space.flatten(problem.parameters()).double()
        before = torch.load(self.file(task - 1)) if task else None
        torch.save({"weights": weights, "loss": losses[-1]}, self.file(task))
        return {
            "lambda_max": float(top.values[0]),
            "residual": float(top.residuals[0]),
            "matvecs": top.matvecs,
            "task_loss": losses[-1],
            "distance": None if before is None else float((weights - before["weights"]).norm()),
            "loss_forgetting": None if before is None else losses[0] - before["loss"],
        }


# What is made of the records ------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over the seeds, a record a stream and regime.

    Args:
        found: Records as ``table.json`` has them.
    """
    return aggregate(found, ["stream", "regime"], _VALUES)


def correlate(points: Sequence[Record]) -> list[Record]:
    """Return the rank correlation of each step with the eigenvalue that it ends at, a record a stream and seed.

    It is over regimes and the tasks after the first; ``width`` is None where there are fewer than three points.

    Args:
        points: Records as ``points.json`` has them.
    """
    groups = dict.fromkeys((point["stream"], point["seed"]) for point in points)
    return [
        {"stream": stream, "seed": seed, "points": len(steps)}
        | {"width": published.rank_correlation([p["distance"] for p in steps], [p["lambda_max"] for p in steps])}
        for stream, seed in groups
        for steps in [[p for p in where(points, stream=stream, seed=seed) if p["distance"] is not None]]
    ]


def claims(
    found: Sequence[Record], points: Sequence[Record], config: TrainingRegimesConfig, data: Subject
) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records as ``table.json`` has them.
        points: Records as ``points.json`` has them.
        config: Of the run.
        data: Of the run.
    """
    answers = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        answers += _claims(stream, where(found, stream=stream), where(points, stream=stream), config, data)
    return answers


def _claims(
    stream: str,
    networks: Sequence[Record],
    points: Sequence[Record],
    config: TrainingRegimesConfig,
    data: Subject,
) -> list[Claim]:
    seeds = list(dict.fromkeys(record["seed"] for record in networks))
    ranks = {row["seed"]: row["width"] for row in correlate(points)}
    gate = partial(published.gate, config, data, stream)

    def compare_metric(key: str, compare: Callable[[float, float], float]) -> list[float]:
        def value(seed: int, regime: str) -> float:
            (network,) = where(networks, seed=seed, regime=regime)
            return float(network[key])

        return published.compare_regimes(seeds, networks, value, compare)

    def largest_ratio(seed: int) -> float:
        pairs = (where(points, seed=seed, regime=regime) for regime in ("stable", "plastic"))
        return max(float(stable["lambda_max"] / plastic["lambda_max"]) for stable, plastic in zip(*pairs, strict=True))

    both = {"stable", "plastic"} <= {record["regime"] for record in points}
    stability = published.judge_stability(stream, compare_metric, gate("figure3"))
    each = Claim.of(
        f"{stream}: the stable regime's largest eigenvalue is smaller after every single task (the largest ratio)",
        stability["lambda_max"].source,
        by_seed(points, seeds, largest_ratio) if both else [],
        lambda value: value < 1,
        gate=gate("figure3"),
    )
    width = published.judge_correlation(
        "the wider the second task's minimum, the smaller the step to it (rank correlation of |dw| and its λmax",
        stream,
        by_seed(points, seeds, ranks.__getitem__),
        gate("hypothesis"),
    )
    return [width, *stability.values(), each]


def report(run: Results[TrainingRegimesConfig]) -> Report:
    """Return the table, the claims, and the curves over the tasks."""
    config, found = run.config, run.records["table"]
    points, accuracies = run.records["points"], run.records["accuracies"]
    what = f"{config.tasks} tasks of {run.subject.data}"
    labels: dict[str, str] = {regime: describe_regime(regime) for regime in config.regimes}
    return Report(
        Table(f"Training regimes after {what}; {run.spread}", _TABLE, summarise(found)),
        claims=claims(found, points, config, run.subject),
        figures={"regime_curves": lambda: regime_curves(points, accuracies, labels, what)},
        files={"correlations": correlate(points)},
        deviations=published.deviations(config, run.subject),
        notes=[
            "stable-X is the stable regime with the plastic one's X, plastic+X the reverse. λmax is of the Hessian of "
            "each task's training loss at its end, |dw| the step from there to the end of the next task, F1 by how "
            "much its training loss rises on that way; means over tasks."
        ],
    )


ANALYSIS = Analysis(
    config=TrainingRegimesConfig,
    question="What does a stable training change? Trains a network on one task after another under several regimes "
    "(learning rate and its decay, batch size, dropout), and follows accuracies, the largest eigenvalue of the Hessian "
    "of each task's loss, and how far the weights move from task to task.",
    presets=PRESETS,
    check=regimes.check,
    measure=measure,
    report=report,
    parts=regimes.parts,
    kinds={"table": "acc", "points": "matvecs", "accuracies": "accuracy"},
    items=("Fig. 3",),
)
