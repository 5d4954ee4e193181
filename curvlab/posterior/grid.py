"""The exact posterior of two parameters, on a grid."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.checks import describe_value, positive_number, whole_number
from curvlab.errors import CurvlabError
from curvlab.posterior.update import Gaussian, LogDensity, evaluate_density

_CHUNK = 5000  # points evaluated at once


@dataclass(frozen=True)
class GridPosterior:
    """A distribution over two parameters, given on a grid of equal cells.

    Attributes:
        points: ``(n, n, 2)``, float64.
        log_density: Normalised, ``(n, n)``.
        area: Area of a grid cell.
    """

    points: Tensor
    log_density: Tensor
    area: float

    @property
    def weights(self) -> Tensor:
        """Probability of each cell, ``(n, n)``."""
        return self.log_density.exp() * self.area

    @property
    def mean(self) -> Tensor:
        """The mean, ``(2,)``."""
        return torch.einsum("ij,ijk->k", self.weights, self.points)

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(2, 2)``."""
        way = self.points - self.mean
        return torch.einsum("ij,ijk,ijl->kl", self.weights, way, way)

    @property
    def edge_mass(self) -> float:
        """Probability of the outermost cells; if it is not small, the grid is too small."""
        return float(self.weights.sum() - self.weights[1:-1, 1:-1].sum())

    def kl_from(self, other: Gaussian) -> float:
        """Return KL(this || other) in nats.

        Raises:
            CurvlabError: The other is not a Gaussian over two parameters.
        """
        _check_two(other, "other")
        log_other = other.log_prob(self.points.reshape(-1, 2)).view_as(self.log_density)
        # Cells of probability zero, whose logarithm may be infinite, count as zero.
        return float((self.weights * (self.log_density - log_other).where(self.weights > 0, 0.0)).sum())


def posterior_on_grid(
    log_density: LogDensity, around: Gaussian, *, points: int = 201, radius: float = 8.0
) -> GridPosterior:
    """Return a distribution over two parameters on a grid in the axes of a Gaussian.

    Args:
        log_density: Gives the logarithm of the density, up to a constant, as a scalar of ``(2,)``.
        around: The grid is a square in its standardised coordinates.
        points: Number of points on each side, from 3.
        radius: Half the side length of the square, in standard deviations, above 0.

    Raises:
        CurvlabError: The Gaussian is not over two parameters, the density is NaN, infinite or everywhere zero on the
            grid, or an argument is not valid.
    """
    _check_two(around, "around")
    points, radius = whole_number(points, "points", 3), positive_number(radius, "radius")
    evaluate_density(log_density, around.mean, finite=False)
    side = torch.linspace(-radius, radius, points, dtype=torch.float64)
    standard = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    factor = torch.linalg.cholesky(around.covariance)
    grid = around.mean + standard @ factor.mT
    values = torch.func.vmap(log_density, chunk_size=_CHUNK)(grid.view(-1, 2)).detach().view(points, points)
    if bool(values.isnan().any()) or not math.isfinite(float(values.max())):
        raise CurvlabError(
            "the log density must be below infinity and not NaN on the whole grid, and finite somewhere; give a "
            "smaller radius, or mend the function"
        )
    area = float(factor.det()) * (2 * radius / (points - 1)) ** 2
    return GridPosterior(grid, values - values.flatten().logsumexp(0) - math.log(area), area)


def _check_two(gaussian: object, what: str) -> None:
    if not isinstance(gaussian, Gaussian) or len(gaussian.mean) != 2:
        given = f"one over {len(gaussian.mean)}" if isinstance(gaussian, Gaussian) else describe_value(gaussian)
        raise CurvlabError(
            f"{what} must be a Gaussian over two parameters, not {given}; for more, draw with hamiltonian_monte_carlo"
        )
