"""Kullback-Leibler divergences between distributions on the real line, and normal distributions that minimise them."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from curvlab.errors import CurvlabError

#: ``forward`` minimises KL(P || Q) over Q, ``reverse`` KL(Q || P).
Direction = Literal["forward", "reverse"]

_ITERATIONS = 500  # of L-BFGS; a fit needs about twenty
_STATIONARY = 1e-5  # largest entry of the gradient that counts as converged


def quadrature_grid(low: float, high: float, points: int = 2001) -> Tensor:
    """Return equally spaced points ``(points,)`` in float64, for ``kl_divergence``.

    Args:
        low: First point; the mass of both distributions outside the grid must be negligible.
        high: Last point.
        points: Number of points.
    """
    return torch.linspace(low, high, points, dtype=torch.float64)


_STANDARD = quadrature_grid(-10.0, 10.0)  # grid of a standard normal


def kl_divergence(p: Distribution, q: Distribution, grid: Tensor) -> Tensor:
    r"""Return KL(P || Q) = \int p log(p / q), a scalar tensor in nats, differentiable in the parameters of both.

    The integral is computed by the trapezoidal rule, whose error decreases faster than any power of the spacing for
    smooth densities that vanish at both ends of the grid.

    Args:
        p: Continuous distribution on the real line.
        q: Continuous distribution that is positive wherever ``p`` is.
        grid: Equally spaced increasing points ``(n,)``; see ``quadrature_grid``. The spacing must be well below the
            width of the narrowest part of ``p``.

    Examples:
        >>> one, other = Normal(0.0, 0.5), Normal(1.0, 0.5)
        >>> round(float(kl_divergence(one, other, quadrature_grid(-10, 10))), 6)
        2.0
    """
    log_p = p.log_prob(grid)
    return torch.trapezoid(log_p.exp() * (log_p - q.log_prob(grid)), grid)


def fit_normal(p: Distribution, direction: Direction, mean: float, std: float, grid: Tensor) -> tuple[Normal, float]:
    """Return a normal distribution Q that minimises the divergence locally, and the divergence in nats.

    L-BFGS optimises the mean and the logarithm of the standard deviation in float64. The minimum of the forward
    divergence is unique and has the mean and variance of P. The reverse divergence can have several local minima; the
    start determines which one is found. Its integral is over (x - mean) / std, so that it is accurate for narrow and
    for wide Q.

    Args:
        p: Continuous distribution on the real line.
        direction: ``forward`` minimises KL(P || Q), ``reverse`` KL(Q || P).
        mean: Mean of Q at the start.
        std: Standard deviation of Q at the start, positive.
        grid: Points of the forward divergence; the mass of P outside the grid must be negligible.

    Raises:
        CurvlabError: The direction is unknown, ``std`` is not positive, or the descent does not converge.
    """
    if direction not in ("forward", "reverse"):
        raise CurvlabError(f"direction must be forward or reverse, not {direction!r}")
    if not std > 0:
        raise CurvlabError(f"std must be positive, not {std}")
    theta = torch.tensor([mean, math.log(std)], dtype=torch.float64, requires_grad=True)
    standard = Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    log_standard = standard.log_prob(_STANDARD)

    def divergence() -> Tensor:
        if direction == "forward":
            return kl_divergence(p, Normal(theta[0], theta[1].exp(), validate_args=False), grid)
        log_q, log_p = log_standard - theta[1], p.log_prob(theta[0] + theta[1].exp() * _STANDARD)
        return torch.trapezoid(log_standard.exp() * (log_q - log_p), _STANDARD)

    optimizer = torch.optim.LBFGS(
        [theta], max_iter=_ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = divergence()
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    value = divergence()
    (gradient,) = torch.autograd.grad(value, theta)
    if not bool(gradient.abs().max() < _STATIONARY):
        raise CurvlabError(
            f"the {direction} fit from mean {mean:g} and standard deviation {std:g} does not converge; take another "
            "start"
        )
    fitted = theta.detach()
    return Normal(fitted[0], fitted[1].exp()), float(value.detach())
