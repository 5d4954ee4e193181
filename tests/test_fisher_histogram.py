"""The analysis ``fisher_histogram``: its numbers against the dense Fisher, its claims, its figure."""

import numpy as np
import pytest
import torch

from curvlab import Problem, estimate
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture import fisher_histogram as analysis
from curvlab.analyze.lecture.fisher_histogram import ANALYSIS, PRESETS, FisherHistogramConfig
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.models import build
from curvlab.plots import log_bins, log_histogram

MNIST = Subject("mnist", (1, 28, 28), 10, 12665, 2115)


def measure(config, folder):
    return list(analysis.measure(config, ANALYSIS.load(config, RunOptions()), Workspace(Place(folder))))


def test_the_numbers_are_those_of_the_dense_fisher(tmp_path):
    config = FisherHistogramConfig(hidden=(3,), steps=5, samples=30, seeds=(2,), dtype="float64")
    number, *bins = measure(config, tmp_path)
    data = ANALYSIS.load(config, RunOptions())
    model = build("mlp", data.sample_shape, 10, hidden=(3,)).double()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    model.load_state_dict({name.removeprefix("parameter "): tensor for name, tensor in saved.items()})
    problem = Problem(model, "cross_entropy", (data.x_train[:30].double(), data.y_train[:30]))
    diagonal = estimate(problem, "fisher", "dense", backend="torch").to_dense().diagonal().numpy()
    entries = np.sort(diagonal[diagonal > 0])
    assert set(data.y_train.tolist()) == {0, 1}
    assert (number["seed"], number["size"]) == (2, len(diagonal))
    assert number["zero_fraction"] == pytest.approx(1 - len(entries) / len(diagonal))
    assert number["zero_fraction"] > 0  # pixels that are always black
    assert number["mean"] == pytest.approx(entries.mean(), rel=1e-8)
    assert number["median"] == pytest.approx(np.median(entries), rel=1e-8)
    assert number["mean_over_median"] == pytest.approx(entries.mean() / np.median(entries), rel=1e-8)
    assert number["p99_over_median"] == pytest.approx(np.quantile(entries, 0.99) / np.median(entries), rel=1e-8)
    largest = entries[-int(np.ceil(len(entries) / 100)) :]
    assert number["top_share"] == pytest.approx(largest.sum() / entries.sum(), rel=1e-8)
    assert sum(record["count"] for record in bins) == len(entries)
    for record in bins:
        inside = (entries >= record["low"] * (1 - 1e-8)) & (entries < record["high"] * (1 + 1e-8))
        assert inside.sum() >= record["count"]


def test_bins():
    bins = log_bins(np.array([1e-9, 0.011, 0.05, 0.99, 1.0]), per_decade=1)
    assert [one["count"] for one in bins] == [1, 2, 1, 1]
    assert [one["low"] for one in bins] == pytest.approx([1e-9, 1e-2, 0.1, 1.0])
    assert [one["high"] for one in bins] == pytest.approx([1e-8, 0.1, 1.0, 10.0])


def test_a_diagonal_of_zeros(tmp_path, monkeypatch):
    class Zeros:
        def diagonal(self):
            return torch.zeros(7)

    monkeypatch.setattr(analysis, "estimate", lambda *_: Zeros())
    with pytest.raises(CurvlabError, match="every entry of the Fisher's diagonal is zero"):
        measure(FisherHistogramConfig(hidden=(3,), steps=1, seeds=(0,)), tmp_path)


def report(subject=MNIST, config=PRESETS["cpu"].config, seeds=3, **numbers):
    usual = {"size": 9, "zero_fraction": 0.2, "mean": 1.0, "median": 0.1, "test_accuracy": 0.99}
    usual |= {"top_share": 0.4, "mean_over_median": 10.0, "p99_over_median": 10.0}
    table = [{"seed": seed, **usual, **(numbers if seed == seeds - 1 else {})} for seed in range(seeds)]
    bins = [{"seed": seed, **one} for seed in range(seeds) for one in log_bins(np.array([1e-6, 1e-3, 1e-3]))]
    return ANALYSIS.report(Results(config, subject, {"table": table, "histogram": bins}))


@pytest.mark.parametrize(
    ("place", "key", "missed"), [(0, "top_share", 0.39), (1, "mean_over_median", 9.9), (2, "p99_over_median", 9.9)]
)
def test_verdicts(place, key, missed):
    assert [claim.verdict for claim in report().claims] == ["reproduced"] * 3
    verdicts = ["reproduced"] * 3
    verdicts[place] = "not reproduced"
    assert [claim.verdict for claim in report(**{key: missed}).claims] == verdicts
    assert {claim.verdict for claim in report(seeds=2).claims} == {"not tested"}


@pytest.mark.parametrize(
    ("subject", "changed", "reason"),
    [
        (Subject("digits", (64,), 10, 290, 70), {}, "data is digits, published: mnist"),
        (MNIST, {"classes": (0, 1, 2)}, "classes is 0 1 2, published: 0 1"),
        (MNIST, {"classes": "all"}, "classes is all, published: 0 1"),
        (MNIST, {"steps": 0}, "steps is 0, at least 100 is needed"),
    ],
)
def test_other_conditions_are_not_tested(subject, changed, reason):
    for claim in report(subject, PRESETS["cpu"].config.model_copy(update=changed)).claims:
        assert (claim.verdict, claim.reason) == ("not tested", reason)


def test_the_figure():
    axes = report().figures["histogram"]().axes[0]
    assert axes.get_xscale() + axes.get_yscale() == "loglog"
    assert axes.get_title() == "Diagonal of the Fisher of a 784-256-10 network on mnist,\nclasses [0, 1]"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["seed 0", "seed 1", "seed 2"]
    # A bin of a seed without a number in it is a gap.
    (stairs,) = log_histogram([{"seed": 0, **one} for one in log_bins(np.array([1.5, 300.0]))], "t").axes[0].patches
    values, edges, _ = stairs.get_data()
    assert [1.0, np.nan, 1.0] == pytest.approx(values.tolist(), nan_ok=True)
    assert edges.tolist() == pytest.approx([1, 10**0.2, 10**2.4, 10**2.6])
