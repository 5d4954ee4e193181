"""The analysis ``lr_schedules``: what it transfers, its shares of variance, its claims; the schedule ``one_cycle``."""

import math

import pytest
import torch
from torch import nn

from curvlab import CurvlabError
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.transfer.lr_schedules import ANALYSIS, choose_best, report, share_variance
from curvlab.analyze.transfer.options import PRESETS, LrSchedulesConfig, check, load_data, pretrain
from curvlab.commandline.options import RunOptions
from curvlab.grid import Place
from curvlab.training import Training
from curvlab.training.optimization import make_optimizer, make_schedule

CPU = PRESETS["cpu"].config
MNIST = Subject("mnist", (1, 28, 28), 10, 60_000, 10_000)
DIGITS = Subject("digits", (1, 8, 8), 10, 1437, 360)
SCHEDULES = ("constant", "linear", "cosine", "step", "exponential", "one_cycle")


def test_one_cycle_rises_to_the_rate_and_falls_to_zero():
    parameters = [nn.Parameter(torch.zeros(1))]
    training = Training(optimizer="sgd", lr=2.0, schedule="one_cycle", steps=100)
    optimizer = make_optimizer("sgd", parameters, 2.0, 0.0, 0.0)
    schedule = make_schedule(training, optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2.0 / 25)
    assert rates[30] == pytest.approx(2.0) == max(rates)
    assert rates[15] == pytest.approx((2.0 / 25 + 2.0) / 2)  # half way up
    assert rates[65] == pytest.approx(1.0)  # half way down
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 69 / 70))


# Data and network.


@pytest.fixture(scope="module")
def config():
    return LrSchedulesConfig(hidden=(6,), source_steps=30, validation=60, steps=5)


def test_the_source_is_of_other_classes_than_the_target(config):
    data = load_data(config, RunOptions(offline=True))
    assert set(data.source.y_train.tolist()) == {0, 1, 2, 3, 4}
    assert set(data.y_train.tolist()) == set(data.held_out[1].tolist()) == {5, 6, 7, 8, 9}
    check(config, data)
    model, fresh = (pretrain(config, data, 0, steps=steps) for steps in (None, 0))
    outputs = model(data.source.x_test)
    assert torch.equal(outputs, pretrain(config, data, 0)(data.source.x_test))
    body, head = (dict(model.named_parameters()), dict(fresh.named_parameters()))
    assert not torch.equal(body["fc1.weight"], head["fc1.weight"])  # it has learnt
    assert float(body["fc2.weight"].detach().abs().max()) <= 1 / math.sqrt(6)  # its last layer is as new


def test_networks_that_are_pre_trained_twice_or_not_are_refused(config):
    data = load_data(config, RunOptions(offline=True))
    with pytest.raises(CurvlabError, match="class 5 is both in source_classes and in classes"):
        check(config.model_copy(update={"source_classes": (4, 5)}), data)
    bare = config.model_copy(update={"source_classes": ()})
    with pytest.raises(CurvlabError, match="set either weights or source_classes"):
        check(bare, load_data(bare, RunOptions(offline=True)))
    with pytest.raises(CurvlabError, match="lrs needs one or more different values"):
        check(config.model_copy(update={"lrs": (0.1, 0.1)}), data)


def test_a_training_that_diverges_is_a_record(config, tmp_path):
    wild = config.model_copy(update={"lrs": (1e12,), "schedules": ("constant",), "seeds": (0,), "steps": 20})
    (record,) = ANALYSIS.measure(wild, load_data(wild, RunOptions(offline=True)), Workspace(Place(tmp_path)))
    assert (record["reached"], record["accuracy"]) == (False, None)
    assert "lower lr" in record["note"]


# What is made of records.


def make_records(change=lambda record: {}, schedules=SCHEDULES, lrs=(0.01, 0.1, 1.0)):
    """Return records with which every claim is reproduced; ``change`` returns what is to be another."""
    records = []
    for schedule in schedules:
        for lr in lrs:
            for seed in (0, 1, 2):
                record = {"schedule": schedule, "lr": lr, "decay": None, "seed": seed, "note": ""}
                good = lr == 0.1
                record |= {"accuracy": 0.9 if good else 0.6, "validation_accuracy": 0.9 if good else 0.5}
                record |= {"area": (0.8 if good else 0.4) + 0.01 * SCHEDULES.index(schedule), "lambda_max": 2.0}
                record |= {"steps_to_target": 100 if good else None, "reached": good}
                if schedule == "cosine":
                    record |= {"steps_to_target": 80 if good else None, "lambda_max": 1.0}
                    record["validation_accuracy"] += 0.01
                records.append(record | change(record))
    return records


