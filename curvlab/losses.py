"""The three losses, each a negative log-likelihood, with what the curvature of its outputs needs.

The loss of a sample is ``l_n = -log p(y_n | f_n)``, with no reduction over samples (the scale of every matrix
is set once, by the mean over samples). Each loss gives its per-sample value and output gradient, targets drawn from
the model, and the *output factors*: vectors ``s_r`` in output space with ``sum_r s_r s_r' = E_y[grad_f l grad_f l']``,
the exact Fisher information of the outputs. Pulled back through the network (``J' s_r``) they give the exact
Fisher of the parameters. Outputs of half precision are taken to float32 before anything is computed from them.
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
        """Raise a ``CurvlabError`` where the targets do not belong to this loss and these outputs."""

    @abstractmethod
    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of every sample's loss with respect to its outputs, shape ``(N, C)``."""

    @abstractmethod
    def num_factors(self, num_outputs: int) -> int:
        """Return ``R``, how many output factors a sample has."""

    @abstractmethod
    def output_factors(self, outputs: Tensor, part: range | None = None) -> Tensor:
        """Return ``s`` of shape ``(N, R, C)`` whose ``sum_r s_r s_r'`` is the exact output Fisher of each sample.

        Args:
            outputs: ``(N, C)``.
            part: Consecutive factors, which are then all that is formed; None for all.
        """

    @abstractmethod
    def fisher_product(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Return each sample's exact output Fisher times its vector, both ``(N, C)``, without forming the matrix."""

    @abstractmethod
    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``count`` targets a sample from the model's own predictive distribution.

        The stream of ``rng`` is used in the order of the samples, on the CPU: the same draws for every split
        of the data into batches and on every device.

        Returns:
            Shape ``(N, count)`` of class indices, or ``(N, count, C)``.
        """

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return what ``drawn_gradients`` makes gradients of: the targets of ``sample`` unless a loss keeps less."""
        return self.sample(outputs, count, rng)

    def drawn_gradients(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        """Return the gradients at targets that ``draw`` gave, ``(N, k, C)`` for any ``k`` columns of them."""
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
                "cross_entropy takes targets of class indices, int64 of shape (N,); "
                f"these are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise CurvlabError(
                f"a label is {low if low < 0 else high}, but the model has {outputs.shape[1]} outputs "
                f"(labels 0 to {outputs.shape[1] - 1})"
            )

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``p - e_y``, to full relative precision also where ``p_y`` rounds to one."""
        p = _precise(outputs).softmax(dim=1)
        labels = targets.long().unsqueeze(1)
        return p.scatter(1, labels, -_complement(p).gather(1, labels))

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C - 1``, or one, of zeros, where there is one class."""
        return max(num_outputs - 1, 1)

    def output_factors(self, outputs: Tensor, part: range | None = None) -> Tensor:
        """Return ``C - 1`` factors: the matrix ``diag(p) - p p'`` has no more rank.

        With ``u = sqrt(p)`` it is ``D (I - u u') D``, ``D = diag(u)``, and the columns but one of a Householder
        reflection are a root of ``I - u u'``. Reflected onto the most probable class, no difference cancels, also where
        its probability rounds to one.
        """
        outputs = _precise(outputs)
        n, c = outputs.shape
        part = range(self.num_factors(c)) if part is None else part
        if c == 1:
            return outputs.new_zeros(n, len(part), 1)
        # Through the logarithm: the root of a probability is representable also where it underflows itself.
        u = outputs.log_softmax(dim=1).mul(0.5).exp()
        top = u.argmax(dim=1, keepdim=True)
        others = torch.arange(part.start, part.stop, device=outputs.device).expand(n, len(part))
        others = others + (others >= top)
        of_top, of_others = u.gather(1, top), u.gather(1, others)
        factors = -(u.square() / (1 + of_top)).unsqueeze(1) * of_others.unsqueeze(2)
        factors.scatter_add_(2, others.unsqueeze(2), of_others.unsqueeze(2))
        return factors.scatter_(2, top.expand_as(others).unsqueeze(2), -(of_top * of_others).unsqueeze(2))

    def fisher_product(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Return ``p (u - p . u)``.

        It is the same for ``u`` less a constant: less the entry of the most probable class, no difference cancels where
        the probability of that class rounds to one.
        """
        p = _precise(outputs).softmax(dim=1)
        u = _precise(vectors)
        u = u - u.gather(1, p.argmax(dim=1, keepdim=True))
        return p * (u - (p * u).sum(dim=1, keepdim=True))

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw class indices from ``softmax(f)`` by inversion of its distribution function."""
        uniform = torch.from_numpy(rng.random((len(outputs), count))).to(outputs.device)
        cumulative = outputs.detach().double().softmax(dim=1).cumsum(dim=1)
        return torch.searchsorted(cumulative, uniform, right=True).clamp_(max=outputs.shape[1] - 1)


class SquaredError(Loss):
    """Gaussian likelihood of unit variance: ``1/2 ||f - y||^2`` summed over outputs, targets ``(N, C)``.

    The constant of the Gaussian's normaliser is left out of the value.
    """

    name: LossName = "squared_error"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``1/2 ||f - y||^2``."""
        return 0.5 * self.gradients(outputs, targets).square().sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require floating-point targets of the outputs' shape."""
        _check_like_outputs(self.name, outputs, targets)

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``f - y``."""
        return _precise(outputs) - targets

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def output_factors(self, outputs: Tensor, part: range | None = None) -> Tensor:
        """Return the unit vectors: the output Fisher of a unit Gaussian is the identity."""
        return _diagonal_factors(torch.ones_like(_precise(outputs[:1])), part).expand(len(outputs), -1, -1)

    def fisher_product(self, outputs: Tensor, vectors: Tensor) -> Tensor:  # noqa: ARG002
        """Return the vectors."""
        return vectors

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``f + e`` with standard normal ``e``."""
        return outputs.detach().unsqueeze(1) + self.draw(outputs, count, rng)

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``e`` alone, of which large outputs take no digit."""
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
        """Require floating-point targets of the outputs' shape with entries in [0, 1]."""
        _check_like_outputs(self.name, outputs, targets)
        if bool(((targets < 0) | (targets > 1)).any()):
            raise CurvlabError("binary_cross_entropy takes targets between 0 and 1; some lie outside")

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``sigmoid(f) - y``, to full relative precision also where the sigmoid rounds to one."""
        outputs, targets = _precise(outputs), _precise(targets)
        return (1 - targets) * torch.sigmoid(outputs) - targets * torch.sigmoid(-outputs)

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def output_factors(self, outputs: Tensor, part: range | None = None) -> Tensor:
        """Return ``s_c = sqrt(p_c (1 - p_c)) e_c``."""
        return _diagonal_factors(self._variances(outputs).sqrt(), part)

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
    """Return outputs in float32 where they have fewer digits."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _diagonal_factors(scales: Tensor, part: range | None) -> Tensor:
    """Return some of the unit vectors times scales ``(N, C)``, ``(N, R, C)``."""
    n, c = scales.shape
    part = range(c) if part is None else part
    factors = scales.new_zeros(n, len(part), c)
    factors.diagonal(offset=part.start, dim1=1, dim2=2).copy_(scales[:, part.start : part.stop])
    return factors


def _complement(p: Tensor) -> Tensor:
    """Return ``1 - p`` of probabilities ``(N, C)`` without cancellation where one of them rounds to one."""
    top = p.argmax(dim=1, keepdim=True)
    rest = p.scatter(1, top, 0.0).sum(dim=1, keepdim=True)
    return (1 - p).scatter(1, top, rest)


def _check_like_outputs(name: str, outputs: Tensor, targets: Tensor) -> None:
    if not targets.is_floating_point() or targets.shape != outputs.shape:
        raise CurvlabError(
            f"{name} takes floating-point targets of the outputs' shape {tuple(outputs.shape)}; "
            f"these are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
        )


LOSSES: dict[str, Loss] = {loss.name: loss for loss in (CrossEntropy(), SquaredError(), BinaryCrossEntropy())}


def get_loss(name: str) -> Loss:
    """Return the loss of that name.

    Raises:
        CurvlabError: The name is none of ``cross_entropy``, ``squared_error``, ``binary_cross_entropy``.

    Examples:
        >>> get_loss("cross_entropy").values(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    if not isinstance(name, str):
        raise CurvlabError(f"a loss goes by its name, one of {', '.join(LOSSES)}; this is a {type(name).__name__}")
    if name not in LOSSES:
        raise CurvlabError(f"there is no loss {name!r}; the losses are {', '.join(LOSSES)}")
    return LOSSES[name]
