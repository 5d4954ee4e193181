"""The analysis ``softmax_hessian``: its formulas against exact arithmetic, its network against a dense oracle."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from curvlab import plots
from curvlab.analyze.dlcft import softmax_hessian as analysis
from curvlab.analyze.dlcft.softmax_hessian import (
    logit_records,
    network_record,
    random_logits,
    softmax_hessian,
    summarise,
)
from curvlab.analyze.dlcft.softmax_hessian_claims import claims, conditions, deviations, identities
from curvlab.analyze.dlcft.softmax_hessian_options import PRESETS, SoftmaxHessianConfig
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.grid import Place
from curvlab.problem import Problem

CONFIG = {"hidden": (4,), "steps": 3, "points": 2, "samples": 40, "draws": 3, "decades": 4}
SUBJECT = Subject("mnist", (1, 28, 28), 10, 60000, 10000)
MNIST = conditions(PRESETS["cpu"].config, SUBJECT, [{"step": 0, "complement": 0.9}, {"step": 5000, "complement": 0.03}])


def measure(config, folder):
    dataset = analysis.ANALYSIS.load(config, RunOptions())
    return list(analysis.measure(config, dataset, Workspace(Place(folder))))


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


def test_identities_show_a_wrong_formula(monkeypatch):
    config = SoftmaxHessianConfig(draws=4, decades=6)
    right = softmax_hessian
    records = [record for seed in range(3) for record in logit_records(config, seed)]
    slope, autograd, factors, *bounds, squared_error = [one.values for one in identities(records)]
    assert all(len(values) == 3 for values in (slope, autograd, factors, *bounds, squared_error))
    assert max(map(abs, slope)) < 0.01
    assert max(*autograd, *factors, *(value for values in bounds for value in values)) < 1e-12
    assert max(squared_error) == 0
    monkeypatch.setattr(analysis, "softmax_hessian", lambda x, t: right(x, t) * (1 + 1e-6))
    wrong = [record for seed in range(3) for record in logit_records(config, seed)]
    _, autograd, factors, *_ = [one.values for one in identities(wrong)]
    assert min(*autograd, *factors) > 1e-8
    # A rate needs two probabilities near one.
    assert all(map(math.isnan, identities([r for r in records if r["complement"] > 0.01])[0].values))


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


@pytest.mark.parametrize(
    ("end", "verdicts", "ours"),
    [
        ({"outputs": 0.02, "ggn": 1.0}, ["reproduced", "reproduced"], [0.2, 1.0]),
        # The fall is measured from the peak, here the start. Without a fall, the second claim is not tested.
        ({"outputs": 0.05, "ggn": 1.0}, ["not reproduced", "not tested"], [0.5, 1.0]),
        ({"outputs": 0.02, "ggn": 0.9}, ["reproduced", "not reproduced"], [0.2, 0.9]),
    ],
)
def test_verdicts(end, verdicts, ours):
    found = claims(network(end=end), MNIST)
    assert [claim.verdict for claim in found] == verdicts
    assert [claim.ours for claim in found] == pytest.approx(ours)
    assert [claim.scope for claim in found] == ["direction, at network 784-100-10 network, steps 5,000", ""]
    assert {claim.verdict for claim in claims(network(end=end)[:2], MNIST)} == {"not tested"}


def test_the_claim_of_the_paper_is_not_tested_on_other_data():
    ours = conditions(
        SoftmaxHessianConfig(), Subject("digits", (64,), 10, 1437, 360), [{"step": 0, "complement": 0.01}]
    )
    paper, own = claims(network(), ours)
    assert (paper.verdict, own.verdict) == ("not tested", "reproduced")
    assert paper.reason == "data is digits, published: mnist; training samples is 1,437, at least 5,000 is needed"
    assert deviations(ours) == []
    assert deviations(MNIST) == ["network 784-100-10 network (shallow_cnn); steps 5,000 (10,000)."]


# The run.


def test_a_run_and_its_report(tmp_path):
    config = SoftmaxHessianConfig(**CONFIG, seeds=(1,))
    records = measure(config, tmp_path)
    logits = [record for record in records if "lambda_max" in record]
    steps = [record for record in records if "step" in record]
    assert len(logits) == 5
    assert [(record["seed"], record["step"]) for record in steps] == [(1, 0), (1, 1), (1, 3)]
    run = Results(config, Subject("digits", (64,), 10, 1437, 360), {"table": logits, "network": steps})
    report = analysis.ANALYSIS.report(run)
    assert report.summary.title == "Hessian of the softmax loss at 3 random logits with 10 classes; one seed"
    assert "64-4-10 network on digits, 40 samples" in report.tables[1].title
    assert len(report.identities) == 7
    assert {claim.verdict for claim in report.claims} == {"not tested"}
    assert isinstance(report.figures["vanishing_curvature"](), Figure)


def test_a_run_that_was_stopped_within_its_training(tmp_path, monkeypatch):
    """Its checkpoint is taken up: the network is not measured again where it was."""
    config = SoftmaxHessianConfig(**CONFIG | {"points": 3}, seeds=(1,))
    whole = measure(config, tmp_path / "whole")
    real, measured = analysis.network_record, []

    def interrupted(*arguments):
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(analysis, "network_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(config, tmp_path / "stopped")
    assert measure(config, tmp_path / "stopped") == whole
    assert len(measured) == 3 + 2  # of the steps 0, 1, 2 and 3


def test_outputs_that_are_not_finite(tmp_path):
    config = SoftmaxHessianConfig(**CONFIG | {"steps": 200, "hidden": (30, 30)}, seeds=(0,), lr=1e30)
    with pytest.raises(CurvlabError, match="outputs are not finite"):
        measure(config, tmp_path)


def test_the_figure_shows_every_curve():
    config = SoftmaxHessianConfig(draws=4, decades=6)
    drawn = [record for seed in range(3) for record in logit_records(config, seed)]
    figure = plots.vanishing_curvature(*summarise(drawn, network()), "net")
    left, right = figure.axes
    assert {axes.get_xscale() + axes.get_yscale() for axes in (left, right)} == {"loglog"}
    assert {axes.get_ylabel() for axes in (left, right)} == {"largest eigenvalue"}
    points = next(line for line in left.lines if line.get_label() == "softmax").get_xydata()
    assert points[:, 0].tolist() == [0.5 * 10.0**-k for k in range(7)]
    means = [np.mean([r["lambda_max"] for r in drawn if r["complement"] == x]) for x in points[:, 0]]
    np.testing.assert_allclose(points[:, 1], means, rtol=1e-12)
    assert "net" in right.get_title()
    # The Hessian's broken line lies on the wider one of the GGN.
    curves = {container.get_label(): container.lines[0] for container in right.containers}
    assert curves["GGN"].get_linewidth() > 2 * curves["Hessian"].get_linewidth()
    assert curves["Hessian"].get_linestyle() == "--"


def test_the_claim_needs_certain_outputs():
    uncertain = conditions(
        PRESETS["cpu"].config, SUBJECT, [{"step": 0, "complement": 0.9}, {"step": 9, "complement": 0.4}]
    )
    (claim, *_) = claims(network(), uncertain)
    assert (claim.verdict, claim.reason) == ("not tested", "mean 1 - p_t at the end is 0.4, at most 0.1 is needed")
