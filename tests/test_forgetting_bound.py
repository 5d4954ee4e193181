"""The analysis ``forgetting_bound``: its expansion against dense matrices and exact quadratics, regimes, its run."""

import json
import math
import shlex
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from killing import stopped_when_written
from scipy.stats import spearmanr
from torch import nn

from curvlab import CurvlabError
from curvlab.analyze import forgetting_bound as analysis
from curvlab.analyze.__main__ import main
from curvlab.analyze.command import RunOptions
from curvlab.analyze.forgetting_bound import (
    PRESETS,
    ForgettingBoundConfig,
    Regime,
    accuracy_metrics,
    claims_of,
    correlations_of,
    expansion,
    summarise,
    toy,
)
from curvlab.continual import permuted
from curvlab.data import load
from curvlab.estimators import estimate
from curvlab.grid import Place, Store
from curvlab.models import build, mlp
from curvlab.problem import Problem
from curvlab.training import evaluate, fit
from curvlab.training.state import derived_seed

pytestmark = pytest.mark.usefixtures("one_server", "cells_here", "no_figures")

TINY = "--hidden 5 --epochs 1 --task-samples 64 --samples 40 --regimes stable plastic --streams permuted"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(analysis.__file__).parents[2]))


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(["forgetting_bound", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


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
    with pytest.raises(CurvlabError, match="dropout belongs to mlp; cnn takes none"):
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
    assert toy(seed) <= 1e-10
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


def test_the_networks_learn_one_task_after_another(call):
    line = "--hidden 6 --epochs 2 --task-samples 100 --samples 50 --regimes stable-decay --streams permuted --seeds 3"
    assert call(f"{line} --dtype float64 --out run")[0] == 0
    records = json.loads(Path("run/table.json").read_text())
    accuracies = json.loads(Path("run/accuracies.json").read_text())

    tasks = permuted(load("digits"), tasks=3, seed=3)
    model = build("mlp", (1, 8, 8), 10, hidden=(6,), dropout=0.25, seed=3).double()
    assert len(records) == 2
    before = old_samples = None
    for number, task in enumerate(tasks, start=1):
        x, y = (part[:100] for part in task.train)
        common = {"optimizer": "sgd", "momentum": 0.8, "epochs": 2, "batch_size": 16}
        fit(model, (x, y), lr=0.1, seed=derived_seed(3, number), **common)
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


# What is made of them.


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
        {"stream": "rotated", "seed": seed}
        | {key: float(rng.integers(6)) for key in ("forgetting", *analysis._CORRELATED)}
        for seed in (0, 1)
        for _ in range(12)
    ]
    for row in correlations_of(records):
        mine = [record for record in records if record["seed"] == row["seed"]]
        for key in analysis._CORRELATED:
            expected = spearmanr([r["forgetting"] for r in mine], [r[key] for r in mine]).statistic
            assert row[key] == pytest.approx(expected, abs=1e-12)
        assert row["points"] == 12
    assert correlations_of(records[:2])[0]["bound"] is None
    assert correlations_of([{**record, "bound": 1.0} for record in records])[0]["bound"] is None


def verdicts(claims):
    return {claim.text.split(" (")[0]: claim.verdict for claim in claims}


def test_claims():
    good = claims_of(pairs(), seen(), [1e-16] * 3)
    assert len(good) == 2 + 2 * 5
    assert {claim.verdict for claim in good} == {"reproduced"}
    assert {claim.verdict for claim in claims_of(pairs()[:2], seen()[:2], [0.0])} == {"not tested"}

    above = verdicts(claims_of(pairs(**{"rotated/stable": {"quadratic": 1.5}}), seen(), [0.0] * 3))
    assert [text for text, verdict in above.items() if verdict != "reproduced"] == [next(iter(above))]
    within = pairs(**{"rotated/stable": {"quadratic": 1.0005, "bound": 1.0}})
    assert claims_of(within, seen(), [0.0] * 3)[0].verdict == "reproduced"
    assert claims_of(within, seen(), [0.0] * 3, tol=1e-4)[0].verdict == "not reproduced"
    negative = pairs(**{"rotated/stable": {"quadratic": -0.5, "bound": -1.0}})
    assert claims_of(negative, seen(), [0.0] * 3)[0].verdict == "not reproduced"
    assert claims_of(pairs(), seen(), [0.0, 1e-9, 0.0])[1].verdict == "not reproduced"

    reversed_ranks = pairs(**{"rotated/plastic": {"bound": 0.2}})
    changed = {
        "rotated: what is forgotten goes with the bound": (reversed_ranks, seen()),
        "rotated: its Hessian's largest eigenvalue is smaller": (
            pairs(**{"rotated/stable": {"lambda_max": 9}}),
            seen(),
        ),
        "rotated: it moves less from task to task": (pairs(**{"rotated/stable": {"distance": 9}}), seen()),
    }
    for text, (records, accuracies) in changed.items():
        found = verdicts(claims_of(records, accuracies, [0.0] * 3))
        assert {t for t, verdict in found.items() if verdict == "not reproduced"} == {text}
    forgets = verdicts(claims_of(pairs(), seen(stable=(0.9, 0.1)), [0.0] * 3))
    assert {t for t, verdict in forgets.items() if verdict == "not reproduced"} == {
        f"{stream}: the stable regime forgets less than the plastic one" for stream in ("rotated", "permuted")
    }
    dear = claims_of(pairs(), seen(stable=(0.83, 0.8)), [0.0] * 3)
    assert [claim.verdict for claim in dear if "costs" in claim.text] == ["not reproduced"] * 2


def test_claims_of_one_regime_are_not_tested():
    alone = [record for record in pairs() if record["regime"] == "stable"]
    accuracies = [record for record in seen() if record["regime"] == "stable"]
    found = claims_of(alone, accuracies, [0.0] * 3)
    assert [claim.verdict for claim in found][:2] == ["reproduced"] * 2
    assert {claim.verdict for claim in found if "stable over plastic" in claim.text} == {"not tested"}


def test_claims_where_a_cell_has_failed():
    def without(records):
        return [r for r in records if (r["stream"], r["regime"], r["seed"]) != ("rotated", "stable", 1)]

    found = claims_of(without(pairs()), without(seen()), [0.0] * 3)
    for claim in found:
        untested = claim.text.startswith(("rotated", "1/2 d'H d is at most"))
        assert claim.verdict == ("not tested" if untested else "reproduced"), claim.text
    table = summarise(without(pairs()), without(seen()))
    assert [row["seeds"] for row in table] == [2, 3, 3, 3]


def test_figure():
    changes = {"rotated/stable": {"forgetting": -0.1}}
    figure = analysis.figure(pairs(**changes), "title")
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
    assert not any("hollow" in text.get_text() for text in analysis.figure(pairs(), "").legends[0].get_texts())


# The run.


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_run_and_the_same_again(call, monkeypatch, with_figures):
    line = f"{TINY.replace('--streams permuted', '')} --seeds 0 1 2 --tasks 3 --degrees 30 --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    assert {name for name in files("run") if not name.startswith("sweep.sqlite")} == {
        *("config.yaml", "table.json", "table.csv", "table.md", "table.tex", "accuracies.json", "correlations.json"),
        *("claims.json", "provenance.json", "bound_and_factors.png", "bound_and_factors.pdf"),
    }
    checkpoints = sorted(str(Path(*Path(name).parts[-2:])) for name in files("run") if ".cells/" in name)
    assert checkpoints == sorted(
        f"{stream}-{regime}/task-{task}.pt"
        for stream in ("rotated", "permuted")
        for regime in ("stable", "plastic")
        for task in (1, 2, 3)
        for _ in range(3)
    )
    records = json.loads(Path("run/table.json").read_text(), parse_constant=pytest.fail)
    assert len(records) == len(pd.read_csv("run/table.csv")) == 2 * 3 * 2 * 2
    for record in records:
        assert record["quadratic"] <= record["bound"] * (1 + 1e-3)
        assert record["bound"] == pytest.approx(0.5 * record["lambda_max"] * record["distance"] ** 2, rel=1e-9)
    claims = json.loads(Path("run/claims.json").read_text())
    assert [claim["verdict"] for claim in claims[:2]] == ["reproduced"] * 2
    for text in (
        "What a 64-5-10 network on digits forgets",
        "Test accuracy",
        "Spearman's rank correlation",
        "Saved in",
    ):
        assert text in out
    assert Path("run/table.tex").read_text().isascii()
    assert set(json.loads(Path("run/provenance.json").read_text())["seconds"]) == {*("data", "cells", "figures")}

    names = {name for name in files("run") if not name.endswith(".lock")}
    before = {name: Path("run", name).read_bytes() for name in names}
    with monkeypatch.context() as no_cell:
        no_cell.setattr("curvlab.grid.running.supervised", None)  # a finished run is only printed again
        assert call(line) == (0, out, "")
    assert {name: Path("run", name).read_bytes() for name in names} == before


