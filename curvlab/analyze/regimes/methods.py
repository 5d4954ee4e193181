"""Comparison of methods of continual learning: Mirzadeh et al. (2020), Table 2 and Figure 4."""

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.search import Candidate, Group, check_selection_seeds, search_by_accuracy
from curvlab.analyze.regimes import table2
from curvlab.analyze.regimes.method_list import HYPER_PARAMETERS, METHODS, label_method
from curvlab.analyze.regimes.methods_options import PRESETS, MethodsConfig, candidates, single_run
from curvlab.commandline.options import RunOptions
from curvlab.continual import Regime, Task, metrics, permuted, rotated, split_classes
from curvlab.continual import run as learn
from curvlab.continual.checks import check_loss
from curvlab.continual.outputs import Head, Outputs
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.results import Column, aggregate, mean_column
from curvlab.text import did_you_mean

_VALUES = ["acc", "forgetting", "learning_accuracy", "bytes"]
_NAMES = (Column("stream", "stream"), Column("label", "method"))
_TABLE = (
    *_NAMES,
    mean_column("acc", "accuracy"),
    mean_column("forgetting", "forgetting"),
    mean_column("learning_accuracy", "learning accuracy"),
    Column("megabytes", "MB kept", format=lambda value: f"{value:.2f}"),
    Column("seconds", "median seconds", format=lambda value: f"{value:.0f}"),
)
_PUBLISHED = (
    *_NAMES,
    mean_column("acc", "accuracy"),
    Column("printed_acc", "published"),
    mean_column("forgetting", "forgetting"),
    Column("printed_forgetting", "published"),
)
_ORDER = (
    Column("stream", "stream"),
    Column("seed", "seed"),
    Column("stable-ewc", "Stable SGD - EWC", format=lambda value: f"{value:.4f}"),
    Column("ewc-naive", "EWC - naive", format=lambda value: f"{value:.4f}"),
    Column("stable-naive", "Stable SGD - naive", format=lambda value: f"{value:.4f}"),
    Column("holds", "order holds", format=lambda value: "yes" if value else "no"),
)


# A run ----------------------------------------------------------------------------------------------------------------


def load_dataset(config: MethodsConfig, options: RunOptions | Place) -> Dataset:
    """Return the data set, without held-out samples: each task holds out its own."""
    return subject.take(subject.load_whole(config, options), test=config.test_samples)


def check(config: MethodsConfig, dataset: Dataset) -> None:
    """Check the configuration, the data and the weights.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_distinct(streams=config.streams, methods=config.methods)
    subject.check_subject(config, dataset)
    for method in config.methods:
        if method not in METHODS:
            known = f"(methods: {', '.join(METHODS)})"
            raise CurvlabError(f"unknown method {method!r}{did_you_mean(method, METHODS)} {known}")
        _check_lists(config, method)
    if config.model != "mlp" and "stable" in config.methods and any(config.dropouts):
        raise CurvlabError(f"only the mlp has dropout: with {config.model} set dropouts to 0")
    tried = [(method, candidate) for method in config.methods for candidate in candidates(config, method)]
    for dropout in {candidate.get("dropout", 0.0) for _, candidate in tried}:
        subject.network(config, dataset, config.seeds[0], dropout)
    for stream in config.streams:
        tasks = make_tasks(config, dataset, stream)
        head = choose_head(stream)
        check_loss(tasks, Outputs(tasks, head, dataset.num_classes, torch.device("cpu")), "cross_entropy")
        for method, candidate in tried:
            METHODS[method].make(config, candidate, tasks)


def _check_lists(config: MethodsConfig, method: str) -> None:
    """Check the values to try of a method, and the held-out samples and seeds of its search."""
    tuned = {option: getattr(config, option) for option in METHODS[method].hyper_parameters.values()}
    subject.check_distinct(**tuned)
    if len(candidates(config, method)) == 1:
        return
    if not config.validation:
        raise CurvlabError(
            f"the hyper-parameters of {method} are chosen on held-out samples: set validation, or give "
            f"{', '.join(tuned)} a single value each"
        )
    check_selection_seeds(config)


def make_tasks(config: MethodsConfig, dataset: Dataset, stream: str) -> tuple[Task, ...]:
    """Return the tasks of a stream, for the first seed.

    Raises:
        CurvlabError: The data set cannot be split into these tasks.
    """
    common: Any = {"tasks": config.tasks, "seed": config.seeds[0], "validation": config.validation}
    common["samples"] = config.task_samples
    if stream == "rotated":
        return rotated(dataset, **common, degrees=config.degrees)
    return (permuted if stream == "permuted" else split_classes)(dataset, **common)


def choose_head(stream: str) -> Head:
    """Return which outputs are used in a stream."""
    return "masked" if stream == "split" else "single"


def measure(config: MethodsConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Learn one stream by one method with one candidate; yield a record with ``acc``, then one per accuracy.

    Raises:
        CurvlabError: The training diverges.
    """
    (stream,), (method,), (seed,) = config.streams, config.methods, config.seeds
    (candidate,) = candidates(config, method)
    names: Record = {"stream": stream, "method": method, "seed": seed}
    tasks = make_tasks(config, dataset, stream)
    regime = Regime(
        candidate["lr"], candidate.get("decay", 1.0), int(candidate["batch_size"]), candidate.get("dropout", 0.0)
    )
    checkpoint = workspace.folder / "checkpoint.pt"
    try:
        result = learn(
            tasks,
            subject.network(config, dataset, seed, regime.dropout),
            METHODS[method].make(config, candidate, tasks),
            head=choose_head(stream),
            **regime.options(),
            momentum=config.momentum,
            epochs=config.epochs,
            seed=seed,
            evaluation=config.evaluation,
            checkpoint=checkpoint,
            progress=False,
        )
    except CurvlabError:
        checkpoint.unlink(missing_ok=True)  # the training would diverge again
        raise
    checkpoint.unlink(missing_ok=True)  # the records replace it
    summary = {
        **names,
        "evaluation": config.evaluation,
        **{name: candidate.get(name) for name in HYPER_PARAMETERS},
        **metrics.summary(result.accuracy),
        "bytes": result.tasks[-1]["bytes"],
        "seconds": sum(task["seconds"] + task["strategy_seconds"] for task in result.tasks),
        "note": "",
        "samples": tasks[0].sizes["train"],
    }
    yield {key: None if value != value else value for key, value in summary.items()}
    for after, row in enumerate(result.accuracy.tolist(), start=1):
        for task, accuracy in enumerate(row[:after], start=1):
            if not math.isnan(accuracy):
                yield {**names, "after": after, "task": task, "accuracy": accuracy}


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def _groups(config: MethodsConfig) -> list[tuple[Group, list[Candidate]]]:
    return [
        ({"stream": stream, "method": method}, candidates(config, method))
        for stream in config.streams
        for method in config.methods
    ]


