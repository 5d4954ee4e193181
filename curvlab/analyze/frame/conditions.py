"""Differences between the conditions of a run and those of the published one."""

from collections.abc import Mapping, Sequence

from curvlab.results import format_number


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
