"""Independent Bernoulli likelihoods: binary cross-entropy of logits."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from curvlab.checks import real_number
from curvlab.errors import CurvlabError
from curvlab.likelihoods.base import Likelihood, check_like_outputs, diagonal_factors, precise


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(Likelihood):
    """Independent Bernoulli likelihoods, logits ``(M, C)``, targets ``(M, C)`` in [0, 1], summed over outputs.

    With a weight ``w`` of positive targets an output's loss is ``-w y log p - (1 - y) log (1 - p)``. Gradient:
    ``a p - w y`` with the mass ``a = w y + 1 - y``; Hessian and Fisher: ``a p (1 - p)``.

    Args:
        pos_weight: Weight of positive targets, not negative: a number, or a tensor ``(C,)``; None for 1.
        ignore_value: Value of targets that do not count, such as -1; None: all count.

    Raises:
        CurvlabError: A weight is negative or not finite.
    """

    pos_weight: float | Tensor | None = None
    ignore_value: float | None = None
    name: ClassVar[str] = "binary_cross_entropy"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.pos_weight is not None:
            weight = torch.as_tensor(self.pos_weight).detach()
            weight = weight if weight.is_floating_point() else weight.double()
            if weight.ndim > 1 or bool((~weight.isfinite() | (weight < 0)).any()):
                raise CurvlabError(
                    "pos_weight of binary_cross_entropy must be finite numbers from 0: one, or one per output"
                )
            object.__setattr__(self, "pos_weight", weight.squeeze() if weight.numel() == 1 else weight)
        if self.ignore_value is not None:
            object.__setattr__(self, "ignore_value", real_number(self.ignore_value, "ignore_value"))

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``-sum_c (w y_c log p_c + (1 - y_c) log(1 - p_c))``."""
        outputs, y = precise(outputs), self._known(targets)
        weight = None if self.pos_weight is None else self._weight(outputs)
        found = F.binary_cross_entropy_with_logits(outputs, precise(y), reduction="none", pos_weight=weight)
        return (found if self.ignore_value is None else found * self._kept(targets)).sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require floating-point targets in [0, 1] with the shape of the outputs."""
        check_like_outputs(self.name, outputs, targets)
        y = self._known(targets)
        if bool(((y < 0) | (y > 1)).any()):
            raise CurvlabError("binary_cross_entropy needs targets between 0 and 1; some targets are outside")
        if isinstance(self.pos_weight, Tensor) and self.pos_weight.ndim and len(self.pos_weight) != outputs.shape[1]:
            raise CurvlabError(
                f"binary_cross_entropy has {len(self.pos_weight)} weights of positive targets, but the model has "
                f"{outputs.shape[1]} outputs"
            )

    def align(self, targets: Tensor) -> Tensor:
        """Return targets as ``(M, C)``."""
        return targets.unsqueeze(1) if targets.ndim == 1 else targets

    def weights(self, targets: Tensor) -> Tensor:
        """Return 1 for a term with a target that counts, else 0."""
        return self._kept(targets).reshape(len(targets), -1).any(dim=1).double()

    def _kept(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool) if self.ignore_value is None else targets != self.ignore_value

    def _known(self, targets: Tensor) -> Tensor:
        """Return the targets, with 0 for ignored ones."""
        return targets if self.ignore_value is None else torch.where(self._kept(targets), targets, 0.0)

    def _weight(self, like: Tensor) -> Tensor:
        return torch.as_tensor(1.0 if self.pos_weight is None else self.pos_weight).to(like)

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``a p - w y``, with full relative precision even if the sigmoid rounds to one."""
        outputs, y = precise(outputs), precise(self._known(targets))
        positive = y if self.pos_weight is None else self._weight(outputs) * y
        found = (1 - y) * torch.sigmoid(outputs) - positive * torch.sigmoid(-outputs)
        return found if self.ignore_value is None else found * self._kept(targets)

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return ``sqrt(a p (1 - p))``."""
        return (self._variances(outputs, targets).sqrt(),)

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return ``s_c = sqrt(a_c p_c (1 - p_c)) e_c``."""
        return diagonal_factors(scales[0], part)

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return ``a p (1 - p) u``."""
        return self._variances(outputs, targets) * vectors

    def _variances(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = precise(outputs)
        found = torch.sigmoid(outputs) * torch.sigmoid(-outputs)
        return found if self._counts_all else found * self.masses(outputs, targets)

    @property
    def _counts_all(self) -> bool:
        return self.pos_weight is None and self.ignore_value is None

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw zeros and ones from ``sigmoid(f)``."""
        uniform = torch.from_numpy(rng.random((len(outputs), count, outputs.shape[1]))).to(outputs.device)
        return (uniform < outputs.detach().double().sigmoid().unsqueeze(1)).to(outputs.dtype)

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        """Return ``sqrt(a) (p - y)``."""
        plain = BinaryCrossEntropy()
        found = torch.stack([plain.gradients(outputs, some) for some in drawn.unbind(dim=1)], dim=1)
        return found if self._counts_all else found * self.masses(outputs, targets).sqrt().unsqueeze(1)

    def entry_values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``-log Bernoulli(y; sigmoid(f))``, ``(M, C)``."""
        return F.binary_cross_entropy_with_logits(precise(outputs), precise(targets), reduction="none")

    def masses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``a = w y + 1 - y``, ``(M, C)``; 0 where a target is ignored."""
        y = self._known(targets).to(precise(outputs))
        return (1 - y + self._weight(y) * y) * self._kept(targets)

    def outcomes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return 0 and 1."""
        p = precise(outputs).sigmoid()
        return torch.stack([torch.zeros_like(p), torch.ones_like(p)]), torch.stack([1 - p, p])
