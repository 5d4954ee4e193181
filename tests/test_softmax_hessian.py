"""The analysis ``softmax_hessian``: its formulas against exact arithmetic, its network against a dense oracle."""

import json
import math
import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from curvlab.analyze.__main__ import main
from curvlab.analyze.dlcft import softmax_hessian as analysis
from curvlab.analyze.dlcft.softmax_hessian import (
    SoftmaxHessianConfig,
    claims_of,
    logit_records,
    network_record,
    random_logits,
    softmax_hessian,
    summarise,
)
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.grid import Place, Store, folder_of
from curvlab.problem import Problem

pytestmark = pytest.mark.usefixtures("one_server", "cells_here", "no_figures")

TINY = "--hidden 4 --steps 3 --points 2 --samples 40 --draws 3 --decades 4"
CONFIG = {"hidden": (4,), "steps": 3, "points": 2, "samples": 40, "draws": 3, "decades": 4}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(analysis.__file__).parents[2]))


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(["softmax_hessian", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


# At random logits.


def test_the_formula_is_automatic_differentiation():
    logits = torch.randn(5, 7, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 3, 1])
    for x, t, matrix in zip(logits, targets, softmax_hessian(logits, targets), strict=True):
        autograd = torch.autograd.functional.hessian(lambda z, t=t: F.cross_entropy(z, t), x)
        torch.testing.assert_close(matrix, autograd, rtol=0, atol=1e-14)
        p = x.softmax(0)
        torch.testing.assert_close(matrix, p.diag() - p.outer(p), rtol=0, atol=1e-14)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_the_formula_loses_no_digit_where_a_probability_rounds_to_one(target):
    logits = torch.tensor([[50.0, 0.0, -3.0]], dtype=torch.float64).roll(target)
    weights = [Fraction(math.exp(x - logits.max().item())) for x in logits[0].tolist()]
    p = [w / sum(weights) for w in weights]
    exact = [[float((p[i] if i == j else 0) - p[i] * p[j]) for j in range(3)] for i in range(3)]
    found = softmax_hessian(logits, torch.tensor([target]))[0]
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-14)
    assert 0 < found.diagonal().min() < 1e-20


@pytest.mark.parametrize("complement", [0.5, 1e-3, 1e-20, 1e-200])
def test_random_logits_have_the_probability(complement):
    logits, targets = random_logits(6, 200, complement, seed=3)
    others = logits.log_softmax(dim=1).exp().scatter(1, targets.unsqueeze(1), 0.0).sum(dim=1)
    torch.testing.assert_close(others, torch.full_like(others, complement), rtol=1e-11, atol=0)
    assert set(targets.tolist()) == set(range(6))
    again, same = random_logits(6, 200, complement, seed=3)
    assert torch.equal(again, logits)
    assert torch.equal(same, targets)
    assert not torch.equal(random_logits(6, 200, complement, seed=4)[0], logits)


def test_two_classes_in_closed_form():
    """Then the Hessian is ``p (1 - p)`` times a matrix of eigenvalues 0 and 2, and its trace is the largest."""
    config = SoftmaxHessianConfig(categories=2, draws=5, decades=30)
    for decade, record in enumerate(logit_records(config, seed=0)):
        delta = 0.5 * 10.0**-decade
        assert record["complement"] == pytest.approx(delta, rel=1e-12)
        assert record["lower"] == pytest.approx(delta * (1 - delta), rel=1e-12)
        for key in ("lambda_max", "trace"):
            assert record[key] == pytest.approx(2 * delta * (1 - delta), rel=1e-12)
        assert record["below_lower"] == pytest.approx(-1, rel=1e-12)
        assert abs(record["above_trace"]) < 1e-12
        assert record["above_upper"] == pytest.approx(-delta, rel=1e-9, abs=1e-12)
    assert record["complement"] < 1e-30


def test_records_of_logits():
    config = SoftmaxHessianConfig(draws=20, decades=18)
    records = logit_records(config, seed=1)
    assert len(records) == 19
    for record in records:
        logits, targets = random_logits(10, 20, record["complement"], seed=1)
        matrices = softmax_hessian(logits, targets)
        assert record["lambda_max"] == pytest.approx(torch.linalg.matrix_norm(matrices, 2).mean().item(), rel=1e-10)
        assert record["lower"] <= record["lambda_max"] <= record["trace"] <= record["upper"] * (1 + 1e-12)
        assert record["factors"] <= 1e-12
        assert record["autograd_entry"] <= 1e-15
        assert record["squared_error"] <= 1e-15
    tiny = logit_records(SoftmaxHessianConfig(draws=2, decades=150), seed=1)[-1]
    assert tiny["factors"] <= 1e-12  # and not the quotient of two squares that are zero
    # What automatic differentiation is left with: digits go with 1 - p_t.
    assert records[0]["autograd"] < 1e-14
    assert records[-1]["autograd"] > 0.5


