"""Naive fine-tuning: the lower bound."""

from curvlab.continual.strategies.base import Strategy


class Naive(Strategy):
    """Naive fine-tuning: train on one task after another, without a measure against forgetting."""
