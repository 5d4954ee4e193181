"""Laplace's approximation of a posterior, and its sequential update: the posterior of old data is the next prior."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.losses import LossName, get_loss
from curvlab.parameters import ParameterSpace
from curvlab.problem import Pair, Problem
from curvlab.quantities import Quantity
from curvlab.structures import Structure

LogDensity = Callable[[Tensor], Tensor]

_ITERATIONS = 500  # of a search by L-BFGS
_SEARCHES = 10
_STATIONARY = 1e-5  # largest entry of the gradient at a mode


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution over ``P`` parameters.

    Attributes:
        mean: ``(P,)``, float64.
        precision: Inverse of the covariance, ``(P, P)``, float64.
    """

    mean: Tensor
    precision: Tensor

    @classmethod
    def prior(cls, size: int, precision: float) -> "Gaussian":
        """Return the normal distribution around zero with independent entries of one precision."""
        return cls(torch.zeros(size).double(), precision * torch.eye(size).double())

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(P, P)``."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.precision))

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the logarithm of the density at ``(P,)`` or at each of ``(K, P)``."""
        way = points - self.mean
        factor = torch.linalg.cholesky(self.precision)
        constant = factor.diagonal().log().sum() - len(self.mean) / 2 * math.log(2 * math.pi)
        density: Tensor = constant - (way @ factor).square().sum(-1) / 2
        return density

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Return draws ``(count, P)``."""
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, len(self.mean))))
        factor = torch.linalg.cholesky(self.precision)
        way: Tensor = torch.linalg.solve_triangular(factor.mT, noise.mT, upper=True).mT
        return self.mean + way


def log_likelihood(model: nn.Module, loss: LossName | str, data: Pair) -> LogDensity:
    """Return the log-likelihood of data as a function of flat parameters ``(P,)``.

    The value is minus the sum of the losses of the samples, a float64 scalar. The model's own parameters are not used.

    Args:
        model: Deterministic, in eval mode.
        loss: Loss name, see ``curvlab.Problem``.
        data: Inputs and targets.
    """
    model, space, criterion = deepcopy(model).double(), ParameterSpace.of(model), get_loss(loss)
    inputs, targets = (tensor.double() if tensor.is_floating_point() else tensor for tensor in data)

    def value(theta: Tensor) -> Tensor:
        return -criterion.values(functional_call(model, space.unflatten(theta), (inputs,)), targets).sum()

    return value


def find_mode(log_density: LogDensity, start: Tensor) -> Tensor:
    """Return a maximum of a smooth function near ``start``, ``(P,)``, by L-BFGS in float64.

    Args:
        log_density: Gives a scalar of ``(P,)``.
        start: ``(P,)``.

    Raises:
        CurvlabError: The search ends where the gradient is not zero.
    """
    theta = start.detach().double().clone().requires_grad_()

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
    data: Pair,
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
        CurvlabError: The mode is not found, or the curvature cannot be computed.
    """
    likelihood = log_likelihood(model, loss, data)
    mode = find_mode(lambda theta: likelihood(theta) + prior.log_prob(theta), prior.mean if start is None else start)
    at_mode = deepcopy(model).double()
    space = ParameterSpace.of(at_mode)
    with torch.no_grad():
        for name, value in space.unflatten(mode).items():
            at_mode.get_parameter(name).copy_(value)
    curvature = estimate(Problem(at_mode, loss, data), quantity, structure)
    return Gaussian(mode, prior.precision + len(data[0]) * curvature.to_dense())
