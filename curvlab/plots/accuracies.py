"""Figures of continual learning: accuracies of methods and of training regimes after each task of a stream."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from curvlab.plots.records import Record, count_seeds, list_distinct
from curvlab.plots.style import (
    LABEL,
    LINEAR,
    MARKERS,
    METHODS,
    NONLINEAR,
    OTHERS,
    SYMBOL,
    WIDTH,
    add_legend,
    draw_line,
    finish,
    new_figure,
    set_log_ticks,
    set_whole_ticks,
)

_ACROSS: dict[str, Any] = {"linestyle": "--", "marker": None}
_MOST_LINES = 8  # largest number of coloured lines


def accuracy_curves(
    accuracies: Sequence[Record], labels: Mapping[str, str], title: str, *, bands: bool = False
) -> Figure:
    """Draw the mean accuracy on the tasks so far, and below it the accuracy on the first task: one column per stream.

    Thick lines are means over seeds, thin lines single seeds.

    Args:
        accuracies: Records of ``stream``, ``method``, ``seed``, ``after`` and ``task`` (from 1) with the ``accuracy``.
            A method that is measured only after the last task is a dashed line across the panel.
        labels: Labels of the methods.
        title: Title of the figure.
        bands: Draw the range over seeds instead of single seeds.
    """
    streams, methods = list_distinct(accuracies, "stream"), list_distinct(accuracies, "method")
    last = max(record["after"] for record in accuracies)
    figure = new_figure(max(3.4 * len(streams), 4.4), 5.2, title)
    panels: np.ndarray = figure.subplots(2, len(streams), squeeze=False, sharex=True, sharey="row")
    for column, stream in zip(panels.T, streams, strict=True):
        for place, method in enumerate(methods):
            mine = [r for r in accuracies if r["stream"] == stream and r["method"] == method]
            for axes, chosen in zip(column, (mine, [r for r in mine if r["task"] == 1]), strict=True):
                after, values = _mean_by(chosen, "after", "accuracy")
                if len(after) == 1 < last:
                    _draw_line(axes, np.array([1, last]), values.repeat(2, axis=1), place, bands, **_ACROSS)
                elif len(after):
                    _draw_line(axes, after, values, place, bands)
        column[0].set_title(stream, fontsize=LABEL)
        column[1].set_xlabel("after task", fontsize=LABEL)
    panels[0, 0].set_ylabel("mean accuracy, tasks so far", fontsize=LABEL)
    panels[1, 0].set_ylabel("accuracy on the first task", fontsize=LABEL)
    for axes in panels.flat:
        _finish(axes)
        set_whole_ticks(axes.xaxis)
    styles = {labels.get(method, method): _style(place) for place, method in enumerate(methods)}
    for method in methods:
        if len({record["after"] for record in accuracies if record["method"] == method}) == 1 < last:
            styles[labels.get(method, method)] |= _ACROSS
    _legend(figure, styles, count_seeds(accuracies), bands)
    return figure


def regime_curves(
    points: Sequence[Record],
    accuracies: Sequence[Record],
    labels: Mapping[str, str],
    title: str,
    *,
    bands: bool = False,
) -> Figure:
    """Draw accuracies, largest eigenvalue and weight change of training regimes over the tasks: one row per stream.

    Thick lines are means over seeds, thin lines single seeds.

    Args:
        points: Records of ``stream``, ``regime``, ``seed`` and ``task`` (from 1) with ``lambda_max`` and ``distance``,
            which is None for the first task.
        accuracies: Records of ``stream``, ``regime``, ``seed``, ``after`` and ``task`` with the ``accuracy``.
        labels: Labels of the regimes.
        title: Title of the figure.
        bands: Draw the range over seeds instead of single seeds.
    """
    streams, regimes = list_distinct(points, "stream"), list_distinct(points, "regime")
    figure = new_figure(7.6, 1.9 * len(streams) + 0.9, title)
    panels: np.ndarray = figure.subplots(len(streams), 4, squeeze=False, sharex=True)
    for row, stream in zip(panels, streams, strict=True):
        for place, regime in enumerate(regimes, start=1):
            seen, moved = (
                [r for r in records if r["stream"] == stream and r["regime"] == regime]
                for records in (accuracies, points)
            )
            drawn = (
                _mean_by(seen, "after", "accuracy"),
                _mean_by([r for r in seen if r["task"] == 1], "after", "accuracy"),
                _mean_by(moved, "task", "lambda_max"),
                _mean_by([r for r in moved if r["distance"] is not None], "task", "distance"),
            )
            for axes, (tasks, values) in zip(row, drawn, strict=True):
                _draw_line(axes, tasks, values, place, bands)
        row[0].set_ylabel(stream, fontsize=LABEL)
        for axes in row[2:]:
            axes.set_yscale("log")
    headers = (
        "accuracy, tasks so far",
        "accuracy, first task",
        r"$\lambda_{\max}$, newest task",
        r"$\|\Delta w\|$",
    )
    for axes, header in zip(panels[0], headers, strict=True):
        axes.set_title(header, fontsize=LABEL)
    for axes in panels.flat:
        _finish(axes)
        set_whole_ticks(axes.xaxis)
    for axes in panels[-1]:
        axes.set_xlabel("after task", fontsize=LABEL)
    styles = {labels.get(regime, regime): _style(place) for place, regime in enumerate(regimes, start=1)}
    _legend(figure, styles, count_seeds(points), bands)
    return figure


def _mean_by(records: Sequence[Record], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted values of ``x`` ``(T,)``, and the means of ``y`` for each of them ``(seeds, T)``."""
    places = sorted({record[x] for record in records})
    seeds = sorted({record["seed"] for record in records})
    at: dict[tuple[int, int], list[float]] = {}
    for record in records:
        at.setdefault((record["seed"], record[x]), []).append(record[y])
    means = [[float(np.mean(at.get((seed, place), [np.nan]))) for place in places] for seed in seeds]
    return np.array(places), np.array(means).reshape(len(seeds), len(places))


