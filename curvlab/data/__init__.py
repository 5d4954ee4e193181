"""Data sets by name or path, checked, as tensors in memory."""

from curvlab.data.dataset import Dataset
from curvlab.data.loading import NAMES, load

__all__ = ["NAMES", "Dataset", "load"]
