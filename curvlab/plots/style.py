"""The style of all figures: sizes, colours, axes and legends for the width of a page."""

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter

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


class _LogLocator(LogLocator):
    """Ticks at powers of ten; below two decades also at parts of these; at equal steps where these are too few."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Return the ticks of an axis with these limits."""
        low, high = min(vmin, vmax), max(vmin, vmax)
        if not low > 0:
            return super().tick_values(vmin, vmax)
        if not _is_short(low, high):
            powers = range(ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9) + 1)
            return [float(f"1e{power}") for power in powers[:: ceil(len(powers) / self._most)]]
        parts = (1.0, 2.0, 5.0) if self._most > 5 else (1.0, 3.0)  # six or four ticks in two decades
        ticks = [
            float(f"{part}e{power}") for power in range(floor(log10(low)), ceil(log10(high)) + 1) for part in parts
        ]
        for number in range(2, 6):
            if 2 <= sum(low <= tick <= high for tick in ticks) <= self._most + 1:
                break
            ticks = list(MaxNLocator(number).tick_values(low, high))
        return ticks


class _LogFormatter(LogFormatterMathtext):
    """Labels of these ticks: powers of ten, or plain numbers below two decades."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick."""
        text: str
        if not _is_short(*sorted(self.axis.get_view_interval())):  # type: ignore[union-attr]
            text = super().__call__(x, pos)
        elif 1e-4 <= x < 1e6:
            text = f"{x:g}"
        else:
            mantissa, exponent = f"{x:e}".split("e")
            text = rf"${float(mantissa):g}\times10^{{{int(exponent)}}}$"
        return text


def _is_short(low: float, high: float) -> bool:
    return bool(0 < low <= high < 100 * low)


def set_log_ticks(axis: Axis, most: int = 8) -> None:
    """Label a logarithmic axis so that at least two ticks have a number, whatever its limits are when it is drawn.

    The numbers are powers of ten; if the range is below two decades, also 2 and 5 times these, or equal steps.

    Args:
        axis: The axis.
        most: Largest number of powers of ten.
    """
    if axis.get_scale() != "log":
        return  # there was nothing positive to draw
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_locator(_LogLocator(most))
    axis.set_major_formatter(_LogFormatter())


def set_whole_ticks(axis: Axis, most: int = 9) -> None:
    """Label an axis of counts at whole numbers only, even if there is a single one.

    Args:
        axis: The axis.
        most: Largest number of intervals between labels.
    """
    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def cut_bars(heights: Any, spread: Any) -> tuple[Any, Any]:
    """Return the lengths of error bars below and above the points of a logarithmic axis.

    A bar that would pass zero ends at a tenth of its point, since the axis has no zero.

    Args:
        heights: Values of the points, an array or a sequence.
        spread: Standard deviations, of the same length.
    """
    return np.minimum(spread, 0.9 * np.abs(np.nan_to_num(np.asarray(heights, dtype=float)))), spread


def draw_line(axes: Axes, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, **style: Any) -> None:
    """Draw a line, with a marker if it has a single point, which would not be seen otherwise."""
    if len(x) == 1:
        style = {"markersize": 4, **style, "marker": style.get("marker") or "o"}
    axes.plot(x, y, **style)


def mark_empty(axes: Axes, text: str) -> None:
    """Write in axes without data why they are empty, and hide their ticks."""
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=TICK, color=SYMBOL, transform=axes.transAxes)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)


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
