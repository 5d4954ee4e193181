"""Continual learning: the streams of tasks that a network learns one after another, the loop, and what it measures."""

from curvlab.continual import metrics
from curvlab.continual.loop import Result, run
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.tasks import Task, disjoint, permuted, rotated, split_classes, split_data

__all__ = [
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
