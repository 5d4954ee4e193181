"""Conversion of linearized models for the estimators."""

from curvlab.linearize import first_order_model
from curvlab.problem import Problem


def to_first_order(problem: Problem) -> Problem:
    """Return the problem with a model that has the same outputs and Jacobian and ordinary layers.

    All quantities except the Hessian are the same for both. If nothing is linearized, the problem itself is returned.
    """
    model = first_order_model(problem.model)
    if model is problem.model:
        return problem
    return problem.with_model(model)
