"""The natural gradient: the gradient times the inverse of the Fisher of a step's batch."""

import torch

from curvlab.estimators import estimate
from curvlab.matrices import Implicit
from curvlab.problem import Problem
from curvlab.training.options import Training

_TOLERANCE = 1e-4  # of conjugate gradients: a step's Fisher and gradient are of one batch, and no more exact than that


def precondition_gradients(problem: Problem, training: Training) -> None:
    """Replace the gradients ``g`` of a problem's model by ``(F + damping I)^-1 g`` (Amari 1998).

    ``F`` is the exact Fisher of the problem's samples, at the model in the mode that it is in. A parameter without a
    gradient counts as one whose gradient is zero, and keeps none. The structure ``implicit`` solves to a relative
    residual of 1e-4, which float32 reaches at small dampings too.

    Args:
        problem: The model, whose parameters have their gradients, with the samples of the step.
        training: Its ``structure`` and ``damping``.

    Raises:
        CurvlabError: The Fisher does not have that structure for this model, or the damped Fisher is singular.
    """
    fisher = estimate(problem, "fisher", training.structure)
    named = dict(problem.model.named_parameters())
    parameters = {name: named[name] for name in fisher.space.names}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    gradient = fisher.space.flatten(gradients).to(fisher.dtype)
    if isinstance(fisher, Implicit):
        natural = fisher.solve(gradient, training.damping, tol=_TOLERANCE)
    else:
        natural = fisher.solve(gradient, training.damping)
    for name, part in fisher.space.unflatten(natural).items():
        if (own := parameters[name].grad) is not None:
            own.copy_(part)
