"""Figures of continual learning: accuracies over a stream of tasks, of methods and of training regimes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

Record = Mapping[str, Any]

_FONT = {"title": 10, "label": 9, "tick": 8}
_COLOURS = (
    "#767676",
    "#0b559f",
    "#3a8f5c",
    "#8e5ea2",
    "#e07b39",
    "#222222",
    "#4fa3c7",
    "#a0742b",
    "#c0394b",
    "#d67fb0",
)
_MARKERS = "os^vDP*Xdh"
_ACROSS: dict[str, Any] = {"linestyle": "--", "marker": None}


def accuracy_curves(
    accuracies: Sequence[Record], labels: Mapping[str, str], title: str, *, bands: bool = False
) -> Figure:
    """Draw the mean accuracy on the tasks so far, and below it that on the first task, over tasks: a column a stream.

    A thick line is the mean over the seeds, a thin one a seed.

    Args:
        accuracies: Records of ``stream``, ``method``, ``seed``, ``after`` and ``task`` (from 1) with the ``accuracy``.
            Of a method that is measured after the last task only, a broken line goes across.
        labels: What the methods are called.
        title: What stands above.
        bands: Draw the range of the seeds in place of each of them.
    """
    streams, methods = _distinct(accuracies, "stream"), _distinct(accuracies, "method")
    last = max(record["after"] for record in accuracies)
    figure = Figure(figsize=(max(3.4 * len(streams), 4.4), 5.2), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    panels: np.ndarray = figure.subplots(2, len(streams), squeeze=False, sharex=True, sharey="row")
    for column, stream in zip(panels.T, streams, strict=True):
        for place, method in enumerate(methods):
            mine = [r for r in accuracies if r["stream"] == stream and r["method"] == method]
            for axes, chosen in zip(column, (mine, [r for r in mine if r["task"] == 1]), strict=True):
                after, values = _over(chosen, "after", "accuracy")
                if len(after) == 1 < last:
                    _line(axes, np.array([1, last]), values.repeat(2, axis=1), place, bands, **_ACROSS)
                elif len(after):
                    _line(axes, after, values, place, bands)
        column[0].set_title(stream, fontsize=_FONT["label"])
        column[1].set_xlabel("after task", fontsize=_FONT["label"])
    panels[0, 0].set_ylabel("mean accuracy, tasks so far", fontsize=_FONT["label"])
    panels[1, 0].set_ylabel("accuracy on the first task", fontsize=_FONT["label"])
    for axes in panels.flat:
        _finish(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    styles = {labels.get(method, method): _style(place) for place, method in enumerate(methods)}
    for method in methods:
        if len({record["after"] for record in accuracies if record["method"] == method}) == 1 < last:
            styles[labels.get(method, method)] |= _ACROSS
    _legend(figure, styles, _seeds(accuracies), bands)
    return figure


def method_dots(table: Sequence[Record], title: str) -> Figure:
    """Draw accuracy and, below it, forgetting of methods as dots: a column a stream; published ones as diamonds.

    Args:
        table: A record a ``stream`` and method (``label``) with ``acc`` and ``forgetting``, each with its ``_std``, the
            number of ``seeds``, and where there are some ``published_acc`` and ``published_forgetting``.
        title: What stands above.
    """
    streams = _distinct(table, "stream")
    labels = _distinct(table, "label")
    figure = Figure(figsize=(max(3.4 * len(streams), 4.4), 5.2), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    panels: np.ndarray = figure.subplots(2, len(streams), squeeze=False, sharey="row")
    for column, stream in zip(panels.T, streams, strict=True):
        for axes, key in zip(column, ("acc", "forgetting"), strict=True):
            for row in (row for row in table if row["stream"] == stream):
                _dot(axes, labels.index(row["label"]), row, key)
            axes.set_xlim(-0.6, len(labels) - 0.4)
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            _finish(axes)
        column[0].set_title(stream, fontsize=_FONT["label"])
        column[0].tick_params(labelbottom=False)
    panels[0, 0].set_ylabel("accuracy, mean over all tasks", fontsize=_FONT["label"])
    panels[1, 0].set_ylabel("forgetting", fontsize=_FONT["label"])
    handles = []
    if any(row["acc_std"] is not None for row in table):
        seeds = max(row["seeds"] for row in table)
        handles.append(_symbol("o", f"mean and standard deviation of {seeds} seeds", markersize=5))
    if any(row.get("published_acc") is not None for row in table):
        handles.append(_symbol("D", "published mean", markerfacecolor="white", markersize=5))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=_FONT["tick"], frameon=False)
    return figure


def _dot(axes: Axes, place: int, row: Record, key: str) -> None:
    """Draw a value with its deviation and, to the right of it, the published one."""
    published = row.get(f"published_{key}")
    shift = 0.0 if published is None else 0.13
    if row[key] is not None:
        style: dict[str, Any] = {"fmt": "o", "markersize": 5, "elinewidth": 1.2, "capsize": 2.5}
        axes.errorbar(place - shift, row[key], yerr=row[f"{key}_std"], color=_COLOURS[place % len(_COLOURS)], **style)
    if published is not None:
        axes.plot(place + shift, published, "D", color="white", markeredgecolor="black", markersize=5)


def regime_curves(
    points: Sequence[Record],
    accuracies: Sequence[Record],
    labels: Mapping[str, str],
    title: str,
    *,
    bands: bool = False,
) -> Figure:
    """Draw what training regimes do over a stream: accuracies, the largest eigenvalue, the step from task to task.

    A thick line is the mean over the seeds, a thin one a seed.

    Args:
        points: Records of ``stream``, ``regime``, ``seed`` and ``task`` (from 1) with ``lambda_max`` and ``distance``,
            which is None for the first task.
        accuracies: Records of ``stream``, ``regime``, ``seed``, ``after`` and ``task`` with the ``accuracy``.
        labels: What the regimes are called.
        title: What stands above.
        bands: Draw the range of the seeds in place of each of them.
    """
    streams, regimes = _distinct(points, "stream"), _distinct(points, "regime")
    figure = Figure(figsize=(7.6, 1.9 * len(streams) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    panels: np.ndarray = figure.subplots(len(streams), 4, squeeze=False, sharex=True)
    for row, stream in zip(panels, streams, strict=True):
        for place, regime in enumerate(regimes, start=1):
            seen, moved = (
                [r for r in records if r["stream"] == stream and r["regime"] == regime]
                for records in (accuracies, points)
            )
            drawn = (
                _over(seen, "after", "accuracy"),
                _over([r for r in seen if r["task"] == 1], "after", "accuracy"),
                _over(moved, "task", "lambda_max"),
                _over([r for r in moved if r["distance"] is not None], "task", "distance"),
            )
            for axes, (tasks, values) in zip(row, drawn, strict=True):
                _line(axes, tasks, values, place, bands)
        row[0].set_ylabel(stream, fontsize=_FONT["label"])
        for axes in row[2:]:
            axes.set_yscale("log")
    headers = (
        "accuracy, tasks so far",
        "accuracy, first task",
        r"$\lambda_{\max}$, newest task",
        r"$\|\Delta w\|$",
    )
    for axes, header in zip(panels[0], headers, strict=True):
        axes.set_title(header, fontsize=_FONT["label"])
    for axes in panels.flat:
        _finish(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[-1]:
        axes.set_xlabel("after task", fontsize=_FONT["label"])
    styles = {labels.get(regime, regime): _style(place) for place, regime in enumerate(regimes, start=1)}
    _legend(figure, styles, _seeds(points), bands)
    return figure


def _distinct(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records))


def _seeds(records: Sequence[Record]) -> int:
    return len({record["seed"] for record in records})


def _over(records: Sequence[Record], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of ``x`` in order ``(T,)`` and the means of ``y`` at them ``(seeds, T)``."""
    places = sorted({record[x] for record in records})
    seeds = sorted({record["seed"] for record in records})
    at: dict[tuple[int, int], list[float]] = {}
    for record in records:
        at.setdefault((record["seed"], record[x]), []).append(record[y])
    means = [[float(np.mean(at.get((seed, place), [np.nan]))) for place in places] for seed in seeds]
    return np.array(places), np.array(means).reshape(len(seeds), len(places))


