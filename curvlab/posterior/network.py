"""Laplace's posterior of a trained network: evidence, and outputs of the linearized network.

References:
    MacKay (1992), The evidence framework applied to classification networks; Immer et al. (2021), Improving predictions
    of Bayesian neural nets via local linearization; Daxberger et al. (2021), Laplace redux.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.batches import Inputs, make_batch
from curvlab.checks import positive_number, whole_number
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.estimators.rows import RowFunction
from curvlab.likelihoods import BinaryCrossEntropy, CrossEntropy
from curvlab.matrices import CurvatureMatrix, Implicit
from curvlab.matrices.damping import Damping, DampingLike
from curvlab.problem import Problem
from curvlab.quantities import MaSQ, Quantity, parse_quantity
from curvlab.stateless import copy_model
from curvlab.structures import Structure

_BYTES = 6.4e7  # of the Jacobians that are held at once


@dataclass(frozen=True)
class LaplacePosterior:
    """The normal distribution ``N(theta, (N F + D)^-1)`` around the parameters of a trained network.

    The prior is ``N(0, D^-1)``. That ``theta`` is a mode of likelihood times prior is assumed and not checked: train
    with the weight decay ``D / N`` on the mean loss.

    Attributes:
        problem: With a copy of the model; later training does not change it.
        curvature: ``N F``, the curvature of the sum of the losses over the units of the data.
        prior_precision: ``D``: a number, ``(P,)``, or a dict by parameter name; all above 0. The structure must support
            it as a damping, see ``curvlab.matrices.base.CurvatureMatrix.solve``.

    Raises:
        CurvlabError: The prior precision is not above 0, or does not have one of these forms.
    """

    problem: Problem
    curvature: CurvatureMatrix
    prior_precision: DampingLike

    def __post_init__(self) -> None:
        if not isinstance(self.prior_precision, (Tensor, np.ndarray, Mapping)):
            positive_number(self.prior_precision, "prior_precision")
        if not bool((self._prior > 0).all()):
            raise CurvlabError(
                f"prior_precision must be above 0 for every parameter, but its smallest number is "
                f"{float(self._prior.min()):g}; for a flat prior take a small number"
            )

    @property
    def mean(self) -> Tensor:
        """The parameters of the model, ``(P,)``, in the dtype of the curvature."""
        own, space = self.problem.parameters(), self.curvature.space
        return space.flatten({name: own[name] for name in space.names}).to(self.curvature.dtype)

    @cached_property
    def _prior(self) -> Tensor:
        """The diagonal of ``D``, ``(P,)``."""
        space = self.curvature.space
        parts = Damping.of(self.prior_precision, space, torch.float64, self.curvature.device).parts
        return torch.cat([parts[name].expand(size) for name, size in zip(space.names, space.sizes, strict=True)])

    @cached_property
    def evidence(self) -> float:
        """Laplace's approximation of the logarithm of the marginal likelihood of the data, in nats.

        ``-sum_n l_n - 1/2 (theta' D theta + log det (N F + D) - log det D)``. The constants that the losses leave out,
        such as that of a Gaussian, are left out here too: compare priors and networks, but not variances.

        Raises:
            CurvlabError: ``N F + D`` is not positive definite, or an implicit matrix is too large to be formed.
        """
        log_likelihood = -self.problem.num_units * self.problem.loss_value()
        penalty = float(self._prior @ self.mean.double().square())
        volume = float(_precise(self.curvature).logdet(self.prior_precision) - self._prior.log().sum())
        return log_likelihood - (penalty + volume) / 2

    def with_prior(self, prior_precision: DampingLike) -> "LaplacePosterior":
        """Return the posterior for another prior precision, around the same parameters.

        Raises:
            CurvlabError: The prior precision is not valid.
        """
        return replace(self, prior_precision=prior_precision)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return ``n`` draws of the parameters, ``(P, n)``.

        Use them in ``curvlab.linearize(model)``: the approximation holds for the linearized network.

        Raises:
            CurvlabError: ``N F + D`` is not positive definite, or an argument is not valid.
        """
        return self.mean.unsqueeze(1) + self.curvature.sample(n, self.prior_precision, seed)

    def outputs(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return mean ``(M, C)`` and covariance ``(M, C, C)`` of the outputs of the linearized network.

        These are ``f(x)`` and ``J (N F + D)^-1 J'``. The noise of a target, such as the variance of a Gaussian
        likelihood, is not included. Outputs of several terms are flattened, ``(M, T C)``.

        Args:
            inputs: ``M`` samples in the form that the model takes; a batch, if the problem has a ``forward``.

        Raises:
            CurvlabError: The inputs do not fit the model, or ``N F + D`` is singular to working precision.
        """
        own = self.problem.parameters()
        jacobian = RowFunction(self.problem, {name: own[name] for name in self.curvature.space.names})
        means, covariances = [], []
        for part in self._parts(inputs):
            with torch.enable_grad():  # for models with a derivative in the forward pass
                mean = self.problem.forward({}, part).detach()
            samples, count = mean.shape
            identity = torch.eye(count, dtype=mean.dtype, device=mean.device)
            rows = jacobian(part, identity.expand(samples, -1, -1))  # (M C, P)
            solved = self.curvature.solve(rows.mT.contiguous(), self.prior_precision)
            means.append(mean.to(rows.dtype))
            covariances.append(
                torch.einsum("map,pmb->mab", rows.view(samples, count, -1), solved.view(-1, samples, count))
            )
        return torch.cat(means), torch.cat(covariances)

    def _parts(self, inputs: Any) -> list[Inputs]:
        """Return inputs on the device of the model, in parts whose Jacobians fit into memory."""
        inputs = inputs if isinstance(inputs, Tensor) else make_batch(inputs, "inputs")
        placed = self.problem.with_data([(inputs, torch.zeros(len(inputs)))])
        (whole,) = (part for part, _ in placed.batches())
        with torch.no_grad():
            count = self.problem.forward({}, whole[:1]).shape[1]
        return list(
            whole.split(max(1, int(_BYTES / (count * self.curvature.shape[0] * self.curvature.dtype.itemsize))))
        )

    def probabilities(self, inputs: Any, samples: int = 1000, seed: int = 0) -> Tensor:
        """Return the predictive probabilities ``(M, C)``: the mean over the distribution of ``outputs``.

        Of ``cross_entropy``, the mean of the softmax over normal draws, with a standard error below
        ``1 / (2 sqrt(samples))``; the draws of a sample do not depend on the other samples. Of
        ``binary_cross_entropy``, the probability of every label by quadrature.

        Args:
            inputs: As for ``outputs``.
            samples: Number of draws, from 1.
            seed: Random seed of the draws, a whole number from 0.

        Raises:
            UnsupportedError: The likelihood is another one, or a sample has several terms.
            CurvlabError: As ``outputs``.
        """
        samples, seed, each = whole_number(samples, "samples", 1), whole_number(seed, "seed"), self.problem.loss.each
        if not isinstance(each, (CrossEntropy, BinaryCrossEntropy)):
            raise UnsupportedError(
                f"probabilities are defined for cross_entropy and binary_cross_entropy, not for {each}: use outputs"
            )
        mean, covariance = self.outputs(inputs)
        if self.problem.loss.dims:
            raise UnsupportedError("probabilities are for samples of one term: use outputs for samples of several")
        if isinstance(each, BinaryCrossEntropy):
            nodes, weights = (torch.from_numpy(part).to(mean) for part in np.polynomial.hermite_e.hermegauss(50))
            deviations = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
            values = (mean.unsqueeze(2) + deviations.unsqueeze(2) * nodes).sigmoid()
            return values @ (weights / weights.sum())
        spectrum, basis = torch.linalg.eigh(covariance.double())  # a covariance may be singular
        root = (basis * spectrum.clamp(min=0).sqrt().unsqueeze(1)).to(mean.dtype)
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((samples, mean.shape[1]))).to(mean)
        return torch.stack([(f + noise @ r.mT).softmax(dim=1).mean(dim=0) for f, r in zip(mean, root, strict=True)])


def laplace(
    problem: Problem,
    structure: Structure | str = "kfac",
    *,
    quantity: Quantity | str = "fisher",
    prior_precision: DampingLike | None = None,
    params: Sequence[str] | str | None = None,
) -> LaplacePosterior:
    """Return Laplace's posterior of a trained network.

    Args:
        problem: Trained model, loss and data.
        structure: Structure of the curvature, see ``curvlab.estimate``. With an implicit one, ``outputs`` solves by
            conjugate gradients.
        quantity: Quantity of the curvature; not MaSQ, whose multiple is no curvature of the sum of the losses.
        prior_precision: Precision ``D`` of the prior around zero; None for the number with the largest evidence.
        params: Glob patterns of the parameters that are random, such as those of the last layer; None for all.

    Raises:
        CurvlabError: The curvature cannot be computed, no number has the largest evidence (all parameters are 0, or the
            curvature is 0 or has negative eigenvalues), or an argument is not valid.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(50, 3)
        >>> y = (x[:, 0] > 0).long()
        >>> posterior = laplace(Problem(torch.nn.Linear(3, 2), "cross_entropy", (x, y)), "dense")
        >>> posterior.evidence > posterior.with_prior(100.0).evidence
        True
        >>> mean, covariance = posterior.outputs(x[:5])
        >>> mean.shape, covariance.shape
        (torch.Size([5, 2]), torch.Size([5, 2, 2]))
        >>> posterior.probabilities(x[:5]).shape
        torch.Size([5, 2])
    """
    quantity = parse_quantity(quantity)
    if isinstance(quantity, MaSQ):
        raise UnsupportedError(
            f"{quantity} is made of squares of batches, and no multiple of it is the curvature of the sum of the "
            "losses: use fisher, ggn or empirical_fisher"
        )
    problem = problem.with_model(copy_model(problem.model))
    curvature = problem.num_units * estimate(problem, quantity, structure, params=params)
    posterior = LaplacePosterior(problem, curvature, 1.0 if prior_precision is None else prior_precision)
    if prior_precision is not None:
        return posterior
    return posterior.with_prior(_best_precision(posterior.curvature, float(posterior.mean.double().square().sum())))


def _precise(curvature: CurvatureMatrix) -> CurvatureMatrix:
    """Return a matrix in float64: the rounding of zero eigenvalues in float32 is larger than a weak prior."""
    return curvature if isinstance(curvature, Implicit) else curvature.to(dtype=torch.float64)


def _best_precision(curvature: CurvatureMatrix, square: float) -> float:
    """Return the prior precision ``d`` with the largest evidence, for parameters of a given squared norm.

    The derivative of the evidence with respect to ``log d`` is zero where ``d |theta|^2 = sum_i e_i / (e_i + d)``, the
    number of well-determined parameters (MacKay 1992). The left side grows and the right side falls: there is one
    solution, a maximum.
    """
    values = _precise(curvature).eigenvalues().double()
    largest = float(values.max())
    if not float(values.min()) >= -len(values) * torch.finfo(curvature.dtype).eps * abs(largest):
        raise CurvlabError(
            "the prior precision cannot be chosen for a curvature with the negative eigenvalue "
            f"{float(values.min()):.2g}: give prior_precision, or use fisher or ggn"
        )
    if not (square > 0 and largest > 0):
        what = "the curvature is 0" if square > 0 else "all parameters are 0"
        raise CurvlabError(f"no prior precision has the largest evidence, because {what}: give prior_precision")
    values = values.clamp(min=0)

    def slope(log_precision: float) -> float:
        precision = math.exp(log_precision)
        return precision * square - float((values / (values + precision)).sum())

    low, high = min(largest, 0.25 / square), len(values) / square  # the slope is below 0, and not below 0
    from scipy.optimize import brentq

    return math.exp(brentq(slope, math.log(low), math.log(high), xtol=1e-12))
