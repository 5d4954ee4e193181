"""The analysis ``laplace_posterior``: its numbers for two weights by other means, its claims both ways, its figures."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from curvlab import Problem, estimate
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture.laplace_posterior import ANALYSIS, PRESETS, _diagnose, make_data, measure, report
from curvlab.analyze.lecture.laplace_posterior_options import LaplacePosteriorConfig
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.grid import Place

DIGITS = Subject("digits", (1, 8, 8), 10, 282, 70)
DEFAULT = PRESETS["default"].config
SMALL = LaplacePosteriorConfig(hidden=(2,), chunks=2, chunk_samples=12, draws=6, warmup=3, chains=2, seeds=(1,))


def records_of(model, folder):
    config = SMALL.model_copy(update={"models": (model,)})
    data = ANALYSIS.load(config, RunOptions())
    return list(measure(config, data, Workspace(Place(folder)))), make_data(config, data, 1)


def test_two_weights_by_importance_sampling(tmp_path):
    """The posterior's mean and the divergence, by weights of draws from the approximation itself."""
    found, (x, y, test) = records_of("logistic", tmp_path)
    mine = {(row["structure"], row["chunk"]): row for row in found if "structure" in row}
    assert set(mine) == {(name, chunk) for name in ("diag", "kfac", "full", "at_once") for chunk in (1, 2)}
    assert mine["full", 1]["kl"] == pytest.approx(mine["at_once", 1]["kl"], rel=1e-6)  # there is one chunk so far
    model = nn.Linear(2, 1, bias=False).double()
    rows = slice(12)

    def log_posterior(theta):
        return -nn.functional.softplus(-(2 * y[rows] - 1) * (x[rows] @ theta.T)).sum(0) - theta.square().sum(1) / 4

    mode = torch.zeros(1, 2).double().requires_grad_()
    optimizer = torch.optim.LBFGS([mode], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = -log_posterior(mode).sum()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        model.weight.copy_(mode)
    curvature = estimate(Problem(model, "binary_cross_entropy", (x[rows], y[rows])), "fisher", "dense").to_dense()
    gaussian = torch.distributions.MultivariateNormal(
        mode.detach()[0], precision_matrix=12 * curvature + 0.5 * torch.eye(2).double()
    )
    wide = torch.distributions.MultivariateNormal(gaussian.mean, 9 * gaussian.covariance_matrix)
    torch.manual_seed(0)
    draws = wide.sample((400_000,))
    log_weights = log_posterior(draws) - wide.log_prob(draws)
    weights = log_weights.softmax(0)
    log_p = log_posterior(draws) - (log_weights.logsumexp(0) - torch.tensor(400_000.0).log())
    assert mine["full", 1]["kl"] == pytest.approx(float(weights @ (log_p - gaussian.log_prob(draws))), rel=0.07)
    exact = weights @ (draws @ test.T).sigmoid()
    at_mode = (test @ gaussian.mean).sigmoid()
    # The integral over the two weights is, for a linear model, one over its output.
    assert mine["full", 1]["linear_error"] == pytest.approx(mine["full", 1]["predictive_error"], rel=0.05)
    assert mine["full", 1]["map_error"] == pytest.approx(float((at_mode - exact).abs().mean()), rel=0.03)
    assert all(row["edge_mass"] < 1e-4 for row in found if "edge_mass" in row)
    assert (tmp_path / "contours.json").exists()


def test_a_network_has_diagnostics_and_errors_of_probabilities(tmp_path):
    found, _ = records_of("network", tmp_path)
    diagnostics = [row for row in found if "edge_mass" in row]
    assert len(diagnostics) == 2
    assert all(row["rhat"] > 0 and row["ess"] > 0 and row["noise"] >= 0 for row in diagnostics)
    errors = [row["predictive_error"] for row in found if "structure" in row]
    assert all(0 < error < 1 for error in errors)
    assert {row["kl"] for row in found if "structure" in row} == {None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": (1, 2, 3)}, "classes must be two classes"),
        ({"chunks": 40}, "40 chunks of 20 samples are more than the"),
        ({"models": ()}, "models needs one or more different values"),
    ],
)
def test_refusals(changed, message):
    config = DEFAULT.model_copy(update=changed)
    with pytest.raises(CurvlabError, match=message):
        ANALYSIS.check(config, ANALYSIS.load(config, RunOptions()))


# Claims: with these numbers every claim holds.
KL = {"diag": (0.1, 0.3), "kfac": (0.05, 0.2), "full": (0.02, 0.09), "at_once": (0.02, 0.03)}