def same_results(first, second):
    for name in ("table.json", "table.tex", "accuracies.json", "correlations.json", "bound_and_factors.pdf"):
        assert Path(first, name).read_bytes() == Path(second, name).read_bytes()


def test_a_cell_is_all_of_a_configuration_and_continues(call, tmp_path, monkeypatch):
    """Cells of one stream and regime each come to the same as one of all; one that is stopped trains nothing again."""
    assert call(f"{TINY} --seeds 4 --out run")[0] == 0
    values = {"hidden": (5,), "epochs": 1, "task_samples": 64, "samples": 40, "regimes": ("stable", "plastic")}
    config = PRESETS["default"].model_copy(update={**values, "streams": ("permuted",), "seeds": (4,)})
    real, left = analysis.expansion, [3]

    def interrupted(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as stop:
        stop.setattr(analysis, "expansion", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analysis.cell(config, Place(tmp_path / "place"))
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "place").rglob("*.pt")}
    assert len(trained) == 5
    records = analysis.cell(config, Place(tmp_path / "place"))
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert [r for r in records if "forgetting" in r] == json.loads(Path("run/table.json").read_text())
    assert [r for r in records if "accuracy" in r] == json.loads(Path("run/accuracies.json").read_text())


@pytest.mark.parametrize("done", [1, 3])
def test_interrupted_and_continued(call, monkeypatch, done):
    line = f"{TINY} --seeds 0 1 --tasks 3 --jobs 1"
    assert call(f"{line} --out undisturbed")[0] == 0
    real, left = Store.finish, [done]

    def interrupted(self, outcome):
        real(self, outcome)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(Store, "finish", interrupted)
        code, out, err = call(f"{line} --out run")
    assert (code, out) == (130, "")
    assert err == f"interrupted\ncells done in run: {done}; the same command with --out run continues there\n"
    assert call(f"{line} --out run --jobs 2")[0] == 0
    same_results("run", "undisturbed")
    assert json.loads(Path("run/provenance.json").read_text())["continued"] is True


