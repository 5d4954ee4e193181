"""Figures of eigenvalues against what they are compared with, in logarithmic scales, to be read at a page's width."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

Record = Mapping[str, Any]

_BLUE, _ORANGE, _GREEN, _GREY = "#0b559f", "#e07b39", "#3a8f5c", "#767676"
_LIGHT_BLUE = "#8fbbe3"
_FONT = {"title": 10, "label": 9, "tick": 8}


def vanishing_curvature(logits: Sequence[Record], network: Sequence[Record], title: str) -> Figure:
    """Draw the softmax loss's largest eigenvalue over ``1 - p_t``: at random logits, and of a network in training.

    Args:
        logits: A record a probability, with ``complement`` (``1 - p_t``), ``lambda_max``, ``lower``, ``trace`` and
            ``upper``.
        network: A record a step, with ``complement``, ``outputs``, ``jacobian``, ``ggn`` and ``hessian``, each with
            its ``_std`` over seeds.
        title: What the network is.
    """
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = _column(logits, "complement")
    left.axhline(1.0, color=_ORANGE, linewidth=1.2, label="squared error")
    left.plot(x, _column(logits, "lambda_max"), ".", color=_BLUE, markersize=6, label="softmax")
    left.plot(x, _column(logits, "trace"), color=_GREEN, linewidth=1.0, label=r"$1-\|p\|^2$")
    bounds = [_column(logits, key) for key in ("lower", "upper")]
    left.fill_between(x, *bounds, color=_GREY, alpha=0.3, linewidth=0, label=r"$p_t(1-p_t)$ to $2(1-p_t)$")
    left.set_title("Hessian with respect to random logits", fontsize=_FONT["label"], pad=34)
    left.set_xlabel(r"$1-p_t$  (more certain to the right)", fontsize=_FONT["label"])
    left.set_ylabel("largest eigenvalue", fontsize=_FONT["label"])
    _training_panel(right, network)
    right.set_title(f"{title}, in training", fontsize=_FONT["label"], pad=34)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.invert_xaxis()
        _finish(axes)
        # Above the axes: inside, it would hide a line.
        axes.legend(
            fontsize=_FONT["tick"],
            frameon=False,
            ncols=2,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            columnspacing=1,
        )
    return figure


def _training_panel(axes: Axes, records: Sequence[Record]) -> None:
    """Draw the eigenvalues of a network in training; the Hessian's broken line lies on the GGN's wide one."""
    x = _column(records, "complement")
    drawn: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("jacobian", r"mean of $J^{\mathsf{T}}J$", {"color": _ORANGE, "marker": "^"}),
        ("ggn", "GGN", {"color": _LIGHT_BLUE, "marker": "o", "markersize": 7, "linewidth": 4.0}),
        ("hessian", "Hessian", {"color": "black", "marker": "x", "linestyle": (0, (3, 1.5))}),
        ("outputs", "outputs (mean over samples)", {"color": _GREY, "marker": "."}),
    )
    for key, label, style in drawn:
        spread = np.array([record.get(f"{key}_std") or 0.0 for record in records])
        height = _column(records, key)
        below = np.minimum(spread, 0.9 * height)  # on a logarithmic axis a bar must not reach below zero
        bars: dict[str, Any] = {"yerr": [below, spread], "elinewidth": 0.8, "capsize": 2} if spread.any() else {}
        axes.errorbar(x, height, label=label, **{"markersize": 4, "linewidth": 1.0, **style, **bars})
    axes.set_xlabel(r"mean $1-p_t$  (more certain to the right)", fontsize=_FONT["label"])
    axes.set_ylabel("largest eigenvalue", fontsize=_FONT["label"])


def bound_scatter(records: Sequence[Record], labels: Mapping[str, str], title: str) -> Figure:
    """Draw what was forgotten against its bound and the bound's factors, in logarithmic scales.

    Args:
        records: A record a pair of tasks, with ``stream``, ``regime``, ``forgetting``, ``bound``, ``lambda_max`` and
            ``distance``. Where nothing was forgotten, a hollow mark lies on the lower edge.
        labels: What the regimes are called.
        title: What stands above.
    """
    streams = list(dict.fromkeys(record["stream"] for record in records))
    regimes = list(dict.fromkeys(record["regime"] for record in records))
    panels = (
        ("bound", r"$\frac{1}{2}\,\lambda_{\max}\,\|\Delta w\|^2$"),
        ("lambda_max", r"$\lambda_{\max}$"),
        ("distance", r"$\|\Delta w\|$"),
    )
    figure = Figure(figsize=(7.2, 2.25 * len(streams) + 1.2), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    grid = figure.subplots(len(streams), len(panels), squeeze=False, sharey="row")
    for row, stream in zip(grid, streams, strict=True):
        points = [record for record in records if record["stream"] == stream]
        lost = _column(points, "forgetting")
        y = _raised(lost)
        for axes, (key, label) in zip(row, panels, strict=True):
            x = _raised(_column(points, key))
            for regime, (colour, marker) in zip(regimes, _styles(len(regimes)), strict=True):
                for some, face in ((lost > 0, colour), (lost <= 0, "none")):
                    mine = some & np.array([record["regime"] == regime for record in points], dtype=bool)
                    axes.scatter(x[mine], y[mine], s=18, marker=marker, edgecolors=colour, facecolors=face)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label, fontsize=_FONT["label"])
        lowest_bound = _raised(_column(points, "bound")).min()
        row[0].set_ylim(0.6 * y.min(), max(2 * y.max(), 3 * lowest_bound))  # the line below comes into view
        twice = 2 * lowest_bound
        row[0].axline(
            (lowest_bound, lowest_bound), (twice, twice), color=_GREY, linewidth=0.9, linestyle="--", zorder=0
        )
        row[0].set_ylabel(f"{stream}\n" + r"$F_1=L_1(w_2)-L_1(w_1)$", fontsize=_FONT["label"])
        for axes in row:
            _finish(axes)
    marks: list[Artist] = [
        Line2D(
            [],
            [],
            linestyle="none",
            color=colour,
            marker=marker,
            markersize=4.5,
            label=labels.get(regime, regime),
        )
        for regime, (colour, marker) in zip(regimes, _styles(len(regimes)), strict=True)
    ]
    marks.append(Line2D([], [], color=_GREY, linewidth=0.9, linestyle="--", label=r"$F_1$ = bound"))
    if any(record["forgetting"] <= 0 for record in records):
        hollow = Line2D([], [], linestyle="none", color=_GREY, marker="o", markerfacecolor="none", markersize=4.5)
        hollow.set_label(r"hollow, at the lower edge: $F_1\leq 0$")
        marks.append(hollow)
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=_FONT["tick"], frameon=False)
    return figure


def _styles(count: int) -> list[tuple[str, str]]:
    colours = (_BLUE, _ORANGE, _GREEN, "#8e5ea2", "#c0394b", "#4fa3c7", "#a0742b", "#d67fb0", _GREY, "black")
    return list(zip(colours, "os^vDP*Xdh", strict=True))[:count]


def _raised(values: np.ndarray) -> np.ndarray:
    """Raise what is not positive to below the smallest that is."""
    positive = values[values > 0]
    raised: np.ndarray = np.maximum(values, 0.5 * positive.min() if len(positive) else 1.0)
    return raised


def _column(records: Sequence[Record], key: str) -> np.ndarray:
    return np.array([record[key] for record in records], dtype=float)


def _finish(axes: Axes) -> None:
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_minor_formatter(NullFormatter())
        if max(limits) < 100 * min(limits):  # powers of ten would be too few
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
        else:
            axis.set_major_locator(LogLocator(numticks=8))
    axes.tick_params(labelsize=_FONT["tick"])
    axes.spines[["top", "right"]].set_visible(False)
