"""Select the best point of a grid by its mean over the seeds."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from curvlab.analyze.frame.values import list_by_seed, number, where

Record = Mapping[str, Any]


def choose_best(found: Sequence[Record], keys: Sequence[str], value: str) -> dict[str, Any] | None:
    """Return the combination of ``keys`` whose records have the highest mean ``value``; the first one in a tie.

    A combination with a missing ``value`` (a training that diverged) is excluded. Returns None if none remains.

    Examples:
        >>> choose_best([{"lr": 1, "seed": 0, "acc": 0.5}, {"lr": 2, "seed": 0, "acc": 0.7}], ["lr"], "acc")
        {'lr': 2}
    """
    values: dict[tuple[Any, ...], list[Any]] = {}
    for record in found:
        values.setdefault(tuple(record[key] for key in keys), []).append(record[value])
    means = {names: fmean(numbers) for names, numbers in values.items() if None not in numbers}
    if not means:
        return None
    best = max(means, key=lambda names: means[names])
    return dict(zip(keys, best, strict=True))


def values_by_seed(
    found: Sequence[Record], seeds: Sequence[int], point: Mapping[str, Any] | None, value: str
) -> list[float]:
    """Return ``value`` of a point per seed, NaN where it is missing; an empty list if ``point`` is None."""
    if point is None:
        return []
    mine = where(found, **point)
    of = {record["seed"]: number(record[value]) for record in mine}
    return list_by_seed(mine, seeds, of.get)


def subtract(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the differences per seed; an empty list if either input is empty."""
    return [one - other for one, other in zip(ones, others, strict=True)] if ones and others else []
