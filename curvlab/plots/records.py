"""What figures read of flat records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def distinct(records: Sequence[Record], key: str) -> list[str]:
    """Return the different values of a key, in the order in which they come."""
    return list(dict.fromkeys(record[key] for record in records))


def column(records: Sequence[Record], key: str) -> np.ndarray:
    """Return the numbers of a key, ``(N,)``."""
    return np.array([record[key] for record in records], dtype=float)


def count_seeds(records: Sequence[Record]) -> int:
    """Return how many different seeds the records are of."""
    return len({record["seed"] for record in records})
