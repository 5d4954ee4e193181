"""Memory aware synapses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlab.continual.options import check_number, check_whole
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import (
    PROBE_SAMPLES,
    around_here,
    importance,
)
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.rows import linear_factors, linear_layers, row_batches
from curvlab.matrices import Penalty
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import EmpiricalFisher

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class MAS(Strategy):
    """Memory aware synapses (Aljundi et al., 2018): how much a parameter changes the outputs is how much it is held.

    Minimised is ``loss + strength * sum_k Omega_k (theta_k - theta*_k)^2`` (no factor 1/2), where
    ``theta*`` is the last solution. A task adds to ``Omega`` the mean over its training inputs of
    ``|d ||f(x)||^2 / d theta|`` of the outputs that count for it, before any softmax; labels have no part.
    The absolute values are of every sample's gradient, as in the paper; public codes take those of a batch's, which
    are smaller. Those codes average over tasks, too, where here importance adds up, as curvature does.

    Memory: two vectors.

    Args:
        strength: Of the penalty, ``lambda`` in the paper.
        params: Glob patterns of the parameters to protect; None for all.
        samples: Training samples of a task that the importance is estimated on, drawn at random; None for all.

    Raises:
        CurvlabError: An option is out of its range.
    """

    def __init__(
        self, strength: float, *, params: Sequence[str] | str | None = None, samples: int | None = None
    ) -> None:
        check_number("strength", strength)
        if samples is not None:
            check_whole("samples", samples)
        self.strength, self.samples = strength, samples
        self.params = params if params is None or isinstance(params, str) else list(params)

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        self.space = ParameterSpace.of(learner.model, self.params)
        self._sensitivity(learner, PROBE_SAMPLES)  # what it cannot be had of is refused before the first step
        self.penalty = Penalty()
        self.omega: Tensor | None = None

    def after_backward(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters, 2 * self.strength)

    def after_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        found = self._sensitivity(learner, self.samples)
        self.omega = found if self.omega is None else self.omega + found
        self.penalty = around_here(importance(self.omega, self.space, "mas", learner), learner)

    def _sensitivity(self, learner: "Learner", limit: int | None) -> Tensor:
        with learner.problem(learner.samples(limit=limit)) as problem:
            return sensitivity(problem, self.space)


def sensitivity(problem: Problem, space: ParameterSpace) -> Tensor:
    """Return the mean over samples of ``|d ||f(x)||^2 / d theta|``, ``(P,)``.

    Args:
        problem: Model and data, whose targets have no part in it.
        space: Of parameters of the model.
    """
    problem.check()
    problem = to_first_order(problem)  # the outputs and their gradients are the same, and its layers can be looked into
    # Rows of a network in half precision are in float32.
    dtype = torch.promote_types(problem.dtype, torch.float32)
    total = torch.zeros(space.total, dtype=dtype, device=problem.device)
    named = space.unflatten(total)  # views
    layers = {
        name: (layer, f"{name}.weight".removeprefix("."), f"{name}.bias".removeprefix("."))
        for name, layer in linear_layers(problem).items()
    }
    rest = space.restrict(set(space.names) - {name for _, *of_layer in layers.values() for name in of_layer})
    for inputs, _ in problem.batches():
        with torch.no_grad():
            zeros = torch.zeros_like(problem.forward({}, inputs))
        # d ||f||^2 is twice the gradient of the squared error of targets that are zero.
        norms = Problem(problem.model, "squared_error", [(inputs, zeros)])
        for name, (layer, weight, bias) in layers.items():
            if weight not in named and bias not in named:
                continue
            # A sample's gradient is g x', so that of absolute values the sum over samples is a product.
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
