"""Fine-tuning on one task after another: the lower bound."""

from curvlab.continual.strategies.base import Strategy


class Naive(Strategy):
    """Train on each task as it comes, and do nothing against forgetting."""
