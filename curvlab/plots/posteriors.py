"""Figures of posteriors over two parameters: the exact density with the ellipses of Gaussians."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from curvlab.plots.style import LABEL, PALE_BLUE, SERIES, add_legend, finish, new_figure

_MASSES = (0.9, 0.5)  # of the regions of highest density
_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":")
_COLOURS = SERIES[1:]


def posterior_contours(
    panels: Sequence[Mapping[str, Any]], labels: Mapping[str, str], title: str, axis_labels: tuple[str, str]
) -> Figure:
    """Draw exact densities and the 90 % ellipses of Gaussians, one panel for each density.

    Args:
        panels: Each with ``name``, ``points`` ``(n, n, 2)``, ``density`` ``(n, n)`` of cells of equal area, and
            ``gaussians``: ``mean`` ``(2,)`` and ``covariance`` ``(2, 2)`` by name.
        labels: Names of the Gaussians.
        title: Title of the figure.
        axis_labels: Names of the two parameters.
    """
    figure = new_figure(6.8, 3.2, title)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(name for panel in panels for name in panel["gaussians"]))
    for axes, panel in zip(drawn, panels, strict=True):
        points, density = np.asarray(panel["points"]), np.asarray(panel["density"])
        levels = _levels(density)
        axes.contourf(
            points[..., 0], points[..., 1], density, [*levels, density.max() * 1.001], colors=(PALE_BLUE, SERIES[0])
        )
        shown = [points[density >= levels[0]]]
        for place, name in enumerate(names):
            ellipse = _ellipse(**panel["gaussians"][name])
            shown.append(ellipse)
            style = {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _STYLES[place % len(_STYLES)]}
            axes.plot(*ellipse.T, linewidth=1.3, **style)
        inside = np.concatenate(shown)
        low, high = inside.min(axis=0), inside.max(axis=0)
        margin = 0.12 * (high - low)
        axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axes.set_title(panel["name"], fontsize=LABEL)
        axes.set_xlabel(axis_labels[0], fontsize=LABEL)
        finish(axes)
    drawn[0].set_ylabel(axis_labels[1], fontsize=LABEL)
    handles: list[Line2D | Patch] = [
        Patch(facecolor=colour, label=f"exact, {mass:.0%}")
        for mass, colour in zip(_MASSES, (PALE_BLUE, SERIES[0]), strict=True)
    ]
    handles += [
        Line2D([], [], color=_COLOURS[i % len(_COLOURS)], linestyle=_STYLES[i % len(_STYLES)], label=labels[name])
        for i, name in enumerate(names)
    ]
    add_legend(figure, handles, 3, handlelength=2.6)
    return figure


def _levels(density: np.ndarray) -> list[float]:
    """Return the densities above which there are 90 % and 50 % of the mass."""
    ordered = np.sort(density, axis=None)[::-1]
    shares = np.cumsum(ordered) / ordered.sum()
    return [float(ordered[np.searchsorted(shares, mass)]) for mass in _MASSES]


def _ellipse(mean: Any, covariance: Any) -> np.ndarray:
    """Return the border ``(K, 2)`` of the region with 90 % of a Gaussian's mass."""
    turn = np.linspace(0, 2 * np.pi, 200)
    radius = math.sqrt(-2 * math.log(1 - _MASSES[0]))
    circle = radius * np.stack([np.cos(turn), np.sin(turn)])
    return np.asarray(mean) + (np.linalg.cholesky(np.asarray(covariance)) @ circle).T
