"""Means and deviations in SQL whose result does not depend on the order of the rows."""

import math
import sqlite3
import statistics
from typing import Any


def add_aggregates(connection: sqlite3.Connection) -> None:
    """Give a connection ``mean`` and ``std`` (n - 1): nothing where a number is missing or not finite."""
    connection.create_aggregate("mean", 1, Mean)  # type: ignore[arg-type]
    connection.create_aggregate("std", 1, Std)  # type: ignore[arg-type]


class _Numbers:
    """An SQL aggregate that gathers numbers."""

    def __init__(self) -> None:
        self.values: list[float | None] = []

    def step(self, value: Any) -> None:
        self.values.append(float(value) if isinstance(value, int | float) else None)

    def known(self) -> list[float]:
        """Return the numbers; none if one is missing, not finite or no number."""
        known = [value for value in self.values if value is not None and math.isfinite(value)]
        return known if len(known) == len(self.values) else []


class Mean(_Numbers):
    """The mean."""

    def finalize(self) -> float | None:
        """Return it, or None."""
        known = self.known()
        return math.fsum(known) / len(known) if known else None  # exact, whatever the order


class Std(_Numbers):
    """The standard deviation (n - 1)."""

    def finalize(self) -> float | None:
        """Return it, or None, also of one number."""
        known = self.known()
        return statistics.stdev(known) if len(known) > 1 else None  # in exact fractions