def _style(place: int) -> dict[str, Any]:
    place %= len(_COLOURS)
    return {"color": _COLOURS[place], "marker": _MARKERS[place], "markersize": 3.5}


def _line(axes: Axes, x: np.ndarray, values: np.ndarray, place: int, bands: bool, **style: Any) -> None:
    """Draw the mean over seeds and, where there are several, each of them as a thin line, or their range."""
    style = {**_style(place), "linewidth": 1.4, **style}
    if len(values) > 1 and bands:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)
    elif len(values) > 1:
        axes.plot(x, values.T, color=style["color"], linewidth=0.5, alpha=0.35, linestyle=style.get("linestyle", "-"))
    axes.plot(x, values.mean(axis=0), **style)


def _symbol(marker: str, label: str, **style: Any) -> Line2D:
    return Line2D([], [], linestyle="none", color="black", marker=marker, label=label, **style)


def _finish(axes: Axes) -> None:
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        decades = math.log10(high / low)
        subs = (
            (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
        )
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=_FONT["tick"])
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]], seeds: int, bands: bool) -> None:
    handles: list[Line2D | Patch] = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    if seeds > 1 and bands:
        handles.append(Patch(facecolor="#808080", alpha=0.3, label=f"mean and range of {seeds} seeds"))
    elif seeds > 1:
        handles.append(
            Line2D([], [], color="#808080", linewidth=0.5, label=f"one of {seeds} seeds (thick: their mean)")
        )
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.06 * longest)))  # inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=_FONT["tick"], frameon=False)
