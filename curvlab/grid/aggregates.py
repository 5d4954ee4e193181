"""SQL aggregates for means and standard deviations whose result does not depend on the order of the rows."""

import math
import sqlite3
import statistics
from typing import Any


def add_aggregates(connection: sqlite3.Connection) -> None:
    """Add ``mean`` and ``std`` (n - 1) to a connection; both are NULL if a number is missing or not finite."""
    connection.create_aggregate("mean", 1, Mean)  # type: ignore[arg-type]
    connection.create_aggregate("std", 1, Std)  # type: ignore[arg-type]


class _Numbers:
    """An SQL aggregate that collects numbers."""

    def __init__(self) -> None:
        self.values: list[float | None] = []

    def step(self, value: Any) -> None:
        self.values.append(float(value) if isinstance(value, int | float) else None)

    def finite_values(self) -> list[float]:
        """Return the numbers; an empty list if a value is missing, not finite or not a number."""
        finite = [value for value in self.values if value is not None and math.isfinite(value)]
        return finite if len(finite) == len(self.values) else []


class Mean(_Numbers):
    """Mean."""

    def finalize(self) -> float | None:
        """Return the mean, or None."""
        values = self.finite_values()
        return math.fsum(values) / len(values) if values else None  # exact sum, in any order


class Std(_Numbers):
    """Standard deviation (n - 1)."""

    def finalize(self) -> float | None:
        """Return the standard deviation, or None; None also for a single number."""
        values = self.finite_values()
        return statistics.stdev(values) if len(values) > 1 else None  # computed in exact fractions
