"""The linearized model: first-order in its parameters, as an ``nn.Module`` like any other."""

from curvlab.linearize.module import Linearized, first_order, linearize, outputs_at_point

__all__ = ["Linearized", "first_order", "linearize", "outputs_at_point"]
