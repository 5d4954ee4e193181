"""Dot plots: sums and means of matrix entries, and accuracies of methods."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from curvlab.plots.records import Record, list_distinct
from curvlab.plots.style import (
    BLACK,
    BLUE,
    LABEL,
    METHODS,
    ORANGE,
    PUBLISHED,
    TICK,
    WIDTH,
    add_legend,
    cut_bars,
    draw_grid,
    finish,
    mark_empty,
    new_figure,
    set_log_scale,
    set_log_ticks,
)

_ON, _OFF = BLUE, ORANGE  # on and off the diagonal
_LINEAR, _NONLINEAR = BLUE, ORANGE
_SHIFT, _THEIRS = 0.18, 0.18  # offset of the two dots of a tensor, and of published dots from ours
_LONG_LABEL = 26  # characters; longer labels are wrapped after the comma


def diagonality_dots(records: Sequence[Record], title: str, published: Mapping[str, Record] | None = None) -> Figure:
    """Draw sums and means on and off the diagonal in a logarithmic scale: one pair of dots per parameter tensor.

    Args:
        records: Records of ``curvlab.results.aggregate`` with ``diag_sum``, ``offdiag_abs_sum``, ``diag_mean``,
            ``offdiag_abs_mean``, each with its ``_std`` over seeds.
        title: Title of the figure.
        published: Published sums by parameter name, drawn as diamonds; means are computed from them with the
            denominators ``n`` and ``n^2 - n``.
    """
    figure = new_figure(WIDTH, 3.5, title)
    names = [record["parameter"] for record in records]
    places = np.arange(len(records))
    # Published dots are right of ours; without published dots, the pair is centred.
    moved = np.array([_THEIRS / 2 if name in (published or {}) else 0.0 for name in names])
    panels = (
        ("Sum", "diag_sum", "offdiag_abs_sum", r"$\Sigma_i F_{ii}$", r"$\Sigma_{i\neq j}|F_{ij}|$"),
        ("Mean", "diag_mean", "offdiag_abs_mean", r"mean $F_{ii}$", r"mean $|F_{ij}|,\ i\neq j$"),
    )
    for place, (label, on, off, on_label, off_label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        for shift, key, colour, text in ((-_SHIFT, on, _ON, on_label), (_SHIFT, off, _OFF, off_label)):
            heights = np.array([record[key] if record[key] else np.nan for record in records], dtype=float)
            spread = np.array([record.get(f"{key}_std") or 0.0 for record in records], dtype=float)
            axes.errorbar(
                places + shift - moved,
                heights,
                yerr=cut_bars(heights, spread) if spread.any() else None,
                fmt="o",
                color=colour,
                markersize=5,
                elinewidth=1.2,
                capsize=2.5,
                label=text,
            )
        _mark_published(axes, records, published, on, off)
        if not set_log_scale(axes, y=True):
            mark_empty(axes, "all entries are zero")
        set_log_ticks(axes.yaxis)
        draw_grid(axes, "y")
        axes.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_ylabel(f"{label} of entries (nats)", fontsize=LABEL)
        finish(axes)
        # Above the axes, since inside it would cover a marker.
        axes.legend(fontsize=TICK, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _mark_published(
    axes: Axes, records: Sequence[Record], published: Mapping[str, Record] | None, on: str, off: str
) -> None:
    if not published:
        return
    for place, record in enumerate(records):
        row = published.get(record["parameter"])
        if row is None:
            continue
        n = record["size"]
        divide = {"diag_sum": 1, "offdiag_abs_sum": 1, "diag_mean": n, "offdiag_abs_mean": n * (n - 1)}
        for shift, key, divisor, colour in (
            (-_SHIFT, "diag_sum", divide[on], _ON),
            (_SHIFT, "offdiag_abs_sum", divide[off], _OFF),
        ):
            x, y = place + shift + _THEIRS / 2, row[key] / divisor
            axes.plot(x, y, "D", markersize=5, color="white", markeredgecolor=colour)
    axes.plot([], [], "D", markersize=5, color="white", markeredgecolor=BLACK, label="published")


def method_dots(table: Sequence[Record], title: str) -> Figure:
    """Draw accuracy and, below it, forgetting of methods: one column per stream; published values are diamonds.

    Args:
        table: One record per ``stream`` and method (``label``) with ``acc`` and ``forgetting``, each with its ``_std``,
            the number of ``seeds``, and optionally ``published_acc`` and ``published_forgetting``.
        title: Title of the figure.
    """
    streams = list_distinct(table, "stream")
    labels = list_distinct(table, "label")
    figure = new_figure(max(3.4 * len(streams), 4.4), 5.2, title)
    panels: np.ndarray = figure.subplots(2, len(streams), squeeze=False, sharey="row")
    for column, stream in zip(panels.T, streams, strict=True):
        for axes, key in zip(column, ("acc", "forgetting"), strict=True):
            for row in (row for row in table if row["stream"] == stream):
                _draw_dot(axes, labels.index(row["label"]), row, key)
            axes.set_xlim(-0.6, len(labels) - 0.4)
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
            draw_grid(axes, "y")
            finish(axes)
        column[0].set_title(stream, fontsize=LABEL)
        column[0].tick_params(labelbottom=False)
    panels[0, 0].set_ylabel("accuracy, mean over all tasks", fontsize=LABEL)
    panels[1, 0].set_ylabel("forgetting", fontsize=LABEL)
    handles = []
    if any(row["acc_std"] is not None for row in table):
        seeds = max(row["seeds"] for row in table)
        handles.append(_new_symbol("o", f"mean and standard deviation of {seeds} seeds", markersize=5))
    if any(row.get("published_acc") is not None for row in table):
        handles.append(_new_symbol("D", "published mean", markerfacecolor="white", markersize=5))
    if handles:
        add_legend(figure, handles, 2)
    return figure


def _draw_dot(axes: Axes, place: int, row: Record, key: str) -> None:
    """Draw a value with its standard deviation and, to its right, the published value."""
    published = row.get(f"published_{key}")
    shift = 0.0 if published is None else 0.13
    if row[key] is not None:
        style: dict[str, Any] = {"fmt": "o", "markersize": 5, "elinewidth": 1.2, "capsize": 2.5}
        axes.errorbar(place - shift, row[key], yerr=row[f"{key}_std"], color=METHODS[place % len(METHODS)], **style)
    if published is not None:
        axes.plot(place + shift, published, "D", color="white", markeredgecolor=BLACK, markersize=5)


def _new_symbol(marker: str, label: str, **style: Any) -> Line2D:
    return Line2D([], [], linestyle="none", color=BLACK, marker=marker, label=label, **style)


def accuracy_points(table: Sequence[Record], methods: Sequence[str], title: str) -> Figure:
    """Draw the accuracy of every method with its standard deviation, and the published value: one column per setting.

    Args:
        table: One record per setting and method with ``setting_label``, ``label``, ``linear``, ``acc``, ``acc_std``
            over seeds, and optionally ``published_value``.
        methods: Labels in the order of the rows; labels that are not in the table are left out.
        title: Title of the figure.
    """
    settings, shown = (list_distinct(table, key) for key in ("setting_label", "label"))
    labels = [label for label in methods if label in shown]
    figure = new_figure(WIDTH, min(0.27 * len(labels) + 1.2, 7.0), title)
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for row in table:
            if row["setting_label"] == setting:
                _draw_point(axes, row, labels.index(row["label"]))
        axes.set_yticks(range(len(labels)), [_wrap(label) for label in labels])
        draw_grid(axes)
        axes.set_title(setting, fontsize=LABEL)
        finish(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4 if len(settings) < 4 else 3))
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    text = "accuracy after the last task"
    if any(row.get("acc_std") is not None for row in table):
        text += " (mean and standard deviation over seeds)"
    points: list[tuple[str, dict[str, Any]]] = [
        ("linear network, squared error", {"color": _LINEAR, "marker": "o"}),
        ("non-linear, cross-entropy", {"color": _NONLINEAR, "marker": "s"}),
    ]
    if any(row.get("published_value") is not None for row in table):
        points.append(("published", {"color": PUBLISHED, "marker": "D", "markerfacecolor": "none"}))
    handles = [Line2D([], [], linestyle="none", label=label, **style) for label, style in points]
    add_legend(figure, handles, 3, title=text, title_fontsize=LABEL)
    return figure


def _draw_point(axes: Axes, row: Record, place: int) -> None:
    colour, marker = (_LINEAR, "o") if row["linear"] else (_NONLINEAR, "s")
    if row["acc"] is not None:
        axes.errorbar(row["acc"], place, xerr=row["acc_std"], color=colour, marker=marker, capsize=2, markersize=5)
    if row.get("published_value") is not None:
        axes.plot(row["published_value"], place, "D", color=PUBLISHED, markerfacecolor="none", markersize=5)


def _wrap(label: str) -> str:
    return label.replace(", ", ",\n", 1) if len(label) > _LONG_LABEL else label
