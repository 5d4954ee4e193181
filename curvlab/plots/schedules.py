"""Figures of learning-rate schedules: learning curves at their best, and what a rate does to accuracy and curvature."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvlab.plots.records import Record, list_distinct
from curvlab.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABEL,
    MARKERS,
    ORANGE,
    PURPLE,
    RED,
    WIDTH,
    add_legend,
    cut_bars,
    draw_grid,
    draw_line,
    finish,
    new_figure,
    set_log_scale,
    set_log_ticks,
    set_whole_ticks,
)

_COLOURS = (INK, BLUE, ORANGE, GREEN, PURPLE, RED)


def schedule_curves(curves: Sequence[Record], target: float, title: str) -> Figure:
    """Draw test accuracy and learning rate over the steps, one line per schedule, the mean over the seeds.

    Args:
        curves: One record per schedule, seed and step, with ``test_accuracy`` and ``rate``.
        target: Test accuracy that is marked.
        title: Title of the figure.
    """
    figure = new_figure(WIDTH, 3.1, title)
    left, right = figure.subplots(1, 2)
    schedules = list_distinct(curves, "schedule")
    for schedule, colour in zip(schedules, _COLOURS, strict=False):
        mine = [record for record in curves if record["schedule"] == schedule]
        steps = sorted({record["step"] for record in mine})
        for axes, key in ((left, "test_accuracy"), (right, "rate")):
            means = [np.mean([record[key] for record in mine if record["step"] == step]) for step in steps]
            draw_line(axes, steps, means, color=colour, linewidth=1.1)
    left.axhline(target, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    left.set_ylabel("test accuracy", fontsize=LABEL)
    right.set_ylabel("learning rate", fontsize=LABEL)
    set_log_scale(right, y=True)
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=LABEL)
        set_whole_ticks(axes.xaxis)
        draw_grid(axes, "y")
        finish(axes)
    set_log_ticks(right.yaxis)
    lines = [
        Line2D([], [], color=colour, linewidth=1.1, label=_label(schedule))
        for schedule, colour in zip(schedules, _COLOURS, strict=False)
    ]
    lines.append(Line2D([], [], color=GREY, linewidth=0.8, linestyle="--", label="target"))
    add_legend(figure, lines, 4)
    return figure


def rate_curves(grid: Sequence[Record], title: str) -> Figure:
    """Draw final accuracy, area under the learning curve and largest eigenvalue over the initial rate.

    For a schedule with decays, the best decay at each rate is drawn. Bars are standard deviations over the seeds.

    Args:
        grid: One record per schedule, ``lr`` and ``decay``, with ``accuracy``, ``area`` and ``lambda_max``, each with
            ``_std``; None where trainings diverge.
        title: Title of the figure.
    """
    figure = new_figure(WIDTH, 2.9, title)
    panels = (
        ("accuracy", "test accuracy"),
        ("area", "mean accuracy over the steps"),
        ("lambda_max", r"$\lambda_{\max}$ at the end"),
    )
    schedules = list_distinct(grid, "schedule")
    for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for place, (schedule, colour) in enumerate(zip(schedules, _COLOURS, strict=False)):
            rows = [_best(grid, schedule, lr) for lr in sorted({row["lr"] for row in grid})]
            drawn = [row for row in rows if row is not None and row[key] is not None]
            x = np.array([row["lr"] for row in drawn]) * 1.06 ** (place - len(schedules) / 2)  # beside each other
            heights = np.array([row[key] for row in drawn], dtype=float)
            spread = np.array([row.get(f"{key}_std") or 0.0 for row in drawn], dtype=float)
            axes.errorbar(
                x,
                heights,
                yerr=cut_bars(heights, spread) if key == "lambda_max" else spread,
                color=colour,
                marker=MARKERS[place],
                markersize=3.5,
                linewidth=0.9,
                elinewidth=0.7,
            )
        set_log_scale(axes, x=True, y=key == "lambda_max")
        set_log_ticks(axes.xaxis, most=4)
        if key == "lambda_max":
            set_log_ticks(axes.yaxis)
        axes.set_xlabel("initial learning rate", fontsize=LABEL)
        axes.set_title(label, fontsize=LABEL)
        draw_grid(axes, "y")
        finish(axes)
    lines = [
        Line2D([], [], color=colour, marker=marker, markersize=3.5, linewidth=0.9, label=_label(schedule))
        for schedule, colour, marker in zip(schedules, _COLOURS, MARKERS, strict=False)
    ]
    add_legend(figure, lines, 6)
    return figure


def _best(grid: Sequence[Record], schedule: str, lr: float) -> Record | None:
    rows = [row for row in grid if row["schedule"] == schedule and row["lr"] == lr and row["accuracy"] is not None]
    return max(rows, key=lambda row: row["accuracy"], default=None)


def _label(schedule: str) -> str:
    return schedule.replace("_", "-")
