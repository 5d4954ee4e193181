"""A number, or several, estimated from random vectors, and how far off it is likely to be."""

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """An estimate with its error, in float64.

    Attributes:
        value: A scalar tensor, or one number an entry.
        standard_error: Likewise; zero where the value is exact up to rounding.
        matvecs: Products taken.
        converged: Whether the accuracy asked for is reached; True where none was.
        samples: Independent random vectors behind it.
    """

    value: Tensor
    standard_error: Tensor
    matvecs: int
    converged: bool
    samples: int

    @property
    def half_width(self) -> Tensor:
        """Half of the 95 % interval, by Student's distribution."""
        return student_factor(self.samples) * self.standard_error

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """The ends of the 95 % interval."""
        return self.value - self.half_width, self.value + self.half_width

    @property
    def precision(self) -> float:
        """Half of the 95 % interval over the value: of several numbers, the one norm over the other."""
        largest = float(torch.maximum(self.half_width.abs().max(), self.value.abs().max())) or 1.0  # squares overflow
        half, value = (float(torch.linalg.vector_norm(of / largest)) for of in (self.half_width, self.value))
        return half / value if value else (float("inf") if half else 0.0)


def student_factor(samples: int) -> float:
    """Return the half-width of a 95 % interval in standard errors that come from that many samples."""
    return float(stdtrit(max(samples - 1, 1), (1 + CONFIDENCE) / 2))


def mean_and_error(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of ``(n, ...)`` over its first dimension, with the standard error of that."""
    largest = rows.abs().amax(dim=0)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)  # squares of 1e-200 are zero
    return rows.mean(dim=0), (rows / unit).std(dim=0) * (unit / len(rows) ** 0.5)
