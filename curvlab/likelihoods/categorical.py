"""The categorical likelihood over classes: the cross-entropy of a softmax."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from curvlab.checks import real_number, whole_number
from curvlab.errors import CurvlabError
from curvlab.likelihoods.base import Likelihood, precise

_ENTRIES = 1 << 21  # probabilities that are computed in float64 at once
_LABELS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True, eq=False)
class CrossEntropy(Likelihood):
    """Categorical likelihood: ``-sum_c a_c log softmax(f)_c``, logits ``(M, C)``.

    A target is a class index, or a vector of probabilities (a soft target). With the probabilities ``q`` of the
    classes, after smoothing, ``a_c = w_c q_c``. Gradient: ``m p - a`` with the mass ``m = sum_c a_c``; Hessian and
    Fisher: ``m (diag(p) - p p')``. With one hard label, ``m`` is its weight: a term of weight 2 counts as two terms.

    Args:
        weight: Weights ``w`` of the classes, ``(C,)``, not negative; None for ones.
        label_smoothing: Part of the probability that is spread evenly over all classes, from 0 to below 1.
        ignore_index: Label of terms that do not count; None: every label must be a class.

    Raises:
        CurvlabError: An option is out of range.

    Examples:
        >>> likelihood = CrossEntropy(ignore_index=-100)
        >>> likelihood.values(torch.zeros(3, 4), torch.tensor([0, -100, 3]))
        tensor([1.3863, 0.0000, 1.3863])
    """

    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    name: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.weight is not None:
            weight = torch.as_tensor(self.weight).detach()
            if weight.ndim != 1 or not weight.is_floating_point() or bool((~weight.isfinite() | (weight < 0)).any()):
                raise CurvlabError("weight of cross_entropy must be a floating-point vector of finite weights from 0")
            object.__setattr__(self, "weight", weight)
        smoothing = real_number(self.label_smoothing, "label_smoothing of cross_entropy")
        if not 0 <= smoothing < 1:
            raise CurvlabError(f"label_smoothing of cross_entropy must be from 0 to below 1, not {smoothing}")
        object.__setattr__(self, "label_smoothing", smoothing)
        if self.ignore_index is not None:
            index = whole_number(self.ignore_index, "ignore_index of cross_entropy", -(2**63))
            object.__setattr__(self, "ignore_index", index)

    @property
    def _plain(self) -> bool:
        return self.weight is None and not self.label_smoothing

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``-sum_c a_c log softmax(f)_c``."""
        outputs = precise(outputs)
        if targets.is_floating_point() or not self._plain:
            return -(self._all_masses(outputs, targets) * outputs.log_softmax(dim=1)).sum(dim=1)
        found = F.cross_entropy(outputs, self._labels(targets), reduction="none")
        return found if self._counts_all else found * self._kept(targets)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require labels in ``0 .. C-1``, apart from ``ignore_index``, or probabilities ``(M, C)``."""
        classes = outputs.shape[1]
        if self.weight is not None and len(self.weight) != classes:
            raise CurvlabError(
                f"cross_entropy has {len(self.weight)} class weights, but the model has {classes} outputs"
            )
        if targets.is_floating_point() and targets.ndim == 2:
            if targets.shape != outputs.shape:
                raise CurvlabError(
                    f"cross_entropy needs one probability per class, {tuple(outputs.shape)}; these are of shape "
                    f"{tuple(targets.shape)}"
                )
            if bool((targets < 0).any()) or bool(((targets.sum(dim=1) - 1).abs() > 1e-3).any()):
                raise CurvlabError(
                    "soft targets of cross_entropy must be probabilities: from 0, with a sum of 1 per row"
                )
            return
        if targets.dtype not in _LABELS or targets.ndim != 1:
            raise CurvlabError(
                "cross_entropy needs class indices as targets, int64 of shape (N,); "
                f"these are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
            )
        labels = targets[self._kept(targets)]
        if not len(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise CurvlabError(
                f"a label is {low if low < 0 else high}, but the model has {classes} outputs "
                f"(labels 0 to {classes - 1})"
            )

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``m p - a``, with full relative precision even if ``p_y`` rounds to one."""
        p = precise(outputs.detach()).softmax(dim=1)
        if targets.is_floating_point() or self.label_smoothing:
            a = self._all_masses(p, targets)
            return a.sum(dim=1, keepdim=True) * p - a
        labels = self._labels(targets).unsqueeze(1)
        p.scatter_(1, labels, 0.0)
        p.scatter_(1, labels, -p.sum(dim=1, keepdim=True))  # 1 - p_y as the sum of the others, without cancellation
        return p if self._counts_all else p.mul_(self.masses(outputs, targets))

    def weights(self, targets: Tensor) -> Tensor:
        """Return the class weight of hard labels (0 for ignored ones), as torch's mean does; 1 for soft targets."""
        if targets.is_floating_point() or self._counts_all:
            return super().weights(targets)
        kept = self._kept(targets).double()
        return kept if self.weight is None else kept * self.weight.to(kept)[self._labels(targets)]

    def align(self, targets: Tensor) -> Tensor:
        """Return labels as ``(M,)``."""
        one = targets.ndim == 2 and targets.shape[1] == 1 and not targets.is_floating_point()
        return targets.squeeze(1) if one else targets

    @property
    def _counts_all(self) -> bool:
        return self._plain and self.ignore_index is None

    def _kept(self, targets: Tensor) -> Tensor:
        if self.ignore_index is None:
            return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        return targets != self.ignore_index

    def _labels(self, targets: Tensor) -> Tensor:
        """Return the labels as int64, with 0 for ignored ones."""
        return targets.long() if self.ignore_index is None else targets.long() * self._kept(targets)

    def _all_masses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``a``, ``(M, C)``."""
        classes = outputs.shape[1]
        if targets.is_floating_point():
            q = targets.to(outputs)
        else:
            q = F.one_hot(self._labels(targets), classes).to(outputs)
        q = (1 - self.label_smoothing) * q + self.label_smoothing / classes
        q = q if self.weight is None else q * self.weight.to(outputs)
        return q if targets.is_floating_point() else q * self._kept(targets).unsqueeze(1)

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C - 1``; for one class return 1, a factor of zeros."""
        return max(num_outputs - 1, 1)

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return ``sqrt(p)``, from the logarithm, so that it does not underflow where ``p`` does, and ``sqrt(m)``."""
        scales = precise(outputs).log_softmax(dim=1).mul(0.5).exp()
        return (scales,) if self._counts_all else (scales, self.masses(outputs, targets).sqrt())

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return some of the ``C - 1`` factors; ``C - 1`` is the rank of the matrix ``diag(p) - p p'``.

        With ``u = sqrt(p)`` and ``D = diag(u)`` the matrix is ``D (I - u u') D``, and all columns but one of a
        Householder reflection are a root of ``I - u u'``. The reflection is onto the most probable class, which avoids
        cancellation if its probability rounds to one.
        """
        factors = _root(scales[0], part)
        for root in scales[1:]:
            factors.mul_(root.unsqueeze(2))
        return factors

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return ``m p (u - p . u)``.

        The product does not change if a constant is subtracted from ``u``. Subtracting the entry of the most probable
        class avoids cancellation if the probability of that class rounds to one.
        """
        p = precise(outputs).softmax(dim=1)
        u = precise(vectors)
        u = u - u.gather(1, p.argmax(dim=1, keepdim=True))
        u -= torch.einsum("mc,mc->m", p, u).unsqueeze(1)
        p *= u  # in place: with many classes, these are the largest tensors
        return p if self._counts_all else p.mul_(self.masses(outputs, targets))

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw class indices from ``softmax(f)`` by inverting the cumulative distribution."""
        uniform = torch.from_numpy(rng.random((len(outputs), count))).to(outputs.device)
        step = max(1, _ENTRIES // outputs.shape[1])  # rows in float64 at once
        drawn = [
            torch.searchsorted(f.double().softmax(dim=1).cumsum(dim=1), u, right=True)
            for f, u in zip(outputs.detach().split(step), uniform.split(step), strict=True)
        ]
        return torch.cat(drawn).clamp_(max=outputs.shape[1] - 1)

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        """Return ``sqrt(m) (p - e_y)``."""
        plain = CrossEntropy()
        found = torch.stack([plain.gradients(outputs, labels) for labels in drawn.unbind(dim=1)], dim=1)
        return found if self._counts_all else found * self.masses(outputs, targets).sqrt().unsqueeze(2)

    def entry_values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``-log softmax(f)[y]``, ``(M, 1)``."""
        return F.cross_entropy(precise(outputs), targets.long(), reduction="none").unsqueeze(1)

    def masses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``m``, ``(M, 1)``."""
        outputs = precise(outputs)
        if targets.is_floating_point() or not self._plain:
            return self._all_masses(outputs, targets).sum(dim=1, keepdim=True)
        return self._kept(targets).to(outputs).unsqueeze(1)

    def outcomes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return all classes."""
        p = precise(outputs).softmax(dim=1)
        return torch.arange(p.shape[1], device=p.device).unsqueeze(1).expand(-1, len(p)), p.mT.unsqueeze(2)


def _root(u: Tensor, part: range) -> Tensor:
    n, c = u.shape
    if c == 1:
        return u.new_zeros(n, len(part), 1)
    top = u.argmax(dim=1, keepdim=True)
    others = torch.arange(part.start, part.stop, device=u.device).expand(n, len(part))
    others = others + (others >= top)
    of_top, of_others = u.gather(1, top), u.gather(1, others)
    factors = -(u.square() / (1 + of_top)).unsqueeze(1) * of_others.unsqueeze(2)
    factors.scatter_add_(2, others.unsqueeze(2), of_others.unsqueeze(2))
    return factors.scatter_(2, top.expand_as(others).unsqueeze(2), -(of_top * of_others).unsqueeze(2))
