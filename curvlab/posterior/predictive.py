"""Predictive probabilities of a binary classifier under a posterior.

References:
    Immer et al. (2021), Improving predictions of Bayesian neural nets via local linearization.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.parameters import ParameterSpace
from curvlab.posterior.laplace import Gaussian

_NODES = 50  # of the quadrature
_CHUNK = 2000  # parameters evaluated at once


def make_predictor(model: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that gives probabilities ``(K, N)`` of the positive class at parameters ``(K, P)``.

    Args:
        model: Deterministic, with one output, the logit ``(N, 1)``.
        inputs: ``(N, ...)``, float64.
    """
    space = ParameterSpace.of(model)

    def probabilities(theta: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(model, space.unflatten(theta), (inputs,))
        return outputs[:, 0].sigmoid()

    return lambda thetas: torch.func.vmap(probabilities, chunk_size=_CHUNK)(thetas).detach()


def predict_linear(model: nn.Module, posterior: Gaussian, inputs: Tensor) -> Tensor:
    """Return the probabilities ``(N,)`` of the model linearized at the mean, whose outputs are normal.

    The predictive of Immer et al. (2021) for a Laplace posterior; exact for a linear model. The integral over an output
    uses Gauss-Hermite quadrature.

    Args:
        model: Deterministic, with one output, the logit ``(N, 1)``.
        posterior: Over the parameters of the model.
        inputs: ``(N, ...)``, float64.
    """
    space = ParameterSpace.of(model)

    def outputs(theta: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, space.unflatten(theta), (inputs,))
        return found[:, 0]

    jacobian = torch.func.jacrev(outputs)(posterior.mean)
    deviations = torch.einsum("np,pq,nq->n", jacobian, posterior.covariance, jacobian).sqrt()
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(_NODES))
    values = (outputs(posterior.mean)[:, None] + deviations[:, None] * nodes).sigmoid()
    return (values @ weights / weights.sum()).detach()
