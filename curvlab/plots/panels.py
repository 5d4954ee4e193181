"""Figures of several panels in a row with a common legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvlab.plots.records import Record
from curvlab.plots.style import (
    GREY,
    GROUPS,
    LABEL,
    MARKERS,
    TICK,
    add_legend,
    cut_bars,
    draw_grid,
    finish,
    new_figure,
    set_log_ticks,
    set_whole_ticks,
)

ONE_COLUMN, TWO_COLUMNS = 3.3, 6.8  # inches
_SPREAD = 0.5  # width of the points of a category; categories are 1 apart


@dataclass(frozen=True)
class Panel:
    """A panel: one line per series, mean and standard deviation over the seeds.

    Attributes:
        title: Title of the panel.
        records: One record per point and seed; records whose ``y`` is None are skipped.
        x: Key of the horizontal axis. Numbers give lines; strings give categories, with points side by side.
        y: Key of the vertical axis.
        series: Key that distinguishes the lines; None for a single line.
        xlabel: Label with unit.
        ylabel: Label with unit.
        log: Logarithmic axes: ``""``, ``"x"``, ``"y"`` or ``"xy"``; x = 0 is then drawn at the left end.
        reference: Key of a dashed reference line for every series, such as a closed form.
        level: Position of a dotted horizontal line, such as a threshold.
    """

    title: str
    records: Sequence[Record]
    x: str
    y: str
    series: str | None
    xlabel: str
    ylabel: str
    log: str = ""
    reference: str | None = None
    level: float | None = None


def draw_panels(panels: Sequence[Panel], height: float = 2.4, reference: str = "", columns: int = 4) -> Figure:
    """Draw panels in a row: 3.3 inches wide for one panel (one column of a paper), 6.8 inches for several.

    Panels that all have the same ``ylabel`` share the vertical axis.

    Args:
        panels: Panels from left to right.
        height: Height of the panels in inches, without the legend.
        reference: Legend label of the reference lines; empty for none.
        columns: Maximum number of columns of the legend.
    """
    labels = list(dict.fromkeys(str(r[p.series]) for p in panels if p.series for r in p.records))
    columns = max(1, min(columns if len(panels) > 1 else 2, len(labels) + bool(reference)))
    rows = -(-(len(labels) + bool(reference)) // columns) if labels or reference else 0
    figure = new_figure(ONE_COLUMN if len(panels) == 1 else TWO_COLUMNS, height + 0.2 * rows)
    alike = len({panel.ylabel for panel in panels}) == 1
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=alike)[0], panels, strict=True):
        _draw(axes, panel, labels)
        if alike:
            axes.label_outer()
    line: Any = "none" if all(isinstance(r[p.x], str) for p in panels for r in p.records) else "-"
    handles = [
        Line2D([], [], label=label, markersize=4, linestyle=line, **_style(place)) for place, label in enumerate(labels)
    ]
    if reference:
        handles.append(Line2D([], [], label=reference, color=GREY, linestyle="--", linewidth=1.2))
    if handles:
        add_legend(figure, handles, columns)
    return figure


def _style(place: int) -> dict[str, Any]:
    return {"color": GROUPS[place % len(GROUPS)], "marker": MARKERS[place % len(MARKERS)], "linewidth": 1.2}


def _draw(axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    words = list(dict.fromkeys(r[panel.x] for r in panel.records if isinstance(r[panel.x], str)))
    least = min((r[panel.x] for r in panel.records if not words and r[panel.x] > 0), default=1.0)
    mine = list(dict.fromkeys(str(r[panel.series]) if panel.series else "" for r in panel.records))
    for place, label in enumerate(mine):
        chosen = [r for r in panel.records if not panel.series or str(r[panel.series]) == label]
        style = _style(labels.index(label) if label in labels else 0)
        shift = _SPREAD * (place / (len(mine) - 1) - 0.5) if len(mine) > 1 else 0.0
        x, y, spread = _over(chosen, panel.x, panel.y)
        if not x:
            continue
        at = np.array(
            [words.index(v) + shift for v in x] if words else [max(v, least / 3) for v in x] if "x" in panel.log else x
        )
        bars = cut_bars(y, spread) if "y" in panel.log else (spread, spread)
        line: Any = "none" if words else "-"
        axes.errorbar(at, y, yerr=bars, markersize=3.5, elinewidth=0.9, capsize=1.5, linestyle=line, **style)
        if panel.reference:
            x, y, _ = _over(chosen, panel.x, panel.reference)
            axes.plot(x, y, color=GREY, linestyle="--", linewidth=1.2, zorder=3)
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=0.9, linestyle=":", zorder=0)
    axes.set_title(panel.title, fontsize=LABEL)
    axes.set_xlabel(panel.xlabel, fontsize=LABEL)
    axes.set_ylabel(panel.ylabel, fontsize=LABEL)
    draw_grid(axes, "y")
    if "x" in panel.log:
        axes.set_xscale("log")
        set_log_ticks(axes.xaxis, most=6)
        if any(r[panel.x] == 0 for r in panel.records):
            ticks = [t for t in axes.get_xticks() if least <= t <= max(r[panel.x] for r in panel.records)]
            write = axes.xaxis.get_major_formatter()
            axes.set_xticks([least / 3, *ticks], ["0", *(write(tick) for tick in ticks)])
    elif not words and all(isinstance(r[panel.x], int) for r in panel.records):
        set_whole_ticks(axes.xaxis, 5)
    if "y" in panel.log and 0 < axes.dataLim.intervaly.max() < np.inf:
        axes.set_yscale("log")
        set_log_ticks(axes.yaxis)
    if words:
        axes.set_xticks(range(len(words)), words, rotation=40, ha="right", rotation_mode="anchor")
    finish(axes)
    axes.tick_params(axis="x", labelsize=TICK)


def _over(records: Sequence[Record], x: str, y: str) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Return the values of ``x``, and mean and standard deviation of ``y`` at each (0 for a single seed)."""
    known = [r for r in records if r[y] is not None]
    if any(isinstance(r[x], (int, float)) for r in known):
        known = sorted(known, key=lambda r: r[x])
    groups = [(place, [r[y] for r in group]) for place, group in groupby(known, key=lambda r: r[x])]
    merged: dict[Any, list[float]] = {}
    for place, values in groups:
        merged.setdefault(place, []).extend(values)
    means = np.array([np.mean(values) for values in merged.values()])
    return list(merged), means, np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in merged.values()])
