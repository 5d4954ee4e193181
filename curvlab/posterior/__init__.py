"""Posteriors over a model's parameters: Laplace's approximation, and exact ones to compare it with."""

from curvlab.posterior.grid import GridPosterior, posterior_on_grid
from curvlab.posterior.hmc import Draws, effective_sample_size, hamiltonian_monte_carlo, split_rhat
from curvlab.posterior.network import LaplacePosterior, laplace
from curvlab.posterior.predictive import make_predictor, predict_linear
from curvlab.posterior.update import Gaussian, find_mode, laplace_update, log_likelihood

__all__ = [
    "Draws",
    "Gaussian",
    "GridPosterior",
    "LaplacePosterior",
    "effective_sample_size",
    "find_mode",
    "hamiltonian_monte_carlo",
    "laplace",
    "laplace_update",
    "log_likelihood",
    "make_predictor",
    "posterior_on_grid",
    "predict_linear",
    "split_rhat",
]
