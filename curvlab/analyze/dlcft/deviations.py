"""In what a configuration of the analysis ``dlcft`` differs from the published runs."""

from pathlib import Path
from typing import Any

from curvlab.analyze.dlcft.claims import published
from curvlab.analyze.dlcft.methods import METHODS
from curvlab.analyze.dlcft.options import DlcftConfig
from curvlab.analyze.frame.conditions import differing, either
from curvlab.data import Dataset

_ALWAYS = (
    "Images are neither cropped nor flipped (both); no pull to the first weights (1e-4); Seq-MIT-67 is not run; ER and "
    "DER, and the memory of DLCFT, have sizes of ours (none is published)."
)


def deviations(config: DlcftConfig, target: Dataset) -> list[str]:
    """Return in what a configuration differs from the published runs, with what these had in brackets, a line each.

    Args:
        config: Of the analysis.
        target: What its streams are made of.
    """
    differ = differing(_conditions(config, target), published()["conditions"])
    lines = [f"{differ}."] if differ else []
    if "osla" in config.methods or "ewc" in config.methods:
        lines.append(
            "OSLA and EWC minimise the loss and the penalty, DLCFT, and OSLA in class-IL, the same over the number of "
            "tasks (as the authors' code does for all): another weight of the weight decay and of the largest gradient."
        )
    if any(name.startswith(("ewc", "osla", "dlcft")) for name in config.methods):
        fisher = (
            "the expectation over labels" if config.draws is None else f"labels drawn {config.draws} times a sample"
        )
        taken = "all" if config.samples is None else f"{config.samples:,} random"
        lines.append(f"Curvatures: {fisher}, {taken} samples of a task (labels drawn once, 1,000 batches of 64).")
    lists = dict.fromkeys(key for name in config.methods for key in METHODS[name].lists)
    if single := [key for key in lists if len(getattr(config, key)) == 1]:
        lines.append(f"Given, and not chosen from several values: {', '.join(single)}.")
    return [*lines, _ALWAYS]


def _conditions(config: DlcftConfig, target: Dataset) -> dict[str, Any]:
    """Return the conditions under the names that the published ones have."""
    network = f"{config.model} {'-'.join(map(str, config.hidden))}" if config.model == "mlp" else config.model
    name = Path(config.data).name
    kinds = {METHODS[method].linear for method in config.methods}
    conditions: dict[str, Any] = {
        "data": name,
        "classes": target.num_classes,
        "training samples of a stream": len(target.x_train) - config.validation,
        "test samples": len(target.x_test),
    }
    if "data" in config.settings:
        conditions["tasks of data"] = config.data_tasks
    if "data_long" in config.settings:
        conditions["tasks of data_long"] = config.long_tasks
    if {"task", "class"} & {*config.settings}:
        conditions["tasks of task and class"] = config.class_tasks
    source = f"the classes {' '.join(map(str, config.source_classes))} of {name}"
    conditions |= {
        "network": network,
        "pre-trained on": source if config.weights is None else f"what {config.weights.name} is of",
        "slope of LeakyReLU": config.slope,
        "normalisation": config.normalize,
        "steps a task": _steps(config),
        "batch size": config.batch_size,
    }
    for linear, text in ((False, "the network as it is"), (True, "the linear network")):
        if linear in kinds:
            conditions[f"optimizer of {text}"] = config.linear_optimizer if linear else config.nonlinear_optimizer
            lrs = config.linear_lrs if linear else config.nonlinear_lrs
            conditions[f"learning rate of {text}"] = lrs[0] if len(lrs) == 1 else either(lrs)
    if True in kinds:
        conditions |= {"strength of DLCFT": either(config.dlcft_strengths), "target scale": config.target_scale}
    return conditions | {"weight decay": config.weight_decay, "largest gradient": config.clip_norm}


def _steps(config: DlcftConfig) -> str:
    short, long = config.steps, config.long_steps
    if "data_long" not in config.settings:
        return f"{short:,}"
    return f"{long:,}" if set(config.settings) == {"data_long"} else f"{short:,}, of data_long {long:,}"
