"""Histograms over many decades."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvlab.plots.records import Record, list_distinct
from curvlab.plots.style import GREY, LABEL, SERIES, TICK, TITLE, add_legend, finish, new_figure, set_log_ticks

_TITLE_WIDTH = 60  # characters
_MOST_WIDE = 3  # columns; more are narrower than the label of an axis


def log_bins(values: np.ndarray, per_decade: int = 5) -> list[dict[str, Any]]:
    """Return the non-empty logarithmic bins of positive numbers.

    Args:
        values: The numbers.
        per_decade: Number of bins per decade.

    Returns:
        One record per bin with its edges ``low`` and ``high``, and its ``count``.

    Examples:
        >>> log_bins(np.array([0.2, 3.0, 4.0]), per_decade=1)
        [{'low': 0.1, 'high': 1.0, 'count': 1}, {'low': 1.0, 'high': 10.0, 'count': 2}]
    """
    places, counts = np.unique(np.floor(np.log10(values) * per_decade).astype(int), return_counts=True)
    return [
        {"low": 10.0 ** (place / per_decade), "high": 10.0 ** ((place + 1) / per_decade), "count": count}
        for place, count in zip(places.tolist(), counts.tolist(), strict=True)
    ]


def log_histogram(records: Sequence[Record], title: str) -> Figure:
    """Draw histograms of positive numbers in logarithmic scales, one line per seed.

    Args:
        records: One record per ``seed`` and non-empty bin, with its edges ``low`` and ``high`` and its ``count``.
        title: Title of the figure.
    """
    figure = new_figure(5.4, 3.3)
    axes = figure.add_subplot()
    _draw_bins(axes, records)
    axes.set_title(fill(title, _TITLE_WIDTH), fontsize=TITLE)
    axes.set_xlabel("nonzero entry of the diagonal (nats)", fontsize=LABEL)
    axes.set_ylabel("parameters per bin", fontsize=LABEL)
    axes.legend(fontsize=TICK, frameon=False)
    return figure


def log_histogram_grid(records: Sequence[Record], title: str, x_label: str, mark: float | None = None) -> Figure:
    """Draw a grid of histograms of positive numbers on logarithmic scales, one line for each seed.

    Args:
        records: As for ``log_histogram``, each with the names of its ``row`` and ``column``.
        title: Title of the figure.
        x_label: Label of the numbers, with their unit.
        mark: Position of a thin vertical line.
    """
    rows, columns = list_distinct(records, "row"), list_distinct(records, "column")
    figure = new_figure(6.8, 1.6 * len(rows) + 0.9, title)
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, of_row in zip(rows, panels, strict=True):
        for column, axes in zip(columns, of_row, strict=True):
            if mark is not None:
                axes.axvline(mark, color=GREY, linewidth=0.7, linestyle=":")
            _draw_bins(axes, [r for r in records if (r["row"], r["column"]) == (row, column)])
        of_row[0].set_ylabel(f"{row}:\nparameters per bin", fontsize=LABEL)
    for column, axes in zip(columns, panels[0], strict=True):
        axes.set_title(column, fontsize=LABEL)
    narrow = len(columns) > _MOST_WIDE
    for axes in panels.flat:
        set_log_ticks(axes.xaxis, most=3 if narrow else 4)
    for axes in panels[-1]:
        axes.set_xlabel(x_label.replace(" (", "\n(") if narrow else x_label, fontsize=LABEL)
    add_legend(figure, panels[0, 0].get_legend_handles_labels()[0], len(SERIES))
    return figure


def _draw_bins(axes: Axes, records: Sequence[Record]) -> None:
    for place, seed in enumerate(dict.fromkeys(record["seed"] for record in records)):
        bins = sorted((r["low"], r["high"], r["count"]) for r in records if r["seed"] == seed)
        # The left edge of a bin is the right edge of the previous one, except for rounding and empty bins.
        edges, counts = [bins[0][0]], []
        for low, high, count in bins:
            if low > edges[-1] * (1 + 1e-9):
                edges.append(low)
                counts.append(float("nan"))
            edges.append(high)
            counts.append(count)
        axes.stairs(counts, edges, color=SERIES[place % len(SERIES)], linewidth=1.3, label=f"seed {seed}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        set_log_ticks(axis)
    finish(axes)
