"""The analysis ``imm_masq``: mergings against the strategy, claims both ways, the figure; choosing points."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.workspace import Workspace
from curvlab.analyze.masq import choice, streams
from curvlab.analyze.masq import imm_masq as analysis
from curvlab.analyze.masq.imm_masq import ANALYSIS, PRESETS, ImmMasqConfig
from curvlab.commandline.options import RunOptions
from curvlab.continual import run
from curvlab.continual.strategies import IMM
from curvlab.grid import Place
from curvlab.training import evaluate

MNIST = Subject("mnist", (1, 28, 28), 10, 20_000, 2000)


@pytest.fixture(scope="module")
def small():
    config = ImmMasqConfig(
        hidden=(6,), steps=8, streams=("D5-5",), seeds=(2,), train_samples=400, alphas=(0.5,), dtype="float64"
    )
    return config, ANALYSIS.load(config, RunOptions())


def test_merging_is_that_of_the_strategy(small, tmp_path):
    """Mean-IMM of the solutions of a run of the strategy; mode-IMM by its definition."""
    config, data = small
    stream = streams.make_tasks(config, data, "D5-5", 2)
    model, seen = subject.network(config, data, 2), []

    def see(learner):
        seen.append(parameters_to_vector(learner.model.parameters()).detach().clone())
        return {}

    run(stream, model, IMM("mean"), observe=see, steps=5, seed=0)
    first, merged = seen
    second = 2 * merged - first
    ones = torch.ones_like(first)
    assert torch.allclose(analysis.merge(first, second, (ones, ones), 0.5), merged, rtol=0, atol=1e-12)
    weights = (torch.rand_like(first), torch.rand_like(first))
    expected = (0.3 * weights[0] * first + 0.7 * weights[1] * second) / (0.3 * weights[0] + 0.7 * weights[1])
    assert torch.allclose(analysis.merge(first, second, weights, 0.7), expected)


def test_the_records_of_a_run(small, tmp_path):
    config, data = small
    records = list(analysis.measure(config, data, Workspace(Place(tmp_path))))
    assert [(r["transfer"], r["merge"]) for r in records] == [
        (transfer, merge) for transfer in ("weight", "l2", "drop") for merge in ("last", "mean", "fim", "masq")
    ]
    tasks = streams.make_tasks(config, data, "D5-5", 2)
    model = streams.train_first(config, data, tasks[0], 2)
    ends = {t: analysis._train_second(config, model, tasks[1], t, 2) for t in ("weight", "l2", "drop")}
    vectors = [parameters_to_vector(end.parameters()) for end in ends.values()]
    assert not torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    last = {r["transfer"]: r for r in records if r["merge"] == "last"}
    for name, end in ends.items():
        x, y = (torch.cat(parts) for parts in zip(tasks[0].test, tasks[1].test, strict=True))
        assert last[name]["accuracy"] == pytest.approx(evaluate(end, x, y).accuracy)


def synthetic(seeds=3, **changed):
    """Return records with which every claim is reproduced, but for what is changed in the last seed."""
    usual = {"last": 0.5, "mean": 0.8, "fim": 0.85, "masq": 0.85, "drop": 0.86}
    found = []
    for seed in range(seeds):
        now = usual | (changed if seed == seeds - 1 else {})
        for transfer in ("weight", "drop"):
            for merge in ("last", "mean", "fim", "masq"):
                accuracy = now["drop"] if (transfer, merge) == ("drop", "fim") else now[merge]
                held_out = 0.1 if (transfer, merge) == ("drop", "fim") else 0.2
                keys = {"stream": "D5-5", "seed": seed, "transfer": transfer, "merge": merge, "alpha": 0.5}
                found.append({**keys, "validation": held_out, "accuracy": accuracy, "D1": 0.5, "D2": 0.5})
    return found


def report(found, data=MNIST):
    config = PRESETS["cpu"].config.model_copy(update={"streams": ("D5-5",), "transfers": ("weight", "drop")})
    return ANALYSIS.report(Results(config, data, {"table": found}))


@pytest.mark.parametrize(
    ("changed", "missed"),
    [({}, set()), ({"masq": 0.82}, {0}), ({"mean": 0.87}, {1}), ({"last": 0.845}, {2}), ({"drop": 0.84}, {3})],
)
def test_every_claim_goes_either_way(changed, missed):
    claims = report(synthetic(**changed)).claims
    assert {place for place, claim in enumerate(claims) if claim.verdict == "not reproduced"} == missed
    assert [claim.verdict for claim in claims].count("reproduced") == 4 - len(missed)


def test_no_verdict_elsewhere():
    assert {claim.verdict for claim in report(synthetic(seeds=2)).claims} == {"not tested"}
    digits = report(synthetic(), Subject("digits", (1, 8, 8), 10, 1437, 360))
    assert {claim.verdict for claim in digits.claims} == {"not tested"}


def test_the_figure_and_the_table():
    made = report(synthetic())
    figure = made.figures["alphas"]()
    assert figure.get_figwidth() == 3.3
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["mean-IMM", "mode-IMM, FIM", "mode-IMM, MaSQ"]
    assert len(made.summary.records) == 8
    assert made.summary.records[1]["halves"] == pytest.approx(0.8)


def test_choosing():
    found = [{"a": a, "seed": seed, "v": v} for a, v in (("x", 0.5), ("y", 0.7), ("z", None)) for seed in (0, 1)]
    assert choice.choose_best(found, ["a"], "v") == {"a": "y"}
    assert choice.choose_best([], ["a"], "v") is None
    assert choice.values_by_seed(found, (0, 1), {"a": "x"}, "v") == [0.5, 0.5]
    assert choice.values_by_seed(found, (0, 1), None, "v") == []
    assert choice.subtract([1.0], []) == []
