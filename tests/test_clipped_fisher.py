"""The analysis ``clipped_fisher``: its numbers against the dense Fisher, its claims both ways, its figure."""

import numpy as np
import pytest
import torch

from curvlab import Problem, estimate
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture.clipped_fisher import ANALYSIS, PRESETS, ClippedFisherConfig, measure, report
from curvlab.commandline.options import RunOptions
from curvlab.continual import run, split_classes
from curvlab.continual.strategies import EWC
from curvlab.grid import Place
from curvlab.models import build

MNIST = Subject("mnist", (1, 28, 28), 10, 60_000, 10_000)
CPU = PRESETS["cpu"].config


def test_the_numbers_are_those_of_the_dense_fishers(tmp_path):
    config = ClippedFisherConfig(hidden=(4,), steps=20, batches=2, seeds=(3,), clip=1e-4, dtype="float64", lr=0.01)
    data = ANALYSIS.load(config, RunOptions())
    found = list(measure(config, data, Workspace(Place(tmp_path))))
    stream = split_classes(data, tasks=5)[:2]
    model = build("mlp", data.sample_shape, 10, hidden=(4,), seed=3).double()
    dense = []

    def keep(learner):
        x, y = learner.stream[learner.task].train
        seen = 2 * learner.task + 2  # outputs that count
        weights = [p.detach().clone() for p in learner.model.parameters()]
        narrow = build("mlp", data.sample_shape, seen, hidden=(4,)).double()
        with torch.no_grad():
            for mine, all_of in zip(narrow.parameters(), weights, strict=True):
                mine.copy_(all_of[: len(mine)])
        fisher = estimate(Problem(narrow, "cross_entropy", (x, y)), "fisher", "dense", backend="torch")
        diagonal, wide = fisher.to_dense().diagonal(), torch.zeros(sum(w.numel() for w in weights)).double()
        first = 64 * 4 + 4
        wide[:first] = diagonal[:first]
        wide[first : first + 4 * seen] = diagonal[first : first + 4 * seen]
        wide[first + 40 : first + 40 + seen] = diagonal[first + 4 * seen :]
        dense.append(wide.numpy())
        return {}

    options = {"optimizer": "adam", "lr": 0.01, "steps": 20, "batch_size": 100, "seed": 3}
    run(
        stream,
        model,
        EWC(100.0, quantity="fisher", mode="average"),
        head="growing",
        observe=keep,
        progress=False,
        **options,
    )
    for batch, row in enumerate((row for row in found if "batch" in row), start=1):
        entries = dense[batch - 1][dense[batch - 1] > 0]
        average = np.mean(dense[:batch], axis=0)
        assert row["median"] == pytest.approx(np.median(entries), rel=1e-6)
        assert row["p99_over_median"] == pytest.approx(np.quantile(entries, 0.99) / np.median(entries), rel=1e-6)
        assert row["largest"] == pytest.approx(entries.max(), rel=1e-6)
        assert row["zero_fraction"] == pytest.approx(1 - len(entries) / len(average))
        assert row["saturated"] == (average >= 1e-4).mean() > 0
        bins = [one for one in found if one.get("column") == f"after B{batch}"]
        assert sum(one["count"] for one in bins if one["row"] == "F") == len(entries)
        clipped = [one for one in bins if one["row"] != "F"]
        assert sum(one["count"] for one in clipped) == (average > 0).sum()
        assert max(one["low"] for one in clipped) <= 1e-4 * (1 + 1e-9)  # the saturated ones are the last bin
        assert max(clipped, key=lambda one: one["low"])["count"] == (average >= 1e-4).sum()


def results(subject=MNIST, config=CPU, last=(), first=()):
    table = []
    for seed in range(3):
        for batch in (1, 2, 3):
            row = {"seed": seed, "batch": batch, "zero_fraction": 0.1, "median": 1e-6, "largest": 0.1}
            row |= {"p99_over_median": 10.0, "saturated": 0.001, "spike": 2.0}
            changed = dict(last) if (seed, batch) == (2, 3) else dict(first) if (seed, batch) == (2, 1) else {}
            table.append(row | changed)
    bins = [
        {"seed": seed, "row": row, "column": f"after B{batch}", "low": 10.0**k, "high": 10.0 ** (k + 1), "count": 5 - k}
        for seed in range(3)
        for row in ("F", "average, clipped")
        for batch in (1, 2)
        for k in (-5, -4, -3)
    ]
    return Results(config, subject, {"table": table, "histogram": bins}, total=3)


def verdicts(**changes):
    return [claim.verdict for claim in report(results(**changes)).claims]


def test_claims_that_hold():
    assert verdicts() == ["reproduced"] * 3 + ["not tested"]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"first": {"p99_over_median": 9.9}}, 0),
        ({"last": {"spike": 0.9}}, 1),
        ({"last": {"saturated": 0.011}}, 2),
    ],
)
def test_claims_that_fail(changes, missed):
    assert [place for place, verdict in enumerate(verdicts(**changes)) if verdict == "not reproduced"] == [missed]


def test_the_published_share_is_judged_on_the_published_network_alone():
    core50 = Subject("core50", (3, 128, 128), 50, 1, 1)
    config = CPU.model_copy(update={"model": "caffenet"})
    assert verdicts(subject=core50, config=config)[3] == "reproduced"
    assert verdicts(subject=core50, config=config, last={"saturated": 0.0031})[3] == "not reproduced"
    assert verdicts(subject=core50, config=config, last={"saturated": 0.0003})[3] == "not reproduced"


def test_nothing_below_the_clip_says_nothing_of_a_spike():
    assert verdicts(last={"spike": None})[1] == "not tested"


def test_other_conditions_are_not_tested():
    assert set(verdicts(subject=Subject("digits", (1, 8, 8), 10, 1437, 360))) == {"not tested"}


def test_the_figure():
    figure = report(results()).figures["histograms"]()
    assert [axes.get_title() for axes in figure.axes] == ["after B1", "after B2", "", ""]
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in figure.axes)
    values, edges, _ = figure.axes[0].patches[0].get_data()
    assert values.tolist() == [10, 9, 8]
    assert edges.tolist() == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
