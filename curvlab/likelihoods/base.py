"""The interface of a likelihood: what curvature needs to know about a loss.

A *term* is what a loss is computed for: a sample with one label, a token, a pixel. Its outputs ``f`` are a row of
``(M, C)``, its target a row of the targets. The loss of a term is ``-log p(y | f)``, up to a constant. A term is a sum
of ``K`` independent *entries* (one for a categorical likelihood, one per output for independent outputs), and an entry
has a *mass*: it counts as if it were there that many times. A mass is 0 where a target is ignored, a class weight, or
1.

Every matrix is a mean over terms or samples, so that no method reduces over terms. For the exact Fisher information of
the outputs, a likelihood gives *factors*: vectors ``s_r`` with ``sum_r s_r s_r' = E_y[grad_f l grad_f l']``. Multiplied
with the Jacobian of the network (``J' s_r``) they give the Fisher of the parameters. Outputs in half precision are
converted to float32 first.
References: Martens, "New insights and perspectives on the natural gradient method",
JMLR 2020, section 9; Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019.
"""

from abc import ABC, abstractmethod
from dataclasses import Field, fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError, UnsupportedError


class Likelihood(ABC):
    """A likelihood of targets given outputs ``f`` of shape ``(M, C)``: one row per term."""

    name: ClassVar[str]

    def __str__(self) -> str:
        """Return the name, with the options that have another value than their default: ``poisson``."""
        options: list[str] = []
        known: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        for field in known:
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = value.tolist() if value.numel() <= 10 else f"<{value.numel()} values>"
                options.append(f"{field.name}={value}")
            elif value != field.default:
                options.append(f"{field.name}={getattr(value, '__name__', value)}")
        return f"{self.name}:{','.join(options)}" if options else self.name

    # The loss ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every term, shape ``(M,)``."""

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise a ``CurvlabError`` if the targets do not match this likelihood and these outputs."""

    @abstractmethod
    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of every term's loss with respect to its outputs, shape ``(M, C)``."""

    def weights(self, targets: Tensor) -> Tensor:
        """Return how often every term counts in a mean over terms, ``(M,)``: 0 for an ignored one, usually 1."""
        return torch.ones(len(targets), dtype=torch.float64, device=targets.device)

    def align(self, targets: Tensor) -> Tensor:
        """Return targets in the shape of the methods above; by default unchanged.

        Args:
            targets: One row per term, ``(M,)`` where an output has one number per term, else ``(M, ...)``.
        """
        return targets

    # The empirical Fisher --------------------------------------------------------------------------------------------

    def num_gradients(self, outputs: Tensor) -> int:  # noqa: ARG002
        """Return the number of gradients per row of the outputs: one."""
        return 1

    def empirical_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradients ``(M, C)`` from which ``some_gradients`` selects."""
        return self.gradients(outputs, targets)

    def some_gradients(self, gradients: Tensor, part: range) -> Tensor:
        """Return a consecutive part of the gradients of every row, ``(M, len(part), C)``."""
        return gradients.unsqueeze(1)[:, part.start : part.stop]

    # The Fisher information of the outputs ----------------------------------------------------------------------------

    @abstractmethod
    def num_factors(self, num_outputs: int) -> int:
        """Return ``R``, the number of factors per term."""

    def output_factors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the factors ``s``, ``(M, R, C)``; ``sum_r s_r s_r'`` is a term's exact output Fisher."""
        return self.some_factors(self.factor_scales(outputs, targets), range(self.num_factors(outputs.shape[1])))

    @abstractmethod
    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors from which ``some_factors`` computes factors, with one row per term.

        The targets matter only for the masses.
        """

    @abstractmethod
    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return a consecutive part of the factors, ``(M, len(part), C)``; the others are not formed.

        Args:
            scales: The tensors of ``factor_scales``.
            part: The indices of the factors, from ``0 .. R-1``.
        """

    @abstractmethod
    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return the product of each term's exact output Fisher with its vector ``(M, C)``; no matrix is formed."""

    @property
    def hessian_form(self) -> "Likelihood":
        """A likelihood whose Fisher is the Hessian of this loss with respect to the outputs, for the GGN.

        By default the likelihood itself: the two are equal if the outputs are the natural parameters of an exponential
        family (Martens, JMLR 2020, section 9.2).
        """
        return self

    @abstractmethod
    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw ``count`` targets per term from the model's own predictive distribution.

        Random numbers are drawn from ``rng`` in the order of the terms, on the CPU, so that the targets do not depend
        on the batch size or the device.

        Returns:
            Shape ``(M, count)`` of class indices, or ``(M, count, ...)``.
        """

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return the draws from which ``drawn_gradients`` computes gradients: by default the targets of ``sample``."""
        return self.sample(outputs, count, rng)

    @abstractmethod
    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        """Return output gradients whose outer products have the exact output Fisher as their expectation.

        The gradient of an entry is multiplied by the root of its mass, which depends on the targets of the data.

        Args:
            outputs: ``(M, C)``.
            targets: Targets of the data.
            drawn: ``k`` columns of the result of ``draw``.

        Returns:
            Shape ``(M, k, C)``.
        """

    # For the reference, which differentiates -----------------------------------------------------------------------

    def entry_values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``-log p`` of every entry without its mass, ``(M, K)``."""
        raise _no_exact_fisher(self, outputs, targets)

    def masses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mass of every entry, ``(M, K)``."""
        raise _no_exact_fisher(self, outputs, targets)

    def outcomes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets ``(Q, M, ...)`` and their probabilities ``(Q, M, K)``, which give exact second moments.

        For an entry with few values these are all of them, for a Gaussian the nodes of a quadrature.
        """
        raise _no_exact_fisher(self, outputs)


def _no_exact_fisher(likelihood: Likelihood, *_: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"the reference has no exact Fisher of {likelihood.name}; use fisher:samples=k, which draws targets"
    )


def precise(outputs: Tensor) -> Tensor:
    """Return outputs in float32 at least."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def diagonal_factors(scales: Tensor, part: range) -> Tensor:
    """Return unit vectors multiplied with the scales ``(M, C)``, for the indices in ``part``: ``(M, len(part), C)``."""
    n, c = scales.shape
    factors = scales.new_zeros(n, len(part), c)
    factors.diagonal(offset=part.start, dim1=1, dim2=2).copy_(scales[:, part.start : part.stop])
    return factors


def check_like_outputs(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Require floating-point targets with the shape of the outputs.

    Raises:
        CurvlabError: They have another shape or dtype.
    """
    if not targets.is_floating_point() or targets.shape != outputs.shape:
        raise CurvlabError(
            f"{name} needs floating-point targets with the shape of the outputs {tuple(outputs.shape)}; "
            f"these are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"
        )
