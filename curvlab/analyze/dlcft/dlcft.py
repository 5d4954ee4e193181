"""Deep linear continual fine-tuning and its baselines: the tables of Shon et al. (2022), DLCFT."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from curvlab import plots
from curvlab.analyze.dlcft.claims import RISING, list_claims, list_rises
from curvlab.analyze.dlcft.conditions import has_scale, list_deviations, published_tables
from curvlab.analyze.dlcft.methods import METHODS, SETTINGS, adapt, count_tasks, list_steps, split
from curvlab.analyze.dlcft.network import TransferData, check_source, load_data, pretrain
from curvlab.analyze.dlcft.options import PRESETS, DlcftConfig, MethodName, Setting
from curvlab.analyze.dlcft.table5 import make_table5
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.search import Candidate, Choice, check_selection_seeds, search_by_accuracy
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import where
from curvlab.continual import Result, metrics
from curvlab.continual import run as learn
from curvlab.continual.checks import check_loss
from curvlab.continual.outputs import Outputs
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.results import Column, aggregate, mean_column
from curvlab.training import Training

Name = tuple[Setting, MethodName]


def _shortest(value: float) -> str:
    return f"{value:g}"


_NAMES = (Column("setting_label", "setting"), Column("label", "method"))
_MEASURED = {
    "acc": mean_column("acc", "accuracy"),
    "bwt": mean_column("bwt", "backward transfer"),
}
_HALF = mean_column("acc_half", "at half the steps")
_PUBLISHED = {key: Column(f"published_{key}", "published") for key in _MEASURED}
_CHOSEN = (Column("lr", "lr", format=_shortest), Column("strength", "strength", format=_shortest))
_COSTS = (
    Column("megabytes", "MB kept", format=lambda value: f"{value:.2f}"),
    Column("seconds", "median s", format=lambda value: f"{value:.1f}"),
)
#: The methods with coloured lines in the figure of all methods.
_MAIN = ("fine_tuning", "ewc", "osla", "der", "dlcft_kfac", "dlcft_tkfac", "joint", "joint_linear")
_VALUES = ["acc", "acc_half", "bwt", "forgetting", "learning_accuracy", "bytes"]


# A run ----------------------------------------------------------------------------------------------------------------


def check(config: DlcftConfig, dataset: Dataset) -> None:
    """Check the configuration and the data.

    Raises:
        CurvlabError: One of them is invalid.
    """
    assert isinstance(dataset, TransferData)
    subject.check_distinct(seeds=config.seeds, settings=config.settings, methods=config.methods)
    subject.check_subject(config, dataset)
    check_source(config, dataset)
    if not _pairs(config):
        raise CurvlabError(
            f"none of the methods {', '.join(config.methods)} is run in {', '.join(config.settings)}: choose others"
        )
    streams = {setting: split(config, dataset, setting, config.seeds[0]) for setting in config.settings}
    _check_held_out(config)
    for setting, name in _pairs(config):
        method = METHODS[name]
        subject.check_distinct(**{key: getattr(config, key) for key in method.lists})
        method.make(config, setting, 1.0)
        outputs = Outputs(streams[setting], method.head(setting), dataset.num_classes, torch.device("cpu"))
        check_loss(streams[setting], outputs, method.loss)
        _make_training(config, setting, name, getattr(config, method.lists[0])[0], config.seeds[0])
    model = pretrain(config, dataset, config.seeds[0], steps=0)
    adapt(model, METHODS["dlcft_tkfac"])(dataset.x_train[:2].to(config.device, getattr(torch, config.dtype)))


def _check_held_out(config: DlcftConfig) -> None:
    """Check the held-out samples and seeds of the search, and of a table of held-out samples."""
    searched = {group["setting"] for group, candidates in _candidates(config) if len(candidates) > 1}
    for setting in config.settings:
        tasks = count_tasks(config, setting)
        if (setting in searched or config.evaluation == "validation") and config.validation < tasks:
            purpose = "hyper-parameters are chosen on" if setting in searched else "the table is measured on"
            remedy = ", or give one value for each hyper-parameter" if setting in searched else ""
            raise CurvlabError(
                f"validation={config.validation} is less than one sample for each of the {tasks} tasks of {setting}, "
                f"and {purpose} held-out samples: hold out {tasks} or more{remedy}"
            )
    if searched:
        check_selection_seeds(config)


def _make_training(
    config: DlcftConfig, setting: Setting, name: MethodName, lr: float, seed: int, *, half: bool = False
) -> Training:
    """Return the training options of a method in a setting."""
    optimizer = config.linear_optimizer if METHODS[name].linear else config.nonlinear_optimizer
    return Training(
        optimizer=optimizer,
        lr=lr,
        momentum=0.9 if optimizer == "sgd" else 0.0,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        clip_norm=config.clip_norm,
        steps=list_steps(config, name, setting, half=half),
        batch_size=config.batch_size,
        seed=seed,
    )


def measure(config: DlcftConfig, dataset: Dataset, workspace: Workspace, *, halves: bool = True) -> Iterator[Record]:
    """Learn the tasks of each setting by each method, with one seed.

    Args:
        config: The configuration.
        dataset: The data.
        workspace: The folder of checkpoints.
        halves: Also train the joint methods with half of their steps, to measure whether more steps would help.

    Yields:
        One record per setting and method, with ``acc`` (and ``acc_half`` for joint methods), and one per task, with the
        ``accuracy`` on the tasks so far.
    """
    assert isinstance(dataset, TransferData)
    for setting, name in _pairs(config):
        learn_tasks = partial(_learn, config, dataset, setting, name, workspace)
        half = learn_tasks(half=True) if halves and name.startswith("joint") else None
        yield from _list_records(config, setting, name, learn_tasks(), half)


def _learn(
    config: DlcftConfig,
    dataset: TransferData,
    setting: Setting,
    name: MethodName,
    workspace: Workspace,
    *,
    half: bool = False,
) -> Result:
    """Learn the tasks of a setting by a method; with ``half``, with half of the steps."""
    (seed,), method = config.seeds, METHODS[name]
    (candidate,) = method.candidates(config)
    checkpoint = workspace.folder / f"{setting}-{name}{'-half' if half else ''}.pt"
    try:
        result = learn(
            split(config, dataset, setting, seed),
            adapt(pretrain(config, dataset, seed), method),
            method.make(config, setting, candidate.get("strength", 0.0)),
            head=method.head(setting),
            loss=method.loss,
            target_scale=config.target_scale if method.linear else 1.0,
            training=_make_training(config, setting, name, candidate["lr"], seed, half=half),
            evaluation=config.evaluation,
            checkpoint=checkpoint,
            progress=False,
        )
    except CurvlabError:  # the training diverges, and would diverge again
        checkpoint.unlink(missing_ok=True)
        raise
    checkpoint.unlink(missing_ok=True)  # the records replace it
    return result


def _list_records(
    config: DlcftConfig, setting: Setting, name: MethodName, result: Result, half: Result | None
) -> Iterator[Record]:
    (seed,), (candidate,) = config.seeds, METHODS[name].candidates(config)
    keys: Record = {"setting": setting, "method": name, "seed": seed, "evaluation": config.evaluation}
    keys |= {"lr": candidate["lr"], "strength": candidate.get("strength")}
    record = {
        **keys,
        **metrics.summary(result.accuracy),
        "acc_half": None if half is None else metrics.acc(half.accuracy),
        "bytes": result.tasks[-1]["bytes"],
        "seconds": sum(task["seconds"] + task["strategy_seconds"] for task in result.tasks),
    }
    yield {key: None if value != value else value for key, value in record.items()}
    for after, value in enumerate(metrics.average_accuracy(result.accuracy).tolist(), start=1):
        if not math.isnan(value):
            yield {**keys, "after": after, "accuracy": value}


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def _pairs(config: DlcftConfig) -> list[Name]:
    """Return the pairs of a setting and a method that is available in it."""
    return [
        (setting, name) for setting in config.settings for name in config.methods if setting in METHODS[name].settings
    ]


def _find_search_setting(config: DlcftConfig, setting: Setting, name: MethodName) -> Setting:
    """Return the setting of the search: ``data`` for ``data_long`` if ``data`` is run, otherwise the setting itself."""
    return "data" if setting == "data_long" and ("data", name) in _pairs(config) else setting


def _candidates(config: DlcftConfig) -> list[tuple[dict[str, str], list[dict[str, float]]]]:
    return [
        ({"setting": setting, "method": name}, METHODS[name].candidates(config))
        for setting, name in _pairs(config)
        if _find_search_setting(config, setting, name) == setting
    ]


def _single_run(config: DlcftConfig, group: Mapping[str, Any], candidate: Candidate) -> DlcftConfig:
    """Return the configuration for one setting, method and candidate."""
    one = {"settings": (group["setting"],), "methods": (group["method"],)}
    return config.model_copy(update=METHODS[group["method"]].choose(candidate) | one)


def _runs(config: DlcftConfig, chosen: Sequence[Choice]) -> list[DlcftConfig]:
    values = {(choice.group["setting"], choice.group["method"]): choice.candidate for choice in chosen}
    return [
        _single_run(
            config, {"setting": setting, "method": name}, values[_find_search_setting(config, setting, name), name]
        )
        for setting, name in _pairs(config)
    ]


def _label(part: str) -> str:
    names: dict[str, str] = {name: label for name, (label, _) in SETTINGS.items()}
    names |= {name: method.label for name, method in METHODS.items()}
    return names[part]


SEARCH = search_by_accuracy(
    _candidates,
    _single_run,
    runs=_runs,
    measure=partial(measure, halves=False),
    advice="give smaller learning rates or strengths",
    label=_label,
)


# The report -----------------------------------------------------------------------------------------------------------


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return one record per setting and method with mean and standard deviation over seeds, in table order.

    ``seconds`` is the median, because another program may have slowed down one of the runs.

    Args:
        found: Records of ``measure`` with ``acc``.
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
            "seconds": median(r["seconds"] for r in where(found, setting=row["setting"], method=row["method"])),
        }
        for row in rows
    ]


def add_published(table: Sequence[Record], config: DlcftConfig, data: Subject) -> list[Record]:
    """Return the rows of a summary, with published numbers if a setting has the published data and tasks.

    ``published_acc`` and ``published_bwt`` are texts with the published digits, as fractions, and a dagger if the
    source does not name the method of the number; ``published_value`` is the accuracy as a number.
    """
    rows = []
    for row in table:
        printed: Mapping[str, Any] = {}
        if has_scale(config, data, row["setting"]):
            tables = (published["rows"] for published in published_tables(row["setting"], data))
            printed = next((numbers[row["method"]] for numbers in tables if row["method"] in numbers), {})
        mark = "†" if printed.get("read") else ""
        shares = {key: value / 100 for key, value in printed.items() if key != "read"}
        texts = {f"published_{key}": f"{value:.4f}{mark}" for key, value in shares.items()}
        rows.append({**row, **texts, "published_value": shares.get("acc")})
    return rows


def describe(config: DlcftConfig, data: Subject) -> str:
    """Return the text for a title: the network and the data."""
    name = data.data
    if config.classes != "all" and len(config.classes) > 1:
        first, last = config.classes[0], config.classes[-1]
        name += f", classes {first} to {last}" if [*config.classes] == [*range(first, last + 1)] else ""
    held_out = "" if config.evaluation == "test" else ", measured on the held-out samples"
    return f"{config.model} fine-tuned on {name}{held_out}"


def report(results: Results[DlcftConfig]) -> Report:
    """Return one table per setting, the claims of the paper, and the figures."""
    config, found, curves = results.config, results.records["table"], results.records["curves"]
    table = add_published(summarise(found), config, results.subject)
    title = describe(config, results.subject)
    tables = [
        Table(
            f"{SETTINGS[setting][0]}, {count_tasks(config, setting)} tasks: {title}; {results.spread}",
            _columns(rows),
            rows,
        )
        for setting in SETTINGS
        if (rows := where(table, setting=setting))
    ]
    tables += make_table5(table, config, results.subject, title, results.spread)
    figures = {
        "accuracies": partial(plots.accuracy_points, table, [method.label for method in METHODS.values()], title)
    }
    if any(record["after"] > 1 for record in curves):
        figures["accuracy_curves"] = partial(
            plots.setting_curves,
            curves,
            {name: method.label for name, method in METHODS.items()},
            {name: label for name, (label, _) in SETTINGS.items()},
            {name for name, method in METHODS.items() if method.linear},
            _MAIN,
            title,
        )
    return Report(
        Table(title, (*_NAMES, *_columns(table)[1:]), table),
        tables,
        list_claims(found, config, results.subject),
        figures=figures,
        deviations=list_deviations(config, results.subject),
        notes=_notes(config, table, found),
    )


def _columns(rows: Sequence[Record]) -> list[Column]:
    """Return the columns that have a value in at least one row."""
    transfer = [_MEASURED["bwt"], _PUBLISHED["bwt"]] if any(row["setting"] == "task" for row in rows) else []
    columns = [_NAMES[1], _MEASURED["acc"], _PUBLISHED["acc"], _HALF, *transfer, *_CHOSEN, *_COSTS]
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def _notes(config: DlcftConfig, table: Sequence[Record], found: Sequence[Record]) -> list[str]:
    notes = [
        f"{SETTINGS[setting][0]}, {METHODS[name].label}: joint training still rises by {rise:.3f} from half of its "
        "steps to all of them; claims that compare the linear and the non-linear network need more steps."
        for setting in config.settings
        if setting != "data_long"
        for name, rise in list_rises(found, setting).items()
        if rise > RISING
    ]
    if SEARCH.trials(config):
        long = (
            " data-IL, long uses the values chosen in data-IL." if {"data", "data_long"} <= {*config.settings} else ""
        )
        notes.append(
            "lr and strength are the candidates with the best mean accuracy on held-out samples, with seed "
            f"{', '.join(map(str, config.selection_seeds))}; the runs of the table have seed "
            f"{', '.join(map(str, config.seeds))}.{long}"
        )
    printed = [row.get(f"published_{key}") or "" for row in table for key in _MEASURED]
    if any(printed):
        notes.append("Published: Shon et al. (2022), poster and supplement, with a ResNet-18.")
    if any("†" in text for text in printed):
        notes.append("† The source does not name the method of this number; the assignment is ours.")
    return notes


ANALYSIS = Analysis(
    config=DlcftConfig,
    question="Does a linear network with squared error forget less? Fine-tunes a pre-trained network by DLCFT and its "
    "baselines on three kinds of streams (parts of the data; classes with known or unknown task), with the "
    "hyper-parameters of each method chosen on held-out samples.",
    presets=PRESETS,
    load=load_data,
    check=check,
    measure=measure,
    report=report,
    search=SEARCH,
    kinds={"table": "acc", "curves": "after"},
)
