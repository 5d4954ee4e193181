"""Figures of distributions over many decades, drawn to be read at the width of a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

Record = Mapping[str, Any]

_COLOURS = ("#0b559f", "#e07b39", "#3a7d44", "#7b3294", "#767676")
_FONT = {"title": 10, "label": 9, "tick": 8}


def log_bins(values: np.ndarray, per_decade: int = 5) -> list[dict[str, Any]]:
    """Return the bins of positive numbers that are not empty, equally wide in the logarithm.

    Args:
        values: The numbers.
        per_decade: How many bins from a power of ten to the next.

    Returns:
        One record a bin: its edges ``low`` and ``high``, and its ``count``.

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
    """Draw histograms of positive numbers in logarithmic scales, a line a seed.

    Args:
        records: One a ``seed`` and bin that is not empty, with its edges ``low`` and ``high`` and its ``count``.
        title: What stands above.
    """
    figure = Figure(figsize=(5.4, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for place, seed in enumerate(dict.fromkeys(record["seed"] for record in records)):
        bins = sorted((r["low"], r["high"], r["count"]) for r in records if r["seed"] == seed)
        # The left edge of a bin is the right one of the bin before, but for rounding and for empty bins.
        edges, counts = [bins[0][0]], []
        for low, high, count in bins:
            if low > edges[-1] * (1 + 1e-9):
                edges.append(low)
                counts.append(float("nan"))
            edges.append(high)
            counts.append(count)
        axes.stairs(counts, edges, color=_COLOURS[place % len(_COLOURS)], linewidth=1.3, label=f"seed {seed}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=_FONT["title"])
    axes.set_xlabel("entry of the diagonal, where it is not zero (nats)", fontsize=_FONT["label"])
    axes.set_ylabel("parameters a bin", fontsize=_FONT["label"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=_FONT["tick"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=_FONT["tick"], frameon=False)
    return figure
