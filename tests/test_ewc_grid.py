"""The analysis ``ewc_grid``: its runs, which points are chosen, its claims both ways, and its figure."""

import json

import pytest
import torch

from curvlab import Problem, estimate
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.workspace import Workspace
from curvlab.analyze.masq import ewc_grid as analysis
from curvlab.analyze.masq import streams, table1
from curvlab.analyze.masq.ewc_grid import ANALYSIS
from curvlab.analyze.masq.ewc_grid_options import PRESETS, EwcGridConfig
from curvlab.analyze.masq.table1 import Point
from curvlab.commandline.options import RunOptions
from curvlab.continual.copies import train_copies
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.training import evaluate

MNIST = Subject("mnist", (1, 28, 28), 10, 20_000, 2000)
SMALL = EwcGridConfig(
    nets=("5-4",), steps=4, every=2, train_samples=700, test_samples=200, rates=(0.01, 0.001), strengths=(10.0, 1e9)
)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = SMALL.model_copy(update={"streams": ("D9-1",), "seeds": (3,)})
    data = ANALYSIS.load(config, RunOptions())
    records = list(analysis.measure(config, data, Workspace(Place(folder))))
    return config, data, records, json.loads((folder / "curves.json").read_text())


def test_a_run_has_every_point_of_the_grid(run):
    _, _, records, kept = run
    points = [(r["importance"], r["rate"], r["strength"]) for r in records]
    one = [("none", 0.0), ("masq", 10.0), ("masq", 1e9), ("fim", 10.0), ("fim", 1e9)]
    assert points == [(name, rate, strength) for rate in (0.01, 0.001) for name, strength in one]
    assert {(r["stream"], r["net"], r["seed"]) for r in records} == {("D9-1", "5-4", 3)}
    assert kept["steps"] == [2, 4]
    assert [c["importance"] for c in kept["curves"]] == ["first"] + ["none", "masq", "masq", "fim", "fim"] * 2


def test_accuracies_are_those_of_the_networks(run):
    """The curves for lambda = 0 and for the FIM are those of two retrainings here, from the same first task."""
    config, data, records, _ = run
    tasks = streams.make_tasks(config, data, "D9-1", 3)
    model = subject.network(config.model_copy(update={"hidden": (5, 4)}), data, 3)
    total = sum(p.numel() for p in model.parameters())
    options = {"steps": 4, "every": 4, "evaluation": {}}
    first = train_copies(model, tasks[0].train, torch.zeros(1, total), lr=1e-3, seed=6, **options)
    model.load_state_dict({name: p[0] for name, p in first.parameters.items()})
    fim = estimate(Problem(model, "cross_entropy", tasks[0].train), "empirical_fisher", "diag", backend="torch")
    for place, weights in ((0, torch.zeros(1, total)), (3, 10.0 * fim.diagonal()[None])):
        second = train_copies(model, tasks[1].train, weights, lr=0.01, seed=7, **options)
        model_after = subject.network(config.model_copy(update={"hidden": (5, 4)}), data, 3)
        model_after.load_state_dict({name: p[0] for name, p in second.parameters.items()})
        x, y = (torch.cat(parts) for parts in zip(tasks[0].test, tasks[1].test, strict=True))
        assert records[place]["last"] == pytest.approx(evaluate(model_after, x, y).accuracy)
        assert records[place]["last_D2"] == pytest.approx(evaluate(model_after, *tasks[1].test).accuracy)


def test_parts_and_nets():
    assert len(ANALYSIS.parts(PRESETS["cpu"].config)) == 3 * 3 * 8
    assert len(PRESETS["paper"].config.nets) == 36
    assert {"800-800-200", "800-400-400", "800-800"} < set(PRESETS["paper"].config.nets)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "cnn"}, "leave model and weights as they are"),
        ({"nets": ("5", "5")}, "nets needs one or more different values"),
        ({"samples": 650}, "samples is 650, but the first task of D5-5 has"),
        ({"train_samples": 10_000}, "10,000 training samples requested"),
    ],
)
def test_what_is_refused(changed, words):
    config = SMALL.model_copy(update=changed)
    with pytest.raises(CurvlabError, match=words):
        ANALYSIS.check(config, ANALYSIS.load(config, RunOptions()))


# Choosing, and claims -------------------------------------------------------------------------------------------------

VALUES = {
    "D5-5": {"masq": 0.8, "fim": 0.79, "none": 0.49},
    "D9-1": {"masq": 0.8, "fim": 0.79, "none": 0.3},
    "DP10-10": {"masq": 0.9, "fim": 0.91, "none": 0.89},
}


def found(changed=(), seeds=3):
    """Return records of one network and rate, and one strength of each importance; ``changed`` of the last seed."""
    records = []
    for stream, values in VALUES.items():
        for name, value in values.items():
            for seed in range(seeds):
                record = {"stream": stream, "net": "50-50", "seed": seed, "importance": name, "rate": 1e-4}
                record |= {"strength": 0.0 if name == "none" else 100.0, "last_D1": 0.5, "last_D2": 0.5}
                record |= {"validation_last": value, "validation_best": value, "last": value, "best": value}
                record["peak"] = value
                if seed == seeds - 1 and stream == "D5-5":
                    record |= dict(changed).get(name, {})
                records.append(record)
    return records


