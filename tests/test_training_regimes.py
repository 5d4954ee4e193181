"""The analysis ``training_regimes``: what is measured after each task, its claims, its run."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curvlab.analyze.__main__ import main
from curvlab.analyze.regimes import training_regimes as analysis
from curvlab.analyze.regimes.options import RegimesConfig
from curvlab.analyze.regimes.training_regimes import (
    ANALYSIS,
    PRESETS,
    TrainingRegimesConfig,
    claims_of,
    figure,
    summarise,
)
from curvlab.continual import metrics, permuted, run
from curvlab.continual.regimes import Regime
from curvlab.continual.strategies import Naive
from curvlab.data import load
from curvlab.estimators import estimate
from curvlab.grid import Place, Store
from curvlab.models import build
from curvlab.problem import Problem

pytestmark = pytest.mark.usefixtures("one_server", "cells_here", "no_figures")

TINY = "--hidden 5 --epochs 1 --tasks 3 --task-samples 64 --samples 40 --regimes stable plastic --streams permuted"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(analysis.__file__).parents[2]))


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(["training_regimes", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


def read(*path):
    return json.loads(Path(*path).read_text(), parse_constant=pytest.fail)


def tiny(**changes):
    values = {"hidden": (5,), "tasks": 3, "epochs": 1, "task_samples": 64, "samples": 40, "streams": ("permuted",)}
    return TrainingRegimesConfig(**values | changes)


def test_a_regime_is_what_the_loop_is_given():
    stable = Regime(lr=0.1, decay=0.4, batch_size=16, dropout=0.25)
    seen = []
    stream = permuted(load("digits"), tasks=12, samples=32)
    model = build("mlp", (1, 8, 8), 10, hidden=(4,))
    run(stream, model, Naive(), **stable.options(), observe=lambda learner: seen.append(learner.lr) or {})
    assert seen == pytest.approx([stable.rate(task) for task in range(1, 13)], rel=1e-12)
    assert seen[0] == pytest.approx(0.04)
    assert seen[-1] == 5e-5


@pytest.mark.parametrize("name", ["stable", "plastic+dropout"])
def test_every_point_is_that_of_dense_matrices(tmp_path, name):
    config = tiny(regimes=(name,), seeds=(3,), dtype="float64", tol=1e-8, stable_lr=0.5)
    network, *records = ANALYSIS.cell(config, Place(tmp_path))
    points = [record for record in records if "matvecs" in record]
    accuracies = [record for record in records if "accuracy" in record]

    regime = Regime.of(config, name)
    stream = permuted(load("digits"), tasks=3, seed=3, samples=64)
    model = build("mlp", (1, 8, 8), 10, hidden=(5,), dropout=0.25, seed=3).double()
    after = []
    result = run(
        stream,
        model,
        Naive(),
        **regime.options(),
        momentum=0.8,
        seed=3,
        observe=lambda learner: after.append({k: v.clone() for k, v in learner.model.state_dict().items()}) or {},
    )
    plain = build("mlp", (1, 8, 8), 10, hidden=(5,)).double().eval()

    def problem(weights, task):
        plain.load_state_dict(after[weights])
        return Problem(plain, "cross_entropy", tuple(part[:40] for part in stream[task].train))

    def loss(weights, task):
        (batch,) = problem(weights, task).batches()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(plain(batch[0]), batch[1]))

    assert [point["task"] for point in points] == [1, 2, 3]
    for t, point in enumerate(points):
        dense = estimate(problem(t, t), "hessian", "dense", backend="torch").to_dense()
        assert point["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-6)
        assert point["task_loss"] == pytest.approx(loss(t, t), rel=1e-10)
        if t == 0:
            assert (point["distance"], point["loss_forgetting"]) == (None, None)
            continue
        moved = torch.cat([(after[t][key] - after[t - 1][key]).flatten() for key in after[t]])
        assert point["distance"] == pytest.approx(float(moved.norm()), rel=1e-10)
        assert point["loss_forgetting"] == pytest.approx(loss(t, t - 1) - loss(t - 1, t - 1), rel=1e-8)
    summary = metrics.summary(result.accuracy)
    assert all(network[key] == summary[key] for key in ("acc", "forgetting", "learning_accuracy", "bwt"))
    assert network["lambda_max"] == pytest.approx(np.mean([point["lambda_max"] for point in points]))
    assert network["distance"] == pytest.approx(np.mean([point["distance"] for point in points[1:]]))
    matrix = result.accuracy.tolist()
    assert [(r["after"], r["task"]) for r in accuracies] == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    assert all(r["accuracy"] == matrix[r["after"] - 1][r["task"] - 1] for r in accuracies)


def test_measuring_does_not_change_the_training(tmp_path):
    network, *_ = ANALYSIS.cell(tiny(regimes=("stable",), seeds=(0,)), Place(tmp_path))
    model = build("mlp", (1, 8, 8), 10, hidden=(5,), dropout=0.25)
    stream = permuted(load("digits"), tasks=3, samples=64)
    regime = Regime(0.1, 0.4, 16, 0.25)
    result = run(stream, model, Naive(), **regime.options(), momentum=0.8)
    assert network["acc"] == metrics.acc(result.accuracy)


def test_a_cell_continues_after_the_last_finished_task(tmp_path, monkeypatch):
    config = tiny(regimes=("stable",), seeds=(0,))
    whole = ANALYSIS.cell(config, Place(tmp_path / "whole"))
    real, left = Naive.loss, [10]  # in the third task, of four steps each

    def interrupted(self, learner, batch):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(self, learner, batch)

    with monkeypatch.context() as stop:
        stop.setattr(Naive, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ANALYSIS.cell(config, Place(tmp_path / "stopped"))
    steps = []
    monkeypatch.setattr(Naive, "loss", lambda *given: (steps.append(1), real(*given))[1])
    assert ANALYSIS.cell(config, Place(tmp_path / "stopped")) == whole
    assert len(steps) == 4
    assert not files(tmp_path)  # what was in them is in the records


def test_the_two_solvers(tmp_path):
    exact, powered = (
        ANALYSIS.cell(tiny(regimes=("plastic",), seeds=(0,), solver=solver), Place(tmp_path))[0]
        for solver in ("lanczos", "power_iteration")
    )
    assert powered["lambda_max"] == pytest.approx(exact["lambda_max"], rel=0.2)
    assert powered["lambda_max"] != exact["lambda_max"]
    assert powered["distance"] == exact["distance"]


# What is made of them.


def networks(**changes):
    """Three seeds, two streams, both regimes: the plastic one has three times everything but accuracy."""
    return [
        {"stream": stream, "regime": regime, "seed": seed, "acc": 0.9, "learning_accuracy": 0.9, "loss_forgetting": 1.0}
        | dict.fromkeys(("forgetting", "lambda_max", "distance"), scale * (0.1 + 0.01 * seed))
        | changes.get(f"{stream}/{regime}", {})
        for stream in ("rotated", "permuted")
        for regime, scale in (("stable", 1.0), ("plastic", 3.0))
        for seed in range(3)
    ]


def points(**changes):
    return [
        {"stream": stream, "regime": regime, "seed": seed, "task": task, "matvecs": 5}
        | {"lambda_max": scale * task, "distance": None if task == 1 else scale * 0.5}
        | changes.get(f"{stream}/{regime}/{task}", {})
        for stream in ("rotated", "permuted")
        for regime, scale in (("stable", 1.0), ("plastic", 3.0))
        for seed in range(3)
        for task in (1, 2, 3)
    ]


def test_claims():
    good = claims_of(networks(), points())
    assert len(good) == 2 * 5
    assert {claim.verdict for claim in good} == {"reproduced"}
    assert [claim.ours for claim in good[:3]] == pytest.approx([-0.22, 1 / 3, 1 / 3])
    for change, wrong in (
        ({"forgetting": 0.5}, 0),
        ({"lambda_max": 0.5}, 1),
        ({"distance": 0.5}, 3),
        ({"learning_accuracy": 0.83}, 4),
    ):
        claims = claims_of(networks(**{"rotated/stable": change}), points())
        assert [n for n, claim in enumerate(claims) if claim.verdict == "not reproduced"] == [wrong]
    one_task = claims_of(networks(), points(**{"permuted/stable/3": {"lambda_max": 9.5}}))
    assert [n for n, claim in enumerate(one_task) if claim.verdict == "not reproduced"] == [7]


def test_claims_where_something_is_missing():
    alone = [record for record in networks() if record["regime"] == "stable"]
    found = claims_of(alone, [point for point in points() if point["regime"] == "stable"])
    assert {claim.verdict for claim in found} == {"not tested"}

    def without(records):
        return [r for r in records if (r["stream"], r["regime"], r["seed"]) != ("rotated", "stable", 1)]

    found = claims_of(without(networks()), without(points()))
    assert [claim.verdict for claim in found] == ["not tested"] * 5 + ["reproduced"] * 5
    assert [row["seeds"] for row in summarise(without(networks()))] == [2, 3, 3, 3]


def test_figure():
    accuracies = [
        {"stream": stream, "regime": regime, "seed": seed, "after": after, "task": task}
        | {"accuracy": 0.9 - 0.1 * (after - task) + 0.01 * seed}
        for stream in ("rotated", "permuted")
        for regime in ("stable", "plastic")
        for seed in range(3)
        for after in (1, 2, 3)
        for task in range(1, after + 1)
    ]
    drawn = figure(points(), accuracies, "title")
    assert len(drawn.axes) == 8
    mixed = [record | {"regime": "stable-batch_size"} for record in (*points(), *accuracies)]
    (legend,) = figure(mixed[: len(points())], mixed[len(points()) :], "title").legends
    assert legend.get_texts()[0].get_text() == "stable, batch size of plastic"
    mean, first, eigenvalue, distance = drawn.axes[4:]
    np.testing.assert_allclose(mean.lines[0].get_xydata(), [[1, 0.91], [2, 0.86], [3, 0.81]])
    np.testing.assert_allclose(first.lines[1].get_xydata(), [[1, 0.91], [2, 0.81], [3, 0.71]])
    np.testing.assert_allclose(eigenvalue.lines[1].get_xydata(), [[1, 3], [2, 6], [3, 9]])
    np.testing.assert_allclose(distance.lines[0].get_xydata(), [[2, 0.5], [3, 0.5]])
    assert [text.get_text() for text in drawn.legends[0].get_texts()][:2] == ["stable", "plastic"]


# The run.


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_run_and_the_same_again(call, monkeypatch, with_figures):
    line = f"{TINY} --seeds 0 1 --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    names = {name for name in files("run") if not name.startswith("sweep.sqlite")}
    assert names == {
        *("config.yaml", "table.json", "table.csv", "table.md", "table.tex", "points.json", "accuracies.json"),
        *("claims.json", "provenance.json", "regime_curves.png", "regime_curves.pdf"),
    }
    assert len(read("run/table.json")) == 4
    assert len(read("run/points.json")) == 4 * 3
    assert len(read("run/accuracies.json")) == 4 * 6
    assert len(read("run/claims.json")) == 5
    for text in ("Training regimes after 3 tasks of digits", "stable-X is", "Saved in run"):
        assert text in out
    assert Path("run/table.tex").read_text().isascii()
    before = {name: Path("run", name).read_bytes() for name in names}
    with monkeypatch.context() as no_cell:
        no_cell.setattr("curvlab.grid.running.supervised", None)  # a finished run is only printed again
        assert call(line) == (0, out, "")
    assert {name: Path("run", name).read_bytes() for name in names} == before


def test_interrupted_and_continued(call, monkeypatch):
    line = f"{TINY} --seeds 0 --jobs 1"
    assert call(f"{line} --out undisturbed")[0] == 0
    real = Store.finish

    def interrupted(self, outcome):
        real(self, outcome)
        raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(Store, "finish", interrupted)
        code, out, err = call(f"{line} --out run")
    assert (code, out) == (130, "")
    assert err == "interrupted\ncells done in run: 1; the same command with --out run continues there\n"
    assert call(f"{line} --out run --jobs 2")[0] == 0
    for name in ("table.json", "points.json", "accuracies.json", "claims.json", "regime_curves.pdf"):
        assert Path("run", name).read_bytes() == Path("undisturbed", name).read_bytes()


def test_a_cell_that_fails_is_told(call):
    code, out, err = call(f"{TINY} --seeds 0 --plastic-lr 1e30 --out run")
    assert code == 1
    assert err.startswith("error: 1 of 2 cells has failed, the first (seed 0) so: the loss of the evaluation data is")
    assert "Failed, and in no number above" in out
    assert [r["regime"] for r in read("run/table.json")] == ["stable"]
    assert {claim["verdict"] for claim in read("run/claims.json")} == {"not tested"}


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--tasks 1", "--tasks should be greater than or equal to 2, not '1'"),
        ("--regimes stable stable", "regimes needs one value or several different ones"),
        ("--streams split", "--streams should be 'rotated' or 'permuted', not 'split'"),
        ("--seeds", "seeds needs one value or several different ones"),
        ("--task-samples 1438", "task_samples is 1,438, but there are 1,437 training samples"),
        ("--stable-dropout 1", "--stable-dropout should be less than 1"),
        ("--model cnn", "with cnn set stable_dropout and plastic_dropout to 0"),
        ("--weights gone.pt", "gone.pt: there is no such file"),
        ("--regime stable", "there is no option --regime; the nearest is --regimes"),
    ],
)
def test_bad_value(call, line, fragment, tmp_path):
    code, out, err = call(f"{line} --out run")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert list(tmp_path.iterdir()) == []


def test_presets_are_the_papers_regimes():
    for name in ("cpu", "paper"):
        config = PRESETS[name]
        assert (config.hidden, config.tasks, config.epochs, config.momentum) == ((100, 100), 5, 5, 0.8)
        assert Regime.of(config, "stable") == Regime(0.1, 0.4, 16, 0.25)
        assert Regime.of(config, "plastic") == Regime(0.01, 1.0, 64, 0.0)
    assert all(field.description for field in RegimesConfig.model_fields.values())
