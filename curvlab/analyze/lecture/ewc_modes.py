"""Comparison of the forms of EWC and related methods: Carta's lecture on regularization priors."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.search import Candidate, Choice, Group, Search
from curvlab.analyze.frame.values import where
from curvlab.analyze.lecture import ewc_modes_claims
from curvlab.analyze.lecture.ewc_modes_methods import (
    HEADS,
    METHODS,
    ONLINE,
    STREAM_LABELS,
    EwcModesConfig,
    candidates,
    select_methods,
    single_run,
)
from curvlab.commandline.options import RunOptions
from curvlab.continual import Task, metrics, permuted, split_classes
from curvlab.continual import run as learn
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.results import Column, aggregate, mean_column
from curvlab.text import did_you_mean

_MNIST = EwcModesConfig(
    data="mnist",
    task_samples=10_000,
    validation=1000,
    test_samples=2000,
    samples=1000,
    epochs=3,
    lr=1e-3,
    ewc_strengths=(1.0, 10.0, 100.0, 1000.0, 10_000.0),
    osla_strengths=(1.0, 10.0, 100.0),
    lwf_strengths=(0.1, 1.0),
    imm_strengths=(1e-3, 1e-2),
)
PRESETS = {
    "default": Preset(
        EwcModesConfig(
            task_samples=500,
            ewc_strengths=(1.0, 10.0, 100.0),
            l2_strengths=(1e-2, 1e-1),
            si_strengths=(0.1, 1.0, 10.0),
            mas_strengths=(1e-3, 1e-2, 1e-1),
            osla_strengths=(10.0, 100.0),
            lwf_strengths=(0.1, 1.0),
            imm_strengths=(1e-2,),
        ),
        minutes=1.5,
    ),
    "cpu": Preset(_MNIST, minutes=20, needs=("mnist",)),
    "paper": Preset(
        _MNIST.model_copy(
            update={"task_samples": None, "validation": 5000, "test_samples": None, "seeds": (0, 1, 2, 3, 4)}
        ),
        minutes=180,
        needs=("mnist",),
    ),
}
_PUBLISHED = "EWC separate, as published"
_PENALTIES = ("naive", "l2", "ewc_separate", *ONLINE, "si", "mas", "osla")  # methods with a quadratic penalty
_VALUES = ["acc", "forgetting", "learning_accuracy", "vectors"]
_COLUMNS = (
    Column("stream_label", "stream"),
    Column("label", "method"),
    Column("strength", "strength"),
    mean_column("acc", "accuracy"),
    mean_column("forgetting", "forgetting"),
    mean_column("learning_accuracy", "of each new task"),
    Column("vectors", "stored numbers / parameters", format=lambda value: f"{value:.2f}"),
)
_SENSITIVITY = (
    Column("stream_label", "stream"),
    Column("label", "method"),
    Column("strength", "strength"),
    mean_column("acc", "accuracy"),
)


# A run ----------------------------------------------------------------------------------------------------------------


def load_dataset(config: EwcModesConfig, options: RunOptions | Place) -> Dataset:
    """Return the data set; each task holds out samples of its own."""
    return subject.take(subject.load_whole(config, options), test=config.test_samples)


def make_tasks(config: EwcModesConfig, dataset: Dataset, stream: str) -> tuple[Task, ...]:
    """Return the tasks of a stream, for the first seed.

    Raises:
        CurvlabError: The data set has no such tasks.
    """
    if stream == "class":
        return split_classes(dataset, tasks=config.tasks, validation=config.validation // config.tasks)
    common: Any = {"tasks": config.tasks, "seed": config.seeds[0], "validation": config.validation}
    return permuted(dataset, **common, samples=config.task_samples)


def check(config: EwcModesConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable.
    """
    subject.check_distinct(streams=config.streams, methods=config.methods)
    subject.check_subject(config, dataset)
    for method in (*config.methods, *config.class_methods):
        if method not in METHODS:
            known = f"(methods: {', '.join(METHODS)})"
            raise CurvlabError(f"unknown method {method!r}{did_you_mean(method, METHODS)} {known}")
    for method in config.methods:
        option = METHODS[method].strengths
        if option is not None:
            subject.check_distinct(**{option: getattr(config, option)})
        for candidate in candidates(config, method):
            METHODS[method].make(config, candidate.get("strength", 0.0))
    if SEARCH.trials(config) and not config.validation:
        raise CurvlabError("strengths are chosen on held-out samples: set validation, or give one strength per method")
    subject.network(config, dataset, config.seeds[0])
    for stream in config.streams:
        make_tasks(config, dataset, stream)


