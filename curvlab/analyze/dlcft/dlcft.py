"""Deep linear continual fine-tuning beside its baselines: the tables of Shon et al. (2022), DLCFT."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import nn

from curvlab.analyze import gridded
from curvlab.analyze.command import Analysis, GridOptions
from curvlab.analyze.dlcft.claims import beside_published, claims, published
from curvlab.analyze.dlcft.deviations import deviations
from curvlab.analyze.dlcft.methods import (
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
from curvlab.analyze.dlcft.network import data, pretrained
from curvlab.analyze.dlcft.options import PRESETS, DlcftConfig
from curvlab.analyze.frame import subject
from curvlab.continual import metrics
from curvlab.continual import run as learn
from curvlab.continual.checks import check_loss
from curvlab.continual.outputs import Outputs
from curvlab.continual.tasks import Part
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
from curvlab.training.optimization import OptimizerName, make_optimizer

Record = dict[str, Any]
Name = tuple[Setting, MethodName]


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
)
_COSTS = (
    Column("megabytes", "MB kept", format=lambda value: f"{value:.2f}"),
    Column("seconds", "median s", format=lambda value: f"{value:.1f}"),
)
_TABLE = (*_NAMES, *_ACCURACY, *_TRANSFER, *_CHOSEN, *_COSTS)
#: What is printed in place of the published columns and of the chosen values.
_PUBLISHED = {key: Column(f"printed_{key}", "published") for key in ("acc", "bwt")}
_CHOICE = (
    Column("chosen_lr", "lr"),
    Column("chosen_strength", "strength"),
    Column("validation_acc", "held-out", spread="validation_acc_std"),
    Column("tried", "tried"),
    Column("failed", "failed"),
)
_VALUES = ["acc", "bwt", "forgetting", "learning_accuracy", "bytes"]


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
    _check(subject.locate_weights(config, options), source, target)
    with gridded.opened("dlcft", config, options) as directory:
        with clock("selection"):
            tries = ANALYSIS.cells(_part(config, *one, "validation") for one in _tries(config))
            of_tries = gridded.candidates(tries, options, directory) if tries else []
            chosen = choose(config, of_tries)
        with clock("cells"):
            cells = ANALYSIS.cells(
                _part(config, name, point, seed, config.evaluation)
                for name, point in chosen.items()
                for seed in config.seeds
            )
            records, failed = gridded.run([*tries, *cells], options, directory)
        records = records[len(of_tries) :]
        found = [record for record in records if "acc" in record]
        curves = [record for record in records if "after" in record]
        if not found:
            gridded.report_failures(console, directory)
        images = len(target.x_test) if config.evaluation == "test" else config.validation
        table, verdicts, picked = summarise(found), claims(found, images), selection(of_tries, chosen)
        columns = (*_TABLE, gridded.SEEDS) if failed else _TABLE
        write_tables(directory, found, columns, summary=beside_published(table))
        directory.write_json("selection.json", picked)
        directory.write_json("curves.json", curves)
        directory.write_json("claims.json", verdicts)
        with clock("figures"):
            for name, figure in figures(table, curves, describe(config)).items():
                directory.write_figure(name, gridded.marked(figure, directory.path))
        gridded.write_provenance(directory, config.seeds, data_hash, clock, config.device)
        _print(console, config, target, table, picked, verdicts, directory)
        gridded.report_failures(console, directory)


def cell(config: DlcftConfig, place: Place) -> list[Record]:
    """Return the records of all settings, methods and seeds of a configuration.

    One a run, with ``acc``; and one a task of it, with the accuracy so far ``after`` that task. Of several
    hyper-parameters the best on the held-out samples are taken.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, or a training diverges.
    """
    source, target = data(config, place)
    config = subject.locate_weights(config, place)
    _check(config, source, target)

    def learnt(name: Name, point: Point, seed: int, evaluation: Part, file: str) -> list[Record]:
        part = _part(config, name, point, seed, evaluation)
        return _learnt(part, source, target, name, point, seed, place.folder / file)

    tried = [
        record
        for number, one in enumerate(_tries(config))
        for record in learnt(*one, "validation", f"candidate-{number}.pt")
    ]
    return [
        record
        for name, point in choose(config, tried).items()
        for seed in config.seeds
        for record in learnt(name, point, seed, config.evaluation, f"{'-'.join(name)}-{seed}.pt")
    ]


def _check(config: DlcftConfig, source: Dataset | None, target: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    subject.check_distinct(seeds=config.seeds, settings=config.settings, methods=config.methods)
    subject.check_subject(config, target)
    if not _pairs(config):
        raise CurvlabError(
            f"none of the methods {', '.join(config.methods)} is run in {', '.join(config.settings)}: choose others"
        )
    streams = {setting: stream(config, target, setting, config.seeds[0]) for setting in config.settings}
    for setting, tasks in streams.items():
        needs = any(_chosen_in(config, at, name) == setting and _many(config, name) for at, name in _pairs(config))
        if (needs or config.evaluation == "validation") and not tasks[0].sizes["validation"]:
            raise CurvlabError(
                f"validation={config.validation} gives none of its held-out samples to each of the {len(tasks)} tasks "
                f"of {setting}, where "
                + (
                    f"hyper-parameters are chosen on them: hold out {len(tasks)} or more, or give single values"
                    if needs
                    else f"the table is of them: hold out {len(tasks)} or more"
                )
            )
    if any(_many(config, name) for _, name in _pairs(config)):
        subject.check_distinct(selection_seeds=config.selection_seeds)
        if config.evaluation == "validation" and set(config.seeds) & set(config.selection_seeds):
            raise CurvlabError(
                "a table of the held-out samples needs other seeds than those that hyper-parameters are chosen with: "
                "give seeds and selection_seeds no value in common"
            )
    for setting, name in _pairs(config):
        method = METHODS[name]
        subject.check_distinct(**{key: getattr(config, key) for key in method.lists})
        method.make(config, setting, 1.0)
        outputs = Outputs(streams[setting], method.head(setting), target.num_classes, torch.device("cpu"))
        check_loss(streams[setting], outputs, method.loss)
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
    name: Name,
    point: Point,
    seed: int,
    checkpoint: Path,
) -> list[Record]:
    """Learn the tasks of a setting by a method, and return what came of it; of a candidate that diverges, this."""
    setting, method = name[0], METHODS[name[1]]
    lr, strength = point[method.lists[0]], point.get(method.strengths or "")
    keys: Record = {"setting": setting, "method": name[1], "seed": seed, "evaluation": config.evaluation}
    keys |= {"lr": lr, "strength": strength}
    tasks = stream(config, target, setting, seed)
    optimizer, _, _, momentum = _optimizer(config, name[1])
    try:
        result = learn(
            tasks,
            network(method, pretrained(config, source, target, seed)),
            method.make(config, setting, 0.0 if strength is None else strength),
            head=method.head(setting),
            loss=method.loss,
            target_scale=config.target_scale if method.linear else 1.0,
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            weight_decay=config.weight_decay,
            schedule=config.schedule,
            clip_norm=config.clip_norm,
            steps=steps(config, name[1], setting),
            batch_size=config.batch_size,
            seed=seed,
            evaluation=config.evaluation,
            checkpoint=checkpoint,
            progress=False,
        )
    except UnsupportedError:
        raise
    except CurvlabError as error:
        if config.evaluation == "test":
            raise
        # The options have been checked: what is left is a loss, or a weight, that is not finite.
        checkpoint.unlink(missing_ok=True)
        return [{**keys, **dict.fromkeys([*_VALUES, "seconds"]), "note": str(error)}]
    checkpoint.unlink(missing_ok=True)  # all that is wanted of it is in the records
    whole = {
        **keys,
        **metrics.summary(result.accuracy),
        "bytes": result.tasks[-1]["bytes"],
        "seconds": sum(task["seconds"] + task["strategy_seconds"] for task in result.tasks),
        "note": "",
    }
    so_far = enumerate(metrics.average_accuracy(result.accuracy).tolist(), start=1)
    curve = [{**keys, "after": after, "accuracy": value} for after, value in so_far if not math.isnan(value)]
    return [{key: None if value != value else value for key, value in whole.items()}, *curve]


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def _pairs(config: DlcftConfig) -> list[Name]:
    return [
        (setting, name) for setting in config.settings for name in config.methods if setting in METHODS[name].settings
    ]


def _many(config: DlcftConfig, name: MethodName) -> bool:
    return len(METHODS[name].points(config)) > 1


def _tries(config: DlcftConfig) -> Iterator[tuple[Name, Point, int]]:
    """Yield the candidates of each method, each with all selection seeds; none for a single one.

    In data_long a method has what is chosen in data, if it is run there.
    """
    for setting, name in _pairs(config):
        if _chosen_in(config, setting, name) == setting and _many(config, name):
            for point in METHODS[name].points(config):
                for seed in config.selection_seeds:
                    yield (setting, name), point, seed


def _chosen_in(config: DlcftConfig, setting: Setting, name: MethodName) -> Setting:
    return "data" if setting == "data_long" and ("data", name) in _pairs(config) else setting


def _part(config: DlcftConfig, name: Name, point: Point, seed: int, evaluation: Part) -> DlcftConfig:
    """Return the configuration of one cell, in which what has no part in it is always the same."""
    lists = {key: (value,) for key, value in point.items()}
    one = {"settings": name[:1], "methods": name[1:], "seeds": (seed,), "evaluation": evaluation}
    return config.model_copy(update=canonical(config, name[1]) | lists | one)


def _judged(name: Name, tried: Sequence[Record]) -> list[Record]:
    """Return a record a candidate: its mean accuracy on the held-out samples over the seeds; None if one diverged."""
    of_name = [
        {**record, "validation_acc": record["acc"]}
        for record in tried
        if "acc" in record and (record["setting"], record["method"]) == name
    ]
    rows = aggregate(of_name, ["setting", "method", "lr", "strength"], ["validation_acc"])
    for row in rows:
        row["note"] = next((r["note"] for r in of_name if r["note"] and _point(r) == _point(row)), "")
    return rows


def choose(config: DlcftConfig, tried: Sequence[Record]) -> dict[Name, Point]:
    """Return for every setting and method the point with the best accuracy on held-out samples, the first of several.

    Raises:
        CurvlabError: A method has diverged with all of them.
    """
    chosen = {}
    for setting, name in _pairs(config):
        if not _many(config, name):
            chosen[setting, name] = METHODS[name].points(config)[0]
            continue
        within = _chosen_in(config, setting, name)
        rows = _judged((within, name), tried)
        able = [row for row in rows if row["validation_acc"] is not None]
        if not able:
            raise CurvlabError(
                f"{METHODS[name].label} does not come to an end in {within} with any of its {len(rows)} candidates: "
                f"lower {' or '.join(METHODS[name].lists)}"
            )
        chosen[setting, name] = _point(max(able, key=lambda row: float(row["validation_acc"])))
    return chosen


def _point(record: Record) -> Point:
    values = (record["lr"], record["strength"])
    return dict(zip(METHODS[record["method"]].lists, values, strict=False))


def selection(tried: Sequence[Record], chosen: Mapping[Name, Point]) -> list[Record]:
    """Return a record a candidate that was tried, and of a method with a single one this, with ``chosen``."""
    found: list[Record] = []
    for name, point in chosen.items():
        rows = _judged(name, tried) or [_single(name, point)]
        found += [{**row, "chosen": _point(row) == point} for row in rows]
    return found


def _single(name: Name, point: Point) -> Record:
    lr, strength = [*point.values(), None][:2]
    return {"setting": name[0], "method": name[1], "lr": lr, "strength": strength}


def at_an_end(config: DlcftConfig, name: MethodName, point: Point) -> list[str]:
    """Return the lists of a method, of three values or more, of which a point has the smallest or the largest."""
    values = {key: getattr(config, key) for key in METHODS[name].lists}
    return [key for key, tried in values.items() if len(tried) > 2 and point[key] in (min(tried), max(tried))]


# What is made of them -------------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over the seeds, a record a setting and method, in the order of the tables.

    Of the seconds it is the median: another program may have disturbed one of the runs.

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
            "seconds": median(r["seconds"] for r in found if all(r[key] == row[key] for key in ("setting", "method"))),
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
    held_out = "" if config.evaluation == "test" else ", measured on the held-out samples"
    return f"{config.model} fine-tuned on {name}{held_out}"


def _print(
    console: Console,
    config: DlcftConfig,
    target: Dataset,
    table: Sequence[Record],
    picked: Sequence[Record],
    verdicts: Sequence[Claim],
    directory: RunDirectory,
) -> None:
    seeds: tuple[Column, ...] = ()
    number = f"{len(config.seeds)} seeds"
    if any(row["seeds"] < len(config.seeds) for row in table):
        number, seeds = "the seeds that did not fail", (gridded.SEEDS,)
    spread = f"mean ± standard deviation over {number}" if len(config.seeds) > 1 else "one seed"
    every, notes = [row | _printed(row) | _choice(config, row, picked) for row in beside_published(table)], []
    for setting, (label, _) in SETTINGS.items():
        rows = [row for row in every if row["setting"] == setting]
        if not rows:
            continue
        tasks = len(steps(config, "fine_tuning", setting))
        transfer = (_TRANSFER[0], _PUBLISHED["bwt"]) if setting == "task" else ()
        columns = [_NAMES[1], _ACCURACY[0], _PUBLISHED["acc"], *transfer, *_CHOICE, *_COSTS, *seeds]
        shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
        console.print(render(rows, shown, f"{label}, {tasks} tasks: {describe(config)}; {spread}"), crop=False)
    # A published number has no more digits than were printed.
    printed = [c if c.published is None else replace(c, published=f"{c.published:g}") for c in verdicts]
    console.print(render_claims(printed), crop=False)
    lists = dict.fromkeys(key for name in config.methods for key in METHODS[name].lists)
    if any(_many(config, name) for name in config.methods):
        notes.append(
            "lr and strength are those with the best mean accuracy on held-out samples, of runs with seed "
            f"{', '.join(map(str, config.selection_seeds))}; the table's have {', '.join(map(str, config.seeds))}."
            + (" data-IL, long has what is chosen in data-IL." if {"data", "data_long"} <= {*config.settings} else "")
        )
    if any("*" in f"{row['chosen_lr']}{row['chosen_strength']}" for row in every):
        notes.append("* The smallest or largest of the values that were tried: beyond it may be a better one.")
    if of_two := [key for key in lists if len(getattr(config, key)) == 2]:
        notes.append(f"Of two values only, each of which is the smallest or the largest, are {', '.join(of_two)}.")
    if any(row["published_read"] for row in every):
        notes.append("† Where it is printed the name of this method is not beside it: it is our reading.")
    for note in (
        *notes,
        f"Published: {published()['source']}, of a ResNet-18 on CIFAR-100. Here, and there (in brackets):",
        *(f"- {line}" for line in deviations(config, target)),
        f"Saved in {directory.path}: table (.json .csv .md .tex), selection, curves, claims, provenance, figures, "
        f"{gridded.STORE}.",
    ):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _printed(row: Record) -> Record:
    """Return the published numbers with the digits that they were printed with, and marked where they are a reading."""
    mark = "†" if row["published_read"] else ""
    values = {key: row.get(f"published_{key}") for key in _PUBLISHED}
    return {f"printed_{key}": None if value is None else f"{value:.4f}{mark}" for key, value in values.items()}


def _choice(config: DlcftConfig, row: Record, picked: Sequence[Record]) -> Record:
    """Return what is printed of how the hyper-parameters of a row were chosen."""
    names = METHODS[row["method"]].lists
    tried = [r for r in picked if (r["setting"], r["method"]) == (row["setting"], row["method"])]
    ends = at_an_end(config, row["method"], _point(row))
    texts = [f"{value:g}{'*' * (key in ends)}" for key, value in zip(names, _point(row).values(), strict=True)]
    best = next((r for r in tried if r["chosen"]), {})
    of_several = len(tried) > 1
    failed = sum(r["validation_acc"] is None for r in tried) if of_several else 0
    return {
        "chosen_lr": texts[0],
        "chosen_strength": texts[1] if len(texts) > 1 else None,
        "validation_acc": best.get("validation_acc"),
        "validation_acc_std": best.get("validation_acc_std"),
        "tried": len(tried) if of_several else None,
        "failed": failed or None,
    }


ANALYSIS = Analysis(
    config=DlcftConfig,
    presets=PRESETS,
    run=run,
    description="Does a linear network with squared error forget less? Fine-tunes a pre-trained network on streams of "
    "parts of the data, or of classes with the task known or unknown, by DLCFT and by its baselines, the "
    "hyper-parameters of each chosen on held-out samples, and sets what is left beside the published numbers.",
    cell=cell,
)
