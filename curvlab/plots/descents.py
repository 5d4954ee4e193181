"""Figures of optimization: loss curves, and paths in two parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from curvlab.plots.records import Record, column, count_seeds, list_distinct
from curvlab.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABEL,
    ONE_COLUMN,
    ORANGE,
    PURPLE,
    TWO_COLUMNS,
    add_legend,
    draw_line,
    finish,
    new_figure,
    set_log_scale,
    set_log_ticks,
    set_whole_ticks,
)

_STYLES: dict[str, dict[str, Any]] = {
    "gd": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "sgd": {"color": ORANGE, "linestyle": "--", "marker": "s"},
    "ngd": {"color": GREEN, "linestyle": "-", "marker": "^"},
    "adam": {"color": GREY, "linestyle": "-."},
    "exact": {"color": GREEN, "linestyle": "-"},
    "kfac": {"color": BLUE, "linestyle": (0, (3, 1))},
    "diag": {"color": PURPLE, "linestyle": ":"},
}


def descent_panels(points: Sequence[Record], problem: Record, labels: Mapping[str, str]) -> Figure:
    """Draw descents on a linear regression: for every learning rate, the loss and the path in the two parameters.

    Args:
        points: Records of ``method``, ``lr`` and ``step`` with ``weight``, ``bias`` and ``excess`` (loss
            above the smallest loss).
        problem: ``weight`` and ``bias`` of the solution, and the Hessian: ``fisher_ww``, ``fisher_wb``, ``fisher_bb``.
        labels: Labels of the methods, by name.
    """
    rates, methods = list_distinct(points, "lr"), list_distinct(points, "method")
    figure = new_figure(TWO_COLUMNS, 2.3 * len(rates) + 0.3)
    for (loss, way), rate in zip(figure.subplots(len(rates), 2, squeeze=False), rates, strict=True):
        _draw_contours(way, problem)
        for method in methods:
            mine = [point for point in points if point["method"] == method and point["lr"] == rate]
            style = {**_STYLES[method], "linewidth": 1.1, "markersize": 2.5}
            loss.plot(column(mine, "step"), column(mine, "excess"), **style)
            way.plot(*_leave(way, column(mine, "weight"), column(mine, "bias")), **style)
        loss.set_title(f"learning rate {rate:g}", fontsize=LABEL)
        loss.set_xlabel("step", fontsize=LABEL)
        set_whole_ticks(loss.xaxis, 6)
        loss.set_ylabel("loss above the smallest", fontsize=LABEL)
        if set_log_scale(loss, y=True):
            set_log_ticks(loss.yaxis, most=6)
        finish(loss)
        finish(way)
    lines = [
        Line2D([], [], label=labels[method], linewidth=1.1, markersize=3.5, **_STYLES[method]) for method in methods
    ]
    star = Line2D([], [], linestyle="none", marker="*", color=INK, markersize=7, label="solution")
    add_legend(figure, [*lines, star], len(lines) + 1)
    return figure


def _draw_contours(axes: Axes, problem: Record) -> None:
    """Draw contours of the loss around the solution, and fix the limits of the axes."""
    w = np.linspace(problem["weight"] - 4, problem["weight"] + 4, 81)
    b = np.linspace(problem["bias"] - 6, problem["bias"] + 6, 81)
    dw, db = np.meshgrid(w - problem["weight"], b - problem["bias"])
    excess = 0.5 * (problem["fisher_ww"] * dw**2 + 2 * problem["fisher_wb"] * dw * db + problem["fisher_bb"] * db**2)
    axes.contour(w, b, excess, np.geomspace(0.05, 50, 7), colors=[GREY], linewidths=0.5, alpha=0.6)
    axes.plot(problem["weight"], problem["bias"], "*", color=INK, markersize=7, zorder=4)
    axes.set(xlim=w[[0, -1]], ylim=b[[0, -1]], autoscale_on=False)
    axes.set_xlabel("weight", fontsize=LABEL)
    axes.set_ylabel("bias", fontsize=LABEL)


def _leave(axes: Axes, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points up to the first one outside the limits; a diverging path would cross the panel many times."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    outside = np.flatnonzero((x < left) | (x > right) | (y < low) | (y > high))
    end = outside[0] + 1 if len(outside) else len(x)
    return x[:end], y[:end]


def loss_curves(records: Sequence[Record], labels: Mapping[str, str]) -> Figure:
    """Draw the training loss of a network, one line per method: mean and range over the seeds.

    Args:
        records: Records of ``method``, ``seed`` and ``step`` with the ``loss``.
        labels: Labels of the methods, by name.
    """
    figure = new_figure(ONE_COLUMN, 3.4)
    axes = figure.add_subplot()
    handles: list[Line2D | Patch] = []
    for method in list_distinct(records, "method"):
        mine = [record for record in records if record["method"] == method]
        steps = sorted({record["step"] for record in mine})
        values = [column([record for record in mine if record["step"] == step], "loss") for step in steps]
        style = {**_STYLES[method], "marker": None, "linewidth": 1.3}
        draw_line(axes, steps, [value.mean() for value in values], **style)
        low, high = ([edge(value) for value in values] for edge in (np.min, np.max))
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        handles.append(Line2D([], [], label=labels[method], **style))
    if count_seeds(records) > 1:
        handles.append(Patch(color=GREY, alpha=0.3, label=f"mean and range, {count_seeds(records)} seeds"))
    if set_log_scale(axes, y=True):
        set_log_ticks(axes.yaxis, most=6)
    axes.set_xlabel("step", fontsize=LABEL)
    set_whole_ticks(axes.xaxis, 6)
    axes.set_ylabel("training loss (nats)", fontsize=LABEL)
    finish(axes)
    add_legend(figure, handles, 1)
    return figure