def results(kl=(), printed=0.05, predictive=(), rhat=1.01, ess=160.0, chunks=5, seeds=3):
    config = DEFAULT.model_copy(update={"chunks": chunks})
    kl, predictive = KL | dict(kl), {"diag": 0.04, "full": 0.03} | dict(predictive)
    table, diagnostics = [], []
    for seed in range(seeds):
        changed = seed == seeds - 1  # the last seed alone misses
        for chunk, place in ((1, 0), (chunks, 1)):
            keys = {"seed": seed, "chunk": chunk}
            for structure in KL:
                of = (kl if changed else KL)[structure][place]
                row = {**keys, "model": "logistic", "structure": structure, "kl": of, "predictive_error": 0.01}
                row |= {
                    "kl_as_printed": printed,
                    "mean_error": 0.1,
                    "covariance_error": 0.2,
                    "map_error": 0.01,
                    "linear_error": 0.01,
                }
                error = (predictive if changed else {"diag": 0.04, "full": 0.03}).get(structure, 0.035)
                table += [row, row | {"model": "network", "kl": None, "predictive_error": error}]
            diagnostics.append(
                {**keys, "model": "logistic", "edge_mass": 1e-9, "rhat": None, "ess": None, "noise": None}
            )
            diagnostics.append(
                {**keys, "model": "network", "edge_mass": None, "rhat": rhat, "ess": ess, "noise": 0.004}
            )
    return Results(config, DIGITS, {"table": table, "diagnostics": diagnostics}, total=6)


def missed(**changes):
    return [claim.text for claim in report(results(**changes)).claims if claim.verdict != "reproduced"]


def test_claims_that_hold():
    assert missed() == []
    assert len(report(results()).claims) == 9


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"kl": {"diag": (0.3, 0.25)}}, "The approximation introduces errors over time, diagonal"),
        ({"kl": {"full": (0.02, 0.11)}, "printed": 0.01}, "The posterior is a Gaussian"),
        ({"printed": 0.2}, "Its covariance is F"),
        ({"kl": {"kfac": (0.05, 0.31)}}, "K-FAC curvature is closer"),
        ({"predictive": {"diag": 0.08, "full": 0.06}}, "A network's probabilities"),
        ({"predictive": {"full": 0.045}}, "Full curvature gives"),
    ],
)
def test_claims_that_fail(changes, begins):
    (text,) = missed(**changes)
    assert text.startswith(begins)


def test_full_that_is_farther_than_the_diagonal_fails():
    found = missed(kl={"diag": (0.01, 0.05)}, printed=0.01)
    assert [text.split(" is closer")[0] for text in found] == ["K-FAC curvature", "Full curvature"]


SAMPLED = "R-hat at most 1.05 and effective sample size at least 10 per chain"


@pytest.mark.parametrize(
    ("changes", "sampler", "note"),
    [
        ({"rhat": 1.2}, "R-hat above 1.05 or undefined", "at most 1.200, effective sample size at least 160"),
        ({"rhat": None}, "R-hat above 1.05 or undefined", "is not defined"),  # NaN or infinite, as JSON has it
        ({"rhat": math.nan}, "R-hat above 1.05 or undefined", "is not defined"),
        ({"ess": 159.0}, "R-hat at most 1.05 and effective sample size below 10 per chain", "at least 159"),
        ({"ess": None}, "R-hat at most 1.05 and effective sample size below 10 per chain", "is not defined"),
    ],
)
def test_chains_that_do_not_agree_or_are_too_short_say_nothing(changes, sampler, note):
    found = report(results(**changes))
    verdicts = {claim.verdict: claim.reason for claim in found.claims}
    assert verdicts["not tested"] == f"sampler is {sampler}, published: {SAMPLED}"
    assert note in found.notes[0]


def test_the_worst_of_chains_that_stand_still_at_one_input_is_not_passed_over():
    moving = torch.rand(40, 2, 1, generator=torch.Generator().manual_seed(0)).double()
    for parts in ([moving, torch.ones_like(moving)], [torch.ones_like(moving), moving]):
        found = _diagnose(torch.cat(parts, 2))
        assert math.isnan(found["rhat"])
        assert math.isnan(found["ess"])


def test_few_chunks_say_nothing():
    assert {claim.verdict for claim in report(results(chunks=2)).claims} == {"not tested"}


def test_the_figures(tmp_path):
    found, _ = records_of("logistic", tmp_path)
    table = [row for row in found if "structure" in row]
    diagnostics = [row for row in found if "edge_mass" in row]
    contours = json.loads((tmp_path / "contours.json").read_text())
    run = Results(
        SMALL, DIGITS, {"table": table, "diagnostics": diagnostics}, artifacts={"contours": [contours]}, total=1
    )
    figures = report(run).figures
    assert set(figures) == {"probabilities", "divergence", "contours"}
    drawn = figures["contours"]()
    assert [axes.get_title() for axes in drawn.axes] == ["12 samples", "24 samples"]
    ellipse = drawn.axes[0].lines[0].get_xydata()
    gaussian = contours["panels"][0]["gaussians"]["diag"]
    way = torch.tensor(ellipse).double() - torch.tensor(gaussian["mean"]).double()
    radius = (way @ torch.tensor(gaussian["covariance"]).double().inverse() * way).sum(1)
    torch.testing.assert_close(radius, torch.full((200,), 4.60517).double(), rtol=1e-4, atol=0)
    assert figures["divergence"]().axes[0].get_yscale() == "log"


def test_fewer_draws_than_the_diagnostics_need_are_no_option():
    with pytest.raises(ValidationError, match="greater than or equal to 4"):
        LaplacePosteriorConfig(draws=3)
