"""Continual learning: streams of tasks, the training loop over a stream, and metrics.

The methods are in ``curvlab.continual.strategies``.
"""

from curvlab.continual import metrics
from curvlab.continual.learner import Batch, Learner
from curvlab.continual.loop import Result, run
from curvlab.continual.regimes import Regime
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.task import Task
from curvlab.continual.tasks import disjoint, permuted, rotated, split_classes, split_data

__all__ = [
    "Batch",
    "Learner",
    "Regime",
    "Result",
    "Strategy",
    "Task",
    "disjoint",
    "metrics",
    "permuted",
    "rotated",
    "run",
    "split_classes",
    "split_data",
]
