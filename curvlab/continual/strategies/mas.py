"""Memory aware synapses."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlab.continual.options import check_number, check_whole
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import (
    PROBE_SAMPLES,
    make_importance_matrix,
    make_penalty,
)
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.rows import linear_factors, linear_layers, row_batches
from curvlab.matrices import Penalty
from curvlab.parameters import ParameterSpace, Selection, check_selection
from curvlab.problem import Problem
from curvlab.quantities import EmpiricalFisher

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class MAS(Strategy):
    """Memory aware synapses (Aljundi et al., 2018): parameters are protected by their influence on the outputs.

    The objective is ``loss + strength * sum_k Omega_k (theta_k - theta*_k)^2`` (no factor 1/2), where ``theta*`` is the
    last solution. Each task adds to ``Omega`` the mean over its training inputs of ``|d ||f(x)||^2 / d theta|``, with
    ``f(x)`` the active outputs of the task before the softmax; labels are not used. The absolute value is taken of the
    gradient of each sample, as in the paper; public implementations take it of the gradient of a batch, which is
    smaller. Those implementations also average over tasks; here importance is summed, like curvature.

    Memory: two vectors.

    Args:
        strength: Strength of the penalty, ``lambda`` in the paper.
        params: Selection (as for ``curvlab.estimate``) of the parameters to protect; None for all.
        samples: Number of training samples of a task for the importance, drawn at random; None for all.

    Raises:
        CurvlabError: An option is out of its range.
    """

    def __init__(self, strength: float, *, params: Selection | None = None, samples: int | None = None) -> None:
        check_number("strength", strength)
        if samples is not None:
            check_whole("samples", samples)
        self.strength, self.samples = strength, samples
        self.params = check_selection(params)

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.space = ParameterSpace.of(learner.model, self.params)
        self._sensitivity(learner, PROBE_SAMPLES)  # unsupported models raise an error before the first step
        self.penalty = Penalty()
        self.omega: Tensor | None = None

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters, 2 * self.strength)

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        found = self._sensitivity(learner, self.samples)
        self.omega = found if self.omega is None else self.omega + found
        self.penalty = make_penalty(make_importance_matrix(self.omega, self.space, "mas", learner), learner)

    def _sensitivity(self, learner: "Learner", limit: int | None) -> Tensor:
        with learner.problem(learner.samples(limit=limit)) as problem:
            return sensitivity(problem, self.space)


def sensitivity(problem: Problem, space: ParameterSpace) -> Tensor:
    """Return the mean over samples of ``|d ||f(x)||^2 / d theta|``, ``(P,)``.

    Args:
        problem: Model and data; the targets are not used.
        space: Parameters of the model.
    """
    problem.check()
    problem = to_first_order(problem)  # same outputs and gradients, with accessible layers
    # Gradients of a network in half precision are in float32.
    dtype = torch.promote_types(problem.dtype, torch.float32)
    total = torch.zeros(space.total, dtype=dtype, device=problem.device)
    named = space.unflatten(total)  # views
    layers = {
        name: (layer, f"{name}.weight".removeprefix("."), f"{name}.bias".removeprefix("."))
        for name, layer in linear_layers(problem).items()
    }
    rest = space.restrict(set(space.names) - {name for _, *own in layers.values() for name in own})
    for inputs, _ in problem.batches():
        with torch.no_grad():
            zeros = torch.zeros_like(problem.forward({}, inputs))
        # d ||f||^2 is twice the gradient of the squared error with zero targets.
        norms = Problem(problem.model, "squared_error", [(inputs, zeros)])
        for name, (layer, weight, bias) in layers.items():
            if weight not in named and bias not in named:
                continue
            # The gradient of a sample is g x', so the sum of absolute values over samples is a matrix product.
            factors = linear_factors(norms, EmpiricalFisher(), name, layer)
            gradients = factors.gradients[:, 0].abs()
            if weight in named:
                named[weight].addmm_(gradients.mT, factors.inputs.abs())
            if bias in named:
                named[bias].add_(gradients.sum(dim=0))
        if rest.names:
            for rows in row_batches(norms, EmpiricalFisher(), rest.names):
                for name, part in rest.unflatten(rows.abs_().sum(dim=0)).items():
                    named[name].add_(part)
    return total.mul_(2 / problem.num_samples)
