"""Figures of eigenvalues during training, and of spectral densities."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from curvlab.plots.records import Record, count_seeds, list_distinct
from curvlab.plots.style import (
    BLUE,
    GREEN,
    LABEL,
    ORANGE,
    SERIES,
    SYMBOL,
    add_legend,
    draw_line,
    finish,
    new_figure,
    set_log_scale,
    set_log_ticks,
    set_whole_ticks,
)

_LOSSES = {"cross_entropy": "softmax cross-entropy", "squared_error": "squared error"}
_LOSS_COLOURS = {"cross_entropy": BLUE, "squared_error": ORANGE}
# Cross-entropy is in nats; half a squared error has the squared unit of the outputs.
_UNITS = {"cross_entropy": "nats", "squared_error": "squared outputs"}
_QUANTITIES = {"fisher": "Fisher", "hessian": "Hessian", "ekfac": "Fisher by EK-FAC", "ggn": "GGN"}
_EARLY = 2  # a maximum among this many first points is not resolved
# By index, and distinguishable without colour. A dashed line on a solid one shows both if they coincide.
_LINES: tuple[tuple[Any, float], ...] = (("-", 2.2), ((0, (3, 1.5)), 1.6), ("-.", 1.4), (":", 1.6))
_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "linestyle": line, "linewidth": width}
    for colour, (line, width) in zip(SERIES, _LINES, strict=False)
)


def eigenvalue_curves(records: Sequence[Record], title: str) -> Figure:
    """Draw the largest eigenvalues during training: one column per loss, linear above and logarithmic below.

    The range over seeds is shaded for the first quantity, and between thin lines for the others. A circle marks a
    maximum at the start or at the first point after it; the curve may be higher between these two points.

    Args:
        records: One record per ``loss``, ``seed``, ``step`` and ``quantity``, with the eigenvalue as ``value``.
        title: Title of the figure.
    """
    losses, quantities = list_distinct(records, "loss"), list_distinct(records, "quantity")
    figure, panels = _new_panels(len(losses), title)
    early = False
    for column, loss in enumerate(losses):
        for row, axes in enumerate(panels[:, column]):
            for place, quantity in enumerate(quantities):
                steps, values = _values(records, loss=loss, quantity=quantity)
                style = _STYLES[place % len(_STYLES)]
                _draw(axes, steps, values, style, log=row == 1, outline=place > 0)
                early |= _mark_early_peak(axes, steps, values, style)
            _finish(axes, log=row == 1)
        panels[0, column].set_title(_loss_title(loss), fontsize=LABEL)
    for axes in panels[:, 0]:
        axes.set_ylabel(r"$\lambda_{\max}$", fontsize=LABEL)
    styles = {_QUANTITIES.get(name, name): _STYLES[place % len(_STYLES)] for place, name in enumerate(quantities)}
    _legend(figure, styles, count_seeds(records), outlines=len(quantities) > 1, early=early)
    return figure


def normalised_curves(records: Sequence[Record], title: str) -> Figure:
    """Draw each curve divided by its maximum: one column per quantity, linear above and logarithmic below.

    Args:
        records: Records as for ``eigenvalue_curves``.
        title: Title of the figure.
    """
    losses, quantities = list_distinct(records, "loss"), list_distinct(records, "quantity")
    figure, panels = _new_panels(len(quantities), title, row_axis=True)
    styles = {
        loss: {"color": _LOSS_COLOURS.get(loss, GREEN), "linestyle": style, "linewidth": 1.8}
        for loss, style in zip(losses, ("-", "--", "-."), strict=False)
    }
    early = False
    for column, quantity in enumerate(quantities):
        for row, axes in enumerate(panels[:, column]):
            for loss in losses:
                steps, values = _values(records, loss=loss, quantity=quantity)
                if len(steps):
                    largest = values.max(axis=1, keepdims=True)
                    values = values / np.where(largest == 0, np.nan, largest)  # a curve of zeros has no maximum
                    _draw(axes, steps, values, styles[loss], log=row == 1)
                    early |= _mark_early_peak(axes, steps, values, styles[loss])
            _finish(axes, log=row == 1)
        panels[0, column].set_title(_QUANTITIES.get(quantity, quantity), fontsize=LABEL)
    for axes in panels[:, 0]:
        axes.set_ylabel(r"$\lambda_{\max}$ / its maximum", fontsize=LABEL)
    names = {_LOSSES.get(loss, loss): style for loss, style in styles.items()}
    _legend(figure, names, count_seeds(records), early=early)
    return figure


def layer_curves(records: Sequence[Record], title: str) -> Figure:
    """Draw the largest eigenvalue of each layer's block, logarithmic: one column per loss, one row per quantity.

    Args:
        records: Records as for ``eigenvalue_curves``, one per ``layer``.
        title: Title of the figure.
    """
    losses, quantities = list_distinct(records, "loss"), list_distinct(records, "quantity")
    layers = list_distinct(records, "layer")
    figure, panels = _new_panels(len(losses), title, rows=len(quantities))
    colours = _sequential_colours(len(layers))
    for column, loss in enumerate(losses):
        for row, quantity in enumerate(quantities):
            axes = panels[row, column]
            for layer, colour in zip(layers, colours, strict=True):
                steps, values = _values(records, loss=loss, quantity=quantity, layer=layer)
                _draw(axes, steps, values, {"color": colour, "linewidth": 1.5}, log=True)
            _finish(axes, log=True)
            if column == 0:
                axes.set_ylabel(rf"$\lambda_{{\max}}$, {_QUANTITIES.get(quantity, quantity)}", fontsize=LABEL)
        panels[0, column].set_title(_loss_title(loss), fontsize=LABEL)
    styles = {layer: {"color": colour, "linewidth": 1.5} for layer, colour in zip(layers, colours, strict=True)}
    _legend(figure, styles, count_seeds(records))
    return figure


def density_curves(densities: Sequence[Record], title: str) -> Figure:
    """Draw spectral densities at several steps, logarithmic: one column per loss, one row per quantity.

    Args:
        densities: One record per ``loss``, ``quantity`` and ``step``, with lists of numbers ``grid`` and ``density``.
        title: Title of the figure.
    """
    losses, quantities = list_distinct(densities, "loss"), list_distinct(densities, "quantity")
    steps = sorted({record["step"] for record in densities})
    figure, panels = _new_panels(len(losses), title, rows=len(quantities), shared=False)
    colours = _sequential_colours(len(steps))
    for column, loss in enumerate(losses):
        for row, quantity in enumerate(quantities):
            axes = panels[row, column]
            chosen = [r for r in densities if r["loss"] == loss and r["quantity"] == quantity]
            top = 0.0
            for record in chosen:
                density = np.asarray(record["density"], dtype=float)
                axes.plot(record["grid"], density, color=colours[steps.index(record["step"])], linewidth=1.4)
                top = max(top, float(density.max()))
            axes.set_yscale("log")
            if top:
                axes.set_ylim(top * 1e-7, top * 3)
            _finish(axes, log=True)
            unit = f" ({_UNITS[loss]})" if loss in _UNITS else ""
            axes.set_xlabel(f"eigenvalue of the {_QUANTITIES.get(quantity, quantity)}{unit}", fontsize=LABEL)
            if column == 0:
                axes.set_ylabel("density, smoothed", fontsize=LABEL)
        panels[0, column].set_title(_LOSSES.get(loss, loss), fontsize=LABEL)
    styles = {f"step {step:,}": {"color": colour} for step, colour in zip(steps, colours, strict=True)}
    _legend(figure, styles, 1)
    return figure


def _loss_title(loss: str) -> str:
    return f"{_LOSSES.get(loss, loss)} ({_UNITS[loss]})" if loss in _UNITS else loss


def _values(records: Sequence[Record], **wanted: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps ``(T,)`` and the eigenvalues ``(seeds, T)`` of one curve."""
    chosen = [record for record in records if all(record[key] == value for key, value in wanted.items())]
    steps = sorted({record["step"] for record in chosen})
    seeds = sorted({record["seed"] for record in chosen})
    values = np.full((len(seeds), len(steps)), np.nan)
    for record in chosen:
        values[seeds.index(record["seed"]), steps.index(record["step"])] = record["value"]
    return np.array(steps), values


