"""Figures of results, drawn to be read at the width of a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

Record = Mapping[str, Any]

_ON, _OFF = "#0b559f", "#e07b39"
_FONT = {"title": 10, "label": 9, "tick": 8}
_SHIFT, _THEIRS = 0.18, 0.18  # of a tensor's two dots from its place, and of the published ones from ours


def block_heat_map(matrix: np.ndarray, names: Sequence[str], counts: Sequence[int], title: str) -> Figure:
    """Draw the size of a matrix's entries in a logarithmic colour scale, the tensors' blocks marked.

    Args:
        matrix: ``(k, k)``.
        names: Of the tensors.
        counts: Rows of each.
        title: What stands above.
    """
    size = np.abs(np.asarray(matrix, dtype=float))
    largest = size.max() if size.size and size.max() > 0 else 1.0
    decades = 6
    with np.errstate(divide="ignore"):
        logs = np.log10(size)
    figure = Figure(figsize=(6.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    top = np.log10(largest)
    colours = axes.imshow(
        np.where(np.isfinite(logs), logs, np.nan), cmap="viridis", vmin=top - decades, vmax=top, interpolation="nearest"
    )
    axes.set_facecolor("#d9d9d9")
    edges = np.concatenate([[0], np.cumsum(counts)])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="black", linewidth=0.7)
        axes.axvline(edge - 0.5, color="black", linewidth=0.7)
    centres = (edges[:-1] + edges[1:]) / 2 - 0.5
    labels = [f"{name} ({count})" for name, count in zip(names, counts, strict=True)]
    axes.set_xticks(centres, labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=_FONT["tick"])
    axes.set_yticks(centres, labels, fontsize=_FONT["tick"])
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=_FONT["title"])
    bar = figure.colorbar(colours, ax=axes, extend="min", shrink=0.85)
    bar.set_label(r"$\log_{10}\,|F_{ij}|$  (grey: exactly zero)", fontsize=_FONT["label"])
    bar.ax.tick_params(labelsize=_FONT["tick"])
    return figure


def difference_maps(panels: Mapping[str, np.ndarray], names: Sequence[str], title: str) -> Figure:
    """Draw pairwise relative differences in a logarithmic colour scale, a panel a structure, pairs below the diagonal.

    Args:
        panels: By title, ``(k, k)`` differences, NaN where one of the two has no answer.
        names: Of the ``k`` that are compared.
        title: What stands above.
    """
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.15 * columns + 1.2, 2.2 * rows + 0.75), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    k = len(names)
    below = np.tril(np.ones((k, k), dtype=bool), -1)[1:, :-1]
    drawn = []
    for place, (label, differences) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        pairs = np.asarray(differences, dtype=float)[1:, :-1]
        with np.errstate(divide="ignore"):
            logs = np.log10(np.maximum(pairs, 1e-16))
        shown = np.where(below & np.isfinite(pairs), logs, np.nan)
        drawn.append((axes, axes.imshow(shown, cmap="viridis", vmin=-16, vmax=0)))
        for i, j in zip(*np.nonzero(below), strict=True):
            if np.isnan(pairs[i, j]):
                axes.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="#e4e4e4", edgecolor="#a8a8a8", hatch="////")
                )
                continue
            text = "0" if pairs[i, j] == 0 else f"{pairs[i, j]:.0e}".replace("e-0", "e-").replace("e+00", "")
            colour = "white" if logs[i, j] < -8 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=_FONT["tick"] - 1, color=colour)
        axes.set_xticks(range(k - 1), names[:-1], rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(k - 1), names[1:])
        axes.tick_params(labelsize=_FONT["tick"] - 1, length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(label, fontsize=_FONT["label"])
    bar = figure.colorbar(drawn[0][1], ax=[axes for axes, _ in drawn], extend="both", shrink=0.9, aspect=25)
    bar.set_label(r"$\log_{10}$ relative difference", fontsize=_FONT["label"])
    bar.ax.tick_params(labelsize=_FONT["tick"])
    none = Rectangle((0, 0), 1, 1, facecolor="#e4e4e4", edgecolor="#a8a8a8", hatch="////")
    text = "one of the two does not compute this for the model"
    figure.legend([none], [text], loc="outside lower center", fontsize=_FONT["tick"], frameon=False)
    return figure


def diagonality_dots(records: Sequence[Record], title: str, published: Mapping[str, Record] | None = None) -> Figure:
    """Draw sums and means on and off the diagonal as dots in a logarithmic scale, a pair a parameter tensor.

    Args:
        records: As ``curvlab.results.aggregate`` gives them: ``diag_sum``, ``offdiag_abs_sum``, ``diag_mean``,
            ``offdiag_abs_mean``, each with its ``_std`` over seeds.
        title: What stands above.
        published: Published sums by parameter name, drawn as marks; means are drawn from them with the right
            denominators (``n`` and ``n^2 - n``).
    """
    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    figure.suptitle(title, fontsize=_FONT["title"])
    names = [record["parameter"] for record in records]
    places = np.arange(len(records))
    # Published dots stand right of ours; a tensor that has none has its two in the middle.
    moved = np.array([_THEIRS / 2 if name in (published or {}) else 0.0 for name in names])
    panels = (
        ("Sum", "diag_sum", "offdiag_abs_sum", r"$\Sigma_i F_{ii}$", r"$\Sigma_{i\neq j}|F_{ij}|$"),
        ("Mean", "diag_mean", "offdiag_abs_mean", r"mean $F_{ii}$", r"mean $|F_{ij}|,\ i\neq j$"),
    )
    for place, (label, on, off, on_label, off_label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        for shift, key, colour, text in ((-_SHIFT, on, _ON, on_label), (_SHIFT, off, _OFF, off_label)):
            heights = np.array([record[key] if record[key] else np.nan for record in records], dtype=float)
            spread = np.array([record.get(f"{key}_std") or 0.0 for record in records], dtype=float)
            below = np.minimum(spread, 0.9 * np.nan_to_num(heights))  # not below zero, which no logarithm has
            axes.errorbar(
                places + shift - moved,
                heights,
                yerr=[below, spread] if spread.any() else None,
                fmt="o",
                color=colour,
                markersize=5,
                elinewidth=1.2,
                capsize=2.5,
                label=text,
            )
        _mark_published(axes, records, published, on, off)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_ylabel(f"{label} of entries (nats)", fontsize=_FONT["label"])
        axes.tick_params(labelsize=_FONT["tick"])
        axes.spines[["top", "right"]].set_visible(False)
        # Above the axes: inside, it would hide a mark.
        axes.legend(fontsize=_FONT["tick"], frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _mark_published(
    axes: Any, records: Sequence[Record], published: Mapping[str, Record] | None, on: str, off: str
) -> None:
    if not published:
        return
    for place, record in enumerate(records):
        row = published.get(record["parameter"])
        if row is None:
            continue
        n = record["size"]
        divide = {"diag_sum": 1, "offdiag_abs_sum": 1, "diag_mean": n, "offdiag_abs_mean": n * (n - 1)}
        for shift, key, divisor, colour in (
            (-_SHIFT, "diag_sum", divide[on], _ON),
            (_SHIFT, "offdiag_abs_sum", divide[off], _OFF),
        ):
            x, y = place + shift + _THEIRS / 2, row[key] / divisor
            axes.plot(x, y, "D", markersize=5, color="white", markeredgecolor=colour)
    axes.plot([], [], "D", markersize=5, color="white", markeredgecolor="black", label="published")
