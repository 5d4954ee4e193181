"""Forgetting of a task when a network learns the next one, and its second-order expansion.

To second order, ``F1 = L1(w2) - L1(w1)`` is ``g'd + 1/2 d'H d``, where ``d = w2 - w1`` and ``g`` and ``H`` are gradient
and Hessian of the old task's loss at ``w1``. Moreover ``1/2 d'H d <= 1/2 lambda_max |d|^2``; this inequality bounds the
quadratic form, not F1.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from curvlab.continual.forecast import loss_and_gradient
from curvlab.estimators import estimate
from curvlab.matrices import CurvatureMatrix
from curvlab.problem import Problem
from curvlab.spectrum import deflated_power_iteration, top_eigenvalues

Record = dict[str, Any]


def expansion(
    old: Problem, new: nn.Module, *, solver: Literal["lanczos", "power_iteration"] = "lanczos", tol: float = 1e-3
) -> Record:
    """Return the increase of a problem's loss at the weights of another model, and its second-order expansion.

    Keys: ``forgetting`` (F1), ``gradient_term`` (g'd), ``quadratic`` (1/2 d'H d), ``second_order`` (their
    sum), ``bound`` (1/2 lambda_max |d|^2), ``lambda_max``, ``residual`` (of its eigenvector), ``matvecs``,
    ``distance`` (|d|), ``tightness`` (quadratic over bound), ``loss`` (L1(w1)).

    Args:
        old: The old task: its loss and samples, and the model at the end of its training.
        new: The model after training on another task.
        solver: Method for the largest eigenvalue: ``curvlab.top_eigenvalues``, or deflated power iteration.
        tol: Relative tolerance of the largest eigenvalue, for ``lanczos``.

    Raises:
        CurvlabError: The curvature cannot be computed.
    """
    hessian: CurvatureMatrix = estimate(old, "hessian", "implicit")
    top = top_eigenvalues(hessian, tol=tol) if solver == "lanczos" else deflated_power_iteration(hessian)
    largest = float(top.values[0])
    weights = dict(new.named_parameters())
    d = old.space.flatten({name: weights[name].detach() - w for name, w in old.parameters().items()})
    before, gradient = loss_and_gradient(old)
    after, _ = loss_and_gradient(old.with_model(new))
    wide = d.double()
    distance = float(wide.norm())
    quadratic = 0.5 * float(wide @ hessian.matvec(d).double())
    gradient_term = float(wide @ gradient.double())
    bound = 0.5 * largest * distance**2
    return {
        "forgetting": after - before,
        "gradient_term": gradient_term,
        "quadratic": quadratic,
        "second_order": gradient_term + quadratic,
        "bound": bound,
        "lambda_max": largest,
        "residual": float(top.residuals[0]),
        "matvecs": top.matvecs,
        "distance": distance,
        "tightness": quadratic / bound if bound else None,
        "loss": before,
    }


def quadratic_difference(seed: int) -> float:
    """Return the relative difference of F1 and 1/2 d'H d for a quadratic loss with minimum w1, where they are equal.

    The two tasks are linear regressions, solved exactly, in float64.

    Examples:
        >>> quadratic_difference(0) < 1e-10
        True
    """
    rng = np.random.default_rng(seed)
    solutions = []
    for _ in range(2):
        x, y = (torch.from_numpy(rng.standard_normal((50, width))) for width in (6, 3))
        model = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
        solutions.append((Problem(model, "squared_error", (x, y)), model))
    (old, _), (_, new) = solutions
    found = expansion(old, new)
    return float(abs(found["forgetting"] - found["quadratic"]) / abs(found["quadratic"]))
