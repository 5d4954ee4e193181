"""Natural gradients: the inverse of the Fisher of a batch times its gradient."""

import torch

from curvlab.errors import CurvlabError, UnsupportedError
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
        CurvlabError: A gradient is not finite, the structure is not available for this model or not for a layer without
            a gradient, or the damped Fisher is singular.
    """
    named = dict(problem.model.named_parameters())
    for name in problem.space.names:
        if (g := named[name].grad) is not None and not bool(g.isfinite().all()):
            raise CurvlabError(
                f"the gradient of {name} is not finite: lower lr (here at most {training.lr:g}) or check the scale of "
                "the inputs"
            )
    try:
        fisher = estimate(problem, "fisher", training.structure)
    except UnsupportedError as error:
        still = _find_still(problem)
        if not still:
            raise
        every = len(still) == len(problem.space.names)
        what, units = ("every parameter", "the units of a layer") if every else (still[0], "its units")
        raise UnsupportedError(
            f"the gradient of {what} is zero on the samples of the step, so that its Fisher cannot be computed as "
            f"{training.structure}: {units} may be dead or saturated; lower lr, or use structure kfac or diag"
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


def _find_still(problem: Problem) -> list[str]:
    """Return the parameters on which the loss of the samples does not depend, whatever a method added to ``grad``."""
    leaves = {name: value.requires_grad_() for name, value in problem.parameters().items()}
    moved = set()
    for inputs, targets in problem.batches():
        with torch.enable_grad():
            loss = problem.loss.values(problem.forward(leaves, inputs), targets).sum()
            slopes = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        moved |= {name for name, slope in zip(leaves, slopes, strict=True) if bool(slope.any())}
    return [name for name in leaves if name not in moved]
