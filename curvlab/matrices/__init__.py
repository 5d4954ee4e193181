"""Curvature matrices: algebra only. A matrix has a parameter space and provenance, but no model."""

from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.block_diagonal import BlockDiagonal
from curvlab.matrices.composite import Composite
from curvlab.matrices.damping import FactoredDamping
from curvlab.matrices.dense import Dense
from curvlab.matrices.diagonal import Diagonal
from curvlab.matrices.eigen_kronecker import EKFAC
from curvlab.matrices.implicit import Implicit
from curvlab.matrices.info import Info
from curvlab.matrices.kronecker import KFAC, TKFAC
from curvlab.matrices.merging import merge
from curvlab.matrices.penalty import Penalty
from curvlab.matrices.storage import load

__all__ = [
    "EKFAC",
    "KFAC",
    "TKFAC",
    "BlockDiagonal",
    "Composite",
    "CurvatureMatrix",
    "Dense",
    "Diagonal",
    "FactoredDamping",
    "Implicit",
    "Info",
    "Penalty",
    "load",
    "merge",
]
