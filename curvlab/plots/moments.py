"""Figures that compare Adam's second moment with diagonals of curvature matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from curvlab.plots.records import Record, column, count_seeds, list_distinct
from curvlab.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABEL,
    ORANGE,
    TWO_COLUMNS,
    add_legend,
    finish,
    new_figure,
    set_log_ticks,
    set_whole_ticks,
)

_STYLES: dict[str, dict[str, Any]] = {
    "masq": {"color": BLUE, "linestyle": "-", "linewidth": 1.4},
    "empirical_fisher": {"color": ORANGE, "linestyle": "--", "linewidth": 1.4},
    "fisher": {"color": GREEN, "linestyle": "-.", "linewidth": 1.4},
}

_DECADES = 10  # drawn below the largest value


def moment_curves(records: Sequence[Record], labels: Mapping[str, str]) -> Figure:
    """Draw the rank correlation and the scale of the second moment over training: mean and range over the seeds.

    Args:
        records: Records of ``quantity``, ``seed`` and ``step`` with ``rank_correlation`` and ``log_scale``, either of
            which may be None.
        labels: Labels of the quantities, by name.
    """
    figure = new_figure(TWO_COLUMNS, 2.6)
    panels = figure.subplots(1, 2)
    texts = {"rank_correlation": "rank correlation with v", "log_scale": r"median $\log_{10}(v\,/\,\mathrm{diagonal})$"}
    for axes, (key, text) in zip(panels, texts.items(), strict=True):
        for quantity in list_distinct(records, "quantity"):
            mine = [record for record in records if record["quantity"] == quantity]
            steps = sorted({record["step"] for record in mine})
            values = [column([record for record in mine if record["step"] == step], key) for step in steps]
            style = _STYLES[quantity]
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, [value.mean() for value in values], marker=marker, **style)
            edges = ([edge(value) for value in values] for edge in (np.min, np.max))
            axes.fill_between(steps, *edges, color=style["color"], alpha=0.2, linewidth=0)
        axes.set_xlabel("training step", fontsize=LABEL)
        set_whole_ticks(axes.xaxis)
        axes.set_ylabel(text, fontsize=LABEL)
        finish(axes)
    panels[1].axhline(0, color=GREY, linewidth=0.8)
    panels[0].set_ylim(top=1.0)
    handles: list[Line2D | Patch] = [
        Line2D([], [], label=labels[name], **_STYLES[name]) for name in list_distinct(records, "quantity")
    ]
    if count_seeds(records) > 1:
        handles.append(Patch(color=GREY, alpha=0.3, label=f"mean and range, {count_seeds(records)} seeds"))
    add_legend(figure, handles, len(handles))
    return figure


def moment_scatter(entries: Mapping[str, Any], labels: Mapping[str, str]) -> Figure:
    """Draw the second moment of each parameter against its entry in each diagonal, in logarithmic scales.

    Args:
        entries: ``second_moment`` and each quantity by name, ``(P,)``. Pairs with a zero, or with a value more than ten
            decades below the largest, are left out; the legend says how many these are.
        labels: Labels of the quantities, by name.
    """
    figure = new_figure(TWO_COLUMNS, 2.7)
    panels = figure.subplots(1, len(labels), squeeze=False, sharex=True, sharey=True)[0]
    moment = np.asarray(entries["second_moment"], dtype=float)
    lowest, lowest_moment = _find_lowest(*(entries[name] for name in labels)), _find_lowest(moment)
    top, left_out = float(moment.max()), 0
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        diagonal = np.asarray(entries[name], dtype=float)
        both = (moment >= lowest_moment) & (diagonal >= lowest)
        left_out += int((~both).sum())
        axes.scatter(
            diagonal[both], moment[both], s=2, color=_STYLES[name]["color"], alpha=0.35, linewidths=0, rasterized=True
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axline(
            (top, top),
            (2 * top, 2 * top),
            color=INK,
            linewidth=0.8,
            linestyle="--",
        )
        axes.set_title(label, fontsize=LABEL)
        axes.set_xlabel("entry of the diagonal (nats)", fontsize=LABEL)
        finish(axes)
    panels[0].set_ylabel("v of Adam (nats)", fontsize=LABEL)
    for axis in (panels[0].xaxis, panels[0].yaxis):
        set_log_ticks(axis, most=5)
    handles = [Line2D([], [], color=INK, linewidth=0.8, linestyle="--", label="v = entry")]
    if left_out:
        share = left_out / (len(moment) * len(labels))
        text = f"not drawn: zeros, and values below $10^{{-{_DECADES}}}$ of the largest ({share:.1%} of the points)"
        handles.append(Line2D([], [], linestyle="none", label=text))
    add_legend(figure, handles, 2)
    return figure


def _find_lowest(*values: Any) -> float:
    """Return the smallest positive value that is drawn: at most ten decades below the largest one."""
    joined = np.concatenate([np.asarray(each, dtype=float) for each in values])
    positive = joined[joined > 0]
    return max(float(positive.min()), float(positive.max()) * 10.0**-_DECADES) if len(positive) else 1.0
