"""The analysis ``training_regimes``: what is measured after each task, its claims and figure."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject, load_dataset
from curvlab.analyze.regimes import training_regimes as analysis
from curvlab.analyze.regimes.observer import count_above
from curvlab.analyze.regimes.options import RegimesConfig
from curvlab.analyze.regimes.training_regimes import (
    ANALYSIS,
    PRESETS,
    TrainingRegimesConfig,
    correlate,
    report,
    summarise,
)
from curvlab.continual import Regime, metrics, permuted, run
from curvlab.continual.strategies import Naive
from curvlab.data import load
from curvlab.estimators import estimate
from curvlab.grid import Place
from curvlab.matrices import Diagonal, Info
from curvlab.models import build
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem

CPU = PRESETS["cpu"].config
MNIST = Subject("mnist", (1, 28, 28), 10, 60_000, 10_000)
DIGITS = Subject("digits", (1, 8, 8), 10, 1437, 360)


def tiny(**changes):
    values = {"hidden": (5,), "tasks": 3, "epochs": 1, "task_samples": 64, "samples": 40, "streams": ("permuted",)}
    return TrainingRegimesConfig(**values | changes)


def measure(config, folder):
    return ANALYSIS.execute(config.model_dump(mode="json"), Place(folder))


def test_a_regime_is_what_the_loop_is_given():
    stable = Regime(lr=0.1, decay=0.4, batch_size=16, dropout=0.25)
    seen = []
    stream = permuted(load("digits"), tasks=12, samples=32)
    model = build("mlp", (1, 8, 8), 10, hidden=(4,))
    run(stream, model, Naive(), **stable.options(), observe=lambda learner: seen.append(learner.lr) or {})
    assert seen == pytest.approx([stable.rate(task) for task in range(1, 13)], rel=1e-12)
    assert seen[0] == pytest.approx(0.04)
    assert seen[-1] == 5e-5


def test_batches_of_a_shrinking_regime_become_smaller():
    config = tiny(stable_batch_size=32, batch_decay=0.5)
    shrinking, stable = (Regime.of(config, name) for name in ("stable+shrinking", "stable"))
    assert [shrinking.size(task) for task in (1, 2, 3, 7)] == [32, 16, 8, 1]
    assert [stable.size(task) for task in (1, 7)] == [32, 32]
    seen = []
    stream = permuted(load("digits"), tasks=3, samples=64)
    model = build("mlp", (1, 8, 8), 10, hidden=(4,))
    run(stream, model, Naive(), **shrinking.options(3), observe=lambda learner: seen.append(learner.steps) or {})
    assert seen == [2, 4, 8]


@pytest.mark.parametrize("name", ["stable", "plastic+dropout"])
def test_every_point_is_that_of_dense_matrices(tmp_path, name):
    config = tiny(regimes=(name,), seeds=(3,), dtype="float64", tol=1e-8, stable_lr=0.5, top=2, fixed_step=0.2)
    network, *records = measure(config, tmp_path)
    points = [record for record in records if "matvecs" in record]
    accuracies = [record for record in records if "accuracy" in record]
    spectra = json.loads((tmp_path / "spectra.json").read_text())

    regime = Regime.of(config, name)
    stream = permuted(load_dataset(config, Place(tmp_path)), tasks=3, seed=3, samples=64)
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
        largest = [r["eigenvalue"] for r in records if "eigenvalue" in r and r["task"] == t + 1]
        assert largest == pytest.approx(torch.linalg.eigvalsh(dense).flip(0)[:2].tolist(), rel=1e-6)
        assert (spectra[t]["task"], spectra[t]["values"][-1]) == (t + 1, pytest.approx(point["lambda_max"]))
        if t == 0:
            assert (point["distance"], point["loss_forgetting"]) == (None, None)
            continue
        moved = torch.cat([(after[t][key] - after[t - 1][key]).flatten() for key in after[t]])
        assert point["distance"] == pytest.approx(float(moved.norm()), rel=1e-10)
        assert point["loss_forgetting"] == pytest.approx(loss(t, t - 1) - loss(t - 1, t - 1), rel=1e-8)
        start = {key: after[t - 1][key] for key in after[t]}
        after.append({key: start[key] + 0.2 * (after[t][key] - start[key]) / moved.norm() for key in start})
        assert point["fixed_forgetting"] == pytest.approx(loss(-1, t - 1) - loss(t - 1, t - 1), rel=1e-6)
        after.pop()
    summary = metrics.summary(result.accuracy)
    assert all(network[key] == summary[key] for key in ("acc", "forgetting", "learning_accuracy", "bwt"))
    assert network["lambda_max"] == pytest.approx(np.mean([point["lambda_max"] for point in points]))
    assert network["distance"] == pytest.approx(np.mean([point["distance"] for point in points[1:]]))
    matrix = result.accuracy.tolist()
    assert [(r["after"], r["task"]) for r in accuracies] == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    assert all(r["accuracy"] == matrix[r["after"] - 1][r["task"] - 1] for r in accuracies)


def test_eigenvalues_above_a_value_are_counted():
    space, info = ParameterSpace(("w",), ((6,),)), Info("hessian", "diag", "", "", 1)
    values = torch.tensor([-1.0, 0.0, 1e-3, 0.05, 0.05, 2.0], dtype=torch.float64)
    found = count_above(Diagonal(values, space, info), 2.0)
    above = dict(zip(found["values"], found["above"], strict=True))
    assert found["values"][0] == pytest.approx(2e-4)
    assert found["above"][0] == pytest.approx(4)
    assert [round(above[value]) for value in above if 1.1e-3 < value < 0.049] == [3] * 16
    assert found["above"][-1] == pytest.approx(0)


def test_measuring_does_not_change_the_training(tmp_path):
    network, *_ = measure(tiny(regimes=("stable",), seeds=(0,)), tmp_path)
    model = build("mlp", (1, 8, 8), 10, hidden=(5,), dropout=0.25)
    stream = permuted(load_dataset(tiny(), Place(tmp_path)), tasks=3, samples=64)
    regime = Regime(0.1, 0.4, 16, 0.25)
    result = run(stream, model, Naive(), **regime.options(), momentum=0.8)
    assert network["acc"] == metrics.acc(result.accuracy)


def test_a_run_continues_after_the_last_finished_task(tmp_path, monkeypatch):
    config = tiny(regimes=("stable",), seeds=(0,))
    whole = measure(config, tmp_path / "whole")
    real, left = Naive.loss, [10]  # in the third task, of four steps each

    def interrupt(self, learner, batch):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(self, learner, batch)

    with monkeypatch.context() as stop:
        stop.setattr(Naive, "loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure(config, tmp_path / "stopped")
    steps = []
    monkeypatch.setattr(Naive, "loss", lambda *given: (steps.append(1), real(*given))[1])
    assert measure(config, tmp_path / "stopped") == whole
    assert len(steps) == 4
    left_over = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left_over == {"spectra.json"}  # what was in the others is in the records


def test_the_two_solvers(tmp_path):
    exact, powered = (
        measure(tiny(regimes=("plastic",), seeds=(0,), solver=solver), tmp_path)[0]
        for solver in ("lanczos", "power_iteration")
    )
    assert powered["lambda_max"] == pytest.approx(exact["lambda_max"], rel=0.2)
    assert powered["lambda_max"] != exact["lambda_max"]
    assert powered["distance"] == exact["distance"]


# What is made of the records.


def networks(**changes):
    """Three seeds, two streams: the plastic regime has three times all but accuracy, the shrinking one half of it."""
    return [
        {"stream": stream, "regime": regime, "seed": seed, "acc": 0.9, "learning_accuracy": 0.9, "loss_forgetting": 1.0}
        | dict.fromkeys(("forgetting", "lambda_max", "distance"), scale * (0.1 + 0.01 * seed))
        | changes.get(f"{stream}/{regime}", {})
        for stream in ("rotated", "permuted")
        for regime, scale in (("stable", 1.0), ("plastic", 3.0), ("stable+shrinking", 0.5))
        for seed in range(3)
    ]


def points(**changes):
    return [
        {"stream": stream, "regime": regime, "seed": seed, "task": task, "matvecs": 5}
        | {"lambda_max": scale * task, "distance": None if task == 1 else scale * 0.5}
        | {"fixed_forgetting": None if task == 1 else scale * (task - 1) * 0.01}
        | changes.get(f"{stream}/{regime}/{task}", {})
        for stream in ("rotated", "permuted")
        for regime, scale in (("stable", 1.0), ("plastic", 3.0))
        for seed in range(3)
        for task in (1, 2, 3)
    ]


CLAIMS = (
    "wider minima are closer",
    "a step of length 1 costs",
    "forgets less",
    "eigenvalue is smaller",
    "move less",
    "costs little",
    "after every task",
    "smaller batches",
)


def judge(found, after, config=CPU, data=MNIST, stream="rotated"):
    return [claim for claim in analysis.claims(found, after, config, data) if claim.text.startswith(stream)]


def test_all_claims_are_reproduced_by_records_that_are_as_they_say():
    good = judge(networks(), points())
    assert [claim.verdict for claim in good] == ["reproduced"] * len(CLAIMS)
    assert all(words in claim.text for words, claim in zip(CLAIMS, good, strict=True))
    assert [claim.ours for claim in good[2:4]] == pytest.approx([-0.22, 1 / 3])
    assert {claim.scope for claim in good} == {"direction, at training samples per task 10,000, seeds 3"}


@pytest.mark.parametrize(
    ("words", "network", "point"),
    [
        (
            "wider minima are closer",
            {},
            {"rotated/plastic/2": {"distance": 0.1}, "rotated/plastic/3": {"distance": 0.1}},
        ),
        (
            "a step of length 1 costs",
            {},
            {f"rotated/stable/{t}": {"fixed_forgetting": 1.0 / t} for t in (2, 3)},
        ),
        ("forgets less", {"rotated/stable": {"forgetting": 0.5}, "rotated/stable+shrinking": {"forgetting": 0.4}}, {}),
        ("smaller batches", {"rotated/stable+shrinking": {"forgetting": 0.13}}, {}),
        ("eigenvalue is smaller", {"rotated/stable": {"lambda_max": 0.5}}, {}),
        ("move less", {"rotated/stable": {"distance": 0.5}}, {}),
        ("costs little", {"rotated/stable": {"learning_accuracy": 0.83}}, {}),
        (
            "after every task",
            {},
            {"rotated/stable/1": {"lambda_max": 3.5}, "rotated/stable/2": {"fixed_forgetting": 0.035}},
        ),
    ],
)
def test_a_claim_is_not_reproduced(words, network, point):
    found = judge(networks(**network), points(**point))
    assert [claim.text for claim in found if claim.verdict == "not reproduced"] == [found[CLAIMS.index(words)].text]
    other = judge(networks(**network), points(**point), stream="permuted")
    assert {claim.verdict for claim in other} == {"reproduced"}


def test_claims_are_not_tested_on_other_data():
    found = judge(networks(), points(), PRESETS["default"].config, DIGITS)
    assert {claim.verdict for claim in found} == {"not tested"}
    assert all(claim.reason.startswith("data is digits, published: mnist") for claim in found)


def test_claims_where_something_is_missing():
    alone = [record for record in networks() if record["regime"] == "stable"]
    found = judge(alone, [point for point in points() if point["regime"] == "stable"])
    assert {claim.verdict for claim in found[2:]} == {"not tested"}

    def without(records):
        return [r for r in records if (r["stream"], r["regime"], r["seed"]) != ("rotated", "stable", 1)]

    found = analysis.claims(without(networks()), without(points()), CPU, MNIST)
    assert [claim.verdict for claim in found] == ["not tested"] * 8 + ["reproduced"] * 8
    assert [row["seeds"] for row in summarise(without(networks()))] == [2, 3, 3, 3, 3, 3]


def test_correlations_are_of_steps_and_where_they_end():
    rows = correlate(points())
    assert [(row["stream"], row["seed"], row["points"]) for row in rows] == [
        (stream, seed, 4) for stream in ("rotated", "permuted") for seed in range(3)
    ]
    assert rows[0]["width"] == pytest.approx(2 / np.sqrt(5))  # ranks 1 2 3 4 and 1.5 1.5 3.5 3.5
    assert correlate(points()[:3])[0]["width"] is None


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

    def draw(after, seen):
        records = {"table": networks(), "points": after, "accuracies": seen}
        found = report(Results(CPU, MNIST, records))
        assert found.summary.title.startswith("Training regimes after 5 tasks of mnist")
        return found.figures["regime_curves"]()

    drawn = draw(points(), accuracies)
    assert len(drawn.axes) == 8
    mixed = [record | {"regime": "stable-batch_size"} for record in (*points(), *accuracies)]
    (legend,) = draw(mixed[: len(points())], mixed[len(points()) :]).legends
    assert legend.get_texts()[0].get_text() == "stable, batch size of plastic"
    mean, first, eigenvalue, distance = drawn.axes[4:]
    thick = {axes: [line for line in axes.lines if line.get_linewidth() > 1] for axes in drawn.axes}
    assert len(mean.lines) == 2 * (1 + 3)  # the mean and each seed
    np.testing.assert_allclose(thick[mean][0].get_xydata(), [[1, 0.91], [2, 0.86], [3, 0.81]])
    np.testing.assert_allclose(thick[first][1].get_xydata(), [[1, 0.91], [2, 0.81], [3, 0.71]])
    np.testing.assert_allclose(thick[eigenvalue][1].get_xydata(), [[1, 3], [2, 6], [3, 9]])
    np.testing.assert_allclose(thick[distance][0].get_xydata(), [[2, 0.5], [3, 0.5]])
    assert [text.get_text() for text in drawn.legends[0].get_texts()][:2] == ["stable", "plastic"]


def test_figures_of_minima_and_spectra():
    spectra = [
        [{"stream": "permuted", "regime": regime, "seed": 0, "task": task, "values": [0.1, 1.0], "above": [9.0, 1.0]}]
        for regime in ("stable", "plastic")
        for task in (1, 2, 3)
    ]
    records = {"table": networks(), "points": points(), "accuracies": []}
    made = report(Results(CPU, MNIST, records, artifacts={"spectra": spectra}))
    minima, steps = made.figures["minima"](), made.figures["spectra"]()
    assert len(minima.axes) == 4
    assert [axes.get_title() for axes in steps.axes] == ["permuted, after task 1", "permuted, after task 3"]
    assert len(steps.axes[0].lines) == 2
    x, y = minima.axes[0].collections[0].get_offsets().T  # of the stable regime: a step starts from the task before
    np.testing.assert_allclose(sorted(set(x.tolist())), [1, 2])
    np.testing.assert_allclose(sorted(set(y.tolist())), [0.01, 0.02])
    after = [{**point, "fixed_forgetting": -0.1} for point in points()]
    drawn = report(Results(CPU, MNIST, {**records, "points": after})).figures["minima"]()
    assert drawn.axes[0].get_yscale() == "linear"  # with nothing positive, points are where they are
    assert all("hollow" not in text.get_text() for text in drawn.legends[0].get_texts())
    assert "spectra" not in report(Results(CPU, MNIST, records)).figures


def test_presets_are_the_papers_regimes():
    for name in ("cpu", "paper"):
        config = PRESETS[name].config
        assert (config.hidden, config.tasks, config.epochs, config.momentum) == ((100, 100), 5, 5, 0.8)
        assert Regime.of(config, "stable") == Regime(0.1, 0.4, 16, 0.25)
        assert Regime.of(config, "plastic") == Regime(0.01, 1.0, 64, 0.0)
    assert all(field.description for field in RegimesConfig.model_fields.values())