FAILING = {
    "decay costs": lambda r: {"accuracy": 0.85} if r["schedule"] == "cosine" else {},
    "the speed": lambda r: {"steps_to_target": 100} if r["reached"] else {},
    "too large": lambda r: {"reached": True},
    "the initial rate": lambda r: {"area": 0.1 * SCHEDULES.index(r["schedule"]) + 0.01 * r["lr"]},
    "flatter": lambda r: {"lambda_max": 3.0} if r["schedule"] == "cosine" else {},
}


def find_claim(records, text, data=MNIST):
    made = report(Results(CPU, data, {"table": records, "curves": []}))
    (claim,) = [claim for claim in made.claims if text in claim.text]
    return claim


@pytest.mark.parametrize("text", FAILING)
def test_each_claim_can_hold_and_fail(text):
    assert find_claim(make_records(), text).verdict == "reproduced"
    assert find_claim(make_records(FAILING[text]), text).verdict == "not reproduced"
    assert find_claim(make_records(), text, DIGITS).verdict == "not tested"


def test_the_best_rate_is_that_of_held_out_samples():
    records = make_records(lambda r: {"accuracy": 1.0 if r["lr"] == 1.0 else 0.5})  # on test samples another is best
    assert {record["lr"] for record in choose_best(records)} == {0.1}
    diverged = make_records(lambda r: {"validation_accuracy": None} if r["lr"] == 0.1 and r["seed"] == 0 else {})
    assert {record["lr"] for record in choose_best(diverged)} == {0.1}
    assert len(choose_best(diverged)) == 3 * len(SCHEDULES)


def test_shares_of_variance_have_their_closed_forms():
    additive = make_records(lambda r: {"area": r["lr"] + 2.0 * SCHEDULES.index(r["schedule"])})
    for share in share_variance(additive, "area", 0.1):
        assert share["schedule"] + share["lr"] == pytest.approx(1)
        assert share["both"] == pytest.approx(0, abs=1e-12)
        rows, columns = torch.tensor([0.0, 2, 4, 6, 8, 10]), torch.tensor([0.01, 0.1, 1.0])
        expected = 3 * rows.var(correction=0) * 6 / (18 * (rows.var(correction=0) + columns.var(correction=0)))
        assert share["schedule"] == pytest.approx(expected.item())
    product = make_records(
        lambda r: {"area": (-1.0) ** SCHEDULES.index(r["schedule"]) * (r["lr"] - 0.37)}, lrs=(0.01, 0.1, 1.0)
    )
    assert all(share["both"] == pytest.approx(1) for share in share_variance(product, "area", 0.1))
    flat = make_records(lambda r: {"area": None})
    assert [share["lr"] for share in share_variance(flat, "area", 0.1)] == [None] * 3


def test_figures_are_drawn_where_all_trainings_diverge():
    diverged = {
        **dict.fromkeys(("accuracy", "area", "lambda_max", "steps_to_target", "validation_accuracy")),
        "reached": False,
    }
    made = report(Results(CPU, MNIST, {"table": make_records(lambda r: diverged), "curves": []}))
    assert {claim.verdict for claim in made.claims} <= {"not tested", "not reproduced"}
    for draw in made.figures.values():
        draw()


def test_figures_are_drawn():
    curves = [
        {"schedule": schedule, "lr": 0.1, "decay": None, "seed": 0, "step": step, "test_accuracy": 0.5, "rate": 0.1}
        for schedule in SCHEDULES
        for step in (10, 20)
    ]
    records = make_records(lambda r: {"accuracy": None, "area": None, "lambda_max": None} if r["lr"] == 1.0 else {})
    made = report(Results(CPU, MNIST, {"table": records, "curves": curves}))
    assert [len(draw().axes) for draw in made.figures.values()] == [2, 3]
