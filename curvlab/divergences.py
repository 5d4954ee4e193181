"""Kullback-Leibler divergences between distributions on the real line, and normal distributions that minimise them."""

import math
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from curvlab.checks import positive_number, real_number, to_double, whole_number
from curvlab.errors import CurvlabError, first_line

#: ``forward`` minimises KL(P || Q) over Q, ``reverse`` KL(Q || P).
Direction = Literal["forward", "reverse"]

_ITERATIONS = 500  # of L-BFGS; a fit needs about twenty
_STATIONARY = 1e-5  # largest entry of the gradient that counts as converged
_EQUAL = 1e-3  # largest relative difference of the spacings of a grid, beyond rounding
_MASS = 1e-4  # largest difference from 1 of the mass of P on a grid


def quadrature_grid(low: float, high: float, points: int = 2001) -> Tensor:
    """Return equally spaced points ``(points,)`` in float64, for ``kl_divergence``.

    Args:
        low: First point; the mass of both distributions outside the grid must be negligible.
        high: Last point, above ``low``.
        points: Number of points, from 3.

    Raises:
        CurvlabError: A value is out of its range.
    """
    low, high, points = real_number(low, "low"), real_number(high, "high"), whole_number(points, "points", 3)
    if not low < high:
        raise CurvlabError(f"low must be below high, not {low:g} with high {high:g}")
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

    Raises:
        CurvlabError: The grid is not increasing or not equally spaced; the mass of ``p`` on it differs from 1 by more
            than 1e-4, because it is too narrow or too coarse; or ``p`` or ``q`` is not a single distribution with a
            density on the whole grid.

    Examples:
        >>> one, other = Normal(0.0, 0.5), Normal(1.0, 0.5)
        >>> round(float(kl_divergence(one, other, quadrature_grid(-10, 10))), 6)
        2.0
    """
    _check_grid(p, grid)
    _check_distribution(q, "q")
    try:
        return _integrate(p, q, grid)
    except ValueError as error:  # the support of q
        raise _make_support_error("q", error) from error


def _integrate(p: Distribution, q: Distribution, grid: Tensor) -> Tensor:
    log_p, log_q = _log_density(p, grid), _log_density(q, grid)
    return torch.trapezoid(log_p.exp() * (log_p - log_q), grid)


def _log_density(one: Distribution, grid: Tensor) -> Tensor:
    found: Tensor = one.log_prob(grid)
    if bool(found.isneginf().any()):  # torch raises an error unless its validation is switched off for the process
        raise ValueError("its density there is 0")
    return found


def _check_grid(p: Distribution, grid: Tensor) -> None:
    """Check that a grid is equally spaced and that the mass of a distribution on it is 1."""
    _check_distribution(p, "p")
    steps = to_double(grid, "the grid", ("n",)).diff()
    if len(steps) < 2 or not bool((steps > 0).all()):
        raise CurvlabError("the points of the grid must be three or more and increase; take a quadrature_grid")
    rounding = 4 * float(grid.abs().max()) * (torch.finfo(grid.dtype).eps if grid.is_floating_point() else 0.0)
    if float((steps - steps.mean()).abs().max()) > _EQUAL * float(steps.mean()) + rounding:
        raise CurvlabError(
            f"the points of the grid must be equally spaced, but their distances are between {float(steps.min()):.4g} "
            f"and {float(steps.max()):.4g}; take a quadrature_grid"
        )
    try:
        mass = torch.trapezoid(_log_density(p, grid).exp(), grid)
    except ValueError as error:  # the support of p
        raise _make_support_error("p", error) from error
    with suppress(RuntimeError):  # under torch.func.vmap the values are unknown
        if not abs(float(mass.detach()) - 1) <= _MASS:
            raise CurvlabError(
                f"the mass of p on the grid is {float(mass.detach()):.6g}, not 1: the grid from {float(grid[0]):g} to "
                f"{float(grid[-1]):g} in steps of {float(steps.mean()):.4g} is too narrow or too coarse; take another "
                "quadrature_grid"
            )


def _check_distribution(one: object, name: str) -> None:
    if not isinstance(one, Distribution) or one.batch_shape or one.event_shape:
        given = f"a batch {tuple(one.batch_shape + one.event_shape)}" if isinstance(one, Distribution) else repr(one)
        raise CurvlabError(f"{name} must be one distribution on the real line, not {given}")


def _make_support_error(name: str, error: ValueError) -> CurvlabError:
    return CurvlabError(
        f"{name} has no density at some points of the grid ({first_line(error)}); take a distribution that is positive "
        "on the whole grid"
    )


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
        CurvlabError: The direction is unknown, ``std`` is not positive, the grid does not fit P (see
            ``kl_divergence``), or the descent does not converge.
    """
    if direction not in ("forward", "reverse"):
        raise CurvlabError(f"direction must be forward or reverse, not {direction!r}")
    mean, std = real_number(mean, "mean"), positive_number(std, "std")
    if direction == "forward":
        _check_grid(p, grid)
    else:
        _check_distribution(p, "p")
    theta = torch.tensor([mean, math.log(std)], dtype=torch.float64, requires_grad=True)
    standard = Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    log_standard = standard.log_prob(_STANDARD)

    def divergence() -> Tensor:
        if direction == "forward":
            return _integrate(p, Normal(theta[0], theta[1].exp(), validate_args=False), grid)
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
