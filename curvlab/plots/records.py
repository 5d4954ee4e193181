"""Functions that read flat records for figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def list_distinct(records: Sequence[Record], key: str) -> list[str]:
    """Return the distinct values of a key, in order of first appearance."""
    return list(dict.fromkeys(record[key] for record in records))


def column(records: Sequence[Record], key: str) -> np.ndarray:
    """Return the values of a key as an array ``(N,)``."""
    return np.array([record[key] for record in records], dtype=float)


def count_seeds(records: Sequence[Record]) -> int:
    """Return the number of distinct seeds."""
    return len({record["seed"] for record in records})