def test_killed_and_continued(call, starter):
    """In the second cell, after its first task."""
    line = f"{TINY} --regimes plastic --tasks 3 --seeds 0 1 --jobs 1"
    assert call(f"{line} --out undisturbed")[0] == 0
    command = ["curvlab.analyze", "forgetting_bound", *shlex.split(line), "--out", "run"]
    assert stopped_when_written(starter, command, "run", "task-1.pt", 2)[0] == -signal.SIGKILL
    assert not Path("run/table.json").exists()
    assert call(f"{line} --out run")[0] == 0
    same_results("run", "undisturbed")


def test_a_cell_that_fails_is_told(call):
    line = f"{TINY} --seeds 0 1 2 --plastic-lr 1e30 --out run"
    code, out, err = call(line)
    assert code == 1
    assert err.startswith(
        "error: 3 of 6 cells have failed, the first (seed 0) so: the loss of the evaluation data is nan"
    )
    assert "cells done in run: 3; the same command with --out run --retry-failed continues there" in err
    assert out.count("regimes=") == 3
    records = json.loads(Path("run/table.json").read_text())
    assert {(r["regime"], r["seed"]) for r in records} == {("stable", seed) for seed in range(3)}
    claims = {claim["text"]: claim["verdict"] for claim in json.loads(Path("run/claims.json").read_text())}
    assert {verdict for text, verdict in claims.items() if "stable over plastic" in text} == {"not tested"}


