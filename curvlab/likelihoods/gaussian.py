"""Gaussian likelihoods: of a fixed variance, and of a variance that the network gives."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from curvlab.checks import real_number
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.likelihoods.base import Likelihood, check_like_outputs, diagonal_factors, precise


@dataclass(frozen=True, eq=False)
class SquaredError(Likelihood):
    """Gaussian likelihood: ``||f - y||^2 / (2 variance)`` summed over outputs, targets ``(M, C)``.

    The normalising constant of the Gaussian is left out. Hessian and Fisher are the inverse variance.

    Args:
        variance: Fixed variance, above 0: a number, or a tensor ``(C,)``.

    Raises:
        CurvlabError: The variance is not positive and finite.
    """

    variance: float | Tensor = 1.0
    name: ClassVar[str] = "squared_error"

    def __post_init__(self) -> None:
        """Check the variance."""
        if isinstance(self.variance, Tensor) and self.variance.ndim:
            if self.variance.ndim != 1 or not self.variance.is_floating_point():
                raise CurvlabError("variance of squared_error must be a number or a floating-point vector (C,)")
            variance: float | Tensor = self.variance.detach()
        else:
            variance = real_number(self.variance, "variance of squared_error")
        if not bool((torch.as_tensor(variance) > 0).all() & torch.as_tensor(variance).isfinite().all()):
            raise CurvlabError(f"variance of squared_error must be above 0, not {self.variance}")
        object.__setattr__(self, "variance", variance)

    @property
    def _unit(self) -> bool:
        return isinstance(self.variance, float) and self.variance == 1

    def _scaled(self, values: Tensor, power: float) -> Tensor:
        """Return the last dimension times a power of the variance."""
        if self._unit:
            return values
        scale = torch.as_tensor(self.variance, dtype=values.dtype, device=values.device) ** power
        return values * scale

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``||f - y||^2 / (2 variance)``."""
        return self.entry_values(outputs, targets).sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require floating-point targets with the shape of the outputs."""
        check_like_outputs(self.name, outputs, targets)
        if isinstance(self.variance, Tensor) and len(self.variance) != outputs.shape[1]:
            raise CurvlabError(
                f"squared_error has {len(self.variance)} variances, but the model has {outputs.shape[1]} outputs"
            )

    def align(self, targets: Tensor) -> Tensor:
        """Return targets as ``(M, C)``."""
        return targets.unsqueeze(1) if targets.ndim == 1 else targets

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``(f - y) / variance``."""
        return self._scaled(precise(outputs) - targets, -1)

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Return the inverse standard deviations."""
        return (self._scaled(torch.ones_like(precise(outputs[:1])), -0.5).expand(outputs.shape),)

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return scaled unit vectors, one per output."""
        return diagonal_factors(scales[0][:1], part).expand(len(scales[0]), -1, -1)

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:  # noqa: ARG002
        """Return the vectors, divided by the variance."""
        return self._scaled(vectors, -1)

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``f + e`` with normal ``e``."""
        return outputs.detach().unsqueeze(1) + self._scaled(self.draw(outputs, count, rng), 0.5)

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw standard normal ``e`` alone, because adding it to large outputs would lose digits."""
        return torch.from_numpy(rng.standard_normal((len(outputs), count, outputs.shape[1]))).to(precise(outputs))

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``-e`` over the standard deviation."""
        return self._scaled(-drawn, -0.5)

    def entry_values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``(f - y)^2 / (2 variance)``, ``(M, C)``."""
        return 0.5 * self._scaled((precise(outputs) - targets).square(), -1)

    def masses(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        """Return ones."""
        return torch.ones_like(precise(outputs))

    def outcomes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return one standard deviation below and above: the moments up to the third are exact."""
        f = precise(outputs.detach())
        step = self._scaled(torch.ones_like(f), 0.5)
        return torch.stack([f - step, f + step]), torch.full((2, *f.shape), 0.5).to(f)


@dataclass(frozen=True, eq=False)
class HeteroscedasticGaussian(Likelihood):
    """Gaussian likelihood whose mean and variance the network gives: ``(s + (y - m)^2 exp(-s)) / 2`` per target.

    The ``2 K`` outputs are the ``K`` means ``m`` and then the ``K`` log variances ``s``; the targets are ``(M, K)``.
    The Fisher is diagonal: ``exp(-s)`` for a mean, 1/2 for a log variance. The Hessian of the loss with respect to
    these outputs can have negative eigenvalues, so that there is no GGN (Schraudolph 2002 needs a convex loss).
    """

    name: ClassVar[str] = "heteroscedastic_gaussian"

    @staticmethod
    def _split(outputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = precise(outputs).chunk(2, dim=1)
        return mean, log_variance

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over the targets."""
        return self.entry_values(outputs, targets).sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require floating-point targets, half as many as outputs."""
        outputs_needed = 2 * targets.shape[-1]
        if not targets.is_floating_point() or targets.ndim != 2 or outputs_needed != outputs.shape[1]:
            raise CurvlabError(
                f"{self.name} needs floating-point targets (N, K) and 2 K outputs, the means and then the log "
                f"variances; the targets are {str(targets.dtype).removeprefix('torch.')} of shape "
                f"{tuple(targets.shape)}, and the model has {outputs.shape[1]} outputs"
            )

    def align(self, targets: Tensor) -> Tensor:
        """Return targets as ``(M, K)``."""
        return targets.unsqueeze(1) if targets.ndim == 1 else targets

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``(m - y) exp(-s)`` and ``(1 - (y - m)^2 exp(-s)) / 2``."""
        mean, log_variance = self._split(outputs)
        error, precision = mean - targets, (-log_variance).exp()
        return torch.cat([error * precision, 0.5 * (1 - error.square() * precision)], dim=1)

    @property
    def hessian_form(self) -> Likelihood:
        """There is none.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"{self.name} has no GGN: the Hessian of its loss with respect to the outputs can have negative "
            "eigenvalues; use fisher, or hessian"
        )

    def num_factors(self, num_outputs: int) -> int:
        """Return ``2 K``."""
        return num_outputs

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Return the roots of the diagonal."""
        log_variance = self._split(outputs)[1]
        return (torch.cat([(-0.5 * log_variance).exp(), torch.full_like(log_variance, math.sqrt(0.5))], dim=1),)

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return scaled unit vectors."""
        return diagonal_factors(scales[0], part)

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return the diagonal times the vectors."""
        return self.factor_scales(outputs, targets)[0].square() * vectors

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``m + exp(s / 2) e`` with standard normal ``e``."""
        mean, log_variance = self._split(outputs.detach())
        return mean.unsqueeze(1) + (0.5 * log_variance).exp().unsqueeze(1) * self.draw(outputs, count, rng)

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw standard normal ``e`` alone, because adding it to a large mean would lose digits."""
        drawn = rng.standard_normal((len(outputs), count, outputs.shape[1] // 2))
        return torch.from_numpy(drawn).to(precise(outputs))

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``-e exp(-s / 2)`` and ``(1 - e^2) / 2``."""
        scale = (-0.5 * self._split(outputs)[1]).exp().unsqueeze(1)
        return torch.cat([-drawn * scale, 0.5 * (1 - drawn.square())], dim=2)

    def entry_values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``(s + (y - m)^2 exp(-s)) / 2``, ``(M, K)``."""
        mean, log_variance = self._split(outputs)
        return 0.5 * (log_variance + (targets - mean).square() * (-log_variance).exp())

    def masses(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        """Return ones."""
        return torch.ones_like(self._split(outputs)[0])

    def outcomes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nodes of a Gauss-Hermite quadrature, with moments up to the ninth exact."""
        mean, log_variance = self._split(outputs.detach())
        nodes, weights = (torch.from_numpy(part).to(mean) for part in np.polynomial.hermite_e.hermegauss(5))
        targets = mean + (0.5 * log_variance).exp() * nodes.view(-1, 1, 1)
        return targets, (weights / weights.sum()).view(-1, 1, 1).expand(targets.shape)
