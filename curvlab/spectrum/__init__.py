"""Spectra of matrices from matrix-vector products: eigenvalues, spectral density, trace, diagonal."""

from curvlab.spectrum.density import SpectralDensity, spectral_density
from curvlab.spectrum.eigenvalues import EigenResult, top_eigenvalues
from curvlab.spectrum.estimate import Estimate
from curvlab.spectrum.functions import condition_number, effective_dimension
from curvlab.spectrum.power import deflated_power_iteration
from curvlab.spectrum.traces import diagonal, trace

__all__ = [
    "EigenResult",
    "Estimate",
    "SpectralDensity",
    "condition_number",
    "deflated_power_iteration",
    "diagonal",
    "effective_dimension",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
