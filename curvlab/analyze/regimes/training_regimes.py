"""What does stable training change? Mirzadeh et al. (2020): stable and plastic training on streams of tasks."""

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean

from curvlab import plots
from curvlab.analyze.frame.analysis import Analysis, Preset, Report, Results, Table, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import list_by_seed, rank_correlation, where
from curvlab.analyze.regimes import claims as published
from curvlab.analyze.regimes import options as regimes
from curvlab.analyze.regimes.observer import RegimeObserver
from curvlab.analyze.regimes.options import ObservedConfig, Record
from curvlab.continual import Regime, metrics
from curvlab.continual import run as learn
from curvlab.continual.regimes import describe_regime
from curvlab.continual.strategies import Naive
from curvlab.data import Dataset
from curvlab.results import Claim, Column, Gate, aggregate, mean_column


class TrainingRegimesConfig(ObservedConfig):
    """Train a network on a sequence of tasks under several regimes, and record its curvature and weight changes."""


PRESETS = {
    # At the paper's plastic learning rate, 1,000 images are underfitted.
    "default": Preset(
        TrainingRegimesConfig(hidden=(100, 100), task_samples=1000, epochs=10, plastic_lr=0.05), minutes=1
    ),
    "cpu": Preset(
        TrainingRegimesConfig(data="mnist", hidden=(100, 100), tasks=5, task_samples=10_000, samples=2000),
        minutes=6,
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
    mean_column("acc", "accuracy"),
    mean_column("forgetting", "forgetting"),
    mean_column("learning_accuracy", "learning accuracy"),
    mean_column("lambda_max", "lambda_max"),
    mean_column("distance", "|dw|"),
    mean_column("loss_forgetting", "F1"),
)


def measure(config: TrainingRegimesConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train the network of one stream, regime and seed, and yield records.

    The record with ``acc`` summarises the run; records with ``matvecs`` describe the network after each task; records
    with ``eigenvalue`` have one of the largest eigenvalues after a task; records with ``accuracy`` have the accuracy on
    a ``task`` ``after`` another one. Tasks in the checkpoint are not repeated.
    """
    (stream,), (name,), (seed,) = config.streams, config.regimes, config.seeds
    checkpoint = workspace.folder / "checkpoint.pt"
    observer = RegimeObserver(config, checkpoint)
    keys = {"stream": stream, "regime": name, "seed": seed}
    regime = Regime.of(config, name)
    result = learn(
        regimes.make_tasks(config, dataset, stream),
        regimes.make_network(config, dataset, regime),
        Naive(),
        **regime.options(config.tasks),
        momentum=config.momentum,
        epochs=config.epochs,
        seed=seed,
        observe=observer,
        checkpoint=checkpoint,
        progress=False,
    )
    for file in (checkpoint, *map(observer.file, range(config.tasks))):
        file.unlink()  # the records replace it
    observed = ("lambda_max", "residual", "matvecs", "task_loss", "distance", "loss_forgetting", "fixed_forgetting")
    points = [{**keys, "task": t, **{key: r[key] for key in observed}} for t, r in enumerate(result.tasks, start=1)]
    workspace.save("spectra", [{**keys, "task": t, **r["spectrum"]} for t, r in enumerate(result.tasks, start=1)])
    summary = metrics.summary(result.accuracy)
    network = {**keys, **{key: summary[key] for key in ("acc", "forgetting", "learning_accuracy", "bwt")}}
    network["lambda_max"] = fmean(point["lambda_max"] for point in points)
    yield network | {key: fmean(point[key] for point in points[1:]) for key in ("distance", "loss_forgetting")}
    yield from points
    for t, r in enumerate(result.tasks, start=1):
        yield from ({**keys, "task": t, "place": n, "eigenvalue": value} for n, value in enumerate(r["top"], start=1))
    for after, row in enumerate(result.accuracy.tolist(), start=1):
        for task, accuracy in enumerate(row[:after], start=1):
            yield {**keys, "after": after, "task": task, "accuracy": accuracy}


# Summaries of the records ---------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over seeds, one record per stream and regime.

    Args:
        found: Records of ``table.json``.
    """
    return aggregate(found, ["stream", "regime"], _VALUES)


def correlate(points: Sequence[Record]) -> list[Record]:
    """Return rank correlations with the largest eigenvalue, one record per stream and seed, over regimes and tasks.

    Keys: ``width``, of the weight change and the eigenvalue after it; ``fixed``, of the loss increase by a step of
    fixed length and the eigenvalue before it. They are None for fewer than three points.

    Args:
        points: Records of ``points.json``.
    """
    groups = dict.fromkeys((point["stream"], point["seed"]) for point in points)
    return [
        {"stream": stream, "seed": seed, "points": len(steps)}
        | {
            "width": rank_correlation([p["distance"] for p in steps], [p["lambda_max"] for p in steps]),
            "fixed": rank_correlation([p["fixed_forgetting"] for p in steps], [p["width_before"] for p in steps]),
        }
        for stream, seed in groups
        for steps in [add_width_before(where(points, stream=stream, seed=seed))]
    ]


def add_width_before(points: Sequence[Record]) -> list[Record]:
    """Return the points after the first task, with ``width_before``, the largest eigenvalue after the task before."""
    before = {(p["stream"], p["regime"], p["seed"], p["task"]): p["lambda_max"] for p in points}
    return [
        {**p, "width_before": before[p["stream"], p["regime"], p["seed"], p["task"] - 1]}
        for p in points
        if p["distance"] is not None
    ]


def claims(
    found: Sequence[Record], points: Sequence[Record], config: TrainingRegimesConfig, data: Subject
) -> list[Claim]:
    """Return the claims with their verdicts.

    Args:
        found: Records of ``table.json``.
        points: Records of ``points.json``.
        config: The configuration.
        data: Description of the data.
    """

    def judge(stream: str, networks: Sequence[Record], points: Sequence[Record]) -> list[Claim]:
        seeds = published.list_seeds(networks)
        ranks = {row["seed"]: row for row in correlate(points)}
        gate = partial(published.gate, config, data, stream)

        def value(metric: str, seed: int, regime: str) -> float:
            (network,) = where(networks, seed=seed, regime=regime)
            return float(network[metric])

        def largest_ratio(seed: int) -> float:
            pairs = (where(points, seed=seed, regime=regime) for regime in ("stable", "plastic"))
            return max(float(one["lambda_max"] / other["lambda_max"]) for one, other in zip(*pairs, strict=True))

        both = {"stable", "plastic"} <= {record["regime"] for record in points}
        stability = published.judge_stability(stream, networks, value, gate("figure3"))
        each = Claim.of(
            f"{stream}: the largest eigenvalue is smaller in the stable regime after every task (largest ratio)",
            stability["lambda_max"].source,
            list_by_seed(points, seeds, largest_ratio) if both else [],
            lambda value: value < 1,
            gate=gate("figure3"),
        )
        width = published.judge_correlation(
            "wider minima are closer to the previous one (rank correlation of |dw| and λmax",
            stream,
            points,
            lambda seed: ranks[seed]["width"],
            gate("hypothesis"),
        )
        fixed = published.judge_correlation(
            f"a step of length {config.fixed_step:g} costs less in wider minima (rank correlation of its cost and λmax",
            stream,
            points,
            lambda seed: ranks[seed]["fixed"],
            gate("hypothesis"),
        )
        return [width, fixed, *stability.values(), each, *_judge_shrinking(stream, networks, gate("shrinking"))]

    return published.judge_streams(judge, found, points)


def _judge_shrinking(stream: str, networks: Sequence[Record], gate: Gate) -> list[Claim]:
    """Return the claims that shrinking batches lower forgetting, one per regime that was run with and without them."""
    run = {record["regime"] for record in networks}
    statement = read_published("regimes")["shrinking"]

    def difference(seed: int, regime: str) -> float:
        values = [where(networks, seed=seed, regime=name)[0]["forgetting"] for name in (f"{regime}+shrinking", regime)]
        return float(values[0] - values[1])

    return [
        Claim.of(
            f"{stream}: {statement['rows']['text']}, {regime} regime (difference of forgetting in accuracy)",
            statement["source"],
            list_by_seed(networks, published.list_seeds(networks), partial(difference, regime=regime)),
            lambda value: value < 0,
            gate=gate,
        )
        for regime in ("stable", "plastic")
        if {regime, f"{regime}+shrinking"} <= run
    ]


def report(results: Results[TrainingRegimesConfig]) -> Report:
    """Return the table, the claims, and the curves over the tasks."""
    config, found = results.config, results.records["table"]
    points, accuracies = results.records["points"], results.records["accuracies"]
    spectra = [record for records in results.artifacts.get("spectra", ()) for record in records]
    what = f"{config.tasks} tasks of {results.subject.data}"
    labels: dict[str, str] = {regime: describe_regime(regime) for regime in config.regimes}
    return Report(
        Table(f"Training regimes after {what}; {results.spread}", _TABLE, summarise(found)),
        claims=claims(found, points, config, results.subject),
        figures={
            "regime_curves": lambda: plots.regime_curves(points, accuracies, labels, what),
            "minima": lambda: plots.minimum_scatter(add_width_before(points), labels, config.fixed_step, what),
            **({"spectra": lambda: plots.spectrum_steps(spectra, labels, what)} if spectra else {}),
        },
        files={"correlations": correlate(points)},
        deviations=published.deviations(config, results.subject),
        notes=[
            "stable-X is the stable regime with the X of the plastic one, plastic+X the reverse. λmax is the largest "
            "eigenvalue of the Hessian of a task's training loss at the end of its training, |dw| the length of the "
            "weight change during the next task, F1 the increase of the training loss by that change; means over tasks."
        ],
    )


ANALYSIS = Analysis(
    config=TrainingRegimesConfig,
    question="What does stable training change? Trains a network on a sequence of tasks under several regimes "
    "(learning rate and its decay, batch size, dropout), and records accuracies, the largest eigenvalue of the Hessian "
    "of each task's loss, and the change of the weights from task to task.",
    presets=PRESETS,
    check=regimes.check,
    measure=measure,
    report=report,
    parts=regimes.parts,
    kinds={"table": "acc", "points": "matvecs", "eigenvalues": "eigenvalue", "accuracies": "accuracy"},
    artifacts=("spectra",),
    version=2,
)