def measure(config: EwcModesConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train on one stream with one method; yield a record with ``acc``, then records with ``accuracy`` and ``stored``.

    If the training diverges, the accuracy is None and ``note`` has the reason.
    """
    (stream,), (method,), (seed,) = config.streams, config.methods, config.seeds
    (candidate,) = candidates(config, method)
    names: Record = {"stream": stream, "method": method, "strength": candidate.get("strength"), "seed": seed}
    checkpoint = workspace.folder / "checkpoint.pt"
    model = subject.network(config, dataset, seed)
    size = sum(p.numel() for p in model.parameters())
    empty = dict.fromkeys(("acc", "forgetting", "learning_accuracy", "vectors"))
    try:
        result = learn(
            make_tasks(config, dataset, stream),
            model,
            METHODS[method].make(config, candidate.get("strength", 0.0)),
            head=HEADS[stream],
            optimizer=config.optimizer,
            lr=config.lr,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=seed,
            evaluation=config.evaluation,
            checkpoint=checkpoint,
            progress=False,
        )
    except CurvlabError as error:
        yield {**names, **empty, "parameters": size, "note": str(error)}
        return
    finally:
        checkpoint.unlink(missing_ok=True)  # the records are complete, and training that diverges would diverge again
    stored = [task["bytes"] / next(model.parameters()).element_size() for task in result.tasks]
    found = metrics.summary(result.accuracy)
    kept = {key: found[key] for key in ("acc", "forgetting", "learning_accuracy")}
    yield {**names, **kept, "vectors": stored[-1] / size, "parameters": size, "note": ""}
    for after, row in enumerate(result.accuracy.tolist(), start=1):
        yield from (
            {**names, "after": after, "task": task, "accuracy": accuracy}
            for task, accuracy in enumerate(row[:after], start=1)
            if not math.isnan(accuracy)
        )
        yield {**names, "after": after, "stored": stored[after - 1]}


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def _groups(config: EwcModesConfig) -> list[tuple[Group, list[Candidate]]]:
    return [
        ({"stream": stream, "method": method}, candidates(config, method))
        for stream in config.streams
        for method in select_methods(config, stream)
    ]


def _trial(config: EwcModesConfig, group: Group, candidate: Candidate, seed: int) -> EwcModesConfig:
    trial: EwcModesConfig = single_run(config, **group, candidate=candidate, seeds=(seed,), evaluation="validation")
    return trial


def _runs(config: EwcModesConfig, chosen: Sequence[Choice]) -> list[EwcModesConfig]:
    """Return the runs of all strengths: the report needs the chosen ones, and the others for the sensitivity."""
    del chosen
    return [single_run(config, **group, candidate=one) for group, given in _groups(config) for one in given]


SEARCH = Search(
    candidates=_groups,
    config=_trial,
    runs=_runs,
    seeds=lambda config: config.selection_seeds,
    value="acc",
    advice="give smaller strengths or a lower learning rate",
    label=lambda name: METHODS[name].label if name in METHODS else STREAM_LABELS.get(name, name),
)


# Summaries of the records ---------------------------------------------------------------------------------------------


def take_chosen(records: Sequence[Record], selection: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return the records of the strengths that were chosen on held-out samples.

    Args:
        records: Each with ``stream``, ``method`` and ``strength``.
        selection: As ``curvlab.analyze.frame.search.select`` gives it.
    """
    keys = ("stream", "method", "strength")
    chosen = {tuple(row.get(key) for key in keys) for row in selection if row["chosen"]}
    return [record for record in records if tuple(record[key] for key in keys) in chosen]


def report(run: Results[EwcModesConfig]) -> Report:
    """Return the tables, the claims, and the figures: accuracy over tasks, sensitivity to the strength, memory."""
    config, everything = run.config, run.records["table"]
    found, accuracies, memory = (
        take_chosen(run.records.get(kind, ()), run.selection) for kind in ("table", "accuracies", "memory")
    )

    def summarise(records: Sequence[Record]) -> list[Record]:
        rows = aggregate(records, ["stream", "method", "strength"], _VALUES)
        names = [{"label": METHODS[r["method"]].label, "stream_label": STREAM_LABELS[r["stream"]]} for r in rows]
        return [row | name for row, name in zip(rows, names, strict=True)]

    what = f"{config.tasks} tasks of {run.subject.data}, {subject.describe_network(config, run.subject)}"
    summary = Table(f"Regularization after {what}; {run.spread}", _COLUMNS, summarise(found))
    swept = [record for record in everything if record["strength"] is not None]
    tables = [summary, Table("Accuracy of every strength", _SENSITIVITY, summarise(swept))] if swept else [summary]
    labels = {name: method.label for name, method in METHODS.items()} | STREAM_LABELS
    return Report(
        summary,
        tables,
        ewc_modes_claims.claims(everything, found, memory, config, run.subject),
        figures={
            "accuracy_over_tasks": lambda: plots.line_panels(
                _means_so_far(accuracies),
                "after",
                "accuracy",
                line="method",
                panel="stream",
                labels=labels,
                axis_labels=("tasks learned", "mean accuracy, tasks so far"),
                title=what,
                height=2.7,
            ),
            "sensitivity": lambda: plots.line_panels(
                [record for record in everything if record["method"] in _PENALTIES],
                "strength",
                "acc",
                line="method",
                panel="stream",
                labels=labels,
                reference={"naive": "--"},
                axis_labels=("strength of the penalty", "accuracy after the last task"),
                title=what,
                log="x",
                height=2.7,
            ),
            "memory": lambda: plots.line_panels(
                _memory_lines(memory, found),
                "after",
                "vectors",
                line="label",
                reference={_PUBLISHED: "--"},
                axis_labels=("tasks learned", "stored numbers / parameters"),
                title=f"{subject.describe_network(config, run.subject)}, structure {config.structure}",
                width=3.3,
            ),
        },
        notes=[
            f"Strengths were chosen on held-out samples with seed {', '.join(map(str, config.selection_seeds))}; "
            "every strength was then run with the seeds of the table.",
            *(f"{row['method']} diverged: {row['note']}" for row in found if row["note"]),
            "A sum of diagonal quadratics is a diagonal quadratic: with structure diag, separate EWC keeps three "
            "vectors for any number of tasks.",
        ],
    )


def _means_so_far(accuracies: Sequence[Record]) -> list[Record]:
    groups: dict[tuple[Any, ...], list[float]] = {}
    keys = ("stream", "method", "seed", "after")
    for record in accuracies:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record["accuracy"])
    return [dict(zip(keys, names, strict=True)) | {"accuracy": fmean(values)} for names, values in groups.items()]


