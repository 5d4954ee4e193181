"""Natural gradients: the inverse of the Fisher of a batch times its gradient."""

import torch

from curvlab.errors import UnsupportedError
from curvlab.estimators import estimate
from curvlab.matrices import Implicit
from curvlab.problem import Problem
from curvlab.training.options import Training

_TOLERANCE = 1e-4  # of conjugate gradients; Fisher and gradient of a batch are less accurate than that


def precondition_gradients(problem: Problem, training: Training) -> None:
    """Replace the gradients ``g`` of the model of a problem by ``(F + damping I)^-1 g`` (Amari 1998).

    ``F`` is the exact Fisher of the samples of the problem. The gradient of a parameter without ``grad`` counts as
    zero, and its ``grad`` stays None. With the structure ``implicit``, the relative residual of the solution is at most
    1e-4, which float32 also reaches with small dampings.

    Args:
        problem: The model in eval mode, with its gradients in ``grad``, and the samples of the step.
        training: Options with ``structure`` and ``damping``.

    Raises:
        CurvlabError: The structure is not available for this model or not for a layer without a gradient, or the damped
            Fisher is singular.
    """
    named = dict(problem.model.named_parameters())
    try:
        fisher = estimate(problem, "fisher", training.structure)
    except UnsupportedError as error:
        still = [name for name in problem.space.names if (g := named[name].grad) is None or not bool(g.any())]
        if not still:
            raise
        raise UnsupportedError(
            f"the gradient of {still[0]} is zero on the samples of the step, so that its Fisher cannot be computed as "
            f"{training.structure}: its units may be dead or saturated; lower lr, or use structure diag"
        ) from error
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