def claims(records, config=PRESETS["cpu"].config, data=MNIST):
    return table1.claims(records, config, data)


def test_every_claim_can_be_reproduced():
    assert [claim.verdict for claim in claims(found())] == ["reproduced"] * 12
    assert all(claim.scope.startswith("direction, at training samples 20,000") for claim in claims(found()))


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"none": {"last": 0.44}}, {0}),
        ({"none": {"last": 0.56}}, {0}),
        ({"masq": {"last": 0.58, "best": 0.58}, "fim": {"last": 0.58}}, {1}),
        ({"fim": {"last": 0.77}}, {2}),
        ({"fim": {"last": 0.83}}, {2}),
        ({"masq": {"best": 0.79}}, {3}),
    ],
)
def test_every_claim_can_fail(changed, missed):
    verdicts = [claim.verdict for claim in claims(found(changed))]
    assert {place for place, verdict in enumerate(verdicts) if verdict == "not reproduced"} == missed


def test_no_verdict_under_other_conditions_or_without_a_value():
    digits = claims(found(), data=Subject("digits", (1, 8, 8), 10, 1437, 360))
    assert {claim.verdict for claim in digits} == {"not tested"}
    short = claims(found(), PRESETS["cpu"].config.model_copy(update={"steps": 400}))
    assert {claim.reason for claim in short} == {"steps per task is 400, at least 500 is needed"}
    assert {claim.verdict for claim in claims(found(seeds=2))} == {"not tested"}
    keys = ("validation_last", "validation_best", "last", "best", "peak")
    diverged = claims(found({"masq": dict.fromkeys(keys)}))
    assert [claim.verdict for claim in diverged[:4]] == ["not tested"] * 4


def test_points_are_chosen_on_held_out_samples_by_their_mean_over_seeds():
    def record(net, seed, held_out, test):
        keys = {"importance": "masq", "net": net, "rate": 1e-3, "strength": 1.0, "seed": seed}
        return {**keys, "validation_last": held_out, "last": test}

    records = [record("1", 0, 0.9, 0.1), record("1", 1, 0.5, 0.1), record("2", 0, 0.6, 0.3), record("2", 1, 0.6, 0.3)]
    assert table1.choose(records, "validation_last") == Point("masq", "1", 1e-3, 1.0)
    assert table1.choose(records, "last") == Point("masq", "2", 1e-3, 1.0)
    assert table1.choose([*records, record("1", 2, None, None)], "validation_last").net == "2"
    assert table1.choose([], "last") is None


def test_the_table_has_both_ways_of_choosing_and_published_numbers_for_their_data_alone():
    rows = table1.rows("D5-5", [r for r in found() if r["stream"] == "D5-5"], "mnist")
    assert [(row["criterion"], row["method"]) for row in rows] == [
        *(("best", name) for name in ("MaSQ", "FIM", "FIM, MaSQ's net and rate")),
        *(
            ("last", name)
            for name in ("MaSQ", "FIM", "λ = 0", "FIM, MaSQ's net and rate", "λ = 0, MaSQ's net and rate")
        ),
    ]
    assert [row["published"] for row in rows] == [0.8781, None, None, 0.8729, None, None, None, 0.49]
    assert rows[0]["on_test"] == pytest.approx(0.8)
    others = table1.rows("D5-5", [r for r in found() if r["stream"] == "D5-5"], "digits")
    assert {row["published"] for row in others} == {None}


def test_equal_strengths():
    (row,) = table1.at_equal_strength([r for r in found() if r["stream"] == "D5-5"])
    assert (row["strength"], row["difference"]) == (100.0, pytest.approx(0.01))


def test_the_figure():
    line = {"D1": [0.5, 0.9], "D2": [0.1, 0.2], "both": [0.3, 0.5]}
    points = [("first", 1e-3, 0.0), ("none", 1e-4, 0.0), ("masq", 1e-4, 100.0), ("fim", 1e-4, 100.0)]
    curves = [
        {
            "stream": stream,
            "net": "50-50",
            "seed": seed,
            "steps": [50, 100],
            "curves": [{"importance": name, "rate": rate, "strength": s, **line} for name, rate, s in points],
        }
        for stream in VALUES
        for seed in range(3)
    ]
    done = ANALYSIS.report(Results(PRESETS["cpu"].config, MNIST, {"table": found()}, artifacts={"curves": curves}))
    figure = done.figures["curves"]()
    assert figure.get_figwidth() == 6.8
    assert len(figure.axes) == 12
    assert [axes.get_title() for axes in figure.axes[:3]] == ["D5-5", "D9-1", "DP10-10"]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [50, 100, 150, 200]
    assert figure.axes[0].lines[2].get_ydata().tolist() == [0.3, 0.5, 0.3, 0.5]
    assert ANALYSIS.report(Results(SMALL, MNIST, {"table": found()}, artifacts={"curves": []})).figures == {}
