"""Continual learning: the streams of tasks that a network learns one after another."""

from curvlab.continual.tasks import Task, permuted, rotated

__all__ = ["Task", "permuted", "rotated"]
