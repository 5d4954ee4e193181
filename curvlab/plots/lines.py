"""Line figures: one line for each group, the mean over seeds with the range of the seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from curvlab.plots.records import Record, count_seeds, list_distinct
from curvlab.plots.style import (
    BLACK,
    LABEL,
    MARKERS,
    METHODS,
    SYMBOL,
    add_legend,
    draw_grid,
    draw_line,
    finish,
    new_figure,
    set_log_scale,
    set_log_ticks,
    set_whole_ticks,
)

_MOST_BANDS = 6  # more would hide each other


def line_panels(
    records: Sequence[Record],
    x: str,
    y: str,
    *,
    line: str,
    panel: str | None = None,
    labels: Mapping[str, str] | None = None,
    reference: Mapping[str, str] | None = None,
    axis_labels: tuple[str, str],
    title: str,
    log: str = "",
    share_y: bool = True,
    markers: bool = True,
    width: float = 6.8,
    height: float = 2.5,
) -> Figure:
    """Draw ``y`` against ``x``: panels side by side, one line for each group, mean and range over seeds.

    The range is a band, or bars at the points if there are many lines.

    Args:
        records: Each with ``x``, ``y``, a ``seed`` and the group; a ``y`` that is None is left out.
        x: Key of the horizontal axis.
        y: Key of the vertical axis.
        line: Key of the groups.
        panel: Key of the panels; None for a single panel.
        labels: Names of groups and panels. The order of the groups in it gives their colours, which are then the
            same in figures with fewer groups.
        reference: Groups drawn as a black line without markers, and their line styles. A group whose ``x`` is None
            is a horizontal line.
        axis_labels: Labels of the horizontal and the vertical axis, with units.
        title: Title of the figure.
        log: The logarithmic axes: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        share_y: Whether the panels have one vertical axis.
        markers: Whether points have markers.
        width: In inches.
        height: Height of the panels, in inches.
    """
    labels, reference = labels or {}, reference or {}
    panels = (list_distinct(records, panel) if panel else [""]) or [""]  # an empty panel where there are no records
    groups = list_distinct(records, line)
    coloured = [name for name in groups if name not in reference]
    known = [*labels, *(name for name in coloured if name not in labels)]
    styles = {name: _style(known.index(name), markers) for name in coloured}
    styles |= {name: {"color": BLACK, "linestyle": style, "linewidth": 1.2} for name, style in reference.items()}
    handles: list[Line2D | Patch] = [
        Line2D([], [], label=labels.get(name, name), **styles[name]) for name in groups if name in styles
    ]
    seeds = count_seeds(records)
    many = len(groups) > _MOST_BANDS
    if seeds > 1:
        text = f"range of {seeds} seeds"
        bar = Line2D([], [], linestyle="none", marker="|", markersize=9, color=SYMBOL, label=text)
        handles.append(bar if many else Patch(facecolor=SYMBOL, alpha=0.3, label=text))
    longest = max((len(part) for handle in handles for part in str(handle.get_label()).split("\n")), default=0)
    columns = max(1, int(width / (0.5 + 0.055 * longest)))  # inches
    figure = new_figure(width, height + 0.55 + 0.17 * -(-len(handles) // columns), title)
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=share_y)[0]
    for axes, name in zip(drawn, panels, strict=True):
        mine = [record for record in records if panel is None or record[panel] == name]
        for group in groups:
            chosen = [r for r in mine if r[line] == group and r[y] is not None]
            _draw(axes, chosen, x, y, styles[group], bars=many)
        if name:
            axes.set_title(labels.get(name, name), fontsize=LABEL)
        axes.set_xlabel(axis_labels[0], fontsize=LABEL)
        if "x" in log and set_log_scale(axes, x=True):
            set_log_ticks(axes.xaxis)
        elif all(isinstance(record[x], int) for record in mine if record[x] is not None):
            set_whole_ticks(axes.xaxis, 6)
        if "y" in log and set_log_scale(axes, y=True):
            set_log_ticks(axes.yaxis)
        draw_grid(axes)
        finish(axes)
    drawn[0].set_ylabel(axis_labels[1], fontsize=LABEL)
    add_legend(figure, handles, min(columns, len(handles)), handlelength=2.4)
    return figure


def _style(place: int, markers: bool) -> dict[str, Any]:
    """Return the style of the group at a place; after the last colour, lines are dashed."""
    turn, place = divmod(place, len(METHODS))
    if not markers:  # dashes show lines under each other
        return {"color": METHODS[place], "linewidth": 1.4, "linestyle": ("-", "--", "-.", ":")[place % 4]}
    style = {"marker": MARKERS[place], "markersize": 3.5, "linestyle": ("-", "--", ":")[turn % 3]}
    return {"color": METHODS[place], "linewidth": 1.3, **style}


def _draw(axes: Axes, records: Sequence[Record], x: str, y: str, style: Mapping[str, Any], bars: bool) -> None:
    if not records:
        return
    if records[0][x] is None:
        axes.axhline(float(np.mean([record[y] for record in records])), **style)
        return
    places = sorted({record[x] for record in records})
    values = [[record[y] for record in records if record[x] == place] for place in places]
    low, high = [*map(min, values)], [*map(max, values)]
    if bars:
        axes.vlines(places, low, high, color=style["color"], linewidth=0.8, alpha=0.7)
    elif max(map(len, values)) > 1:
        axes.fill_between(places, low, high, color=style["color"], alpha=0.18, linewidth=0)
    draw_line(axes, places, [float(np.mean(there)) for there in values], **style)
