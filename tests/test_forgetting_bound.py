"""The analysis ``forgetting_bound``: its expansion against dense matrices and exact quadratics, regimes, its claims."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from curvlab import CurvlabError
from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject, load_dataset
from curvlab.analyze.regimes import forgetting_bound as analysis
from curvlab.analyze.regimes.expansion import expansion, quadratic_difference
from curvlab.analyze.regimes.forgetting_bound import (
    ANALYSIS,
    CORRELATED,
    PRESETS,
    ForgettingBoundConfig,
    accuracy_metrics,
    correlate,
    identities,
    report,
    summarise,
)
from curvlab.continual import Regime, permuted
from curvlab.estimators import estimate
from curvlab.grid import Place
from curvlab.models import build, mlp
from curvlab.problem import Problem
from curvlab.training import evaluate, fit
from curvlab.training.state import derive_seed

CPU = PRESETS["cpu"].config
MNIST = Subject("mnist", (1, 28, 28), 10, 60_000, 10_000)
DIGITS = Subject("digits", (1, 8, 8), 10, 1437, 360)


# The network with dropout.


def test_mlp_with_dropout():
    model = mlp(6, (50, 40), 3, dropout=0.25)
    names = [name for name, _ in model.named_children()]
    assert names == ["flatten", "fc1", "relu1", "drop1", "fc2", "relu2", "drop2", "fc3"]
    x = torch.ones(400, 6)
    share = (model.drop1(torch.ones(400, 50)) == 0).double().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)
    plain = build("mlp", (6,), 3, hidden=(50, 40), seed=4)
    dropping = build("mlp", (6,), 3, hidden=(50, 40), dropout=0.25, seed=4)
    assert torch.equal(plain.eval()(x), dropping.eval()(x))
    with pytest.raises(CurvlabError, match=r"dropout must be at least 0 and below 1, not 1\.0"):
        mlp(6, (5,), 3, dropout=1.0)
    with pytest.raises(CurvlabError, match="dropout belongs to mlp, not to cnn"):
        build("cnn", (1, 8, 8), 3, dropout=0.1)


# The expansion.


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_the_expansion_is_that_of_dense_matrices(loss):
    old, new = network(1), network(2)
    x = torch.randn(30, 4, dtype=torch.float64)
    y = torch.arange(30) % 3 if loss == "cross_entropy" else torch.randn(30, 3, dtype=torch.float64)
    problem = Problem(old, loss, [(x[:20], y[:20]), (x[20:], y[20:])])
    found = expansion(problem, new, tol=1e-9)

    def value(model):
        return problem.loss.values(model(x), y).mean()

    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value(old), list(old.parameters()))])
    hessian = estimate(problem, "hessian", "dense", backend="torch").to_dense()
    d = nn.utils.parameters_to_vector(new.parameters()) - nn.utils.parameters_to_vector(old.parameters())
    largest = torch.linalg.eigvalsh(hessian)[-1]
    expected = {
        "forgetting": value(new) - value(old),
        "loss": value(old),
        "gradient_term": gradient @ d,
        "quadratic": 0.5 * d @ hessian @ d,
        "second_order": gradient @ d + 0.5 * d @ hessian @ d,
        "distance": d.norm(),
        "lambda_max": largest,
        "bound": 0.5 * largest * d @ d,
        "tightness": (d @ hessian @ d) / (largest * d @ d),
    }
    of_largest = ("lambda_max", "bound", "tightness")
    for key, wanted in expected.items():
        assert found[key] == pytest.approx(wanted.item(), rel=1e-8 if key in of_largest else 1e-10), key
    assert found["matvecs"] > 0
    assert not any(parameter.grad is not None for model in (old, new) for parameter in model.parameters())


def test_the_two_solvers():
    old, new = network(3), network(4)
    x, y = torch.randn(60, 4, dtype=torch.float64), torch.arange(60) % 3
    problem = Problem(old, "cross_entropy", (x, y))
    exact, powered = (expansion(problem, new, solver=solver, tol=1e-6) for solver in ("lanczos", "power_iteration"))
    assert powered["lambda_max"] == pytest.approx(exact["lambda_max"], rel=0.05)
    assert powered["residual"] > exact["residual"]
    assert powered["quadratic"] == exact["quadratic"]


@pytest.mark.parametrize("seed", range(5))
def test_on_a_quadratic_loss_the_expansion_is_exact(seed):
    assert quadratic_difference(seed) <= 1e-10
    # Away from the minimum the gradient's term is needed too.
    torch.manual_seed(seed)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    old, new = (nn.Linear(5, 2, dtype=torch.float64) for _ in range(2))
    found = expansion(Problem(old, "squared_error", (x, y)), new)
    assert abs(found["gradient_term"]) > 1e-3
    assert found["forgetting"] == pytest.approx(found["second_order"], rel=1e-10)


def test_the_bound_is_reached_along_the_top_eigenvector():
    old = network(5)
    problem = Problem(old, "cross_entropy", (torch.randn(50, 4, dtype=torch.float64), torch.arange(50) % 3))
    dense = estimate(problem, "hessian", "dense", backend="torch").to_dense()
    top = torch.linalg.eigh(dense).eigenvectors[:, -1]
    new = network(5)
    nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(old.parameters()).detach() + 0.1 * top, new.parameters()
    )
    found = expansion(problem, new, tol=1e-10)
    assert found["tightness"] == pytest.approx(1, abs=1e-9)
    assert found["distance"] == pytest.approx(0.1, rel=1e-9)


def test_nothing_changed():
    old = network(6)
    problem = Problem(old, "cross_entropy", (torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3))
    found = expansion(problem, old)
    assert [found[key] for key in ("forgetting", "second_order", "quadratic", "bound", "distance")] == [0] * 5
    assert found["tightness"] is None


# Regimes and the training.


def test_regimes():
    config = ForgettingBoundConfig()
    stable, plastic = Regime(0.1, 0.4, 16, 0.25), Regime(0.01, 1.0, 64, 0.0)
    assert Regime.of(config, "stable") == stable
    assert Regime.of(config, "plastic") == plastic
    assert Regime.of(config, "stable-lr") == Regime(0.01, 0.4, 16, 0.25)
    assert Regime.of(config, "stable-decay") == Regime(0.1, 1.0, 16, 0.25)
    assert Regime.of(config, "stable-batch_size") == Regime(0.1, 0.4, 64, 0.25)
    assert Regime.of(config, "plastic+dropout") == Regime(0.01, 1.0, 64, 0.25)
    assert Regime.of(config, "plastic+lr") == Regime(0.1, 1.0, 64, 0.0)
    assert [stable.rate(task) for task in (1, 2)] == pytest.approx([0.04, 0.016])
    assert stable.rate(100) == 5e-5
    assert plastic.rate(7) == 0.01


def run_all(config, folder):
    records = ANALYSIS.execute(config.model_dump(mode="json"), Place(folder))
    return [r for r in records if "forgetting" in r], [r for r in records if "accuracy" in r]


def test_the_networks_learn_one_task_after_another(tmp_path):
    values = {"hidden": (6,), "epochs": 2, "task_samples": 100, "samples": 50, "dtype": "float64"}
    config = ForgettingBoundConfig(**values, regimes=("stable-decay",), streams=("permuted",), seeds=(3,))
    records, accuracies = run_all(config, tmp_path)

    tasks = permuted(load_dataset(config, Place(tmp_path)), tasks=3, seed=3)
    model = build("mlp", (1, 8, 8), 10, hidden=(6,), dropout=0.25, seed=3).double()
    assert len(records) == 2
    before = old_samples = None
    for number, task in enumerate(tasks, start=1):
        x, y = (part[:100] for part in task.train)
        common = {"optimizer": "sgd", "momentum": 0.8, "epochs": 2, "batch_size": 16}
        fit(model, (x, y), lr=0.1, seed=derive_seed(3, number), **common)
        model.eval()
        for i, old in enumerate(tasks[:number], start=1):
            (seen,) = [r["accuracy"] for r in accuracies if (r["after"], r["task"]) == (number, i)]
            assert seen == evaluate(model, *old.test).accuracy
        if before is not None:
            found = expansion(Problem(before, "cross_entropy", old_samples), model)
            record = records[number - 2]
            assert record["task"] == number - 1
            for key in ("forgetting", "quadratic", "distance"):
                assert record[key] == pytest.approx(found[key], rel=1e-9)
            assert record["bound"] == pytest.approx(found["bound"], rel=1e-3)
        old_samples = x[:50], y[:50]
        before = build("mlp", (1, 8, 8), 10, hidden=(6,), dropout=0.25).double().eval()
        before.load_state_dict(model.state_dict())


def test_a_run_of_several_parts_is_the_runs_of_each_and_continues(tmp_path, monkeypatch):
    values = {"hidden": (5,), "epochs": 1, "task_samples": 64, "samples": 40, "streams": ("permuted",), "seeds": (4,)}
    config = ForgettingBoundConfig(**values, regimes=("stable", "plastic"))
    whole = run_all(config, tmp_path / "whole")
    parts = [run_all(part, tmp_path / f"part-{number}") for number, part in enumerate(ANALYSIS.parts(config))]
    assert whole == tuple([record for records in kind for record in records] for kind in zip(*parts, strict=True))
    real, left = analysis.expansion, [3]

    def interrupt(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as stop:
        stop.setattr(analysis, "expansion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_all(config, tmp_path / "stopped")
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.pt")}
    assert len(trained) == 5
    assert run_all(config, tmp_path / "stopped") == whole
    assert {path: path.stat().st_mtime_ns for path in trained} == trained


def test_every_pair_is_within_the_bound(tmp_path):
    values = {"hidden": (5,), "epochs": 1, "task_samples": 64, "samples": 40, "degrees": 30.0, "seeds": (0,)}
    records, _ = run_all(ForgettingBoundConfig(**values, regimes=("stable", "plastic")), tmp_path)
    assert len(records) == 2 * 2 * 2
    for record in records:
        assert record["quadratic"] <= record["bound"] * (1 + 1e-3)
        assert record["bound"] == pytest.approx(0.5 * record["lambda_max"] * record["distance"] ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regimes": ()}, "regimes needs one or more different values"),
        ({"streams": ("permuted", "permuted")}, "streams needs one or more different values"),
        ({"samples": 101, "task_samples": 100}, "samples is 101, but there are only 100 training samples"),
        ({"task_samples": 1438}, "1,438 training samples requested, but the data set has 1,437"),
        ({"model": "cnn"}, "with cnn set stable_dropout and plastic_dropout to 0"),
        ({"model": "resnet20", "stable_dropout": 0}, "resnet20 takes images of shape"),
        ({"data": "flat.npz"}, r"only images \(C, H, W\) can be rotated"),
    ],
)
def test_check(tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).random((20, 5), np.float32), np.arange(20) % 3
    np.savez("flat.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    config = ForgettingBoundConfig(**values)
    with pytest.raises(CurvlabError, match=message):
        ANALYSIS.check(config, load_dataset(config, Place(tmp_path)))


def test_vectors_can_be_permuted(tmp_path):
    x, y = np.random.default_rng(0).random((40, 5), np.float32), np.arange(40) % 3
    np.savez(tmp_path / "flat.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    values = {"data": str(tmp_path / "flat.npz"), "streams": ("permuted",), "regimes": ("plastic+dropout",)}
    config = ForgettingBoundConfig(**values, tasks=2, seeds=(0,), hidden=(4,), solver="power_iteration")
    assert len(run_all(config, tmp_path)[0]) == 1


# What is made of the records.


def pairs(**changes):
    """Three seeds, two streams, both regimes, two pairs: the plastic regime has three times everything."""
    return [
        {"stream": stream, "regime": regime, "seed": seed, "task": task}
        | dict.fromkeys(("forgetting", "bound", "lambda_max", "distance"), scale * (1 + 0.1 * task + 0.01 * seed))
        | {"quadratic": 0.1, "gradient_term": 0.0, "second_order": 0.1, "tightness": 0.1}
        | changes.get(f"{stream}/{regime}", {})
        for stream in ("rotated", "permuted")
        for regime, scale in (("stable", 1.0), ("plastic", 3.0))
        for seed in range(3)
        for task in (1, 2)
    ]


def seen(stable=(0.9, 0.8), plastic=(0.9, 0.4)):
    """Accuracies of two tasks when learnt, and at the end, for the first."""
    return [
        {"stream": stream, "regime": regime, "seed": seed, "after": after, "task": task, "accuracy": accuracy}
        for stream in ("rotated", "permuted")
        for regime, (learnt, kept) in (("stable", stable), ("plastic", plastic))
        for seed in range(3)
        for after, task, accuracy in ((1, 1, learnt), (2, 1, kept), (2, 2, learnt))
    ]


def test_accuracy_metrics_by_hand():
    a = {(1, 1): 0.9, (2, 1): 0.95, (3, 1): 0.5, (2, 2): 0.8, (3, 2): 0.9, (3, 3): 0.7}
    found = accuracy_metrics([{"after": t, "task": i, "accuracy": value} for (t, i), value in a.items()])
    assert found["accuracy"] == pytest.approx((0.5 + 0.9 + 0.7) / 3)
    assert found["accuracy_lost"] == pytest.approx(((0.95 - 0.5) + (0.8 - 0.9)) / 2)
    assert found["learning_accuracy"] == pytest.approx((0.9 + 0.8 + 0.7) / 3)


def test_summary():
    table = summarise(pairs(), seen())
    assert [(row["stream"], row["regime"], row["seeds"]) for row in table] == [
        (stream, regime, 3) for stream in ("rotated", "permuted") for regime in ("stable", "plastic")
    ]
    assert table[1]["bound"] == pytest.approx(3 * 1.16)
    assert table[1]["bound_std"] == pytest.approx(3 * 0.01)
    assert table[0]["accuracy"] == pytest.approx(0.85)
    assert table[0]["accuracy_lost"] == pytest.approx(0.1)
    # Of a pair that did not move there is no tightness, and so none of its regime.
    still = summarise(pairs(**{"rotated/stable": {"tightness": None}}), seen())
    assert [row["tightness"] is None for row in still] == [True, False, False, False]


def test_correlations():
    rng = np.random.default_rng(0)
    records = [
        {"stream": "rotated", "seed": seed} | {key: float(rng.integers(6)) for key in ("forgetting", *CORRELATED)}
        for seed in (0, 1)
        for _ in range(12)
    ]
    for row in correlate(records):
        mine = [record for record in records if record["seed"] == row["seed"]]
        for key in CORRELATED:
            expected = spearmanr([r["forgetting"] for r in mine], [r[key] for r in mine]).statistic
            assert row[key] == pytest.approx(expected, abs=1e-12)
        assert row["points"] == 12
    assert correlate(records[:2])[0]["bound"] is None
    assert correlate([{**record, "bound": 1.0} for record in records])[0]["bound"] is None


def judge(records, accuracies, config=CPU, data=MNIST):
    """Return the claims of the rotated stream by the first words that are theirs."""
    found = {claim.text: claim for claim in analysis.claims(records, accuracies, config, data)}
    return [claim for text, claim in found.items() if text.startswith("rotated")]


CLAIMS = (
    "wider minima forget less",
    "correlates with its bound",
    "forgets less",
    "eigenvalue is smaller",
    "move less",
    "costs little",
)


def test_all_claims_are_reproduced_by_records_that_are_as_they_say():
    good = judge(pairs(), seen())
    assert [claim.verdict for claim in good] == ["reproduced"] * len(CLAIMS)
    assert all(words in claim.text for words, claim in zip(CLAIMS, good, strict=True))
    assert {claim.scope for claim in good} == {"direction, at training samples per task 10,000, seeds 3"}


@pytest.mark.parametrize(
    ("words", "changes", "kept"),
    [
        ("wider minima forget less", {"rotated/plastic": {"lambda_max": 0.2}}, {}),
        ("correlates with its bound", {"rotated/plastic": {"bound": 0.2}}, {}),
        ("forgets less", {}, {"stable": (0.9, 0.1)}),
        ("eigenvalue is smaller", {"rotated/stable": {"lambda_max": 9}}, {}),
        ("move less", {"rotated/stable": {"distance": 9}}, {}),
        ("costs little", {}, {"stable": (0.83, 0.8)}),
    ],
)
def test_a_claim_is_not_reproduced(words, changes, kept):
    found = judge(pairs(**changes), seen(**kept))
    failed = {claim.text for claim in found if claim.verdict == "not reproduced"}
    of_width = {"wider minima forget less", "eigenvalue is smaller"}
    allowed = of_width if words in of_width else {words}
    assert any(words in text for text in failed)
    assert all(any(word in text for word in allowed) for text in failed)


@pytest.mark.parametrize(
    ("config", "data", "reason"),
    [
        (PRESETS["default"].config, DIGITS, "data is digits, published: mnist; tasks is 3, published: 5"),
        (CPU.model_copy(update={"task_samples": 5000}), MNIST, "training samples per task is 5,000, at least 10,000"),
        (CPU.model_copy(update={"plastic_lr": 0.05}), MNIST, "plastic regime is lr 0.05, decay 1"),
        (CPU.model_copy(update={"degrees": 40.0}), MNIST, "degrees a task is 40, published: 10"),
    ],
)
def test_claims_are_not_tested_on_other_conditions(config, data, reason):
    found = judge(pairs(), seen(), config, data)
    assert {claim.verdict for claim in found} == {"not tested"}
    assert all(reason in claim.reason for claim in found)


def test_claims_of_the_published_conditions_have_no_scope():
    assert {claim.scope for claim in judge(pairs(), seen(), PRESETS["paper"].config)} == {""}


def test_claims_of_one_regime_are_not_tested():
    alone = [record for record in pairs() if record["regime"] == "stable"]
    found = judge(alone, [record for record in seen() if record["regime"] == "stable"])
    assert {claim.verdict for claim in found[2:]} == {"not tested"}


def test_claims_where_a_run_has_failed():
    def without(records):
        return [r for r in records if (r["stream"], r["regime"], r["seed"]) != ("rotated", "stable", 1)]

    for claim in analysis.claims(without(pairs()), without(seen()), CPU, MNIST):
        expected = "not tested" if claim.text.startswith("rotated") else "reproduced"
        assert claim.verdict == expected, claim.text
    table = summarise(without(pairs()), without(seen()))
    assert [row["seeds"] for row in table] == [2, 3, 3, 3]


def test_identities():
    excess, difference = identities(pairs(), [0, 1, 2])
    assert len(excess.values) == 3
    assert max(excess.values) < 0
    assert max(difference.values) < 1e-10
    above, _ = identities(pairs(**{"rotated/stable": {"quadratic": 1.5, "bound": 1.0}}), [0, 1, 2])
    assert above.values == pytest.approx([0.5] * 3)


def finish(records, accuracies, config=CPU, data=MNIST):
    return Results(config, data, {"table": records, "accuracies": accuracies}, total=12)


def test_report():
    found = report(finish(pairs(), seen()))
    assert len(found.tables) == 3
    assert len(found.claims) == 2 * len(CLAIMS)
    assert len(found.identities) == 2
    assert found.deviations == [
        f"{stream}: training samples per task 10,000 (60,000); seeds 3 (5)." for stream in ("rotated", "permuted")
    ]
    digits = report(finish(pairs(), seen(), PRESETS["default"].config, DIGITS))
    assert digits.deviations == []
    assert digits.summary.title.startswith("Forgetting of a 64-100-100-10 network on digits, 3 tasks")


def test_figure():
    def draw(records, accuracies=None):
        return report(finish(records, accuracies or seen())).figures["bound_and_factors"]()

    changes = {"rotated/stable": {"forgetting": -0.1}}
    figure = draw(pairs(**changes))
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["stable", "plastic"]
    assert any("hollow" in label for label in labels)
    full, hollow = figure.axes[0].collections[:2]
    assert len(full.get_offsets()) == 0
    assert len(hollow.get_offsets()) == 6
    expected = [[r["bound"], r["forgetting"]] for r in pairs() if (r["stream"], r["regime"]) == ("permuted", "plastic")]
    np.testing.assert_allclose(figure.axes[3].collections[2].get_offsets(), expected)
    assert not any("hollow" in text.get_text() for text in draw(pairs()).legends[0].get_texts())
    mixed = draw(*([record | {"regime": "stable-batch_size"} for record in found] for found in (pairs(), seen())))
    assert mixed.legends[0].get_texts()[0].get_text() == "stable, batch size of plastic"


def test_presets_are_the_papers_regimes():
    for name in ("cpu", "paper"):
        config = PRESETS[name].config
        assert (config.hidden, config.tasks, config.epochs, config.momentum) == ((100, 100), 5, 5, 0.8)
        assert Regime.of(config, "stable") == Regime(0.1, 0.4, 16, 0.25)
        assert Regime.of(config, "plastic") == Regime(0.01, 1.0, 64, 0.0)
    assert PRESETS["paper"].config.task_samples is None
