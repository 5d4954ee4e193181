"""Figures of forecasts: against measured values, over the horizon, and against their cost."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvlab.plots.records import Record, column, list_distinct
from curvlab.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABEL,
    MARKERS,
    METHODS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    WIDTH,
    add_legend,
    draw_grid,
    finish,
    mark_empty,
    new_figure,
    set_log_ticks,
    set_whole_ticks,
)

_CURVATURES = (BLUE, ORANGE, GREEN, PURPLE, INK, SKY, RED)
_BROKEN = 5  # from this number of panels on, a title of two words has two lines
_BESIDE = 1.15  # of a hollow mark, from the filled one


def forecast_scatter(
    points: Sequence[Record],
    structures: Mapping[str, str],
    methods: Mapping[str, str],
    title: str,
    *,
    gradient: bool = False,
) -> Figure:
    """Draw forecast against measured forgetting in logarithmic scales, one panel per stream and curvature.

    Args:
        points: One record per past task and later task, with ``stream``, ``method``, ``forgetting`` (nats) and a
            forecast for each curvature. Values that are not positive are hollow marks at the lower or left edge.
        structures: Labels of the curvatures by name, in order.
        methods: Labels of the methods by name.
        title: Title of the figure.
        gradient: Whether forecasts have the gradient's term, ``gradient`` of the records.
    """
    streams = list_distinct(points, "stream")
    figure = new_figure(WIDTH, 1.45 * len(streams) + 1.15, title)
    grid = figure.subplots(len(streams), len(structures), squeeze=False, sharex="row", sharey="row")
    styles = dict(zip(methods, zip(cycle(METHODS), cycle(MARKERS), strict=False), strict=False))
    hollow = False
    for place, (row, stream) in enumerate(zip(grid, streams, strict=True)):
        mine = [point for point in points if point["stream"] == stream]
        measured = column(mine, "forgetting")
        slope = column(mine, "gradient") if gradient else np.zeros(len(mine))
        forecasts = {name: slope + column(mine, name) for name in structures}
        low, high = _limits(np.concatenate([measured, *forecasts.values()]))
        for axes, (name, forecast) in zip(row, forecasts.items(), strict=True):
            raised = np.maximum(forecast, low), np.maximum(measured, low)
            shown = (forecast > low) & (measured > low)
            hollow |= not bool(shown.all())
            for method, (colour, marker) in styles.items():
                own = np.array([point["method"] == method for point in mine], dtype=bool)
                for some, face in ((shown, colour), (~shown, "none")):
                    axes.scatter(
                        raised[0][own & some],
                        raised[1][own & some],
                        s=9,
                        marker=marker,
                        edgecolors=colour,
                        facecolors=face,
                        linewidths=0.6,
                    )
            axes.plot((low, high), (low, high), color=GREY, linewidth=0.8, linestyle="--", zorder=0)
            axes.set(xscale="log", yscale="log", xlim=(low / 1.5, high * 1.5), ylim=(low / 1.5, high * 1.5))
            axes.set_box_aspect(1)
            set_log_ticks(axes.xaxis, most=4)
            set_log_ticks(axes.yaxis, most=4)
            finish(axes)
            if not place:
                text = structures[name]
                axes.set_title(text if len(structures) < _BROKEN else text.replace(" ", "\n"), fontsize=LABEL)
        row[0].set_ylabel(f"{stream}\nmeasured (nats)", fontsize=LABEL)
    # A label of the figure would lie on the legend.
    terms = r"$g^{\mathsf{T}}d+\frac{1}{2}\,d^{\mathsf{T}}C\,d$" if gradient else r"$\frac{1}{2}\,d^{\mathsf{T}}C\,d$"
    centre = 0.5 if len(structures) % 2 else -0.1  # of the row, in the axes in its middle or right of it
    grid[-1][len(structures) // 2].set_xlabel(f"forecast {terms} (nats)", fontsize=LABEL, x=centre)
    marks = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=4, label=methods[method])
        for method, (colour, marker) in styles.items()
    ]
    marks.append(Line2D([], [], color=GREY, linewidth=0.8, linestyle="--", label="forecast = measured"))
    if hollow:
        marks.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker="o",
                color=GREY,
                markerfacecolor="none",
                markersize=4,
                label="hollow, at the edge: below",
            )
        )
    add_legend(figure, marks, 3)
    return figure


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Return the limits of both axes: all positive values, but at least two and at most six decades."""
    positive = values[values > 0]
    if not len(positive):
        return 0.01, 1.0
    low, high = float(positive.min()), float(positive.max())
    return min(max(low, high * 1e-6), high * 1e-2), high


def forecast_value(
    horizons: Sequence[Record], table: Sequence[Record], structures: Mapping[str, str], title: str
) -> Figure:
    """Draw the rank correlation of forecasts over the number of tasks learned since, and against what they store.

    Args:
        horizons: One record per stream, seed, ``horizon`` and ``structure``, with ``rank``.
        table: One record per stream, ``structure`` and ``gradient``, with ``rank``, ``rank_std`` and ``kilobytes``.
        structures: Labels of the curvatures by name, in order.
        title: Title of the figure.
    """
    streams = list_distinct(table, "stream")
    figure = new_figure(WIDTH, 2.1 * len(streams) + 0.8, title)
    grid = figure.subplots(len(streams), 2, squeeze=False, sharey="row")
    colours = dict(zip(structures, _CURVATURES, strict=False))
    for (left, right), stream in zip(grid, streams, strict=True):
        for (name, colour), marker in zip(colours.items(), cycle(MARKERS), strict=False):
            mine = [row for row in horizons if row["stream"] == stream and row["structure"] == name]
            over = sorted({row["horizon"] for row in mine if row["rank"] is not None})
            ranks = [[row["rank"] for row in mine if row["horizon"] == h and row["rank"] is not None] for h in over]
            if over:
                left.plot(over, [np.mean(r) for r in ranks], color=colour, marker=marker, markersize=4, linewidth=1.0)
            for row in table:
                if row["stream"] == stream and row["structure"] == name and row["rank"] is not None:
                    right.errorbar(
                        row["kilobytes"] * (_BESIDE if row["gradient"] else 1),
                        row["rank"],
                        yerr=row.get("rank_std"),
                        fmt=marker,
                        color=colour,
                        markerfacecolor=colour if not row["gradient"] else "none",
                        markersize=5,
                        elinewidth=0.8,
                        capsize=2,
                    )
        left.set_ylabel(f"{stream}\nrank correlation", fontsize=LABEL)
        set_whole_ticks(left.xaxis)
        right.set_xscale("log")
        set_log_ticks(right.xaxis)
        for axes in (left, right):
            draw_grid(axes, "y")
            finish(axes)
            if not axes.has_data():
                mark_empty(axes, "no rank correlation:\nfewer than three points, or all equal")
    grid[-1][0].set_xlabel("tasks learned since", fontsize=LABEL)
    grid[-1][1].set_xlabel("memory per task (kB; exact products: the samples)", fontsize=LABEL)
    marks = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.0, label=structures[name])
        for (name, colour), marker in zip(colours.items(), cycle(MARKERS), strict=False)
    ]
    marks.append(
        Line2D(
            [],
            [],
            linestyle="none",
            color=GREY,
            marker="o",
            markerfacecolor="none",
            markersize=5,
            label="hollow: with the gradient's term",
        )
    )
    add_legend(figure, marks, 3)
    return figure
