"""The one style of the figures: sizes, colours, and how axes and legends look at the width of a page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

TITLE, LABEL, TICK = 10, 9, 8  # points
WIDTH = 7.2  # inches, of a page between its margins

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0b559f", "#e07b39", "#3a8f5c", "#8e5ea2", "#767676"
RED, SKY, BROWN, PINK, INK, BLACK = "#c0394b", "#4fa3c7", "#a0742b", "#d67fb0", "#222222", "black"
PALE_BLUE = "#8fbbe3"  # of a wide line under another one
SYMBOL = "#808080"  # of a legend's entry that stands for any colour
PUBLISHED = "#404040"
OTHERS = "#c8c8c8"  # of the lines that have no colour of their own
EMPTY = "#d9d9d9"  # where a logarithmic colour scale has no value
UNKNOWN: dict[str, Any] = {"facecolor": "#e4e4e4", "edgecolor": "#a8a8a8", "hatch": "////"}  # no comparison
_GRID = "#dddddd"

#: Of seeds, and of quantities by their place.
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)
#: Of methods and regimes by their place; the first one is the plain method, which is grey.
METHODS = (GREY, BLUE, GREEN, PURPLE, ORANGE, INK, SKY, BROWN, RED, PINK)
#: Of groups of points.
GROUPS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BROWN, PINK, GREY, BLACK)
#: Of linear networks, which have solid lines, and of the others, whose lines are dashed.
LINEAR = ("#0b3d91", "#7cc4ec", "#12a0a0", "#9b6bc9", "#e377c2", SKY, "#b8860b", INK)
NONLINEAR = (GREY, GREEN, ORANGE, RED, "#c9a227", PINK, "#7fb069", "#5d4037")
#: Of methods, regimes and groups by their place.
MARKERS = "os^vDP*Xdh"


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """Return an empty figure.

    Args:
        width: In inches.
        height: In inches.
        title: What stands above all of it; None for nothing.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=TITLE)
    return figure


def finish(axes: Axes) -> None:
    """Set the size of the tick labels, and take the upper and the right edge away."""
    axes.tick_params(labelsize=TICK)
    axes.spines[["top", "right"]].set_visible(False)


def draw_grid(axes: Axes, which: str = "both") -> None:
    """Draw pale lines behind the points: ``"both"``, or those of the axis ``"x"`` or ``"y"``."""
    axes.grid(axis=which, color=_GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def set_log_ticks(axis: Axis, limits: tuple[float, float] | None = None, most: int = 8) -> None:
    """Label a logarithmic axis at powers of ten, or at 1, 2 and 5 times these where they would be too few.

    Args:
        axis: The axis.
        limits: Of the axis, by which that is decided; None for powers of ten in any case.
        most: How many labels there may be.
    """
    axis.set_minor_formatter(NullFormatter())
    if limits is not None and max(limits) < 100 * min(limits):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        axis.set_major_locator(LogLocator(numticks=most))


def add_legend(figure: Figure, handles: Sequence[Any], columns: int, **more: Any) -> None:
    """Put a legend below the axes, where it hides nothing."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=TICK, frameon=False, **more)


def set_log_scale(axes: Axes, x: bool = False, y: bool = False) -> bool:
    """Make axes logarithmic where they have something positive to show, and say whether all of these are."""
    done = True
    for wanted, limits, scale in (
        (x, axes.dataLim.intervalx, axes.set_xscale),
        (y, axes.dataLim.intervaly, axes.set_yscale),
    ):
        if wanted and 0 < limits.max() < np.inf:
            scale("log")
        elif wanted:
            done = False
    return done
