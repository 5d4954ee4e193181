"""Curvature matrices: algebra only. A matrix knows its parameter space and where it came from, never a model."""

from curvlab.matrices.base import CurvatureMatrix, Info
from curvlab.matrices.block_diagonal import BlockDiagonal
from curvlab.matrices.dense import Dense
from curvlab.matrices.diagonal import Diagonal
from curvlab.matrices.storage import load

__all__ = ["BlockDiagonal", "CurvatureMatrix", "Dense", "Diagonal", "Info", "load"]
