"""The conditions of a run of the analysis ``dlcft``, compared with those of the published runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from curvlab.analyze.dlcft.methods import METHODS, SETTINGS, count_steps, count_tasks
from curvlab.analyze.dlcft.options import DlcftConfig, Setting
from curvlab.analyze.frame.conditions import describe_choice, describe_differences
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject
from curvlab.data import NAMES
from curvlab.results import Gate, require, require_direction

_MIT67 = "MIT-67"
_PER_SETTING = ("tasks", "parts", "steps per task")  # the others are the same in all settings
_SAME_SCALE = ("data", "classes", "test samples", "tasks", "parts")

_NOTE = (
    "No random crops or flips (both are used); no penalty on the distance to the initial weights (1e-4); the buffer "
    "sizes of ER, DER and DLCFT are ours (not published)."
)


def name_data(data: Subject) -> str:
    """Return the name of the data: a file or folder with 67 classes is taken for MIT-67, with any name."""
    return _MIT67 if data.num_classes == 67 and data.data not in NAMES else data.data


def published_tables(setting: Setting, data: Subject) -> list[Mapping[str, Any]]:
    """Return the published tables of a setting; the first one that has a method is shown with our numbers.

    ``data`` has other tables for MIT-67 (Seq-MIT-67) than for CIFAR-100.
    """
    wanted = "mit67" if setting == "data" and name_data(data) == _MIT67 else setting
    tables = [table for table in read_published("dlcft").values() if table.get("setting") == wanted]
    return sorted(tables, key=lambda table: table["source"].startswith("poster"))


def measured_samples(config: DlcftConfig, data: Subject) -> int:
    """Return the number of samples that accuracies are measured on."""
    return data.test if config.evaluation == "test" else config.validation


def list_conditions(config: DlcftConfig, data: Subject, setting: Setting) -> dict[str, Any]:
    """Return the conditions of a setting, with the names used in ``published.yaml``."""
    network = f"{config.model} {'-'.join(map(str, config.hidden))}" if config.model == "mlp" else config.model
    source = f"the classes {' '.join(map(str, config.source_classes))} of {data.data}"
    kinds = {METHODS[method].linear for method in config.methods}
    conditions: dict[str, Any] = {
        "data": name_data(data),
        "classes": data.num_classes,
        "training samples of a stream": data.train - config.validation,
        "test samples": measured_samples(config, data),
        "tasks": count_tasks(config, setting),
        "steps per task": count_steps(config, setting),
        "network": network,
        "pre-trained on": source if config.weights is None else f"the training data of {config.weights.name}",
        "slope of LeakyReLU": config.slope,
        "normalisation": config.normalize,
        "batch size": config.batch_size,
    }
    for linear, text in ((False, "the original network"), (True, "the linear network")):
        if linear in kinds:
            conditions[f"optimizer of {text}"] = config.linear_optimizer if linear else config.nonlinear_optimizer
            lrs = config.linear_lrs if linear else config.nonlinear_lrs
            conditions[f"learning rate of {text}"] = lrs[0] if len(lrs) == 1 else describe_choice(lrs)
    if True in kinds:
        conditions |= {
            "strength of DLCFT": describe_choice(config.dlcft_strengths),
            "target scale": config.target_scale,
        }
    if setting in ("data", "data_long"):
        conditions["parts"] = config.data_parts
    return conditions | {"weight decay": config.weight_decay, "largest gradient": config.clip_norm}


def direction_gate(config: DlcftConfig, data: Subject, setting: Setting) -> Gate:
    """Return the gate of the claims of a setting; all of them are judged as directions."""
    table = published_tables(setting, data)[0]
    # The scope names only the conditions required for a direction; the others are listed as deviations.
    theirs = {name: table["conditions"][name] for name in table["direction"]}
    return require_direction(list_conditions(config, data, setting), theirs, table["direction"])


def has_scale(config: DlcftConfig, data: Subject, setting: Setting) -> bool:
    """Return whether a setting has the published data and tasks, so that accuracies are comparable."""
    ours, theirs = list_conditions(config, data, setting), published_tables(setting, data)[0]["conditions"]
    return not require(ours, {name: theirs[name] for name in _SAME_SCALE if name in ours}).reason


def list_deviations(config: DlcftConfig, data: Subject) -> Sequence[str]:
    """Return the differences from the published runs, one line each, with the published values in brackets."""
    lines: list[str] = []
    for setting in config.settings:
        ours, theirs = list_conditions(config, data, setting), published_tables(setting, data)[0]["conditions"]
        common = describe_differences({name: value for name, value in ours.items() if name not in _PER_SETTING}, theirs)
        own = describe_differences({name: ours[name] for name in _PER_SETTING if name in ours}, theirs)
        if common and not lines:
            lines.append(f"{common}.")
        if own:
            lines.append(f"{SETTINGS[setting][0]}: {own}.")
    if "osla" in config.methods or "ewc" in config.methods:
        lines.append(
            "OSLA and EWC minimise the loss plus the penalty; DLCFT, and OSLA in class-IL, minimise this sum divided "
            "by the number of tasks (the authors' code divides for all methods); this changes the relative effect of "
            "weight decay and gradient clipping."
        )
    if any(name.startswith(("ewc", "osla", "dlcft")) for name in config.methods):
        fisher = "expectation over labels" if config.draws is None else f"{config.draws} labels drawn per sample"
        count = "all" if config.samples is None else f"{config.samples:,} random"
        lines.append(
            f"Curvatures: {fisher}, {count} samples of a task (one label drawn per sample, 1,000 batches of 64)."
        )
    lists = dict.fromkeys(key for name in config.methods for key in METHODS[name].lists)
    if single := [key for key in lists if len(getattr(config, key)) == 1]:
        lines.append(f"Not tuned, only one value given: {', '.join(single)}.")
    return [*lines, _NOTE]
