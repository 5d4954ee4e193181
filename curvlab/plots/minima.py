"""Figures of minima under training regimes: their width beside steps and forgetting, and their spectra."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvlab.plots.records import Record, column, list_distinct
from curvlab.plots.style import (
    GREY,
    LABEL,
    MARKERS,
    METHODS,
    WIDTH,
    add_legend,
    draw_grid,
    finish,
    new_figure,
    set_log_scale,
    set_log_ticks,
)

_STYLES = tuple(zip(METHODS, MARKERS, strict=True))  # as regime_curves has them


def minimum_scatter(points: Sequence[Record], labels: Mapping[str, str], step: float, title: str) -> Figure:
    """Draw the loss increase of a fixed step, and the length of each step, against the curvature before or after it.

    These are the two drawings of Mirzadeh et al. (2020): a wider minimum forgets less, and a wider minimum of the next
    task is closer.

    Args:
        points: One record per regime, seed and task after the first, with ``stream``, ``width_before`` (the largest
            eigenvalue at the task before), ``fixed_forgetting`` (nats), ``lambda_max`` and ``distance``.
        labels: Labels of the regimes by name.
        step: Length of the fixed step.
        title: Title of the figure.
    """
    streams, regimes = list_distinct(points, "stream"), list_distinct(points, "regime")
    figure = new_figure(WIDTH, 2.2 * len(streams) + 1.0, title)
    grid = figure.subplots(len(streams), 2, squeeze=False)
    panels = (
        (
            "width_before",
            "fixed_forgetting",
            rf"loss increase, step of {step:g} (nats)",
            r"$\lambda_{\max}$ of the task before",
        ),
        ("lambda_max", "distance", r"step $\|\Delta w\|$", r"$\lambda_{\max}$ of the next task"),
    )
    hollow = False
    for row, stream in zip(grid, streams, strict=True):
        mine = [point for point in points if point["stream"] == stream]
        for axes, (x, y, label, below) in zip(row, panels, strict=True):
            heights = column(mine, y)
            positive = heights[heights > 0]
            edge = 0.5 * positive.min() if len(positive) else -np.inf
            hollow |= bool(len(positive)) and bool((heights <= 0).any())
            for regime, (colour, marker) in zip(regimes, cycle(_STYLES), strict=False):
                own = np.array([point["regime"] == regime for point in mine], dtype=bool)
                raised = heights <= 0 if len(positive) else np.zeros(len(heights), dtype=bool)
                for some, face in ((~raised, colour), (raised, "none")):
                    chosen = own & some
                    axes.scatter(
                        column(mine, x)[chosen],
                        np.maximum(heights, edge)[chosen],
                        s=14,
                        marker=marker,
                        edgecolors=colour,
                        facecolors=face,
                        linewidths=0.7,
                    )
            set_log_scale(axes, x=True, y=len(positive) > 0)
            set_log_ticks(axes.xaxis)
            set_log_ticks(axes.yaxis)
            axes.set_ylabel(f"{stream}\n{label}" if x == "width_before" else label, fontsize=LABEL)
            axes.set_xlabel(below, fontsize=LABEL)
            finish(axes)
    marks = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=4, label=labels.get(regime, regime))
        for regime, (colour, marker) in zip(regimes, cycle(_STYLES), strict=False)
    ]
    if hollow:
        text = "hollow, at the lower edge: 0 or less"
        marks.append(Line2D([], [], linestyle="none", marker="o", color=GREY, markerfacecolor="none", label=text))
    add_legend(figure, marks, 3)
    return figure


def spectrum_steps(spectra: Sequence[Record], labels: Mapping[str, str], title: str) -> Figure:
    """Draw how many eigenvalues of the Hessian are above a value, after the first and the last task.

    Args:
        spectra: One record per stream, regime, seed and task, with ``values`` and ``above``, lists of equal length.
        labels: Labels of the regimes by name.
        title: Title of the figure.
    """
    streams, regimes = list_distinct(spectra, "stream"), list_distinct(spectra, "regime")
    tasks = sorted({record["task"] for record in spectra})
    shown = list(dict.fromkeys([tasks[0], tasks[-1]]))
    figure = new_figure(WIDTH, 2.0 * len(streams) + 1.0, title)
    grid = figure.subplots(len(streams), len(shown), squeeze=False, sharey=True)
    for row, stream in zip(grid, streams, strict=True):
        for axes, task in zip(row, shown, strict=True):
            for regime, (colour, _) in zip(regimes, cycle(_STYLES), strict=False):
                for record in spectra:
                    if (record["stream"], record["task"], record["regime"]) == (stream, task, regime):
                        above = np.asarray(record["above"], dtype=float)
                        counted = above >= 0.5
                        axes.plot(np.asarray(record["values"])[counted], above[counted], color=colour, linewidth=0.8)
            set_log_scale(axes, x=True, y=True)
            set_log_ticks(axes.xaxis)
            set_log_ticks(axes.yaxis)
            draw_grid(axes)
            axes.set_title(f"{stream}, after task {task}", fontsize=LABEL)
            finish(axes)
        row[0].set_ylabel("eigenvalues above", fontsize=LABEL)
    for axes in grid[-1]:
        axes.set_xlabel("eigenvalue of the Hessian", fontsize=LABEL)
    lines = [
        Line2D([], [], color=colour, linewidth=1.2, label=labels.get(regime, regime))
        for regime, (colour, _) in zip(regimes, cycle(_STYLES), strict=False)
    ]
    add_legend(figure, lines, 3)
    return figure
