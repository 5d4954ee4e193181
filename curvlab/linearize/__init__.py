"""Linearized models: the first-order expansion of a model in its parameters, as an ``nn.Module``."""

from curvlab.linearize.module import Linearized, first_order_model, linearize, outputs_at_point

__all__ = ["Linearized", "first_order_model", "linearize", "outputs_at_point"]
