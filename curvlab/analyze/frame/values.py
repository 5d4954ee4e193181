"""Values for claims, one per seed, from flat records."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from curvlab.commandline.config import C

Record = Mapping[str, Any]


def where(records: Sequence[Any], **wanted: object) -> list[Any]:
    """Return the records with the given values.

    Examples:
        >>> where([{"task": 1, "acc": 0.5}, {"task": 2, "acc": 0.7}], task=2)
        [{'task': 2, 'acc': 0.7}]
    """
    return [record for record in records if all(record[key] == value for key, value in wanted.items())]


def split_config(config: C, *fields: str) -> list[C]:
    """Return one configuration per combination of the values of some fields, each with a single value of these.

    The values of the last field vary fastest.
    """
    combinations = product(*(getattr(config, name) for name in fields))
    return [
        config.model_copy(update={name: (value,) for name, value in zip(fields, values, strict=True)})
        for values in combinations
    ]


def list_by_seed(records: Sequence[Record], seeds: Sequence[int], value: Callable[[int], float | None]) -> list[float]:
    """Return one value per seed; NaN if there is none, or if the seed has fewer records than another seed."""
    counts = {seed: len(where(records, seed=seed)) for seed in seeds}
    values = [value(seed) if counts[seed] == max(counts.values()) else None for seed in seeds]
    return [math.nan if found is None else found for found in values]


def number(value: Any) -> float:
    """Return a value of a record as a float; None, which stands for a number that is not finite, becomes NaN."""
    return math.nan if value is None else float(value)


def divide(one: float, other: float) -> float:
    """Return a ratio; NaN if the denominator is 0, as for the curvature of a network with a single class."""
    return one / other if other else math.nan


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than three points, or if one of the two is constant.

    Examples:
        >>> f"{rank_correlation([1, 2, 3], [10, 30, 20]):.2f}"
        '0.50'
    """
    if len(x) < 3 or min(x) == max(x) or min(y) == max(y):
        return None
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
