"""Tests of the standard error of Monte Carlo Fishers: against the spread of many estimates, and in closed form."""

from copy import deepcopy
from functools import partial
from math import sqrt

import pytest
import torch
from models_under_test import CLASSES, case
from torch import Tensor, nn

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.estimators import standard_error as module
from curvlab.estimators.standard_error import StandardError, standard_error
from curvlab.estimators.torch_func import per_sample_rows
from curvlab.problem import Problem
from curvlab.quantities import Fisher

SEEDS = 120  # enough to see a variance that is off by two thirds; what is finer is seen in closed form, below


def statistics(error: StandardError) -> Tensor:
    assert error.quadratic_forms is not None
    return torch.cat([error.trace.view(1), error.diagonal, error.quadratic_forms.view(-1)])


def directions(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(problem.space.total, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("samples", "loss"), [(3, "cross_entropy"), (1, "squared_error"), (2, "binary_cross_entropy")])
def test_the_spread_over_seeds(samples: int, loss: str) -> None:
    """The mean of the squared errors is the variance of the estimates: z-scores of both, over independent seeds."""
    problem = case("mlp", loss=loss).problem
    deltas = directions(problem)
    estimates, squared_errors = [], []
    for seed in range(SEEDS):
        # Other seeds, so that the two are independent.
        squared_errors.append(statistics(standard_error(problem, Fisher(samples, SEEDS + seed), deltas)).square())
        matrix = estimate(problem, Fisher(samples, seed), "dense", backend="hooks")
        forms = (deltas * (matrix @ deltas)).sum(dim=0)
        estimates.append(torch.cat([matrix.trace().view(1), matrix.diagonal(), forms]))
    values, claimed = torch.stack(estimates), torch.stack(squared_errors)
    deviations = (values - values.mean(dim=0)).square() * SEEDS / (SEEDS - 1)
    difference = deviations.mean(dim=0) - claimed.mean(dim=0)
    z = difference / ((deviations.var(dim=0) + claimed.var(dim=0)) / SEEDS).sqrt()
    assert z.abs().max() < 4.5  # of some fifty, correlated
    exact = estimate(problem, "fisher", "dense", backend="hooks")
    forms = (deltas * (exact @ deltas)).sum(dim=0)
    truth = torch.cat([exact.trace().view(1), exact.diagonal(), forms])
    z = (values.mean(dim=0) - truth) / (claimed.mean(dim=0) / SEEDS).sqrt()
    assert z.abs().max() < 4.5


def test_closed_form_of_many_draws() -> None:
    """For one sample and a linear model, the variance over all labels is a finite sum."""
    model = nn.Linear(2, CLASSES).double()
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    problem = Problem(model, "cross_entropy", (x, torch.tensor([0])))
    p = model(x).softmax(dim=1)[0].detach()
    norms = ((p - torch.eye(CLASSES)).square().sum(dim=1)) * (1 + x.square().sum())
    variance = (p * norms.square()).sum() - (p @ norms).square()
    draws = 20_000
    error = standard_error(problem, Fisher(draws))
    assert error.quadratic_forms is None
    assert abs(error.trace / (variance / draws).sqrt() - 1) < 0.03


def test_definition() -> None:
    whole = case("mlp")
    draws = 4
    error = standard_error(whole.problem, f"fisher:samples={draws},seed=3", params="2.*")
    space = estimate(whole.problem, "fisher", "diag", params="2.*").space
    rows = torch.stack(list(per_sample_rows(whole.problem, Fisher(draws, 3), space))) * sqrt(draws)
    variance = rows.square().var(dim=1).sum(dim=0) / len(rows) ** 2 / draws
    assert torch.allclose(error.diagonal.square(), variance, rtol=1e-10)
    variance = rows.square().sum(dim=2).var(dim=1).sum() / len(rows) ** 2 / draws
    assert torch.allclose(error.trace.square(), variance, rtol=1e-10)


def test_forms_of_vectors() -> None:
    problem = case("mlp").problem
    deltas = directions(problem)
    several = standard_error(problem, Fisher(2), deltas).quadratic_forms
    one = standard_error(problem, Fisher(2), deltas[:, 1]).quadratic_forms
    named = standard_error(problem, Fisher(2), problem.space.unflatten(deltas[:, 1])).quadratic_forms
    assert several is not None
    assert one is not None
    assert named is not None
    assert (tuple(several.shape), tuple(one.shape)) == ((2,), ())
    assert torch.allclose(one, named, rtol=1e-12)
    assert torch.allclose(several[1], one, rtol=1e-12)


def test_the_split_into_batches_changes_nothing() -> None:
    whole = case("mlp")
    batches = list(zip(whole.inputs.split([3, 1, 3]), whole.targets.split([3, 1, 3]), strict=True))
    one = standard_error(whole.problem, Fisher(2))
    other = standard_error(Problem(whole.model, whole.loss, batches), Fisher(2))
    assert torch.allclose(one.diagonal, other.diagonal, rtol=1e-12)


def test_refusals() -> None:
    problem = case("mlp").problem
    for quantity in ("fisher", "empirical_fisher", "hessian"):
        with pytest.raises(CurvlabError, match=f"{quantity} draws no labels.*fisher:samples=k"):
            standard_error(problem, quantity)
    with pytest.raises(CurvlabError, match="a vector of this space has shape"):
        standard_error(problem, Fisher(2), torch.ones(3))
    model = nn.Sequential(nn.Linear(4, CLASSES), nn.Dropout()).double()
    with pytest.raises(UnsupportedError, match="train mode"):
        standard_error(Problem(model, data=(case("mlp").inputs, case("mlp").targets)), Fisher(2))
    whole = case("one layer")
    nn.init.zeros_(whole.model.weight)
    huge = Problem(whole.model, whole.loss, (1e200 * whole.inputs, whole.targets))
    with pytest.raises(CurvlabError, match="not finite"):
        standard_error(huge, Fisher(2))


def test_the_rows_of_a_sample_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of one sample come in several batches, as for large models."""
    problem = case("mlp").problem
    whole = standard_error(problem, Fisher(5))
    row = problem.space.total * 8
    monkeypatch.setattr(module, "row_batches", partial(module.row_batches, max_bytes=3 * row))
    pieces = standard_error(problem, Fisher(5))
    assert torch.allclose(pieces.diagonal, whole.diagonal, rtol=1e-12)
    assert torch.allclose(pieces.trace, whole.trace, rtol=1e-12)


def test_half_precision() -> None:
    """The errors are computed in float64 from the rounded rows of the model."""
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    half = standard_error(Problem(deepcopy(model).bfloat16(), "cross_entropy", (x, y)), Fisher(50))
    single = standard_error(Problem(model, "cross_entropy", (x, y)), Fisher(50))
    assert half.diagonal.dtype == torch.float64
    assert torch.allclose(half.diagonal, single.diagonal, rtol=0.1)
