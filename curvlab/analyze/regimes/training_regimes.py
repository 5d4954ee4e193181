"""What does a stable training change? Mirzadeh et al. (2020): stable against plastic, over a stream of tasks."""

from collections.abc import Callable, Mapping, Sequence
from operator import sub, truediv
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from curvlab.analyze import gridded
from curvlab.analyze.command import Analysis, GridOptions
from curvlab.analyze.frame import subject
from curvlab.analyze.regimes import options as regimes
from curvlab.analyze.regimes.options import Record, RegimesConfig, by_seed, stable_beside_plastic, where
from curvlab.continual import metrics
from curvlab.continual import run as learn
from curvlab.continual.learner import Learner
from curvlab.continual.regimes import Regime
from curvlab.continual.strategies import Naive
from curvlab.data import Dataset
from curvlab.estimators import estimate
from curvlab.grid import Place
from curvlab.results import (
    Claim,
    Column,
    RunDirectory,
    Stopwatch,
    aggregate,
    render,
    render_claims,
    write_tables,
)
from curvlab.results.continual import regime_curves
from curvlab.spectrum import deflated_power_iteration, top_eigenvalues
from curvlab.training import evaluate


class TrainingRegimesConfig(RegimesConfig):
    """Train a network on one task after another under several regimes, and follow its curvature and its way."""


PRESETS = {
    # The plastic regime's own rate would leave 1,437 images half learnt.
    "default": TrainingRegimesConfig(hidden=(100, 100), tasks=5, epochs=10, plastic_lr=0.05),
    "cpu": TrainingRegimesConfig(data="mnist", hidden=(100, 100), tasks=5, task_samples=10_000, samples=2000),
    "paper": TrainingRegimesConfig(data="mnist", hidden=(100, 100), tasks=5, seeds=(0, 1, 2, 3, 4)),
}

_VALUES = ["acc", "forgetting", "learning_accuracy", "lambda_max", "distance", "loss_forgetting"]
_TABLE: tuple[Column, ...] = (
    Column("stream", "stream"),
    Column("regime", "regime"),
    Column("acc", "accuracy", spread="acc_std"),
    Column("forgetting", "forgetting", spread="forgetting_std"),
    Column("learning_accuracy", "when learnt", spread="learning_accuracy_std"),
    Column("lambda_max", "lambda_max", spread="lambda_max_std"),
    Column("distance", "|dw|", spread="distance_std"),
    Column("loss_forgetting", "F1", spread="loss_forgetting_std"),
)


def run(config: TrainingRegimesConfig, options: GridOptions, console: Console) -> None:
    """Learn and measure, a cell a stream, seed and regime, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, and nothing is written; or a cell has
            failed, and what the others gave is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = subject.load_dataset(config, options)
        data_hash = dataset.fingerprint()
    regimes.check(config, dataset)
    with gridded.opened("training_regimes", config, options) as directory:
        with clock("cells"):
            records, failed = gridded.run(ANALYSIS.cells(regimes.parts(config)), options, directory)
        found = [record for record in records if "acc" in record]
        points = [record for record in records if "matvecs" in record]
        accuracies = [record for record in records if "accuracy" in record]
        table, claims = summarise(found), claims_of(found, points)
        write_tables(directory, found, (*_TABLE, gridded.SEEDS) if failed else _TABLE, summary=table)
        directory.write_json("points.json", points)
        directory.write_json("accuracies.json", accuracies)
        directory.write_json("claims.json", claims)
        with clock("figures"):
            drawn = figure(points, accuracies, describe(config))
            directory.write_figure("regime_curves", gridded.marked(drawn, directory.path))
        gridded.write_provenance(directory, config.seeds, data_hash, clock, config.device)
        _print(console, config, table, claims, directory)
        gridded.report_failures(console, directory)


def cell(config: TrainingRegimesConfig, place: Place) -> list[Record]:
    """Return the records of a seed, for every stream and regime.

    With ``acc``: what a network comes to. With ``matvecs``: a point, the network after a task. With ``accuracy``: that
    on a ``task`` ``after`` another.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, or a training diverges.
    """
    dataset = subject.load_dataset(config, place)
    regimes.check_values(config, dataset)  # what else there is to refuse is refused when it is made
    return [
        record
        for stream in config.streams
        for regime in config.regimes
        for record in _of_network(config, dataset, stream, regime, place.folder / f"{stream}-{regime}.pt")
    ]


def _of_network(
    config: TrainingRegimesConfig, dataset: Dataset, stream: str, name: str, checkpoint: Path
) -> list[Record]:
    """Return the records of a stream and regime; what was learnt before the cell was stopped is in the checkpoint."""
    (seed,) = config.seeds
    observer = _Observer(config, checkpoint)
    keys = {"stream": stream, "regime": name, "seed": seed}
    regime = Regime.of(config, name)
    result = learn(
        regimes.tasks(config, dataset, stream, seed),
        regimes.network(config, dataset, seed, regime),
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
    measured = ("lambda_max", "residual", "matvecs", "task_loss", "distance", "loss_forgetting")
    points = [{**keys, "task": t, **{key: r[key] for key in measured}} for t, r in enumerate(result.tasks, start=1)]
    summary = metrics.summary(result.accuracy)
    network = {**keys, **{key: summary[key] for key in ("acc", "forgetting", "learning_accuracy", "bwt")}}
    network["lambda_max"] = fmean(point["lambda_max"] for point in points)
    network |= {key: fmean(point[key] for point in points[1:]) for key in ("distance", "loss_forgetting")}
    accuracies = [
        {**keys, "after": after, "task": task, "accuracy": accuracy}
        for after, row in enumerate(result.accuracy.tolist(), start=1)
        for task, accuracy in enumerate(row[:after], start=1)
    ]
    return [network, *points, *accuracies]


class _Observer:
    """Measures a network after each task: its curvature there, how far it has come, what that cost the task before.

    What the next measurement needs of one is in a file, which is there before the checkpoint of that task is.
    """

    def __init__(self, config: TrainingRegimesConfig, checkpoint: Path) -> None:
        self._config, self._checkpoint = config, checkpoint

    def file(self, task: int) -> Path:
        """Return the file of a task, counted from 0."""
        return self._checkpoint.with_stem(f"{self._checkpoint.stem}-{task}")

    def __call__(self, learner: Learner) -> Mapping[str, Any]:
        config, task = self._config, learner.task
        samples = [regimes.samples(config, learner.stream[t]) for t in range(max(task - 1, 0), task + 1)]
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


# What is made of them -------------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over the seeds, a record a stream and regime.

    Args:
        found: Records as ``table.json`` has them.
    """
    return aggregate(found, ["stream", "regime"], _VALUES)


