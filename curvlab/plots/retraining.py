"""Figures of accuracies while two tasks are learnt one after the other."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from curvlab.plots.records import Record
from curvlab.plots.style import (
    BLUE,
    EMPTY,
    GREEN,
    LABEL,
    RED,
    add_legend,
    draw_grid,
    finish,
    new_figure,
    set_whole_ticks,
)

_LINES = {"D1": (r"$D_1$", BLUE, "^"), "D2": (r"$D_2$", RED, "o"), "both": (r"$D_1\cup D_2$", GREEN, "s")}
_MARKS = 6  # markers per line
_PAGE = 6.8  # inches, two columns of a paper


def retraining_curves(panels: Mapping[tuple[str, str], Sequence[Record]]) -> Figure:
    """Draw test accuracies on D1, D2 and both together while D1 and then D2 is learnt.

    The layout follows Gepperth and Wiech (2019), Figures 1 to 5: the background is white while D1 is learnt and grey
    while D2 is learnt. Lines are means over the seeds, bands their range.

    Args:
        panels: For each row and column, one record per seed: the ``steps`` of the evaluations ``(T,)`` and, under
            ``first`` and ``second``, the accuracies ``D1``, ``D2`` and ``both``, each ``(T,)``.
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    figure = new_figure(max(2.1 * len(columns) + 0.5, 3.3) if len(columns) < 3 else _PAGE, 1.3 * len(rows) + 0.8)
    axes_of: np.ndarray = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for (row, column), records in panels.items():
        _draw_panel(axes_of[rows.index(row), columns.index(column)], records)
    for axes, name in zip(axes_of[0], columns, strict=True):
        axes.set_title(name, fontsize=LABEL)
    for axes, name in zip(axes_of[:, 0], rows, strict=True):
        axes.set_ylabel(f"{name}\ntest accuracy", fontsize=LABEL)
    for axes in axes_of[-1]:
        axes.set_xlabel("training step", fontsize=LABEL)
        set_whole_ticks(axes.xaxis, 5)
    for axes in axes_of.flat:
        axes.set_ylim(-0.03, 1.03)
        finish(axes)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=label)
        for label, colour, marker in _LINES.values()
    ]
    handles.append(Patch(facecolor=EMPTY, alpha=0.6, label=r"learning $D_2$"))
    if any(len(records) > 1 for records in panels.values()):
        handles.append(Patch(facecolor=BLUE, alpha=0.2, label="range of the seeds"))
    add_legend(figure, handles, len(handles) if len(columns) > 2 else 3)
    return figure


def _draw_panel(axes: Axes, records: Sequence[Record]) -> None:
    steps = np.array(records[0]["steps"], dtype=float)
    end = steps[-1]
    axes.axvspan(end, 2 * end, color=EMPTY, alpha=0.6, linewidth=0)
    draw_grid(axes, "y")
    for name, (_, colour, marker) in _LINES.items():
        values = np.array([[*record["first"][name], *record["second"][name]] for record in records], dtype=float)
        x = np.concatenate([steps, end + steps])
        if len(values) > 1:
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            x,
            values.mean(axis=0),
            color=colour,
            marker=marker,
            markersize=3,
            markevery=max(1, len(x) // _MARKS),
            linewidth=1.2,
        )
    axes.set_xlim(0, 2 * end)
