"""Laplace's approximation of a posterior, and its sequential update: the posterior of old data is the next prior."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlab.checks import describe_value, positive_number, to_double, whole_number
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.likelihoods import LossName, get_likelihood
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import Quantity
from curvlab.stateless import check_module
from curvlab.structures import Structure

LogDensity = Callable[[Tensor], Tensor]

_ITERATIONS = 500  # of a search by L-BFGS
_SEARCHES = 10
_STATIONARY = 1e-5  # largest entry of the gradient at a mode
_SYMMETRIC = 1e-6  # largest relative asymmetry of a precision
_NEWTON_STEP = 1e-2  # largest Newton step at a mode, relative to 1 + the norm of the weights


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution over ``P`` parameters.

    Attributes:
        mean: ``(P,)``, converted to float64.
        precision: Inverse of the covariance, ``(P, P)``, converted to float64.

    Raises:
        CurvlabError: The sizes differ, or the precision is not symmetric and positive definite.
    """

    mean: Tensor
    precision: Tensor

    def __post_init__(self) -> None:
        mean = to_double(self.mean, "the mean of a Gaussian", ("P",))
        precision = to_double(self.precision, "the precision of a Gaussian", (len(mean), len(mean)))
        if float((precision - precision.mT).abs().max()) > _SYMMETRIC * float(precision.abs().max()):
            raise CurvlabError("the precision of a Gaussian must be symmetric; take its mean with its transpose")
        if not _is_positive_definite(precision):
            raise CurvlabError(
                "the precision of a Gaussian must be positive definite to working precision; add a number above 0 to "
                "its diagonal"
            )
        object.__setattr__(self, "mean", mean)  # the class is frozen
        object.__setattr__(self, "precision", precision)

    @classmethod
    def prior(cls, size: int, precision: float) -> "Gaussian":
        """Return the normal distribution around zero with independent entries of one precision.

        Args:
            size: Number of parameters ``P``, from 1.
            precision: A finite number above 0.

        Raises:
            CurvlabError: A value is out of its range.
        """
        size = whole_number(size, "the size of a prior", 1)
        identity = torch.eye(size, dtype=torch.float64)  # float32 would round the precision
        return cls(torch.zeros(size).double(), positive_number(precision, "the precision of a prior") * identity)

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(P, P)``."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.precision))

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the logarithm of the density at ``(P,)`` or at each of ``(K, P)``.

        Raises:
            CurvlabError: The points have another size.
        """
        if not isinstance(points, Tensor) or points.ndim not in (1, 2) or points.shape[-1] != len(self.mean):
            size = len(self.mean)
            raise CurvlabError(f"points of this Gaussian are ({size},) or (K, {size}), not {describe_value(points)}")
        way = points - self.mean
        factor = torch.linalg.cholesky(self.precision)
        constant = factor.diagonal().log().sum() - len(self.mean) / 2 * math.log(2 * math.pi)
        density: Tensor = constant - (way @ factor).square().sum(-1) / 2
        return density

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Return draws ``(count, P)``.

        Args:
            count: Number of draws, from 1.
            seed: Random seed, a whole number from 0.

        Raises:
            CurvlabError: A value is out of its range.
        """
        count, seed = whole_number(count, "count", 1), whole_number(seed, "seed")
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, len(self.mean))))
        factor = torch.linalg.cholesky(self.precision)
        way: Tensor = torch.linalg.solve_triangular(factor.mT, noise.mT, upper=True).mT
        return self.mean + way


def _is_positive_definite(matrix: Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(matrix).info) == 0


def evaluate_density(log_density: LogDensity, point: Tensor, *, finite: bool = True) -> Tensor:
    """Return a log density at a start ``(P,)``, checked.

    Raises:
        CurvlabError: It is not a function that returns a scalar tensor, or the scalar must be finite and is not.
    """
    value = log_density(point) if callable(log_density) else log_density
    if not callable(log_density) or not isinstance(value, Tensor) or value.ndim:
        raise CurvlabError(
            f"log_density must be a function of ({len(point)},) that returns a scalar tensor, not "
            f"{describe_value(value)}"
        )
    if finite and not bool(value.isfinite()):
        raise CurvlabError(f"the log density is {float(value.detach())} at a start; start where it is finite")
    return value


def log_likelihood(model: nn.Module, loss: LossName | str, data: tuple[Tensor, Tensor]) -> LogDensity:
    """Return the log-likelihood of data as a function of flat parameters ``(P,)``.

    The value is minus the sum of the losses of the samples, a float64 scalar. The model's own parameters are not used.

    Args:
        model: Deterministic, in eval mode.
        loss: Loss name, see ``curvlab.Problem``.
        data: Inputs and targets.

    Raises:
        CurvlabError: Model, loss and data do not make a problem, see ``curvlab.Problem.check``; in the function,
            ``theta`` has another size.
    """
    if not isinstance(data, tuple | list) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        raise CurvlabError(f"data must be a pair of tensors, inputs and targets, not {describe_value(data)}")
    check_module(model)
    model, space, criterion = deepcopy(model).double(), ParameterSpace.of(model), get_likelihood(loss)
    inputs, targets = (tensor.double() if tensor.is_floating_point() else tensor for tensor in data)
    Problem(model, loss, (inputs, targets)).check()

    def value(theta: Tensor) -> Tensor:
        theta = to_double(theta, "theta", (space.total,), finite=False)
        return -criterion.values(functional_call(model, space.unflatten(theta), (inputs,)), targets).sum()

    return value