def test_one_seed_of_a_regime_fails(call):
    """The titles do not say of all rows how many seeds there are."""
    assert call(f"{TINY} --seeds 0 --regimes stable --out one")[0] == 0
    (folder,) = Path("one/sweep.sqlite.cells").iterdir()
    Path("run/sweep.sqlite.cells").mkdir(parents=True)
    Path("run/sweep.sqlite.cells", folder.name).write_text("where the folder of the cell belongs")
    Path("run/config.yaml").write_text(call(f"{TINY} --seeds 0 1 --print-config")[1])
    code, out, _ = call(f"{TINY} --seeds 0 1 --out run")
    assert code == 1
    assert "standard deviation over the seeds that did not fail" in " ".join(out.split())
    assert out.count("┃ seeds") == 3


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--tasks 1", "--tasks should be greater than or equal to 2, not '1'"),
        ("--regimes", "regimes needs one value or several different ones"),
        ("--regimes stable stable", "regimes needs one value or several different ones"),
        ("--regimes stabel", "--regimes should be 'stable'"),
        ("--streams permuted permuted", "streams needs one value or several different ones"),
        ("--streams shuffled", "--streams should be 'rotated' or 'permuted', not 'shuffled'"),
        ("--seeds", "seeds needs one value or several different ones"),
        ("--samples 101 --task-samples 100", "samples is 101, but there are 100 training samples"),
        ("--task-samples 1438", "task_samples is 1,438, but there are 1,437 training samples"),
        ("--stable-dropout 1", "--stable-dropout should be less than 1"),
        ("--stable-decay 1.1", "--stable-decay should be less than or equal to 1"),
        ("--plastic-lr 0", "--plastic-lr should be greater than 0"),
        ("--solver arnoldi", "--solver should be 'lanczos' or 'power_iteration'"),
        ("--degrees nan", "--degrees should be a finite number"),
        ("--model cnn", "with cnn set stable_dropout and plastic_dropout to 0"),
        ("--model resnet20 --regimes plastic", "resnet20 takes images of shape (3, 32, 32)"),
        ("--data flat.npz", "only images (C, H, W) can be rotated"),
        ("--weights gone.pt", "gone.pt: there is no such file"),
        ("--device cuda:99", "there is no GPU 'cuda:99' here"),
        ("--regime stable", "there is no option --regime; the nearest is --regimes"),
    ],
)
def test_bad_value(call, line, fragment, tmp_path):
    x, y = np.random.default_rng(0).random((20, 5), np.float32), np.arange(20) % 3
    np.savez("flat.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    code, out, err = call(f"--regimes plastic stable {line} --out run")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert [path.name for path in tmp_path.iterdir()] == ["flat.npz"]


def test_presets_are_the_papers_regimes():
    for name in ("cpu", "paper"):
        config = PRESETS[name]
        assert (config.hidden, config.tasks, config.epochs, config.momentum) == ((100, 100), 5, 5, 0.8)
        assert Regime.of(config, "stable") == Regime(0.1, 0.4, 16, 0.25)
        assert Regime.of(config, "plastic") == Regime(0.01, 1.0, 64, 0.0)
    assert PRESETS["paper"].task_samples is None


def test_vectors_can_be_permuted(call):
    x, y = np.random.default_rng(0).random((40, 5), np.float32), np.arange(40) % 3
    np.savez("flat.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    line = "--data flat.npz --streams permuted --regimes plastic+dropout --tasks 2 --seeds 0 --hidden 4"
    code, _, err = call(f"{line} --solver power_iteration --out run")
    assert (code, err) == (0, "")
    assert len(json.loads(Path("run/table.json").read_text())) == 1


def test_what_the_options_say():
    assert RunOptions().out is None
    fields = ForgettingBoundConfig.model_fields
    assert all(field.description for field in fields.values())
