"""Fit loop with bitwise reproducible results on the CPU and resumable checkpoints."""

from curvlab.training.evaluation import Evaluation, evaluate
from curvlab.training.loop import FitResult, fit
from curvlab.training.observers import Observer
from curvlab.training.options import Training

__all__ = ["Evaluation", "FitResult", "Observer", "Training", "evaluate", "fit"]
