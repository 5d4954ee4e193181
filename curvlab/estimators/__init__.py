"""Estimators: a quantity of a problem in a structure, computed by a backend. ``estimate`` is the one door."""

from curvlab.estimators.per_layer import per_layer
from curvlab.estimators.registry import BACKENDS, estimate

__all__ = ["BACKENDS", "estimate", "per_layer"]
