"""Figures of methods in several settings: the final accuracies beside published ones, and accuracies over the tasks."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

Record = Mapping[str, Any]

_FONT = {"title": 10, "label": 9, "tick": 8}
_LINEAR, _NONLINEAR, _PUBLISHED = "#0b559f", "#e07b39", "#404040"
#: Of lines by place; those of linear networks are whole, others broken, and the two kinds have colours of their own.
_LINEAR_COLOURS = (
    "#222222",
    "#7cc4ec",
    "#0b3d91",
    "#9b6bc9",
    "#e377c2",
    "#12a0a0",
    "#b8860b",
    "#4fa3c7",
)
_NONLINEAR_COLOURS = (
    "#767676",
    "#3a8f5c",
    "#e07b39",
    "#d67fb0",
    "#c0394b",
    "#a0742b",
    "#c9a227",
    "#7fb069",
    "#f2a07b",
    "#5d4037",
)


def method_points(table: Sequence[Record], title: str) -> Figure:
    """Draw the accuracy of every method as a point with its deviation, the published one beside it: a panel a setting.

    Args:
        table: A record a setting and method: ``setting_label``, ``label``, ``linear``, ``acc`` and ``acc_std`` over
            seeds, and where there is one ``published_acc``.
        title: What stands above.
    """
    settings = _distinct(table, "setting_label")
    counts = [sum(row["setting_label"] == setting for row in table) for setting in settings]
    figure = Figure(figsize=(7.2, 0.22 * sum(counts) + 0.62 * len(settings) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    panels = figure.subplots(len(settings), 1, squeeze=False, height_ratios=[count + 1 for count in counts])[:, 0]
    for axes, setting in zip(panels, settings, strict=True):
        rows = [row for row in table if row["setting_label"] == setting]
        for place, row in enumerate(rows):
            if row["acc"] is not None:
                colour = _LINEAR if row["linear"] else _NONLINEAR
                marker = "o" if row["linear"] else "s"
                axes.errorbar(
                    row["acc"], place, xerr=row["acc_std"], color=colour, marker=marker, capsize=2, markersize=5
                )
            if row.get("published_acc") is not None:
                axes.plot(row["published_acc"], place, "D", color=_PUBLISHED, markerfacecolor="none", markersize=5)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(setting, fontsize=_FONT["label"])
        axes.tick_params(labelsize=_FONT["tick"])
        axes.spines[["top", "right"]].set_visible(False)
    text = "accuracy after the last task"
    if any(row.get("acc_std") is not None for row in table):
        text += " (mean and standard deviation over seeds)"
    panels[-1].set_xlabel(text, fontsize=_FONT["label"])
    handles = [
        Line2D([], [], color=_LINEAR, marker="o", linestyle="none", label="linear network, squared error"),
        Line2D([], [], color=_NONLINEAR, marker="s", linestyle="none", label="non-linear, cross-entropy"),
    ]
    if any(row.get("published_acc") is not None for row in table):
        handles.append(
            Line2D(
                [],
                [],
                color=_PUBLISHED,
                marker="D",
                linestyle="none",
                markerfacecolor="none",
                label="published, CIFAR-100",
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=_FONT["tick"], frameon=False)
    return figure


def setting_curves(
    curves: Sequence[Record],
    labels: Mapping[str, str],
    settings: Mapping[str, str],
    linear: Collection[str],
    title: str,
) -> Figure:
    """Draw the accuracy on the tasks so far over tasks, the mean over seeds and its range: a panel a setting.

    Every other line is wide, and below the rest: it is seen, too, where the next one covers it.

    Args:
        curves: Records of ``setting``, ``method``, ``seed`` and ``after`` (tasks, from 1) with the ``accuracy``. Of a
            method that is measured after the last task only, a dotted line goes across.
        labels: What the methods are called.
        settings: What the settings are called.
        linear: The methods whose lines are whole; those of the others are broken.
        title: What stands above.
    """
    shown = _distinct(curves, "setting")
    methods = [name for name in labels if name in _distinct(curves, "method")]
    after_the_last = {name for name in methods if all(r["after"] > 1 for r in curves if r["method"] == name)}
    styles = {name: _style(name in linear, place, name in after_the_last) for name, place in _places(methods, linear)}
    handles: list[Any] = [Line2D([], [], label=labels[method], **style) for method, style in styles.items()]
    if len(_distinct(curves, "seed")) > 1:
        handles.append(Patch(color="#767676", alpha=0.3, linewidth=0, label="from the lowest to the highest seed"))
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    width = max(3.5 * columns + 0.4, 5.0)
    of_legend = max(int(width / (0.9 + 0.058 * max(len(handle.get_label()) for handle in handles))), 1)
    height = 2.3 * rows + 0.17 * -(-len(handles) // of_legend) + 0.6
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes, setting in zip(panels, shown, strict=False):
        of_setting = [record for record in curves if record["setting"] == setting]
        last = max(record["after"] for record in of_setting)
        for method, style in styles.items():
            tasks, values = _values(of_setting, method)
            if not len(tasks):
                continue
            if len(tasks) == 1 < last:
                axes.axhline(values.mean(), **style)
                continue
            axes.plot(tasks, values.mean(axis=0), **style)
            axes.fill_between(
                tasks, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
            )
        axes.set_title(settings[setting], fontsize=_FONT["label"])
        axes.set_xlabel("tasks learnt", fontsize=_FONT["label"])
        axes.set_ylabel("accuracy so far", fontsize=_FONT["label"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=_FONT["tick"])
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower center", ncols=of_legend, fontsize=_FONT["tick"], frameon=False)
    return figure


def _places(methods: Sequence[str], linear: Collection[str]) -> list[tuple[str, int]]:
    """Return every method with its place among those of its kind."""
    kinds = [name in linear for name in methods]
    return [(name, kinds[:i].count(kinds[i])) for i, name in enumerate(methods)]


def _style(linear: bool, place: int, level: bool) -> dict[str, Any]:
    colours = _LINEAR_COLOURS if linear else _NONLINEAR_COLOURS
    line: Any = ":" if level else "-" if linear else (0, (4, 1.5))
    wide = place % 2 == 1 and not level
    width = 3.8 if wide and linear else 2.4 if wide else 1.4
    return {"color": colours[place % len(colours)], "linestyle": line, "linewidth": width, "zorder": 2 if wide else 3}


def _distinct(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records))


def _values(records: Sequence[Record], method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of tasks ``(T,)`` and the accuracies ``(seeds, T)`` of a method."""
    chosen = [record for record in records if record["method"] == method]
    tasks, seeds = (sorted({record[key] for record in chosen}) for key in ("after", "seed"))
    values = np.full((len(seeds), len(tasks)), np.nan)
    for record in chosen:
        values[seeds.index(record["seed"]), tasks.index(record["after"])] = record["accuracy"]
    return np.array(tasks), values
