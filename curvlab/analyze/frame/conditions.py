"""The conditions of a run beside those of the published one."""

from collections.abc import Mapping, Sequence

from curvlab.results import significant


def differing(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    """Return the conditions that are not the same, ours and in brackets theirs; nothing of those they do not name."""
    return "; ".join(
        f"{name} {_word(value)} ({_word(theirs[name])})"
        for name, value in ours.items()
        if name in theirs and value != theirs[name]
    )


def either(values: Sequence[float]) -> str:
    """Return values of which one is chosen, in words."""
    return " or ".join(f"{value:g}" for value in values)


def _word(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else significant(value)
