"""Scatter plots and curves of eigenvalues in logarithmic scales."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvlab.plots.records import Record, column, list_distinct
from curvlab.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    GROUPS,
    LABEL,
    MARKERS,
    ORANGE,
    PALE_BLUE,
    TICK,
    WIDTH,
    add_legend,
    cut_bars,
    finish,
    new_figure,
    set_log_scale,
    set_log_ticks,
)

_GROUPS = tuple(zip(GROUPS, MARKERS, strict=True))


def vanishing_curvature(logits: Sequence[Record], network: Sequence[Record], title: str) -> Figure:
    """Draw the largest eigenvalue of the softmax loss over ``1 - p_t``: at random logits, and during training.

    Args:
        logits: One record per probability, with ``complement`` (``1 - p_t``), ``lambda_max``, ``lower``, ``trace`` and
            ``upper``.
        network: One record per step, with ``complement``, ``outputs``, ``jacobian``, ``ggn`` and ``hessian``, each with
            its ``_std`` over seeds.
        title: Description of the network.
    """
    figure = new_figure(WIDTH, 3.7)
    left, right = figure.subplots(1, 2)
    x = column(logits, "complement")
    left.axhline(1.0, color=ORANGE, linewidth=1.2, label="squared error")
    left.plot(x, column(logits, "lambda_max"), ".", color=BLUE, markersize=6, label="softmax")
    left.plot(x, column(logits, "trace"), color=GREEN, linewidth=1.0, label=r"$1-\|p\|^2$")
    bounds = [column(logits, key) for key in ("lower", "upper")]
    left.fill_between(x, *bounds, color=GREY, alpha=0.3, linewidth=0, label=r"$p_t(1-p_t)$ to $2(1-p_t)$")
    left.set_title("Hessian with respect to random logits", fontsize=LABEL, pad=34)
    left.set_xlabel(r"$1-p_t$  (more certain to the right)", fontsize=LABEL)
    left.set_ylabel("largest eigenvalue", fontsize=LABEL)
    _training_panel(right, network)
    right.set_title(f"{title}, during training", fontsize=LABEL, pad=34)
    for axes in (left, right):
        set_log_scale(axes, x=True, y=True)
        axes.invert_xaxis()
        _finish(axes)
        # Above the axes, since inside it would cover a line.
        axes.legend(
            fontsize=TICK,
            frameon=False,
            ncols=2,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            columnspacing=1,
        )
    return figure


def _training_panel(axes: Axes, records: Sequence[Record]) -> None:
    """Draw the eigenvalues of a network during training; the Hessian is a dashed line on the wide line of the GGN."""
    x = column(records, "complement")
    drawn: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("jacobian", r"mean of $J^{\mathsf{T}}J$", {"color": ORANGE, "marker": "^"}),
        ("ggn", "GGN", {"color": PALE_BLUE, "marker": "o", "markersize": 7, "linewidth": 4.0}),
        ("hessian", "Hessian", {"color": BLACK, "marker": "x", "linestyle": (0, (3, 1.5))}),
        ("outputs", "outputs (mean over samples)", {"color": GREY, "marker": "."}),
    )
    for key, label, style in drawn:
        spread = np.array([record.get(f"{key}_std") or 0.0 for record in records])
        height = column(records, key)
        bars: dict[str, Any] = (
            {"yerr": cut_bars(height, spread), "elinewidth": 0.8, "capsize": 2} if spread.any() else {}
        )
        axes.errorbar(x, height, label=label, **{"markersize": 4, "linewidth": 1.0, **style, **bars})
    axes.set_xlabel(r"mean $1-p_t$  (more certain to the right)", fontsize=LABEL)
    axes.set_ylabel("largest eigenvalue", fontsize=LABEL)


def bound_scatter(records: Sequence[Record], labels: Mapping[str, str], title: str) -> Figure:
    """Draw forgetting over its bound and over the factors of the bound, in logarithmic scales: one row per stream.

    Args:
        records: One record per pair of tasks, with ``stream``, ``regime``, ``forgetting``, ``bound``, ``lambda_max``
            and ``distance``. Negative forgetting is a hollow marker at the lower edge.
        labels: Labels of the regimes.
        title: Title of the figure.
    """
    streams, regimes = list_distinct(records, "stream"), list_distinct(records, "regime")
    panels = (
        ("bound", r"$\frac{1}{2}\,\lambda_{\max}\,\|\Delta w\|^2$"),
        ("lambda_max", r"$\lambda_{\max}$"),
        ("distance", r"$\|\Delta w\|$"),
    )
    figure = new_figure(WIDTH, 2.25 * len(streams) + 1.2, title)
    grid = figure.subplots(len(streams), len(panels), squeeze=False, sharey="row")
    for row, stream in zip(grid, streams, strict=True):
        points = [record for record in records if record["stream"] == stream]
        lost = column(points, "forgetting")
        y = _raise_to_positive(lost)
        for axes, (key, label) in zip(row, panels, strict=True):
            x = _raise_to_positive(column(points, key))
            for regime, (colour, marker) in zip(regimes, cycle(_GROUPS), strict=False):
                for some, face in ((lost > 0, colour), (lost <= 0, "none")):
                    mine = some & np.array([record["regime"] == regime for record in points], dtype=bool)
                    axes.scatter(x[mine], y[mine], s=18, marker=marker, edgecolors=colour, facecolors=face)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label, fontsize=LABEL)
        lowest_bound = _raise_to_positive(column(points, "bound")).min()
        row[0].set_ylim(0.6 * y.min(), max(2 * y.max(), 3 * lowest_bound))  # keeps the line below in view
        twice = 2 * lowest_bound
        row[0].axline((lowest_bound, lowest_bound), (twice, twice), color=GREY, linewidth=0.9, linestyle="--", zorder=0)
        row[0].set_ylabel(f"{stream}\n" + r"$F_1=L_1(w_2)-L_1(w_1)$", fontsize=LABEL)
        for axes in row:
            _finish(axes)
    marks: list[Artist] = [
        _new_marker(labels.get(regime, regime), color=colour, marker=marker)
        for regime, (colour, marker) in zip(regimes, cycle(_GROUPS), strict=False)
    ]
    marks.append(Line2D([], [], color=GREY, linewidth=0.9, linestyle="--", label=r"$F_1$ = bound"))
    if any(record["forgetting"] <= 0 for record in records):
        text = r"hollow, at the lower edge: $F_1\leq 0$"
        marks.append(_new_marker(text, color=GREY, marker="o", markerfacecolor="none"))
    add_legend(figure, marks, 3)
    return figure


def _new_marker(label: str, **style: Any) -> Line2D:
    return Line2D([], [], linestyle="none", markersize=4.5, label=label, **style)


def _raise_to_positive(values: np.ndarray) -> np.ndarray:
    """Replace values that are not positive by half of the smallest positive one."""
    positive = values[values > 0]
    raised: np.ndarray = np.maximum(values, 0.5 * positive.min() if len(positive) else 1.0)
    return raised


def _finish(axes: Axes) -> None:
    set_log_ticks(axes.xaxis, most=4)
    set_log_ticks(axes.yaxis)
    finish(axes)
