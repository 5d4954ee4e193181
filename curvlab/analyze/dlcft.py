"""Deep linear continual fine-tuning beside its baselines: the tables of Shon et al. (2022), DLCFT."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field
from rich.console import Console
from torch import nn

from curvlab.analyze import gridded, subject
from curvlab.analyze.command import Analysis, GridOptions
from curvlab.analyze.dlcft_claims import beside_published, claims, published
from curvlab.analyze.dlcft_methods import (
    METHODS,
    SETTINGS,
    MethodName,
    Point,
    Setting,
    canonical,
    network,
    steps,
    stream,
)
from curvlab.analyze.dlcft_network import data, pretrained
from curvlab.analyze.subject import SubjectConfig
from curvlab.continual import metrics
from curvlab.continual import run as learn
from curvlab.continual.learner import Learner
from curvlab.continual.measure import accuracies
from curvlab.data import Dataset
from curvlab.errors import CurvlabError, UnsupportedError
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
from curvlab.results.incremental import method_points, setting_curves
from curvlab.training.optimization import OptimizerName, ScheduleName, make_optimizer

Record = dict[str, Any]
Positive = Annotated[float, Field(gt=0)]
Label = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class DlcftConfig(SubjectConfig):
    """Fine-tune a pre-trained network on streams of tasks, linearized with squared error and as it is."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "settings": "tasks",
        "methods": "methods",
        "steps": "training",
        "nonlinear_lrs": "hyper-parameters",
        "seeds": "evaluation",
    }

    classes: tuple[Label, ...] | Literal["all"] = (4, 5, 6, 7, 8, 9)
    """Class indices that the tasks are made of, or all."""
    validation: int = Field(default=120, ge=0)
    """Training samples that a stream holds out, equally many of each task, to choose hyper-parameters on."""
    samples: int | None = Field(default=None, ge=1)
    """Take curvatures on so many training samples of a task, random ones; none means all."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (100,)
    """Hidden sizes of the mlp; no number for a linear model."""
    weights: Path | None = None
    """Start from the weights in this file, with a new last layer; no source classes are needed then."""
    normalize: Literal["none", "imagenet"] = "none"
    """imagenet: subtract its channels' means and divide by their deviations, as pre-trained networks expect."""
    source_classes: tuple[Label, ...] = (0, 1, 2, 3)
    """Classes that the network is pre-trained on; no number with weights."""
    source_steps: int = Field(default=300, ge=1)
    """Steps of that, with Adam at a learning rate of 0.001."""
    slope: float = Field(default=0.01, ge=0, lt=1)
    """Of the LeakyReLU that takes the place of every ReLU; 0 leaves it."""
    batch_norm: Literal["merged", "frozen"] = "merged"
    """What becomes of batch normalisation after pre-training: part of the convolution before it, or a fixed map."""
    settings: tuple[Setting, ...] = ("data", "task", "class")
    """data and data_long (data-IL: random parts of the data, one head), task (task-IL: some classes each, whose outputs
    alone count), class (class-IL: the outputs of the classes so far count)."""
    stream_samples: int | None = Field(default=None, ge=1)
    """Training samples of a stream, held-out ones included, random ones; none means all."""
    test_samples: int | None = Field(default=None, ge=1)
    """Test on so many samples, random ones; none means all."""
    data_tasks: int = Field(default=10, ge=2)
    """Tasks of data."""
    long_tasks: int = Field(default=50, ge=2)
    """Tasks of data_long."""
    class_tasks: int = Field(default=3, ge=2)
    """Tasks of task and of class, with equally many classes each."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """osla: online structured Laplace, with K-FAC or TK-FAC; dlcft: the same of the linear network with squared error;
    with diag, EWC's curvature. Those of class keep samples for replay. A setting runs those that it has."""
    buffer_size: int = Field(default=100, ge=1)
    """Samples kept for replay, of er, der, derpp, and in class of osla and dlcft."""
    draws: int | None = Field(default=None, ge=1)
    """Draw so many labels of the network a sample for a Fisher; none takes the expectation, at a pass an output."""
    steps: int = Field(default=60, ge=1)
    """Steps of a task; the first one of a stream has twice as many."""
    long_steps: int = Field(default=10, ge=1)
    """The same of data_long."""
    batch_size: int = Field(default=64, ge=1)
    """New samples a step; as many are replayed."""
    schedule: ScheduleName = "linear"
    """Learning-rate schedule of a task; linear and cosine end at 0."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """As the optimizer of torch.optim understands it."""
    clip_norm: Positive | None = None
    """Largest norm of a gradient; none means no limit."""
    nonlinear_optimizer: OptimizerName = "adam"
    """Of methods with the network as it is; sgd has a momentum of 0.9."""
    linear_optimizer: OptimizerName = "adam"
    """Of methods with the linear network."""
    target_scale: Positive = 15.0
    """What the one-hot targets of squared error have in place of 1."""
    nonlinear_lrs: tuple[Positive, ...] = (3e-3,)
    """Learning rates tried for methods with the network as it is."""
    linear_lrs: tuple[Positive, ...] = (3e-2,)
    """Learning rates tried for methods with the linear network."""
    lwf_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths tried for lwf."""
    ewc_strengths: tuple[Positive, ...] = (10.0, 100.0)
    """Strengths tried for ewc; 1 is Bayes' rule."""
    mas_strengths: tuple[Positive, ...] = (0.01, 0.1)
    """Strengths tried for mas."""
    osla_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths tried for osla, with either curvature; 1 is Bayes' rule."""
    der_alphas: tuple[Positive, ...] = (0.1, 0.5)
    """Weights of the old outputs that are tried for der and derpp."""
    der_beta: Positive = 0.5
    """Weight of the old labels for derpp."""
    dlcft_strengths: tuple[Positive, ...] = (1.0, 10.0)
    """Strengths tried for dlcft; the authors' is 1."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """A network is pre-trained, and streams are drawn, for each; the table has mean and standard deviation. The first
    one is that for which hyper-parameters are tried."""


_MNIST = DlcftConfig(
    data="mnist",
    hidden=(256,),
    settings=("data", "data_long", "task", "class"),
    stream_samples=2400,
    validation=600,
    test_samples=3000,
    long_tasks=100,
    buffer_size=200,
    source_steps=500,
    steps=100,
    long_steps=20,
    nonlinear_lrs=(1e-3, 3e-3),
    linear_lrs=(1e-3, 3e-3),
    lwf_strengths=(1.0, 3.0, 10.0),
    ewc_strengths=(10.0, 100.0, 1000.0),
    mas_strengths=(0.01, 0.1, 1.0),
    osla_strengths=(1.0, 10.0, 100.0),
    der_alphas=(0.1, 0.3, 1.0),
    dlcft_strengths=(1.0, 10.0, 100.0),
)
_CIFAR = DlcftConfig(
    data="cifar100",
    classes="all",
    model="resnet20",
    weights=Path("weights/resnet20_cifar10-12fca82f.th"),
    normalize="imagenet",
    source_classes=(),
    slope=0.0,  # the weights are of a network with ReLU
    validation=0,
    samples=200,
    test_samples=1000,
    class_tasks=10,
    methods=(
        "fine_tuning",
        "lwf",
        "ewc",
        "osla",
        "der",
        "dlcft_diag",
        "dlcft_kfac",
        "dlcft_tkfac",
        "dlcft_no_regularization",
        "joint",
        "joint_linear",
    ),
    buffer_size=500,
    draws=1,
    steps=20,
    batch_size=32,
    nonlinear_lrs=(1e-3,),
    linear_lrs=(1e-3,),
    lwf_strengths=(1.0,),
    ewc_strengths=(10.0,),
    osla_strengths=(1.0,),
    der_alphas=(0.1,),
    dlcft_strengths=(1.0,),
)
PRESETS = {
    "default": DlcftConfig(),
    "cpu": _MNIST,
    "cpu-cifar100": _CIFAR,
    "paper": _CIFAR.model_copy(
        update={
            "device": "cuda",
            "settings": ("data", "data_long", "task", "class"),
            "methods": get_args(MethodName),
            "validation": 5000,
            "samples": None,
            "test_samples": None,
            "long_tasks": 100,
            "steps": 10_000,
            "long_steps": 10_000,
            "batch_size": 128,
            "clip_norm": 1.0,
            "nonlinear_optimizer": "sgd",
            "linear_lrs": (1e-4,),
            "lwf_strengths": (1.0, 10.0),
            "ewc_strengths": (1.0, 10.0, 100.0),
            "mas_strengths": (0.01, 0.1, 1.0),
            "osla_strengths": (1.0, 10.0),
            "der_alphas": (0.1, 0.3),
        }
    ),
}


def _four_decimals(value: float) -> str:
    return f"{value:.4f}"


_NAMES = (Column("setting_label", "setting"), Column("label", "method"))
_ACCURACY = (
    Column("acc", "accuracy", spread="acc_std"),
    Column("published_acc", "published", format=_four_decimals),
    Column("published_read", ""),
)
_TRANSFER = (
    Column("bwt", "backward transfer", spread="bwt_std"),
    Column("published_bwt", "published", format=_four_decimals),
)
_CHOSEN = (
    Column("lr", "lr", format=lambda value: f"{value:g}"),
    Column("strength", "strength", format=lambda value: f"{value:g}"),
    Column("megabytes", "MB kept", format=lambda value: f"{value:.2f}"),
    Column("seconds", "seconds", format=lambda value: f"{value:.1f}"),
)
_TABLE = (*_NAMES, *_ACCURACY, *_TRANSFER, *_CHOSEN)
_SEEDS = Column("seeds", "seeds")  # shown where a cell has failed
_VALUES = ["acc", "bwt", "forgetting", "learning_accuracy", "validation_acc", "bytes", "seconds"]

DEVIATIONS = (
    "Not as published: the network is pre-trained on other data (there are no weights of ImageNet32 here), images are "
    "not cropped or flipped, strengths and learning rates are chosen on held-out samples, the authors' pull of 1e-4 to "
    "the first weights is left out, and so is Seq-MIT-67. ER, DER and the memory of DLCFT have sizes of ours: none is "
    "published."
)


def run(config: DlcftConfig, options: GridOptions, console: Console) -> None:
    """Choose hyper-parameters, learn and measure, a cell a setting, method and seed, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, and nothing is written; or a cell has
            failed, and what the others gave is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        source, target = data(config, options)
        data_hash = target.fingerprint()
    _check(subject.with_weights(config, options), source, target)
    with gridded.opened("dlcft", config, options) as directory:
        with clock("selection"):
            tries = ANALYSIS.cells(_part(config, *at, point, config.seeds[0]) for at, point in _tries(config))
            tried = _runs(gridded.candidates(tries, options, directory))
            chosen = choose(config, tried)
        with clock("cells"):
            others = ANALYSIS.cells(
                _part(config, *at, point, seed) for at, point in chosen.items() for seed in config.seeds
            )
            records, failed = gridded.run([*tries, *others], options, directory)
        every = _runs(records)
        found = [record for record in every if _point(record) == chosen.get((record["setting"], record["method"]))]
        places = {pair: place for place, pair in enumerate(_pairs(config))}
        found.sort(key=lambda record: (places[record["setting"], record["method"]], config.seeds.index(record["seed"])))
        curves = [record for record in records if "after" in record and _is_of(record, found)]
        table, verdicts = summarise(found), claims(found)
        write_tables(directory, found, (*_TABLE, _SEEDS) if failed else _TABLE, summary=beside_published(table))
        directory.write_json("selection.json", selection(every, chosen, config.seeds[0]))
        directory.write_json("curves.json", curves)
        directory.write_json("claims.json", verdicts)
        with clock("figures"):
            for name, figure in figures(table, curves, describe(config)).items():
                directory.write_figure(name, gridded.marked(figure, directory.path))
        gridded.write_provenance(directory, config.seeds, data_hash, clock, config.device)
        _print(console, config, table, verdicts, directory, bool(failed))
        gridded.report_failures(console, directory)


