"""The three losses, each a negative log-likelihood, with the output-space quantities that curvature needs.

The loss of a sample is ``l_n = -log p(y_n | f_n)``, without a reduction over samples (every matrix is a mean over
samples). Each loss computes its per-sample values and output gradients, draws targets from the model, and computes
*output factors*: vectors ``s_r`` in output space with ``sum_r s_r s_r' = E_y[grad_f l grad_f l']``, the exact Fisher
information of the outputs. Multiplied with the Jacobian of the network (``J' s_r``) they give the exact Fisher of the
parameters. Outputs in half precision are converted to float32 first.
References: Martens, "New insights and perspectives on the natural gradient method",
JMLR 2020, section 9; Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019.
"""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from curvlab.errors import CurvlabError

LossName = Literal["cross_entropy", "squared_error", "binary_cross_entropy"]


class Loss(ABC):
    """A negative log-likelihood of targets given outputs ``f`` of shape ``(N, C)``."""

    name: LossName

    @abstractmethod
    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample, shape ``(N,)``."""

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise a ``CurvlabError`` if the targets do not match this loss and these outputs."""

    @abstractmethod
    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of every sample's loss with respect to its outputs, shape ``(N, C)``."""

    @abstractmethod
    def num_factors(self, num_outputs: int) -> int:
        """Return ``R``, the number of output factors per sample."""

    def output_factors(self, outputs: Tensor) -> Tensor:
        """Return the output factors ``s``, ``(N, R, C)``; ``sum_r s_r s_r'`` is a sample's exact output Fisher."""
        return self.some_factors(self.factor_scales(outputs), range(self.num_factors(outputs.shape[1])))

    @abstractmethod
    def factor_scales(self, outputs: Tensor) -> Tensor:
        """Return the scales from which ``some_factors`` computes factors, ``(N, C)``."""

    @abstractmethod
    def some_factors(self, scales: Tensor, part: range) -> Tensor:
        """Return a consecutive part of the output factors, ``(N, len(part), C)``; the others are not formed.

        Args:
            scales: The result of ``factor_scales``.
            part: The indices of the factors, from ``0 .. R-1``.
        """

    @abstractmethod
    def fisher_product(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Return the product of each sample's exact output Fisher with its vector ``(N, C)``; no matrix is formed."""

    @abstractmethod
    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``count`` targets per sample from the model's own predictive distribution.

        Random numbers are drawn from ``rng`` in the order of the samples, on the CPU, so that the targets do not depend
        on the batch size or the device.

        Returns:
            Shape ``(N, count)`` of class indices, or ``(N, count, C)``.
        """

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return the draws from which ``drawn_gradients`` computes gradients: by default the targets of ``sample``."""
        return self.sample(outputs, count, rng)

    def drawn_gradients(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        """Return the output gradients for ``k`` columns of the result of ``draw``, ``(N, k, C)``."""
        return torch.stack([self.gradients(outputs, targets) for targets in drawn.unbind(dim=1)], dim=1)


class CrossEntropy(Loss):
    """Categorical likelihood over classes, logits ``(N, C)``, targets ``(N,)`` of class indices (int64)."""

    name: LossName = "cross_entropy"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``-log softmax(f)[y]``."""
        return F.cross_entropy(_precise(outputs), targets.long(), reduction="none")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require integer labels in ``0 .. C-1``."""
        if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or targets.ndim != 1:
            raise CurvlabError(
                "cross_entropy needs class indices as targets, int64 of shape (N,); "
                f"these are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise CurvlabError(
                f"a label is {low if low < 0 else high}, but the model has {outputs.shape[1]} outputs "
                f"(labels 0 to {outputs.shape[1] - 1})"
            )

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``p - e_y``, with full relative precision even if ``p_y`` rounds to one."""
        p = _precise(outputs).softmax(dim=1)
        labels = targets.long().unsqueeze(1)
        return p.scatter(1, labels, -_complement(p).gather(1, labels))

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C - 1``; for one class return 1, a factor of zeros."""
        return max(num_outputs - 1, 1)

    def factor_scales(self, outputs: Tensor) -> Tensor:
        """Return ``sqrt(p)``, computed from the logarithm so that it does not underflow where ``p`` does."""
        return _precise(outputs).log_softmax(dim=1).mul(0.5).exp()

    def some_factors(self, scales: Tensor, part: range) -> Tensor:
        """Return some of the ``C - 1`` factors; ``C - 1`` is the rank of the matrix ``diag(p) - p p'``.

        With ``u = sqrt(p)`` and ``D = diag(u)`` the matrix is ``D (I - u u') D``, and all columns but one of a
        Householder reflection are a root of ``I - u u'``. The reflection is onto the most probable class, which avoids
        cancellation if its probability rounds to one.
        """
        u = scales
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

    def fisher_product(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Return ``p (u - p . u)``.

        The product does not change if a constant is subtracted from ``u``. Subtracting the entry of the most probable
        class avoids cancellation if the probability of that class rounds to one.
        """
        p = _precise(outputs).softmax(dim=1)
        u = _precise(vectors)
        u = u - u.gather(1, p.argmax(dim=1, keepdim=True))
        return p * (u - (p * u).sum(dim=1, keepdim=True))

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw class indices from ``softmax(f)`` by inverting the cumulative distribution."""
        uniform = torch.from_numpy(rng.random((len(outputs), count))).to(outputs.device)
        cumulative = outputs.detach().double().softmax(dim=1).cumsum(dim=1)
        return torch.searchsorted(cumulative, uniform, right=True).clamp_(max=outputs.shape[1] - 1)


class SquaredError(Loss):
    """Gaussian likelihood of unit variance: ``1/2 ||f - y||^2`` summed over outputs, targets ``(N, C)``.

    The normalising constant of the Gaussian is left out.
    """

    name: LossName = "squared_error"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``1/2 ||f - y||^2``."""
        return 0.5 * self.gradients(outputs, targets).square().sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require floating-point targets with the shape of the outputs."""
        _check_like_outputs(self.name, outputs, targets)

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``f - y``."""
        return _precise(outputs) - targets

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def factor_scales(self, outputs: Tensor) -> Tensor:
        """Return ones: the output Fisher of a unit Gaussian is the identity."""
        return torch.ones_like(_precise(outputs[:1])).expand(outputs.shape)

    def some_factors(self, scales: Tensor, part: range) -> Tensor:
        """Return unit vectors, one per output."""
        return _diagonal_factors(scales[:1], part).expand(len(scales), -1, -1)

    def fisher_product(self, outputs: Tensor, vectors: Tensor) -> Tensor:  # noqa: ARG002
        """Return the vectors unchanged."""
        return vectors

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``f + e`` with standard normal ``e``."""
        return outputs.detach().unsqueeze(1) + self.draw(outputs, count, rng)

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``e`` alone, because adding it to large outputs would lose digits."""
        return torch.from_numpy(rng.standard_normal((len(outputs), count, outputs.shape[1]))).to(_precise(outputs))

    def drawn_gradients(self, outputs: Tensor, drawn: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``-e``."""
        return -drawn


class BinaryCrossEntropy(Loss):
    """Independent Bernoulli likelihoods, logits ``(N, C)``, targets ``(N, C)`` in [0, 1], summed over outputs."""

    name: LossName = "binary_cross_entropy"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``-sum_c log Bernoulli(y_c; sigmoid(f_c))``."""
        outputs = _precise(outputs)
        return F.binary_cross_entropy_with_logits(outputs, _precise(targets), reduction="none").sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require floating-point targets in [0, 1] with the shape of the outputs."""
        _check_like_outputs(self.name, outputs, targets)
        if bool(((targets < 0) | (targets > 1)).any()):
            raise CurvlabError("binary_cross_entropy needs targets between 0 and 1; some targets are outside")

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``sigmoid(f) - y``, with full relative precision even if the sigmoid rounds to one."""
        outputs, targets = _precise(outputs), _precise(targets)
        return (1 - targets) * torch.sigmoid(outputs) - targets * torch.sigmoid(-outputs)

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def factor_scales(self, outputs: Tensor) -> Tensor:
        """Return ``sqrt(p (1 - p))``."""
        return self._variances(outputs).sqrt()

    def some_factors(self, scales: Tensor, part: range) -> Tensor:
        """Return ``s_c = sqrt(p_c (1 - p_c)) e_c``."""
        return _diagonal_factors(scales, part)

    def fisher_product(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Return ``p (1 - p) u``."""
        return self._variances(outputs) * vectors

    def _variances(self, outputs: Tensor) -> Tensor:
        outputs = _precise(outputs)
        return torch.sigmoid(outputs) * torch.sigmoid(-outputs)

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw zeros and ones from ``sigmoid(f)``."""
        uniform = torch.from_numpy(rng.random((len(outputs), count, outputs.shape[1]))).to(outputs.device)
        return (uniform < outputs.detach().double().sigmoid().unsqueeze(1)).to(outputs.dtype)


def _precise(outputs: Tensor) -> Tensor:
    """Return outputs in float32 at least."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _diagonal_factors(scales: Tensor, part: range) -> Tensor:
    """Return unit vectors multiplied with the scales ``(N, C)``, for the indices in ``part``: ``(N, len(part), C)``."""
    n, c = scales.shape
    factors = scales.new_zeros(n, len(part), c)
    factors.diagonal(offset=part.start, dim1=1, dim2=2).copy_(scales[:, part.start : part.stop])
    return factors


def _complement(p: Tensor) -> Tensor:
    """Return ``1 - p`` of probabilities ``(N, C)`` without cancellation, even if one of them rounds to one."""
    top = p.argmax(dim=1, keepdim=True)
    rest = p.scatter(1, top, 0.0).sum(dim=1, keepdim=True)
    return (1 - p).scatter(1, top, rest)


def _check_like_outputs(name: str, outputs: Tensor, targets: Tensor) -> None:
    if not targets.is_floating_point() or targets.shape != outputs.shape:
        raise CurvlabError(
            f"{name} needs floating-point targets with the shape of the outputs {tuple(outputs.shape)}; "
            f"these are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
        )


LOSSES: dict[str, Loss] = {loss.name: loss for loss in (CrossEntropy(), SquaredError(), BinaryCrossEntropy())}


def get_loss(name: str) -> Loss:
    """Return the loss with this name.

    Raises:
        CurvlabError: The name is not ``cross_entropy``, ``squared_error`` or ``binary_cross_entropy``.

    Examples:
        >>> get_loss("cross_entropy").values(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    if not isinstance(name, str):
        raise CurvlabError(f"loss must be one of the names {', '.join(LOSSES)}, not a {type(name).__name__}")
    if name not in LOSSES:
        raise CurvlabError(f"there is no loss {name!r}; available: {', '.join(LOSSES)}")
    return LOSSES[name]