def _memory_lines(memory: Sequence[Record], found: Sequence[Record]) -> list[Record]:
    """Return stored numbers divided by the number of parameters, first stream, and those of separate EWC in the slides.

    Methods with equal memory share a line.
    """
    size, stream, seed = (found[0][key] for key in ("parameters", "stream", "seed"))
    curves: dict[tuple[float, ...], list[str]] = {}
    for method, of in METHODS.items():
        mine = where(memory, stream=stream, seed=seed, method=method)
        if any(record["stored"] for record in mine):
            curves.setdefault(tuple(round(record["stored"] / size, 2) for record in mine), []).append(of.label)
    tasks = max(record["after"] for record in memory)
    lines = {textwrap.fill(", ".join(names), 36): curve for curve, names in curves.items()}
    lines[_PUBLISHED] = tuple(2.0 * task for task in range(1, tasks + 1))
    return [
        {"label": label, "after": after, "vectors": value, "seed": seed}
        for label, curve in lines.items()
        for after, value in enumerate(curve, start=1)
    ]


ANALYSIS = Analysis(
    config=EwcModesConfig,
    question="Which form of EWC? Separate, online and averages, with plain L2, SI, MAS and others: accuracy, memory "
    "over tasks, and sensitivity to the strength.",
    presets=PRESETS,
    check=check,
    load=load_dataset,
    measure=measure,
    report=report,
    search=SEARCH,
    kinds={"table": "acc", "accuracies": "accuracy", "memory": "stored"},
)