def _new_panels(
    columns: int, title: str, rows: int = 2, shared: bool = True, row_axis: bool = False
) -> tuple[Figure, np.ndarray]:
    figure = new_figure(max(2.6 * columns + 0.6, 4.2), 2.0 * rows + 0.9, title)
    panels: np.ndarray = figure.subplots(
        rows, columns, squeeze=False, sharex=shared, sharey="row" if row_axis else False
    )
    if shared:
        for axes in panels[-1]:
            axes.set_xlabel("training step", fontsize=LABEL)
            set_whole_ticks(axes.xaxis)
    return figure, panels


def _draw(
    axes: Axes, steps: np.ndarray, values: np.ndarray, style: Mapping[str, Any], log: bool, outline: bool = False
) -> None:
    """Draw the mean over seeds and, for several seeds, their range: shaded, or only its outline."""
    if log:
        values = np.where(values > 0, values, np.nan)
    draw_line(axes, steps, values.mean(axis=0), **style)
    if len(values) < 2:
        return
    low, high = values.min(axis=0), values.max(axis=0)
    if outline:
        for edge in (low, high):
            axes.plot(steps, edge, **{**style, "linewidth": 0.7})
    else:
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.22, linewidth=0)


def _mark_early_peak(axes: Axes, steps: np.ndarray, values: np.ndarray, style: Mapping[str, Any]) -> bool:
    """Mark the maximum of a mean curve with a circle if it is among the first points; return whether it is."""
    if len(steps) <= _EARLY:
        return False
    mean = values.mean(axis=0)
    place = int(mean.argmax())
    if place >= _EARLY:
        return False
    axes.scatter(
        steps[place], mean[place], s=36, facecolors="none", edgecolors=style["color"], linewidths=1.0, zorder=3
    )
    return True


def _finish(axes: Axes, log: bool) -> None:
    if log and set_log_scale(axes, y=True):
        set_log_ticks(axes.yaxis, most=6)
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    finish(axes)


def _legend(
    figure: Figure, styles: Mapping[str, Mapping[str, Any]], seeds: int, outlines: bool = False, early: bool = False
) -> None:
    handles: list[Line2D | Patch] = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    if seeds > 1:
        edge: dict[str, Any] = {"edgecolor": (0, 0, 0, 0.6), "linestyle": "--", "linewidth": 0.7} if outlines else {}
        handles.append(Patch(facecolor=(0.5, 0.5, 0.5, 0.3), label=f"mean and range of {seeds} seeds", **edge))
    if early:
        circle = Line2D([], [], linestyle="none", marker="o", markerfacecolor="none", color=SYMBOL, markersize=6)
        circle.set_label("maximum in the first interval")
        handles.append(circle)
    # Number of columns that fit the figure: a label has its characters plus about seven for its line.
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() * 13 / (widest + 7)))
    add_legend(figure, handles, min(columns, len(handles)), handlelength=2.6)


def _sequential_colours(count: int) -> list[Any]:
    """Return colours from dark to light, without the lightest ones."""
    from matplotlib import colormaps

    colour: Callable[[float], Any] = colormaps["viridis"]
    return [colour(0.9 * place / max(count - 1, 1)) for place in range(count)]
