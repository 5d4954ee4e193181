"""Figures: one style, and what they do at the limits of their records."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from curvlab import plots
from curvlab.plots.style import GROUPS, set_log_ticks, set_whole_ticks

MODULES = [file for file in Path(plots.__file__).parent.glob("*.py") if file.stem != "style"]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_sizes_and_colours_are_those_of_the_style(file: Path) -> None:
    text = file.read_text()
    assert not re.findall(r"\"#[0-9a-fA-F]{6}\"", text)
    assert not re.findall(r"(?:fontsize|labelsize)=\d", text)


def test_more_groups_than_marks_begin_again() -> None:
    number = len(GROUPS) + 1
    records = [
        {"stream": "s", "regime": str(i), "forgetting": 0.1, "bound": 1.0, "lambda_max": 2.0, "distance": 1.0}
        for i in range(number)
    ]
    (legend,) = plots.bound_scatter(records, {}, "title").legends
    assert len(legend.get_texts()) == number + 1  # and the line of the bound


def labels_of(axis: Axis) -> list[str]:
    """Return the tick labels inside the limits of an axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_locator()() if low <= tick <= high]
    return [text for text in axis.get_major_formatter().format_ticks(ticks) if text]


@pytest.mark.parametrize("most", [3, 4, 8])
@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.0, 8.0, {3: ["1", "3"], 4: ["1", "3"], 8: ["1", "2", "5"]}),
        (0.025, 0.35, {3: ["0.03", "0.1", "0.3"], 4: ["0.03", "0.1", "0.3"], 8: ["0.05", "0.1", "0.2"]}),
        (0.21, 0.29, None),  # neither a power of ten nor 2 or 5 times one
        (2.1e-6, 2.9e-6, None),
        (1.0, 1e6, None),
        (5.0, 1500.0, {3: [1, 2, 3], 4: [1, 2, 3], 8: [1, 2, 3]}),  # three powers, if not every second one of four
        (1e-30, 1.0, None),
    ],
)
def test_a_logarithmic_axis_has_two_to_most_numbers_whatever_its_range(
    low: float, high: float, labels: dict[int, list[Any]] | None, most: int
) -> None:
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    set_log_ticks(axes.yaxis, most)
    axes.set_ylim(low, high)  # after the ticks are chosen, as a panel that shares its axis does
    found = labels_of(axes.yaxis)
    assert 2 <= len(found) <= most + 1
    assert len(set(found)) == len(found)
    if labels:
        assert found == [f"$\\mathdefault{{10^{{{label}}}}}$" if high > 100 else label for label in labels[most]]


@pytest.mark.parametrize(("low", "high", "labels"), [(0.945, 1.055, ["1"]), (0.9, 2.1, ["1", "2"])])
def test_an_axis_of_counts_has_whole_numbers_only(low: float, high: float, labels: list[str]) -> None:
    axes = Figure().add_subplot()
    axes.set_xlim(low, high)
    set_whole_ticks(axes.xaxis)
    assert labels_of(axes.xaxis) == labels


def test_a_figure_of_forecasts_says_why_a_panel_is_empty() -> None:
    table = [{"stream": "s", "structure": "diag", "gradient": False, "rank": None, "kilobytes": 1.0}]
    horizons = [{"stream": "s", "structure": "diag", "horizon": 1, "rank": None}]
    figure = plots.forecast_value(horizons, table, {"diag": "diagonal"}, "title")
    assert [axes.texts[0].get_text().split(":")[0] for axes in figure.axes] == ["no rank correlation"] * 2
    table[0]["rank"] = horizons[0]["rank"] = 0.5
    figure = plots.forecast_value(horizons, table, {"diag": "diagonal"}, "title")
    assert [list(axes.texts) for axes in figure.axes] == [[], []]
    assert labels_of(figure.axes[0].xaxis) == ["1"]


def test_a_figure_of_zeros_says_so() -> None:
    zeros = dict.fromkeys(("diag_sum", "offdiag_abs_sum", "diag_mean", "offdiag_abs_mean"), 0.0)
    figure = plots.diagonality_dots([{"parameter": "w", "size": 2, **zeros}], "title")
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["all entries are zero"] * 2
    figure = plots.diagonality_dots([{"parameter": "w", "size": 2, **zeros, "diag_sum": 1.0}], "title")
    assert [len(axes.texts) for axes in figure.axes] == [0, 1]


def test_a_curve_of_one_point_is_seen() -> None:
    curve = [{"schedule": "constant", "step": step, "test_accuracy": 0.5, "rate": 0.1} for step in (1, 2)]
    for records, marker in ((curve[:1], "o"), (curve, "None")):
        lines = [axes.lines[0] for axes in plots.schedule_curves(records, 0.6, "title").axes]
        assert [line.get_marker() for line in lines] == [marker, marker]


def test_error_bars_are_cut_on_logarithmic_axes_only() -> None:
    values = dict.fromkeys(("accuracy", "area", "lambda_max"), 1.0)
    spreads = {f"{key}_std": 2.0 for key in values}
    figure = plots.rate_curves([{"schedule": "constant", "lr": 0.1, "decay": None, **values, **spreads}], "title")
    lowest = [axes.containers[0].lines[2][0].get_segments()[0][:, 1].min() for axes in figure.axes]
    np.testing.assert_allclose(lowest, [-1.0, -1.0, 0.1], rtol=1e-12)


def test_the_moments_far_below_the_largest_are_left_out_and_counted() -> None:
    entries = {"second_moment": [1.0, 1e-3, 1e-30, 1e-3], "fisher": [1.0, 1e-3, 1e-3, 0.0]}
    figure = plots.moment_scatter(entries, {"fisher": "exact"})
    assert np.asarray(figure.axes[0].collections[0].get_offsets()).tolist() == [[1.0, 1.0], [1e-3, 1e-3]]
    assert min(figure.axes[0].get_ylim()) > 1e-12
    assert "50.0% of the points" in figure.legends[0].get_texts()[1].get_text()
    whole = {name: values[:2] for name, values in entries.items()}
    assert len(plots.moment_scatter(whole, {"fisher": "exact"}).legends[0].get_texts()) == 1


def test_labels_of_many_narrow_histograms_do_not_overlap() -> None:
    records = [
        {"seed": 0, "row": "F", "column": f"after B{i}", "low": low, "high": 10 * low, "count": 3}
        for i in range(1, 6)
        for low in (1e-16, 1e-9, 1e-2)
    ]
    figure = plots.log_histogram_grid(records, "title", "nonzero entry (nats)")
    figure.canvas.draw()
    boxes = [axes.xaxis.get_label().get_window_extent() for axes in figure.axes]
    for axes in figure.axes:
        texts = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        boxes += [text.get_window_extent() for tick, text in texts if 1e-17 < tick < 1]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
