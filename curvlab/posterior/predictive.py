"""Predictive probabilities of a binary classifier under a posterior.

References:
    Immer et al. (2021), Improving predictions of Bayesian neural nets via local linearization.
"""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.checks import describe_value, to_double
from curvlab.errors import CurvlabError, type_and_line
from curvlab.parameters import ParameterSpace
from curvlab.posterior.update import Gaussian
from curvlab.stateless import check_module

_NODES = 50  # of the quadrature
_CHUNK = 2000  # parameters evaluated at once


def make_predictor(model: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that gives probabilities ``(K, N)`` of the positive class at parameters ``(K, P)``.

    Args:
        model: Deterministic, with one output, the logit ``(N, 1)``.
        inputs: ``(N, ...)``.

    Raises:
        CurvlabError: The inputs are not a tensor, or the model does not give one output for each; in the function,
            ``thetas`` have another size.
    """
    logits, space = _logits(model, inputs), ParameterSpace.of(model)

    def probabilities(thetas: Tensor) -> Tensor:
        thetas = to_double(thetas, "the parameters", ("K", space.total))
        return torch.func.vmap(lambda theta: logits(theta).sigmoid(), chunk_size=_CHUNK)(thetas).detach()

    return probabilities


def _logits(model: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the logits ``(N,)`` as a function of parameters ``(P,)``, in float64."""
    check_module(model)
    if not isinstance(inputs, Tensor) or not inputs.numel():
        raise CurvlabError(f"inputs must be a tensor with at least one sample, not {describe_value(inputs)}")
    model, space = deepcopy(model).double(), ParameterSpace.of(model)
    inputs = inputs.double() if inputs.is_floating_point() else inputs

    with torch.no_grad():
        try:
            outputs = model(inputs)
        except Exception as error:  # a model can fail in any way
            raise CurvlabError(
                f"{type(model).__name__} raises an error on the inputs: {type_and_line(error)}; give inputs that fit"
            ) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (len(inputs), 1):
        raise CurvlabError(
            f"the model must have one output, the logit ({len(inputs)}, 1), not {describe_value(outputs)}"
        )

    def logits(theta: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(model, space.unflatten(theta), (inputs,))
        return outputs[:, 0]

    return logits


def predict_linear(model: nn.Module, posterior: Gaussian, inputs: Tensor) -> Tensor:
    """Return the probabilities ``(N,)`` of the model linearized at the mean, whose outputs are normal.

    The predictive of Immer et al. (2021) for a Laplace posterior; exact for a linear model. The integral over an output
    uses Gauss-Hermite quadrature.

    Args:
        model: Deterministic, with one output, the logit ``(N, 1)``.
        posterior: Over the parameters of the model.
        inputs: ``(N, ...)``.

    Raises:
        CurvlabError: The posterior is over other parameters, the inputs are not a tensor, or the model does not give
            one output for each.
    """
    outputs, total = _logits(model, inputs), ParameterSpace.of(model).total
    if not isinstance(posterior, Gaussian) or len(posterior.mean) != total:
        given = f"one over {len(posterior.mean)}" if isinstance(posterior, Gaussian) else describe_value(posterior)
        raise CurvlabError(f"posterior must be a Gaussian over the {total} parameters of the model, not {given}")
    jacobian = torch.func.jacrev(outputs)(posterior.mean)
    deviations = torch.einsum("np,pq,nq->n", jacobian, posterior.covariance, jacobian).sqrt()
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(_NODES))
    values = (outputs(posterior.mean)[:, None] + deviations[:, None] * nodes).sigmoid()
    return (values @ weights / weights.sum()).detach()