def cell(config: DlcftConfig, place: Place) -> list[Record]:
    """Return the records of all settings, methods, hyper-parameters and seeds of a configuration.

    One a run, with ``acc``; and one a task of it, with the accuracy so far ``after`` that task. Of a run that diverges
    the one record has no ``acc``.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable.
    """
    config = subject.with_weights(config, place)
    source, target = data(config, place)
    return [
        record
        for (setting, name), point in _tries(config)
        for seed in config.seeds
        for record in _learnt(config, source, target, setting, name, point, seed, place.folder / "run.pt")
    ]


def _check(config: DlcftConfig, source: Dataset | None, target: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    subject.check_distinct(seeds=config.seeds, settings=config.settings, methods=config.methods)
    subject.check(config, target)
    if not _pairs(config):
        raise CurvlabError(
            f"none of the methods {', '.join(config.methods)} is run in {', '.join(config.settings)}: choose others"
        )
    for setting in config.settings:
        tasks = stream(config, target, setting, config.seeds[0])
        trials = max((len(METHODS[name].points(config)) for at, name in _pairs(config) if at == setting), default=1)
        if trials > 1 and not tasks[0].sizes["validation"]:
            raise CurvlabError(
                f"hyper-parameters are chosen on held-out samples, and validation={config.validation} gives none to "
                f"each of the {len(tasks)} tasks of {setting}: hold out {len(tasks)} or more, or give single values"
            )
    for setting, name in _pairs(config):
        method = METHODS[name]
        subject.check_distinct(**{key: getattr(config, key) for key in method.lists})
        method.make(config, setting, 1.0)
        make_optimizer(*_optimizer(config, name), config.weight_decay)
    model = pretrained(config, source, target, config.seeds[0], trained=False)
    network(METHODS["dlcft_tkfac"], model)(target.x_train[:2].to(config.device, getattr(torch, config.dtype)))


# A run ----------------------------------------------------------------------------------------------------------------


def _optimizer(config: DlcftConfig, name: MethodName) -> tuple[OptimizerName, list[nn.Parameter], float, float]:
    """Return the optimizer's name, a parameter, a learning rate, and the momentum."""
    linear = METHODS[name].linear
    optimizer = config.linear_optimizer if linear else config.nonlinear_optimizer
    lrs = config.linear_lrs if linear else config.nonlinear_lrs
    return optimizer, [nn.Parameter(torch.zeros(()))], lrs[0], 0.9 if optimizer == "sgd" else 0.0


def _learnt(
    config: DlcftConfig,
    source: Dataset | None,
    target: Dataset,
    setting: Setting,
    name: MethodName,
    point: Point,
    seed: int,
    checkpoint: Path,
) -> list[Record]:
    """Learn the tasks of a setting by a method, and return what came of it."""
    method = METHODS[name]
    lr, strength = point[method.lists[0]], point.get(method.strengths or "")
    keys: Record = {"setting": setting, "method": name, "seed": seed, "lr": lr, "strength": strength}
    tasks = stream(config, target, setting, seed)
    optimizer, _, _, momentum = _optimizer(config, name)

    def held_out(learner: Learner) -> dict[str, float]:
        if learner.task < len(tasks) - 1 or not tasks[0].sizes["validation"]:
            return {}
        return {"held_out": float(accuracies(learner, range(len(tasks)), "validation").mean())}

    try:
        result = learn(
            tasks,
            network(method, pretrained(config, source, target, seed)),
            method.make(config, setting, 0.0 if strength is None else strength),
            head=method.head(setting),
            loss="squared_error" if method.linear else "cross_entropy",
            target_scale=config.target_scale if method.linear else 1.0,
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            weight_decay=config.weight_decay,
            schedule=config.schedule,
            clip_norm=config.clip_norm,
            steps=steps(config, name, setting),
            batch_size=config.batch_size,
            seed=seed,
            observe=held_out,
            checkpoint=checkpoint,
            progress=False,
        )
    except UnsupportedError:
        raise
    except CurvlabError as error:
        # The options have been checked: what is left is a loss, or a weight, that is not finite.
        return [{**keys, **dict.fromkeys(_VALUES), "note": str(error)}]
    checkpoint.unlink(missing_ok=True)  # all that is wanted of it is in the records
    whole = {
        **keys,
        **metrics.summary(result.accuracy),
        "validation_acc": result.tasks[-1].get("held_out"),
        "bytes": result.tasks[-1]["bytes"],
        "seconds": sum(task["seconds"] + task["strategy_seconds"] for task in result.tasks),
        "note": "",
    }
    so_far = enumerate(metrics.average_accuracy(result.accuracy).tolist(), start=1)
    curve = [{**keys, "after": after, "accuracy": value} for after, value in so_far if not math.isnan(value)]
    return [{key: None if value != value else value for key, value in whole.items()}, *curve]


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def _pairs(config: DlcftConfig) -> list[tuple[Setting, MethodName]]:
    return [
        (setting, name) for setting in config.settings for name in config.methods if setting in METHODS[name].settings
    ]


def _tries(config: DlcftConfig) -> Iterator[tuple[tuple[Setting, MethodName], Point]]:
    """Yield what is tried: all points of each method. data_long has those that are chosen in data, if that is run."""
    for setting, name in _pairs(config):
        if setting == "data_long" and (_chosen_in(config, setting, name) != setting):
            continue
        for point in METHODS[name].points(config):
            yield (setting, name), point


def _chosen_in(config: DlcftConfig, setting: Setting, name: MethodName) -> Setting:
    return "data" if setting == "data_long" and ("data", name) in _pairs(config) else setting


def _part(config: DlcftConfig, setting: Setting, name: MethodName, point: Point, seed: int) -> DlcftConfig:
    """Return the configuration of one cell, in which what has no part in it is always the same."""
    lists = {key: (value,) for key, value in point.items()}
    one = {"settings": (setting,), "methods": (name,), "seeds": (seed,)}
    return config.model_copy(update=canonical(config, name) | lists | one)


def choose(config: DlcftConfig, tried: Sequence[Record]) -> dict[tuple[Setting, MethodName], Point]:
    """Return for every setting and method the point with the best accuracy on held-out samples, the first of several.

    Raises:
        CurvlabError: A method has diverged with all of them, or its cells have failed.
    """
    chosen = {}
    for setting, name in _pairs(config):
        within = _chosen_in(config, setting, name)
        points = METHODS[name].points(config)
        if len(points) == 1:
            chosen[setting, name] = points[0]
            continue
        able = [r for r in tried if (r["setting"], r["method"]) == (within, name) and r["validation_acc"] is not None]
        if not able:
            raise CurvlabError(
                f"{METHODS[name].label} does not come to an end in {within} with any of its hyper-parameters: lower "
                f"{' or '.join(METHODS[name].lists)}"
            )
        chosen[setting, name] = _point(max(able, key=lambda record: float(record["validation_acc"])))
    return chosen


def _point(record: Record) -> Point:
    values = (record["lr"], record["strength"])
    return dict(zip(METHODS[record["method"]].lists, values, strict=False))


def selection(every: Sequence[Record], chosen: Mapping[tuple[Setting, MethodName], Point], seed: int) -> list[Record]:
    """Return a record a point that was tried, with the accuracy on held-out samples and whether it was ``chosen``."""
    keys = ("setting", "method", "lr", "strength", "validation_acc", "note")
    return [
        {key: record[key] for key in keys}
        | {"chosen": _point(record) == chosen.get((record["setting"], record["method"]))}
        for record in every
        if record["seed"] == seed
    ]


def _runs(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "acc" in record]


def _is_of(record: Record, found: Sequence[Record]) -> bool:
    keys = ("setting", "method", "seed", "lr", "strength")
    return any(all(record[key] == other[key] for key in keys) for other in found)


# What is made of them -------------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over the seeds, a record a setting and method, in the order of the tables.

    Args:
        found: Records as ``table.json`` has them.
    """
    rows = aggregate(found, ["setting", "method", "lr", "strength"], _VALUES)
    order = {pair: place for place, pair in enumerate((s, m) for s in SETTINGS for m in METHODS)}
    rows.sort(key=lambda row: order[row["setting"], row["method"]])
    return [
        {
            **row,
            "setting_label": SETTINGS[row["setting"]][0],
            "label": METHODS[row["method"]].label,
            "linear": METHODS[row["method"]].linear,
            "megabytes": None if row["bytes"] is None else row["bytes"] / 1e6,
        }
        for row in rows
    ]


def figures(table: Sequence[Record], curves: Sequence[Record], title: str) -> dict[str, Any]:
    """Return the figures by name: accuracies over the tasks, and the table as points beside the published ones.

    Args:
        table: Of ``summarise``.
        curves: Records as ``curves.json`` has them.
        title: What stands above.
    """
    labels: dict[str, str] = {name: method.label for name, method in METHODS.items()}
    linear = {name for name, method in METHODS.items() if method.linear}
    settings: dict[str, str] = {name: label for name, (label, _) in SETTINGS.items()}
    drawn = {"accuracies": method_points(beside_published(table), title)}
    if any(record["after"] > 1 for record in curves):
        drawn["accuracy_curves"] = setting_curves(curves, labels, settings, linear, title)
    return drawn


def describe(config: DlcftConfig) -> str:
    """Return what a title says: which network on what."""
    name = Path(config.data).name
    if config.classes != "all" and len(config.classes) > 1:
        first, last = config.classes[0], config.classes[-1]
        name += f", classes {first} to {last}" if [*config.classes] == [*range(first, last + 1)] else ""
    return f"{config.model} fine-tuned on {name}"


def _print(
    console: Console,
    config: DlcftConfig,
    table: Sequence[Record],
    verdicts: Sequence[Claim],
    directory: RunDirectory,
    failed: bool,
) -> None:
    spread = f"mean ± standard deviation over {len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    seeds = (_SEEDS,) if failed else ()
    for setting, (label, _) in SETTINGS.items():
        rows = [row for row in beside_published(table) if row["setting"] == setting]
        if not rows:
            continue
        tasks = len(steps(config, "fine_tuning", setting))
        columns = [_NAMES[1], *_ACCURACY, *(_TRANSFER if setting == "task" else ()), *_CHOSEN, *seeds]
        shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
        console.print(render(rows, shown, f"{label}, {tasks} tasks: {describe(config)}; {spread}"), crop=False)
    console.print(render_claims(verdicts), crop=False)
    for note in (
        f"Published: {published()['source']}, of a ResNet-18 on CIFAR-100. {DEVIATIONS}",
        f"Saved in {directory.path}: table (.json .csv .md .tex), selection, curves, claims, provenance, figures, "
        f"{gridded.STORE}.",
    ):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=DlcftConfig,
    presets=PRESETS,
    run=run,
    description="Does a linear network with squared error forget less? Fine-tunes a pre-trained network on streams of "
    "parts of the data, or of classes with the task known or unknown, by DLCFT and by its baselines, the "
    "hyper-parameters of each chosen on held-out samples, and sets what is left beside the published numbers.",
    cell=cell,
)
