"""Histograms over many decades."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from curvlab.plots.records import Record
from curvlab.plots.style import LABEL, SERIES, TICK, TITLE, finish, new_figure, set_log_ticks


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
    axes.set_title(title, fontsize=TITLE)
    axes.set_xlabel("nonzero entry of the diagonal (nats)", fontsize=LABEL)
    axes.set_ylabel("parameters per bin", fontsize=LABEL)
    for axis in (axes.xaxis, axes.yaxis):
        set_log_ticks(axis)
    finish(axes)
    axes.legend(fontsize=TICK, frameon=False)
    return figure
