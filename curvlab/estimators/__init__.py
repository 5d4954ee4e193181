"""Estimators: ``estimate`` computes a quantity of a problem in a structure with one of the backends."""

from curvlab.estimators.per_layer import per_layer
from curvlab.estimators.registry import BACKENDS, estimate

__all__ = ["BACKENDS", "estimate", "per_layer"]
