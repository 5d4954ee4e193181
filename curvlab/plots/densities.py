"""Figures of Gaussian densities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvlab.plots.records import Record
from curvlab.plots.style import BLUE, GREY, LABEL, ONE_COLUMN, ORANGE, TWO_COLUMNS, add_legend, finish, new_figure

_SHADE = 0.25
_FITS: dict[str, dict[str, Any]] = {
    "forward": {"color": BLUE, "linestyle": "-", "label": "Q, KL(P‖Q)"},
    "reverse": {"color": ORANGE, "linestyle": "--", "label": "Q, KL(Q‖P)"},
}


def density_pairs(records: Sequence[Record]) -> Figure:
    """Draw pairs of Gaussians, P and Q, one panel per pair, titled with their divergence.

    Args:
        records: One record per pair, with ``mean`` and ``std`` of P, ``other_mean`` and ``other_std`` of Q, and ``kl``.
    """
    figure = new_figure(TWO_COLUMNS, 1.7)
    panels = figure.subplots(1, len(records), squeeze=False, sharex=True, sharey=True)[0]
    x = np.linspace(-6, 6, 601)
    for axes, record in zip(panels, records, strict=True):
        _shade(axes, x, _density(x, record["mean"], record["std"]))
        axes.plot(x, _density(x, record["other_mean"], record["other_std"]), color=ORANGE, linewidth=1.3)
        axes.set_title(f"KL = {record['kl']:.3f}", fontsize=LABEL)
        axes.set_xlabel("x", fontsize=LABEL)
        axes.set_ylim(bottom=0)
        finish(axes)
    panels[0].set_ylabel("density", fontsize=LABEL)
    _legend(
        figure, [Line2D([], [], color=ORANGE, linewidth=1.3, label="Q, at distance 1 in (mean, standard deviation)")]
    )
    return figure


def divergence_fits(fits: Sequence[Record], separation: float) -> Figure:
    """Draw the Gaussians that minimise the forward and the reverse divergence from a mixture of two, for every seed.

    Args:
        fits: One record per direction and seed, with ``direction``, ``fit_mean`` and ``fit_std``.
        separation: Distance of the two modes from 0; both have standard deviation 1.
    """
    figure = new_figure(ONE_COLUMN, 2.4)
    axes = figure.add_subplot()
    x = np.linspace(-separation - 6, separation + 6, 801)
    _shade(axes, x, 0.5 * (_density(x, -separation, 1) + _density(x, separation, 1)))
    for fit in fits:
        axes.plot(x, _density(x, fit["fit_mean"], fit["fit_std"]), linewidth=1.2, **_FITS[fit["direction"]])
    axes.set_xlabel("x", fontsize=LABEL)
    axes.set_ylabel("density", fontsize=LABEL)
    axes.set_ylim(bottom=0)
    finish(axes)
    _legend(figure, [Line2D([], [], **style) for style in _FITS.values()])
    return figure


def _density(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    values: np.ndarray = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    return values


def _shade(axes: Axes, x: np.ndarray, density: np.ndarray) -> None:
    axes.fill_between(x, density, color=GREY, alpha=_SHADE, linewidth=0)
    axes.plot(x, density, color=GREY, linewidth=0.9)


def _legend(figure: Figure, lines: Sequence[Line2D]) -> None:
    add_legend(figure, [Line2D([], [], color=GREY, linewidth=5, alpha=2 * _SHADE, label="P"), *lines], 1 + len(lines))
