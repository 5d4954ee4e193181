"""The Poisson likelihood of counts."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.likelihoods.base import Likelihood, check_like_outputs, diagonal_factors, precise


@dataclass(frozen=True, eq=False)
class Poisson(Likelihood):
    """Independent Poisson likelihoods: ``exp(f) - y f``, summed over outputs; ``f`` is the logarithm of the rate.

    Targets are ``(M, C)``, not negative. The constant ``log y!`` is left out. Hessian and Fisher: the rate ``exp(f)``.
    """

    name: ClassVar[str] = "poisson"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``sum_c exp(f_c) - y_c f_c``."""
        return self.entry_values(outputs, targets).sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require floating-point targets from 0 with the shape of the outputs."""
        check_like_outputs(self.name, outputs, targets)
        if bool((targets < 0).any()):
            raise CurvlabError("poisson needs counts as targets, from 0; some targets are negative")

    def align(self, targets: Tensor) -> Tensor:
        """Return targets as ``(M, C)``."""
        return targets.unsqueeze(1) if targets.ndim == 1 else targets

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``exp(f) - y``."""
        return precise(outputs).exp() - targets

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Return ``exp(f / 2)``."""
        return ((0.5 * precise(outputs)).exp(),)

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return ``s_c = exp(f_c / 2) e_c``."""
        return diagonal_factors(scales[0], part)

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``exp(f) u``."""
        return precise(outputs).exp() * vectors

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw counts of the rate ``exp(f)``.

        Raises:
            CurvlabError: A rate is too large to draw from.
        """
        rates = outputs.detach().double().exp().cpu().numpy()
        if not rates.max(initial=0.0) < 1e18:
            raise CurvlabError(
                f"poisson cannot draw counts of the rate {rates.max():.3g}: the model's outputs are too large"
            )
        drawn = np.stack([rng.poisson(row, (count, len(row))) for row in rates]) if len(rates) else rates[:, None]
        return torch.from_numpy(drawn.astype(np.float64)).to(precise(outputs))

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``exp(f) - y``."""
        return precise(outputs).exp().unsqueeze(1) - drawn

    def entry_values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``exp(f) - y f``, ``(M, C)``."""
        outputs = precise(outputs)
        return outputs.exp() - targets * outputs

    def masses(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        """Return ones."""
        return torch.ones_like(precise(outputs))

    def outcomes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return all counts whose probability is above 1e-22 for some entry."""
        rates = outputs.detach().double().exp()
        most = int(rates.max() + 12 * math.sqrt(float(rates.max())) + 40)
        counts = (
            torch.arange(most + 1, dtype=torch.float64, device=rates.device).view(-1, 1, 1).expand(-1, *rates.shape)
        )
        probabilities = (counts * rates.log() - rates - (counts + 1).lgamma()).exp()
        likely = (probabilities > 1e-22).flatten(1).any(dim=1)
        return counts[likely], probabilities[likely]