def test_a_wrong_formula_and_wrong_factors_are_seen(monkeypatch):
    config = SoftmaxHessianConfig(draws=4, decades=3)
    right = softmax_hessian

    with monkeypatch.context() as wrong:
        wrong.setattr(analysis, "softmax_hessian", lambda x, t: right(x, t) * (1 + 1e-6))
        records = [record for seed in range(3) for record in logit_records(config, seed)]
    verdicts = {claim.text[:20]: claim.verdict for claim in claims_of(records, network())}
    assert verdicts["Equations (20) and ("] == "not reproduced"
    assert verdicts["So are the output fa"] == "not reproduced"


# Of a network.


def test_network_record_is_the_dense_oracle():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    record = network_record(Problem(model, "cross_entropy", (x, y)), tol=1e-10)
    p = model(x).softmax(dim=1)
    of_outputs = [torch.linalg.eigvalsh(q.diag() - q.outer(q))[-1] for q in p.detach()]
    assert record["complement"] == pytest.approx((1 - p.gather(1, y.unsqueeze(1))).mean().item(), rel=1e-10)
    assert record["outputs"] == pytest.approx(torch.stack(of_outputs).mean().item(), rel=1e-10)
    for key, problem in (
        ("ggn", Problem(model, "cross_entropy", (x, y))),
        ("hessian", Problem(model, "cross_entropy", (x, y))),
        ("jacobian", Problem(model, "squared_error", (x, torch.randn(30, 3, dtype=torch.float64)))),
    ):
        dense = estimate(problem, "hessian" if key == "hessian" else "ggn", "dense", backend="torch").to_dense()
        assert record[key] == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-8), key


def network(start=None, end=None):
    base = {"complement": 0.9, "outputs": 0.1, "jacobian": 1.0, "ggn": 1.0, "hessian": 1.0}
    first, last = {**base, **(start or {})}, {**base, "outputs": 0.01, **(end or {})}
    return [{"seed": seed, "step": step, **r} for seed in range(3) for step, r in ((0, first), (9, last))]


def test_claims():
    config = SoftmaxHessianConfig(draws=4, decades=6)
    drawn = [record for seed in range(3) for record in logit_records(config, seed)]
    assert {claim.verdict for claim in claims_of(drawn, network())} == {"reproduced"}
    assert {claim.verdict for claim in claims_of(drawn[:7], network()[:2])} == {"not tested"}
    of_network = {claim.text[:15]: claim for claim in claims_of(drawn, network(end={"outputs": 0.05, "ggn": 0.9}))}
    assert of_network["In training, th"].verdict == "not reproduced"
    assert of_network["In training, th"].ours == pytest.approx(0.5)  # of the peak, which is at the start here
    assert of_network["The curvature o"].verdict == "not reproduced"

    for key, text in (
        ("above_trace", "The largest eigenvalue is at most"),
        ("above_upper", "1 - |p|² is at most"),
        ("below_lower", "p_t (1 - p_t) is at most"),
        ("squared_error", "The squared error's"),
    ):
        broken = [*drawn[:-1], {**drawn[-1], key: 1e-9}]
        (claim,) = (claim for claim in claims_of(broken, network()) if claim.text.startswith(text))
        assert claim.verdict == "not reproduced"
    slower = [{**record, "lambda_max": record["lambda_max"] ** 0.9} for record in drawn]
    assert claims_of(slower, network())[0].verdict == "not reproduced"
    early = [record for record in drawn if record["complement"] > 0.01]
    assert claims_of(early, network())[0].verdict == "not tested"


# The run.


def test_a_run_and_the_same_again(call, with_figures):
    line = f"{TINY} --seeds 0 1 2 --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    files = {str(path.relative_to("run")) for path in Path("run").rglob("*") if path.is_file()}
    assert {file for file in files if not file.startswith("sweep.sqlite")} == {
        *("config.yaml", "table.json", "table.csv", "table.md", "table.tex", "network.json", "claims.json"),
        *("provenance.json", "vanishing_curvature.png", "vanishing_curvature.pdf"),
    }
    assert sorted(Path(file).name for file in files if ".cells/" in file) == ["checkpoint.pt"] * 3
    records = json.loads(Path("run/table.json").read_text(), parse_constant=pytest.fail)
    assert len(records) == len(pd.read_csv("run/table.csv")) == 3 * 5
    of_network = json.loads(Path("run/network.json").read_text())
    assert [(r["seed"], r["step"]) for r in of_network] == [(s, step) for s in range(3) for step in (0, 1, 3)]
    claims = json.loads(Path("run/claims.json").read_text())
    assert [claim["verdict"] for claim in claims[:7]] == ["reproduced"] * 7
    for text in ("Hessian of the softmax loss at 3 random logits", "64-4-10 network on digits learns", "Saved in run"):
        assert text in out
    assert Path("run/table.tex").read_text().isascii()

    files = {file for file in files if not file.endswith(".lock")}
    before = {file: Path("run", file).read_bytes() for file in files}
    assert call(f"{line} --jobs 3") == (0, out, "")
    assert {file: Path("run", file).read_bytes() for file in files} == before