def claims_of(found: Sequence[Record], points: Sequence[Record]) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records as ``table.json`` has them.
        points: Records as ``points.json`` has them.
    """
    seeds = list(dict.fromkeys(record["seed"] for record in found))
    paper = "Mirzadeh et al. (2020), Fig. 3"
    claims = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        networks, after = where(found, stream=stream), where(points, stream=stream)
        claims += [
            Claim.of(
                f"{stream}: the stable regime forgets less than the plastic one (difference of forgetting)",
                paper,
                _compared("forgetting", seeds, networks, sub),
                lambda value: value < 0,
            ),
            Claim.of(
                f"{stream}: its Hessian's largest eigenvalue is smaller (stable over plastic, mean over tasks)",
                paper,
                _compared("lambda_max", seeds, networks, truediv),
                lambda value: value < 1,
            ),
            Claim.of(
                f"{stream}: it is smaller after every single task (the largest ratio)",
                paper,
                _largest_ratios(seeds, after),
                lambda value: value < 1,
            ),
            Claim.of(
                f"{stream}: it moves less from task to task (|dw| of stable over plastic, mean over tasks)",
                paper,
                _compared("distance", seeds, networks, truediv),
                lambda value: value < 1,
            ),
            Claim.of(
                f"{stream}: what that costs on each new task is small (difference of learning accuracy at least -0.06)",
                paper,
                _compared("learning_accuracy", seeds, networks, sub),
                lambda value: value >= -0.06,
            ),
        ]
    return claims


def _compared(
    key: str, seeds: Sequence[int], networks: Sequence[Record], compare: Callable[[float, float], float]
) -> list[float]:
    def value(seed: int, regime: str) -> float:
        (network,) = where(networks, seed=seed, regime=regime)
        found: float = network[key]
        return found

    return stable_beside_plastic(seeds, value, networks, compare)


def _largest_ratios(seeds: Sequence[int], points: Sequence[Record]) -> list[float]:
    """Return the largest ratio over tasks of the eigenvalues of stable and plastic, for every seed."""
    if not {"stable", "plastic"} <= {record["regime"] for record in points}:
        return []

    def largest(seed: int) -> float:
        pairs = zip(where(points, seed=seed, regime="stable"), where(points, seed=seed, regime="plastic"), strict=True)
        ratios = [float(stable["lambda_max"] / plastic["lambda_max"]) for stable, plastic in pairs]
        return max(ratios)

    return by_seed(points, seeds, largest)


def figure(points: Sequence[Record], accuracies: Sequence[Record], title: str) -> Figure:
    """Draw accuracies, largest eigenvalues and distances over the tasks, a row a stream.

    Args:
        points: Records as ``points.json`` has them.
        accuracies: Records as ``accuracies.json`` has them.
        title: What stands above.
    """
    return regime_curves(points, accuracies, title)


def describe(config: TrainingRegimesConfig) -> str:
    """Return what a title says: how many tasks of what."""
    return f"{config.tasks} tasks of {Path(config.data).name}"


def _print(
    console: Console,
    config: TrainingRegimesConfig,
    table: Sequence[Record],
    claims: Sequence[Claim],
    directory: RunDirectory,
) -> None:
    number, columns = f"{len(config.seeds)} seeds", _TABLE
    if any(row["seeds"] < len(config.seeds) for row in table):
        number, columns = "the seeds that did not fail", (*_TABLE, gridded.SEEDS)
    spread = f"mean ± standard deviation over {number}" if len(config.seeds) > 1 else "one seed"
    title = f"Training regimes after {describe(config)}; {spread}"
    console.print(render(table, columns, title), crop=False)
    console.print(render_claims(claims), crop=False)
    for note in (
        "stable-X is the stable regime with the plastic one's X, plastic+X the reverse. λmax is of the Hessian of each "
        "task's training loss when it was learnt, |dw| the way from there to the end of the next task, F1 by how much "
        "its training loss rises on that way; means over tasks.",
        f"Saved in {directory.path}: table (.json .csv .md .tex), points, accuracies, claims, provenance, figure, "
        f"{gridded.STORE}.",
    ):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=TrainingRegimesConfig,
    presets=PRESETS,
    run=run,
    description="What does a stable training change? Trains a network on one task after another under several regimes "
    "(learning rate and its decay, batch size, dropout), and follows accuracies, the largest eigenvalue of the Hessian "
    "of each task's loss, and how far the weights move from task to task.",
    cell=cell,
)
