"""Heat maps of matrices."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from curvlab.plots.style import BLACK, EMPTY, LABEL, TICK, TITLE, UNKNOWN, add_legend, new_figure


def block_heat_map(matrix: np.ndarray, names: Sequence[str], counts: Sequence[int], title: str) -> Figure:
    """Draw the absolute entries of a matrix in a logarithmic colour scale, with lines between parameter tensors.

    Args:
        matrix: ``(k, k)``.
        names: Names of the tensors.
        counts: Number of rows of each tensor.
        title: Title of the figure.
    """
    size = np.abs(np.asarray(matrix, dtype=float))
    largest = size.max() if size.size and size.max() > 0 else 1.0
    decades = 6
    with np.errstate(divide="ignore"):
        logs = np.log10(size)
    figure = new_figure(6.2, 5.4)
    axes = figure.add_subplot()
    top = np.log10(largest)
    colours = axes.imshow(
        np.where(np.isfinite(logs), logs, np.nan), cmap="viridis", vmin=top - decades, vmax=top, interpolation="nearest"
    )
    axes.set_facecolor(EMPTY)
    edges = np.concatenate([[0], np.cumsum(counts)])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color=BLACK, linewidth=0.7)
        axes.axvline(edge - 0.5, color=BLACK, linewidth=0.7)
    centres = (edges[:-1] + edges[1:]) / 2 - 0.5
    labels = [f"{name} ({count})" for name, count in zip(names, counts, strict=True)]
    axes.set_xticks(centres, labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=TICK)
    axes.set_yticks(centres, labels, fontsize=TICK)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=TITLE)
    bar = figure.colorbar(colours, ax=axes, extend="min", shrink=0.85)
    bar.set_label(r"$\log_{10}\,|F_{ij}|$  (grey: exactly zero)", fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    return figure


def difference_maps(panels: Mapping[str, np.ndarray], names: Sequence[str], title: str) -> Figure:
    """Draw pairwise relative differences below the diagonal, in a logarithmic colour scale: one panel per structure.

    Args:
        panels: Title -> ``(k, k)`` differences, NaN if one of the two has no result.
        names: Names of the ``k`` compared backends.
        title: Title of the figure.
    """
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(2.15 * columns + 1.2, 2.2 * rows + 0.75, title)
    k = len(names)
    below = np.tril(np.ones((k, k), dtype=bool), -1)[1:, :-1]
    drawn, hatched = [], False
    for place, (label, differences) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        pairs = np.asarray(differences, dtype=float)[1:, :-1]
        with np.errstate(divide="ignore"):
            logs = np.log10(np.maximum(pairs, 1e-16))
        shown = np.where(below & np.isfinite(pairs), logs, np.nan)
        drawn.append((axes, axes.imshow(shown, cmap="viridis", vmin=-16, vmax=0)))
        for i, j in zip(*np.nonzero(below), strict=True):
            if np.isnan(pairs[i, j]):
                hatched = True
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **UNKNOWN))
                continue
            text = "0" if pairs[i, j] == 0 else f"{pairs[i, j]:.0e}".replace("e-0", "e-").replace("e+00", "")
            colour = "white" if logs[i, j] < -8 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=TICK - 1, color=colour)
        axes.set_xticks(range(k - 1), names[:-1], rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(k - 1), names[1:])
        axes.tick_params(labelsize=TICK - 1, length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(label, fontsize=LABEL)
    bar = figure.colorbar(drawn[0][1], ax=[axes for axes, _ in drawn], extend="both", shrink=0.9, aspect=25)
    bar.set_label(r"$\log_{10}$ relative difference", fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    unknown = Rectangle((0, 0), 1, 1, label="not computed by one of the two backends", **UNKNOWN)
    if hatched:
        add_legend(figure, [unknown], 1)
    return figure
