"""A likelihood made of a user's function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import hessian, vmap

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.likelihoods.base import Likelihood, precise


@dataclass(frozen=True, eq=False)
class FromFunction(Likelihood):
    """Likelihood given by ``nll(outputs, targets) -> terms``, differentiated by torch.

    The empirical Fisher and the Hessian work for any differentiable function, the GGN for one that is convex in the
    outputs. The Fisher needs ``draw_targets``, or ``natural=True``.

    Args:
        nll: Function of outputs ``(M, C)`` and targets ``(M, ...)`` that returns the loss of every term, ``(M,)``. A
            term may depend on its own row only.
        draw_targets: Function of outputs ``(M, C)``, a number ``k`` and a NumPy random generator that returns ``k``
            targets per term, drawn from the model's predictive distribution, ``(M, k, ...)``.
        natural: Whether the outputs are the natural parameters of an exponential family, so that the Fisher is the
            GGN (Martens, JMLR 2020, section 9.2).

    Raises:
        CurvlabError: ``nll`` or ``draw_targets`` is not a function.

    Examples:
        >>> huber = FromFunction(lambda f, y: torch.nn.functional.huber_loss(f, y, reduction="none").sum(dim=1))
        >>> huber.gradients(torch.tensor([[0.5], [3.0]]), torch.zeros(2, 1)).flatten()
        tensor([0.5000, 1.0000])
    """

    nll: Callable[[Tensor, Tensor], Tensor]
    draw_targets: Callable[[Tensor, int, np.random.Generator], Tensor] | None = None
    natural: bool = False
    name: ClassVar[str] = "function"

    def __post_init__(self) -> None:
        """Check that the functions are functions."""
        for role, function in (("nll", self.nll), ("draw_targets", self.draw_targets)):
            if not callable(function) and (function is not None or role == "nll"):
                raise CurvlabError(f"{role} of FromFunction must be a function, not {type(function).__name__}")

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what the function returns.

        Raises:
            CurvlabError: It is not one real number per term.
        """
        found = self.nll(precise(outputs), targets)
        if not isinstance(found, Tensor) or found.shape != (len(outputs),) or not found.is_floating_point():
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CurvlabError(
                f"nll of FromFunction must return one number per term, ({len(outputs)},), without a reduction; it "
                f"returned {what}"
            )
        return found

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Require one finite loss per term, which torch differentiates and which depends on its own row only.

        Raises:
            CurvlabError: The function returns something else, a value that is not finite, or, for a term, another value
                among other terms than alone; it writes into its arguments; or torch sees no dependence on the outputs.
        """
        f = precise(outputs).detach()
        with torch.enable_grad():
            at = f.clone().requires_grad_()
            passed = at.clone()
            found = self.values(passed, targets)
        if not torch.equal(passed.detach(), f):
            raise CurvlabError("nll of FromFunction writes into its arguments: use operations that are not in place")
        if not bool(found.isfinite().all()):
            raise CurvlabError("nll of FromFunction is not finite for some terms")
        if not found.requires_grad:
            raise CurvlabError(
                "nll of FromFunction does not depend on the outputs by operations of torch: use no detach and no NumPy"
            )
        other = 1.01 * f + 0.01
        together = self.values(torch.cat([f, other]), torch.cat([targets, targets]))
        apart = torch.cat([self.values(part, targets) for part in (f, other)])
        first = self.values(f[:1], targets[:1])
        rounding = 1e3 * torch.finfo(found.dtype).eps
        pairs = ((together, apart), (first, found.detach()[:1]))
        if not all(torch.allclose(*pair, rtol=rounding, atol=rounding, equal_nan=True) for pair in pairs):
            raise CurvlabError(
                "nll of FromFunction gives a term another value among other terms than alone: a term must depend on "
                "its own row of outputs (M, C) and targets (M, ...) only, not on others by broadcasting or a mean, and "
                "not on random numbers"
            )

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradients by torch."""
        with torch.enable_grad():
            at = precise(outputs).detach().requires_grad_()
            value = self.values(at, targets).sum()
            (found,) = torch.autograd.grad(value, at, allow_unused=True, materialize_grads=True)
        return found

    @property
    def hessian_form(self) -> "Likelihood":
        """The function with its Hessian in place of the Fisher."""
        return FromFunction(self.nll, self.draw_targets, natural=True)

    def num_factors(self, num_outputs: int) -> int:
        """Return ``C``."""
        return num_outputs

    def _hessians(self, outputs: Tensor, targets: Tensor) -> Tensor:
        def of_term(f: Tensor, y: Tensor) -> Tensor:
            return self.nll(f.unsqueeze(0), y.unsqueeze(0))[0]

        found: Tensor = vmap(hessian(of_term))(precise(outputs).detach(), targets)
        return found

    def _require_natural(self) -> None:
        if not self.natural:
            raise UnsupportedError(
                "the exact Fisher of FromFunction is known only if the outputs are natural parameters: give "
                "natural=True, or use fisher:samples=k with draw_targets=..., ggn, or empirical_fisher"
            )

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return a root of every term's Hessian, ``(M, C, C)``.

        Raises:
            UnsupportedError: The outputs are not natural parameters, or a Hessian has a negative eigenvalue.
        """
        self._require_natural()
        values, vectors = torch.linalg.eigh(self._hessians(outputs, targets))
        largest = values.abs().amax(dim=1, keepdim=True)
        if bool((values < -1e3 * torch.finfo(values.dtype).eps * largest).any()):
            raise UnsupportedError(
                "the Hessian of FromFunction with respect to the outputs has a negative eigenvalue, so that the GGN is "
                "not a sum of outer products; use ggn as implicit, hessian, or fisher:samples=k with draw_targets=..."
            )
        return ((vectors * values.clamp(min=0).sqrt().unsqueeze(1)).mT,)

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return rows of the root."""
        return scales[0][:, part.start : part.stop]

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return the Hessian times the vectors, by differentiating the gradient."""
        self._require_natural()
        with torch.enable_grad():
            at = precise(outputs).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.values(at, targets).sum(), at, create_graph=True)
            if not slope.requires_grad:
                return torch.zeros_like(at)
            (found,) = torch.autograd.grad(slope, at, precise(vectors), allow_unused=True, materialize_grads=True)
        return found.detach()

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return what ``draw_targets`` returns.

        Raises:
            UnsupportedError: There is no ``draw_targets``.
            CurvlabError: It returned another shape.
        """
        if self.draw_targets is None:
            raise UnsupportedError(
                "FromFunction cannot draw targets: give draw_targets=function(outputs, count, rng), or use ggn or "
                "empirical_fisher"
            )
        drawn = self.draw_targets(outputs.detach(), count, rng)
        if not isinstance(drawn, Tensor) or drawn.shape[:2] != (len(outputs), count):
            what = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
            raise CurvlabError(f"draw_targets must return ({len(outputs)}, {count}, ...), not {what}")
        return drawn

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gradients at drawn targets."""
        return torch.stack([self.gradients(outputs, some) for some in drawn.unbind(dim=1)], dim=1)
