"""Estimates from random vectors with standard errors and confidence intervals."""

from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """An estimate with its standard error, in float64.

    Attributes:
        value: A scalar tensor, or one number per entry.
        standard_error: The same shape; zero if the value is exact up to rounding.
        matvecs: Number of matrix-vector products.
        converged: Whether the requested precision is reached; True if none was requested.
        samples: Number of independent random vectors.
    """

    value: Tensor
    standard_error: Tensor
    matvecs: int
    converged: bool
    samples: int

    @property
    def half_width(self) -> Tensor:
        """Half of the 95 % confidence interval, by Student's t distribution."""
        return student_factor(self.samples) * self.standard_error

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the 95 % confidence interval."""
        return self.value - self.half_width, self.value + self.half_width

    @property
    def precision(self) -> float:
        """Half of the 95 % interval divided by the value; for several numbers, the ratio of the norms."""
        largest = (
            float(torch.maximum(self.half_width.abs().max(), self.value.abs().max())) or 1.0
        )  # so that squares do not overflow
        half, value = (float(torch.linalg.vector_norm(of / largest)) for of in (self.half_width, self.value))
        return half / value if value else (float("inf") if half else 0.0)


def student_factor(samples: int) -> float:
    """Return the half-width of a 95 % interval in units of the standard error, for this number of samples."""
    from scipy.special import stdtrit

    return float(stdtrit(max(samples - 1, 1), (1 + CONFIDENCE) / 2))


def mean_and_error(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of ``(n, ...)`` over the first dimension, and its standard error."""
    largest = rows.abs().amax(dim=0)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)  # squares of 1e-200 underflow
    return rows.mean(dim=0), (rows / unit).std(dim=0) * (unit / len(rows) ** 0.5)
