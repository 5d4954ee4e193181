"""Figures: one style, and what they do at the limits of their records."""

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from curvlab import plots
from curvlab.plots.style import GROUPS, set_log_ticks

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


@pytest.mark.parametrize(("high", "labels"), [(8.0, {1, 2, 5}), (1e6, {1})])
def test_a_short_logarithmic_axis_has_labels_between_powers_of_ten(high: float, labels: set[int]) -> None:
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(1.0, high)
    set_log_ticks(axes.yaxis, axes.get_ylim())
    inside = [tick for tick in axes.yaxis.get_major_locator().tick_values(1.0, high) if 1.0 <= tick <= high]
    assert {int(f"{tick:e}"[0]) for tick in inside} == labels
