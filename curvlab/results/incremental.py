"""Figures of methods in several settings: the final accuracies, and accuracies over the tasks."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

Record = Mapping[str, Any]

_FONT = {"title": 10, "label": 9, "tick": 8}
_WIDTH = 7.2  # inches, of a page between its margins
_LINEAR, _NONLINEAR, _PUBLISHED, _OTHER = "#0b559f", "#e07b39", "#404040", "#c8c8c8"
#: Colours of lines, in the order of the methods: solid lines of linear networks, dashed lines of the others.
_LINEAR_COLOURS = ("#0b3d91", "#7cc4ec", "#12a0a0", "#9b6bc9", "#e377c2", "#4fa3c7", "#b8860b", "#222222")
_NONLINEAR_COLOURS = ("#767676", "#3a8f5c", "#e07b39", "#c0394b", "#c9a227", "#d67fb0", "#7fb069", "#5d4037")
_MOST_LINES = 8  # with a colour each
_LONG_LABEL = 26  # characters; a longer label is broken behind its comma


def accuracy_points(table: Sequence[Record], methods: Sequence[str], title: str) -> Figure:
    """Draw the accuracy of every method as a point with its deviation, and the published one: a column a setting.

    Args:
        table: A record a setting and method: ``setting_label``, ``label``, ``linear``, ``acc`` and ``acc_std`` over
            seeds, and where there is one ``published_value``.
        methods: The labels in the order of the rows; those that the table does not have are left out.
        title: What stands above.
    """
    settings, shown = (_distinct(table, key) for key in ("setting_label", "label"))
    labels = [label for label in methods if label in shown]
    figure = Figure(figsize=(_WIDTH, 0.27 * len(labels) + 1.2), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, setting in zip(panels, settings, strict=True):
        for row in table:
            if row["setting_label"] == setting:
                _draw_point(axes, row, labels.index(row["label"]))
        axes.set_yticks(range(len(labels)), [_break(label) for label in labels])
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(setting, fontsize=_FONT["label"])
        axes.tick_params(labelsize=_FONT["tick"])
        axes.xaxis.set_major_locator(MaxNLocator(4 if len(settings) < 4 else 3))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    text = "accuracy after the last task"
    if any(row.get("acc_std") is not None for row in table):
        text += " (mean and standard deviation over seeds)"
    points: list[tuple[str, dict[str, Any]]] = [
        ("linear network, squared error", {"color": _LINEAR, "marker": "o"}),
        ("non-linear, cross-entropy", {"color": _NONLINEAR, "marker": "s"}),
    ]
    if any(row.get("published_value") is not None for row in table):
        points.append(("published", {"color": _PUBLISHED, "marker": "D", "markerfacecolor": "none"}))
    handles = [Line2D([], [], linestyle="none", label=label, **style) for label, style in points]
    size = _FONT["tick"]
    figure.legend(
        handles=handles,
        title=text,
        title_fontsize=_FONT["label"],
        loc="outside lower center",
        ncols=3,
        fontsize=size,
        frameon=False,
    )
    return figure


def _draw_point(axes: Axes, row: Record, place: int) -> None:
    colour, marker = (_LINEAR, "o") if row["linear"] else (_NONLINEAR, "s")
    if row["acc"] is not None:
        axes.errorbar(row["acc"], place, xerr=row["acc_std"], color=colour, marker=marker, capsize=2, markersize=5)
    if row.get("published_value") is not None:
        axes.plot(row["published_value"], place, "D", color=_PUBLISHED, markerfacecolor="none", markersize=5)


def _break(label: str) -> str:
    return label.replace(", ", ",\n", 1) if len(label) > _LONG_LABEL else label


def setting_curves(
    curves: Sequence[Record],
    labels: Mapping[str, str],
    settings: Mapping[str, str],
    linear: Collection[str],
    first: Collection[str],
    title: str,
) -> Figure:
    """Draw the accuracy on the tasks so far over tasks, the mean over seeds: a panel a setting.

    Args:
        curves: Records of ``setting``, ``method``, ``seed`` and ``after`` (tasks, from 1) with the ``accuracy``. A
            method that is measured after the last task only is a dotted line across the panel.
        labels: What the methods are called.
        settings: What the settings are called.
        linear: The methods with solid lines; the others have dashed ones.
        first: The methods that have a colour where there are more than eight; the others are thin grey lines.
        title: What stands above.
    """
    drawn = _distinct(curves, "setting")
    methods = [name for name in labels if name in _distinct(curves, "method")]
    coloured = methods if len(methods) <= _MOST_LINES else [name for name in methods if name in first]
    styles: dict[str, dict[str, Any]] = {name: {"color": _OTHER, "linewidth": 0.8, "zorder": 1} for name in methods}
    styles |= {name: _style(name in linear, place) for name, place in _places(coloured, linear)}
    for name in {name for name in methods if all(r["after"] > 1 for r in curves if r["method"] == name)}:
        styles[name]["linestyle"] = ":"
    handles = [Line2D([], [], label=labels[name], **styles[name]) for name in coloured]
    if len(coloured) < len(methods):
        handles.append(Line2D([], [], label="other methods", color=_OTHER, linewidth=0.8))
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(_WIDTH if columns == 2 else 5.0, 2.4 * rows + 0.9), layout="constrained")
    spread = ", mean over seeds" if len(_distinct(curves, "seed")) > 1 else ""
    figure.suptitle(f"{title}{spread}", fontsize=_FONT["title"])
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(drawn) :]:
        axes.remove()
    for axes, setting in zip(panels, drawn, strict=False):
        _draw_curves(axes, [record for record in curves if record["setting"] == setting], styles)
        axes.set_title(settings[setting], fontsize=_FONT["label"])
    for axes in panels[::columns]:
        axes.set_ylabel("accuracy so far", fontsize=_FONT["label"])
    figure.legend(handles=handles, loc="outside lower center", ncols=columns + 1, fontsize=_FONT["tick"], frameon=False)
    return figure


def _draw_curves(axes: Axes, records: Sequence[Record], styles: Mapping[str, Mapping[str, Any]]) -> None:
    last = max(record["after"] for record in records)
    for method, style in styles.items():
        tasks, values = _mean_curve(records, method)
        if len(tasks) == 1 < last:
            axes.axhline(values[0], **style)
        elif len(tasks):
            axes.plot(tasks, values, marker="." if last <= 10 else None, markersize=4, **style)
    axes.set_xlabel("tasks learned", fontsize=_FONT["label"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=_FONT["tick"])
    axes.spines[["top", "right"]].set_visible(False)


def _places(methods: Sequence[str], linear: Collection[str]) -> list[tuple[str, int]]:
    """Return every method with its place among those of its kind."""
    kinds = [name in linear for name in methods]
    return [(name, kinds[:i].count(kinds[i])) for i, name in enumerate(methods)]


def _style(linear: bool, place: int) -> dict[str, Any]:
    colours = _LINEAR_COLOURS if linear else _NONLINEAR_COLOURS
    line: Any = "-" if linear else (0, (4, 1.5))
    return {"color": colours[place % len(colours)], "linestyle": line, "linewidth": 1.4, "zorder": 3 if linear else 2}


def _distinct(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records))


def _mean_curve(records: Sequence[Record], method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of tasks and the mean accuracies of a method over the seeds."""
    chosen = [record for record in records if record["method"] == method]
    tasks = sorted({record["after"] for record in chosen})
    values = [np.mean([record["accuracy"] for record in chosen if record["after"] == after]) for after in tasks]
    return np.array(tasks), np.array(values)