def test_interrupted_and_continued(call, monkeypatch):
    line = f"{TINY} --seeds 0 1 --jobs 1"
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
    assert not Path("run/table.json").exists()
    assert call(f"{line} --out run")[0] == 0
    for name in ("table.json", "network.json", "claims.json"):
        assert Path("run", name).read_bytes() == Path("undisturbed", name).read_bytes()
    assert json.loads(Path("run/provenance.json").read_text())["continued"] is True


def test_a_cell_stopped_within_its_training(tmp_path, monkeypatch):
    """Its checkpoint is taken up: the network is not measured again where it was."""
    config = SoftmaxHessianConfig(**CONFIG | {"points": 3}, seeds=(1,))
    whole = analysis.cell(config, Place(tmp_path / "whole"))
    real, measured = analysis.network_record, []

    def interrupted(*arguments):
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(analysis, "network_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analysis.cell(config, Place(tmp_path / "stopped"))
    assert analysis.cell(config, Place(tmp_path / "stopped")) == whole
    assert len(measured) == 3 + 2  # of the steps 0, 1, 2 and 3


def test_a_cell_that_fails_is_told(call):
    """A wrong checkpoint is what makes the second of four fail."""
    line = f"{TINY} --seeds 0 1 2 3"
    assert call(f"{line} --out undisturbed")[0] == 0
    cells = analysis.ANALYSIS.cells([SoftmaxHessianConfig(**CONFIG, seeds=(0, 1, 2, 3))])
    checkpoint = folder_of(Path("run/sweep.sqlite"), cells[1].key) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    Path("run/config.yaml").write_bytes(Path("undisturbed/config.yaml").read_bytes())
    checkpoint.write_text("not a checkpoint")
    code, out, err = call(f"{line} --out run")
    assert code == 1
    assert "3 seeds of 4" in out
    assert " seed=1: " in out
    assert err.startswith("error: 1 of 4 cells has failed, the first (seed 1) so: ")
    assert "cells done in run: 3; the same command with --out run --retry-failed continues there" in err
    assert {record["seed"] for record in json.loads(Path("run/network.json").read_text())} == {0, 2, 3}
    assert "seeds" in Path("run/table.md").read_text().splitlines()[0]

    checkpoint.unlink()
    assert call(f"{line} --out run")[0] == 1  # not by itself
    assert call(f"{line} --out run --retry-failed")[0] == 0
    for name in ("table.json", "table.md", "network.json", "claims.json"):
        assert Path("run", name).read_bytes() == Path("undisturbed", name).read_bytes()
    assert json.loads(Path("run/provenance.json").read_text())["cells"]["done"] == 4


def test_no_cell_is_done(call):
    code, out, err = call("--points 2 --draws 2 --decades 2 --lr 1e30 --steps 200 --seeds 0 1 --out run")
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: 2 of 2 cells have failed, the first (seed 0) so: the network's outputs are not finite"
    )
    assert not Path("run/table.json").exists()
    code, out, _ = call("--points 2 --draws 2 --decades 2 --lr 1e30 --steps 200 --seeds 0 1 --out run")
    assert (code, out) == (1, "")


def test_a_cell_refuses_what_the_run_refuses(tmp_path):
    with pytest.raises(CurvlabError, match="samples is 1,438, but there are 1,437"):
        analysis.cell(SoftmaxHessianConfig(samples=1438, seeds=(0,)), Place(tmp_path))


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--categories 1", "--categories should be greater than or equal to 2"),
        ("--draws 0", "--draws should be greater than or equal to 1"),
        ("--decades 400", "--decades should be less than or equal to 150"),
        ("--steps 0", "--steps should be greater than or equal to 1"),
        ("--tol 0", "--tol should be greater than 0"),
        ("--seeds 1 1", "seeds needs one value or several different ones"),
        ("--samples 1438", "samples is 1,438, but there are 1,437"),
        ("--model resnet20", "resnet20 takes images of shape (3, 32, 32)"),
        ("--device cuda:99", "there is no GPU 'cuda:99' here"),
        ("--momentum 0.5", "momentum belongs to sgd"),
        ("--draw 3", "there is no option --draw; the nearest is --draws"),
    ],
)
def test_bad_value(call, line, fragment, tmp_path):
    code, out, err = call(f"--points 2 --out run {line}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert fragment in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_figure():
    config = SoftmaxHessianConfig(draws=4, decades=6)
    drawn = [record for seed in range(3) for record in logit_records(config, seed)]
    figure = analysis.vanishing_curvature(*summarise(drawn, network()), "net")
    assert isinstance(figure, Figure)
    left, right = figure.axes
    assert {axes.get_xscale() + axes.get_yscale() for axes in (left, right)} == {"loglog"}
    points = next(line for line in left.lines if line.get_label() == "softmax").get_xydata()
    assert points[:, 0].tolist() == [0.5 * 10.0**-k for k in range(7)]
    means = [np.mean([r["lambda_max"] for r in drawn if r["complement"] == x]) for x in points[:, 0]]
    np.testing.assert_allclose(points[:, 1], means, rtol=1e-12)
    assert "net" in right.get_title()
