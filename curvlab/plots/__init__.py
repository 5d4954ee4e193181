"""Figures from flat records, sized for the width of a page: one module per kind of figure, and one style."""

from curvlab.plots.accuracies import accuracy_curves, regime_curves, setting_curves
from curvlab.plots.densities import density_pairs, divergence_fits
from curvlab.plots.descents import descent_panels, loss_curves
from curvlab.plots.dots import accuracy_points, diagonality_dots, method_dots
from curvlab.plots.fields import preconditioned_fields
from curvlab.plots.forecasts import forecast_scatter, forecast_value
from curvlab.plots.heat_maps import block_heat_map, difference_maps
from curvlab.plots.histograms import log_bins, log_histogram, log_histogram_grid
from curvlab.plots.lines import line_panels
from curvlab.plots.minima import minimum_scatter, spectrum_steps
from curvlab.plots.moments import moment_curves, moment_scatter
from curvlab.plots.panels import Panel, draw_panels
from curvlab.plots.posteriors import posterior_contours
from curvlab.plots.retraining import retraining_curves
from curvlab.plots.scatter import bound_scatter, vanishing_curvature
from curvlab.plots.schedules import rate_curves, schedule_curves
from curvlab.plots.spectra import density_curves, eigenvalue_curves, layer_curves, normalised_curves

__all__ = [
    "Panel",
    "accuracy_curves",
    "accuracy_points",
    "block_heat_map",
    "bound_scatter",
    "density_curves",
    "density_pairs",
    "descent_panels",
    "diagonality_dots",
    "difference_maps",
    "divergence_fits",
    "draw_panels",
    "eigenvalue_curves",
    "forecast_scatter",
    "forecast_value",
    "layer_curves",
    "line_panels",
    "log_bins",
    "log_histogram",
    "log_histogram_grid",
    "loss_curves",
    "method_dots",
    "minimum_scatter",
    "moment_curves",
    "moment_scatter",
    "normalised_curves",
    "posterior_contours",
    "preconditioned_fields",
    "rate_curves",
    "regime_curves",
    "retraining_curves",
    "schedule_curves",
    "setting_curves",
    "spectrum_steps",
    "vanishing_curvature",
]