SEARCH = search_by_accuracy(
    _groups,
    single_run,
    advice="give lower learning rates",
    limits={"batch_size": (1,), "decay": (1.0,), "dropout": (0.0,)},
    label=label_method,
)


# Summaries of the records ---------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return one record per stream and method: mean and standard deviation over seeds, and the median of ``seconds``.

    Args:
        found: Records of ``table.json``.
    """
    table = aggregate(found, ["stream", "method"], _VALUES)
    for row in table:
        mine = [record for record in found if (record["stream"], record["method"]) == (row["stream"], row["method"])]
        row["label"] = label_method(row["method"])
        row["megabytes"] = None if row["bytes"] is None else row["bytes"] / 1e6
        row["seconds"] = median(record["seconds"] for record in mine)  # another program may slow down one run
    return table


def report(results: Results[MethodsConfig]) -> Report:
    """Return the table, with published numbers for published streams, the claims, and the curves."""
    config, found, accuracies = results.config, results.records["table"], results.records["accuracies"]
    table = table2.add_published(summarise(found), config, results.subject)
    order = table2.compare_in_order(found)
    held_out = "" if config.evaluation == "test" else ", on the held-out samples"
    what = f"{config.tasks} tasks of {results.subject.data}{held_out}"
    summary = Table(f"Methods after {what}; {results.spread}", _TABLE, table)
    tables = [summary]
    if any("published_acc" in row for row in table):
        rows = [row | {f"printed_{key}": _as_printed(row, key) for key in ("acc", "forgetting")} for row in table]
        tables.append(Table(f"{table2.source()}, and our values", _PUBLISHED, rows))
    if order:
        tables.append(Table("Order of Stable SGD, EWC and naive: differences of accuracy", _ORDER, order))
    notes = []
    if SEARCH.trials(config):
        notes.append(
            f"Candidates were trained with seed {', '.join(map(str, config.selection_seeds))}, the runs of the table "
            f"with {', '.join(map(str, config.seeds))}; no run trains on held-out samples."
        )
    if "stable" in config.methods:
        notes.append("The learning rate of stable is multiplied by the decay before the first task too.")
    labels = {method: label_method(method) for method in config.methods}
    return Report(
        summary,
        tables,
        table2.claims(found, config, results.subject),
        figures={
            "accuracy_curves": lambda: plots.accuracy_curves(accuracies, labels, what),
            "accuracy_and_forgetting": lambda: plots.method_dots(table, what),
        },
        files={"order": order},
        deviations=table2.deviations(config, results.subject, {row["stream"]: row["samples"] for row in found}),
        notes=notes,
    )


def _as_printed(row: Record, key: str) -> str | None:
    """Return a published number with the published digits."""
    if row.get(f"published_{key}") is None:
        return None
    digits = 3 if key == "acc" else 2
    return f"{row[f'published_{key}']:.{digits}f} ± {row[f'published_{key}_std']:.{digits}f}"


ANALYSIS = Analysis(
    config=MethodsConfig,
    question="Which method forgets least? Learns streams of tasks by naive fine-tuning, EWC, A-GEM, experience replay, "
    "Stable SGD and joint training under the same conditions, with hyper-parameters chosen on held-out samples from "
    "equally many candidates, and compares accuracy and forgetting with the published values.",
    presets=PRESETS,
    check=check,
    load=load_dataset,
    measure=measure,
    report=report,
    search=SEARCH,
    kinds={"table": "acc", "accuracies": "accuracy"},
)
