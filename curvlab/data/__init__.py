"""Data sets by name or path, checked, as tensors in memory."""

from curvlab.data.dataset import Dataset
from curvlab.data.loading import NAMES, data_root, fingerprint, load

__all__ = ["NAMES", "Dataset", "data_root", "fingerprint", "load"]
