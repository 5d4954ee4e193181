"""Linearized models before estimators."""

from curvlab.linearize import first_order
from curvlab.problem import Problem


def to_first_order(problem: Problem) -> Problem:
    """Return the problem with a model of the same outputs and Jacobian whose layers can be looked into.

    It is the same problem for every quantity but the Hessian, and the problem itself if nothing in it is linearized.
    """
    model = first_order(problem.model)
    if model is problem.model:
        return problem
    return problem.with_model(model)
