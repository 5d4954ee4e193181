"""curvlab: curvature of neural networks on data, on one scale, tested against one reference."""

from curvlab.startup import handle_interrupt

handle_interrupt()  # before the slow imports below

# isort: split

from curvlab import data
from curvlab._version import __version__
from curvlab.diagonality import diagonality
from curvlab.doctor import doctor
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.estimators.standard_error import standard_error
from curvlab.functional import as_module
from curvlab.linearize import linearize
from curvlab.matrices import Penalty, load, merge
from curvlab.problem import Problem
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ
from curvlab.recorder import EigenvalueRecorder
from curvlab.spectrum import EigenResult, spectral_density, top_eigenvalues

__all__ = [
    "GGN",
    "CurvlabError",
    "EigenResult",
    "EigenvalueRecorder",
    "EmpiricalFisher",
    "Fisher",
    "Hessian",
    "MaSQ",
    "Penalty",
    "Problem",
    "UnsupportedError",
    "__version__",
    "as_module",
    "data",
    "diagonality",
    "doctor",
    "estimate",
    "linearize",
    "load",
    "merge",
    "spectral_density",
    "standard_error",
    "top_eigenvalues",
]
