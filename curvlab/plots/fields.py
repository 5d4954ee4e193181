"""Figures of vector fields in two parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from curvlab.plots.style import BLUE, GREEN, GREY, INK, LABEL, ORANGE, TWO_COLUMNS, finish, new_figure

_COLOURS = (BLUE, GREEN, ORANGE)
_SCALE, _LEVELS = 30, 5  # scale of the arrows and contour levels, as in the figure of Kunstner et al. (2019)


def preconditioned_fields(drawing: Mapping[str, Any], labels: Mapping[str, str]) -> Figure:
    """Draw the data of a linear regression, and vector fields with trajectories in the plane of its two parameters.

    Args:
        drawing: ``x`` and ``y`` of the samples; ``solution``, intercept and slope; ``axis``, the values of a grid in
            either parameter; ``loss`` at the points of the grid, where the intercept varies slowest; ``fields``, the
            vectors ``(points, 2)`` by name; ``trajectories``, the points ``(starts, steps, 2)`` by name.
        labels: Labels of the fields, by name.
    """
    figure = new_figure(TWO_COLUMNS, 2.15)
    data, *panels = figure.subplots(1, 1 + len(labels))
    x, (intercept, slope) = np.asarray(drawing["x"]), drawing["solution"]
    ends = np.array([0.0, 10.0])
    data.scatter(x, drawing["y"], s=2, color=GREY, alpha=0.5, linewidths=0)
    data.plot(ends, intercept + slope * ends, color=INK, linewidth=1.2, linestyle="--")
    data.set(xlim=(-0.5, 10), ylim=(-2, 22), xticks=(0, 5, 10), yticks=(0, 10, 20))
    data.set_title("data and fit", fontsize=LABEL)
    data.set_xlabel("x", fontsize=LABEL)
    data.set_ylabel("y", fontsize=LABEL)
    data.set_box_aspect(1)
    axis = np.asarray(drawing["axis"])
    loss = np.asarray(drawing["loss"]).reshape(len(axis), -1)
    first, second = np.meshgrid(axis, axis, indexing="ij")
    for axes, (name, label), colour in zip(panels, labels.items(), _COLOURS, strict=False):
        vectors = np.asarray(drawing["fields"][name])
        axes.contour(axis, axis, loss.T, _LEVELS, colors=[GREY], linewidths=0.6, alpha=0.6)
        axes.quiver(
            first.ravel(), second.ravel(), *vectors.T, angles="xy", scale=_SCALE, color=GREY, width=0.006, headwidth=4
        )
        for path in np.asarray(drawing["trajectories"][name]):
            axes.plot(*path.T, color=colour, linewidth=1.6)
            axes.plot(*path[0], "o", color=INK, markersize=3)
        axes.plot(intercept, slope, "*", color=INK, markersize=7, zorder=4)
        axes.set(xlim=axis[[0, -1]], ylim=axis[[0, -1]], xticks=(0, 2, 4), yticks=(0, 2, 4), aspect="equal")
        axes.set_title(label, fontsize=LABEL)
        axes.set_xlabel("intercept", fontsize=LABEL)
    panels[0].set_ylabel("slope", fontsize=LABEL)
    for axes in panels[1:]:
        axes.set_yticklabels([])
    for axes in (data, *panels):
        finish(axes)
    return figure