def find_mode(log_density: LogDensity, start: Tensor) -> Tensor:
    """Return a maximum of a smooth function near ``start``, ``(P,)``, by L-BFGS in float64.

    Args:
        log_density: Gives a scalar of ``(P,)``.
        start: ``(P,)``.

    Raises:
        CurvlabError: The search ends where an entry of the gradient is above 1e-5, the function is not finite at the
            start or not differentiable there, or an argument is not valid.
    """
    theta = to_double(start, "start", ("P",)).detach().clone().requires_grad_()
    if not evaluate_density(log_density, theta).requires_grad:
        raise CurvlabError("log_density must be differentiable: its value has no graph; compute it from its argument")

    def ascend() -> float:
        """Continue the search and return the largest entry of the gradient at its end."""
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=_ITERATIONS, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            optimizer.zero_grad()
            value = -log_density(theta)
            value.backward()
            return float(value.detach())

        optimizer.step(closure)
        closure()
        assert theta.grad is not None
        return float(theta.grad.abs().max())

    # A failed line search ends a search early; the next search starts without its curvature estimate.
    if not any(ascend() < _STATIONARY for _ in range(_SEARCHES)):
        raise CurvlabError("the search for the mode of the posterior does not converge; take a stronger prior")
    return theta.detach()


def laplace_update(
    prior: Gaussian,
    model: nn.Module,
    loss: LossName | str,
    data: tuple[Tensor, Tensor],
    *,
    structure: Structure | str = "dense",
    quantity: Quantity | str = "fisher",
    start: Tensor | None = None,
) -> Gaussian:
    """Return Laplace's approximation of the posterior after a chunk of data: the recursion that EWC approximates.

    The mean is the mode of likelihood and prior; the precision is the prior's plus the number of samples times the
    curvature at the mode. With the posterior of earlier chunks as the prior this is the online Laplace approximation
    (Ritter et al., 2018; Huszar, 2018), exact where the log-likelihood is quadratic and the curvature is dense.

    Args:
        prior: Over the trainable parameters of the model, in their order.
        model: Deterministic, in eval mode; it is not changed.
        loss: Loss name, see ``curvlab.Problem``.
        data: Inputs and targets of the chunk.
        structure: Structure of the curvature, see ``curvlab.estimate``.
        quantity: Quantity of the curvature, see ``curvlab.estimate``.
        start: Initial point of the search for the mode, ``(P,)``; None for the prior's mean.

    Raises:
        CurvlabError: The mode is not found: an entry of the gradient is above 1e-5, or a Newton step from there moves
            the weights by more than 1 % of 1 plus their norm, as where a model separates the data under a weak prior.
            The curvature cannot be computed, or an argument is not valid.
    """
    if not isinstance(prior, Gaussian):
        raise CurvlabError(f"prior must be a curvlab.posterior.Gaussian, not {describe_value(prior)}")
    likelihood = log_likelihood(model, loss, data)
    if (total := ParameterSpace.of(model).total) != len(prior.mean):
        raise CurvlabError(
            f"the prior is over {len(prior.mean):,} parameters, but the model has {total:,} trainable ones: take "
            f"Gaussian.prior({total}, precision)"
        )
    start = prior.mean if start is None else to_double(start, "start", (total,))
    mode = find_mode(lambda theta: likelihood(theta) + prior.log_prob(theta), start)
    at_mode = deepcopy(model).double()
    space = ParameterSpace.of(at_mode)
    with torch.no_grad():
        for name, value in space.unflatten(mode).items():
            at_mode.get_parameter(name).copy_(value)
    curvature = estimate(Problem(at_mode, loss, data), quantity, structure)
    precision = prior.precision + len(data[0]) * curvature.to_dense()
    if not _is_positive_definite(precision):
        raise CurvlabError(
            f"the prior plus the {quantity} at the mode is not positive definite: use the quantity fisher or ggn, or a "
            "stronger prior"
        )
    theta = mode.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood(theta) + prior.log_prob(theta), theta)
    step = float(torch.linalg.solve(precision, gradient).norm())
    if not step <= _NEWTON_STEP * (1 + float(mode.norm())):
        raise CurvlabError(
            f"the mode of the posterior is not found: the gradient there has norm {float(gradient.norm()):.1e}, but a "
            f"Newton step still moves the weights by {step:.2g}, as where the model separates the data under a weak "
            "prior; take a stronger prior"
        )
    return Gaussian(mode, precision)
