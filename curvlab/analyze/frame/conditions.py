"""Conditions of a run, and their differences from those of the published one."""

from collections.abc import Mapping, Sequence
from typing import Any

from curvlab.analyze.frame.subject import TrainedSubjectConfig
from curvlab.results import format_number


def training_conditions(config: TrainedSubjectConfig) -> dict[str, Any]:
    """Return the training options of a run as conditions, with the names used in ``published.yaml``."""
    return {
        "optimizer": config.optimizer,
        "learning rate": config.lr,
        "momentum": config.momentum,
        "weight decay": config.weight_decay,
        "schedule": config.schedule,
        "batch size": config.batch_size,
        "steps": config.steps,
        "precision": config.dtype,
    }


def lowest_accuracy(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the lowest ``test_accuracy`` of the trained networks of a run; None if one was not trained.

    A network that has learnt nothing says nothing about the curvature of a trained one: as the condition
    ``test accuracy``, it decides whether a claim is judged.
    """
    accuracies: list[Any] = [record.get("test_accuracy") for record in records]
    return None if None in accuracies else min(accuracies, default=None)


def describe_differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    """Return the conditions that differ: our value, and the published one in brackets.

    Conditions that ``theirs`` does not name are left out.
    """
    return "; ".join(
        f"{name} {_word(value)} ({_word(theirs[name])})"
        for name, value in ours.items()
        if name in theirs and value != theirs[name]
    )


def describe_choice(values: Sequence[float]) -> str:
    """Return the values that a search chooses from, as text: ``0.1 or 0.01``."""
    return " or ".join(f"{value:g}" for value in values)


def _word(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else format_number(value)
