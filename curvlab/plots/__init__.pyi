from .accuracies import accuracy_curves, regime_curves, setting_curves
from .densities import density_pairs, divergence_fits
from .descents import descent_panels, loss_curves
from .dots import accuracy_points, diagonality_dots, method_dots
from .fields import preconditioned_fields
from .forecasts import forecast_scatter, forecast_value
from .heat_maps import block_heat_map, difference_maps
from .histograms import log_bins, log_histogram, log_histogram_grid
from .lines import line_panels
from .minima import minimum_scatter, spectrum_steps
from .moments import moment_curves, moment_scatter
from .panels import Panel, draw_panels
from .posteriors import posterior_contours
from .retraining import retraining_curves
from .scatter import bound_scatter, vanishing_curvature
from .schedules import rate_curves, schedule_curves
from .spectra import density_curves, eigenvalue_curves, layer_curves, normalised_curves

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
