"""Values of claims, one a seed, from flat records."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def where(records: Sequence[Any], **wanted: object) -> list[Any]:
    """Return the records that have these values.

    Examples:
        >>> where([{"task": 1, "acc": 0.5}, {"task": 2, "acc": 0.7}], task=2)
        [{'task': 2, 'acc': 0.7}]
    """
    return [record for record in records if all(record[key] == value for key, value in wanted.items())]


def by_seed(records: Sequence[Record], seeds: Sequence[int], value: Callable[[int], float | None]) -> list[float]:
    """Return a value for every seed, NaN where there is none, or where the seed lacks records that another one has."""
    counts = {seed: len(where(records, seed=seed)) for seed in seeds}
    values = [value(seed) if counts[seed] == max(counts.values()) else None for seed in seeds]
    return [math.nan if found is None else found for found in values]


def number(value: Any) -> float:
    """Return a number of a record; what is null there, as a number that is not finite is, is NaN."""
    return math.nan if value is None else float(value)


def divide(one: float, other: float) -> float:
    """Return a ratio; NaN where there is none, as of the curvature of a network that has a single class to learn."""
    return one / other if other else math.nan
