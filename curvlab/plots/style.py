"""The style of all figures: sizes, colours, axes and legends for the width of a page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

TITLE, LABEL, TICK = 10, 9, 8  # points
WIDTH = 7.2  # inches, width of the text on a page
ONE_COLUMN, TWO_COLUMNS = 3.3, 6.8  # inches, widths of a figure in a two-column paper

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0b559f", "#e07b39", "#3a8f5c", "#8e5ea2", "#767676"
RED, SKY, BROWN, PINK, INK, BLACK = "#c0394b", "#4fa3c7", "#a0742b", "#d67fb0", "#222222", "black"
PALE_BLUE = "#8fbbe3"  # wide lines below another line
SYMBOL = "#808080"  # legend entries that apply to every colour
PUBLISHED = "#404040"
OTHERS = "#c8c8c8"  # lines without their own colour
EMPTY = "#d9d9d9"  # zeros in a logarithmic colour scale
UNKNOWN: dict[str, Any] = {"facecolor": "#e4e4e4", "edgecolor": "#a8a8a8", "hatch": "////"}  # no comparison
_GRID = "#dddddd"

#: Colours of seeds and quantities, by index.
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)
#: Colours of methods and regimes, by index; the first one, for the baseline, is grey.
METHODS = (GREY, BLUE, GREEN, PURPLE, ORANGE, INK, SKY, BROWN, RED, PINK, "#c9a227")
#: Colours of groups of points.
GROUPS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BROWN, PINK, GREY, BLACK, "#c9a227")
#: Colours of linear networks (solid lines) and of other networks (dashed lines).
LINEAR = ("#0b3d91", "#7cc4ec", "#12a0a0", "#9b6bc9", "#e377c2", SKY, "#b8860b", INK)
NONLINEAR = (GREY, GREEN, ORANGE, RED, "#c9a227", PINK, "#7fb069", "#5d4037")
#: Markers of methods, regimes and groups, by index.
MARKERS = "os^vDP*Xdh>"


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """Return an empty figure.

    Args:
        width: Width in inches.
        height: Height in inches.
        title: Title of the figure; None for no title.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=TITLE)
    return figure


def finish(axes: Axes) -> None:
    """Set the size of the tick labels, and remove the upper and right spines."""
    axes.tick_params(labelsize=TICK)
    axes.spines[["top", "right"]].set_visible(False)


def draw_grid(axes: Axes, which: str = "both") -> None:
    """Draw pale grid lines behind the data, for the axis ``"x"``, ``"y"`` or ``"both"``."""
    axes.grid(axis=which, color=_GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def set_log_ticks(axis: Axis, limits: tuple[float, float] | None = None, most: int = 8) -> None:
    """Label a logarithmic axis at powers of ten, or at 1, 2 and 5 times these if the range is below two decades.

    Args:
        axis: The axis.
        limits: Limits of the axis, which decide this; None for powers of ten in all cases.
        most: Largest number of labels.
    """
    if axis.get_scale() != "log":
        return  # there was nothing positive to draw
    axis.set_minor_formatter(NullFormatter())
    if limits is not None and max(limits) < 100 * min(limits):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        axis.set_major_locator(LogLocator(numticks=most))


def add_legend(figure: Figure, handles: Sequence[Any], columns: int, **more: Any) -> None:
    """Put a legend below the axes, where it covers no data."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=TICK, frameon=False, **more)


def set_log_scale(axes: Axes, x: bool = False, y: bool = False) -> bool:
    """Make axes logarithmic if they have positive data; return whether all requested axes are logarithmic."""
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