def _style(place: int) -> dict[str, Any]:
    place %= len(METHODS)
    return {"color": METHODS[place], "marker": MARKERS[place], "markersize": 3.5}


def _draw_line(axes: Axes, x: np.ndarray, values: np.ndarray, place: int, bands: bool, **style: Any) -> None:
    """Draw the mean over seeds and, for several seeds, each seed as a thin line or their range."""
    style = {**_style(place), "linewidth": 1.4, **style}
    if len(values) > 1 and bands:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)
    elif len(values) > 1:
        axes.plot(x, values.T, color=style["color"], linewidth=0.5, alpha=0.35, linestyle=style.get("linestyle", "-"))
    axes.plot(x, values.mean(axis=0), **style)


def _finish(axes: Axes) -> None:
    set_log_ticks(axes.yaxis)
    finish(axes)


def _legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]], seeds: int, bands: bool) -> None:
    handles: list[Line2D | Patch] = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    if seeds > 1 and bands:
        handles.append(Patch(facecolor=SYMBOL, alpha=0.3, label=f"mean and range of {seeds} seeds"))
    elif seeds > 1:
        handles.append(Line2D([], [], color=SYMBOL, linewidth=0.5, label=f"one of {seeds} seeds (thick: mean)"))
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.06 * longest)))  # inches
    add_legend(figure, handles, columns)


def setting_curves(
    curves: Sequence[Record],
    labels: Mapping[str, str],
    settings: Mapping[str, str],
    linear: Collection[str],
    first: Collection[str],
    title: str,
) -> Figure:
    """Draw the accuracy on the tasks so far, mean over seeds: one panel per setting.

    Args:
        curves: Records of ``setting``, ``method``, ``seed`` and ``after`` (tasks, from 1) with the ``accuracy``. A
            method that is measured only after the last task is a dotted line across the panel.
        labels: Labels of the methods.
        settings: Labels of the settings.
        linear: Methods with solid lines; the others have dashed lines.
        first: Methods with coloured lines if there are more than eight methods; the others are thin grey lines.
        title: Title of the figure.
    """
    drawn = list_distinct(curves, "setting")
    methods = [name for name in labels if name in list_distinct(curves, "method")]
    coloured = methods if len(methods) <= _MOST_LINES else [name for name in methods if name in first]
    styles: dict[str, dict[str, Any]] = {name: {"color": OTHERS, "linewidth": 0.8, "zorder": 1} for name in methods}
    styles |= {name: _setting_style(name in linear, place) for name, place in _places(coloured, linear)}
    for name in {name for name in methods if all(r["after"] > 1 for r in curves if r["method"] == name)}:
        styles[name]["linestyle"] = ":"
    handles = [Line2D([], [], label=labels[name], **styles[name]) for name in coloured]
    if len(coloured) < len(methods):
        handles.append(Line2D([], [], label="other methods", color=OTHERS, linewidth=0.8))
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    spread = ", mean over seeds" if len(list_distinct(curves, "seed")) > 1 else ""
    figure = new_figure(WIDTH if columns == 2 else 5.0, 2.4 * rows + 0.9, f"{title}{spread}")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(drawn) :]:
        axes.remove()
    for axes, setting in zip(panels, drawn, strict=False):
        _draw_curves(axes, [record for record in curves if record["setting"] == setting], styles)
        axes.set_title(settings[setting], fontsize=LABEL)
    for axes in panels[::columns]:
        axes.set_ylabel("accuracy so far", fontsize=LABEL)
    add_legend(figure, handles, columns + 1)
    return figure


def _draw_curves(axes: Axes, records: Sequence[Record], styles: Mapping[str, Mapping[str, Any]]) -> None:
    last = max(record["after"] for record in records)
    for method, style in styles.items():
        tasks, values = _mean_curve(records, method)
        if len(tasks) == 1 < last:
            axes.axhline(values[0], **style)
        elif len(tasks):
            draw_line(axes, tasks, values, marker="." if last <= 10 else None, markersize=4, **style)
    axes.set_xlabel("tasks learned", fontsize=LABEL)
    set_whole_ticks(axes.xaxis)
    finish(axes)


def _places(methods: Sequence[str], linear: Collection[str]) -> list[tuple[str, int]]:
    """Return each method with its index among the linear or the other methods."""
    kinds = [name in linear for name in methods]
    return [(name, kinds[:i].count(kinds[i])) for i, name in enumerate(methods)]


def _setting_style(linear: bool, place: int) -> dict[str, Any]:
    colours = LINEAR if linear else NONLINEAR
    line: Any = "-" if linear else (0, (4, 1.5))
    return {"color": colours[place % len(colours)], "linestyle": line, "linewidth": 1.4, "zorder": 3 if linear else 2}


def _mean_curve(records: Sequence[Record], method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of tasks, and the accuracies of a method, averaged over seeds."""
    chosen = [record for record in records if record["method"] == method]
    tasks = sorted({record["after"] for record in chosen})
    values = [np.mean([record["accuracy"] for record in chosen if record["after"] == after]) for after in tasks]
    return np.array(tasks), np.array(values)
