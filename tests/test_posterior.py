"""Posteriors: Laplace's update where it is exact, the grid and the sampler against Gaussians, the diagnostics."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from curvlab import Problem, estimate
from curvlab.errors import CurvlabError
from curvlab.posterior import (
    Gaussian,
    effective_sample_size,
    find_mode,
    hamiltonian_monte_carlo,
    laplace_update,
    log_likelihood,
    posterior_on_grid,
    split_rhat,
)

PRECISION = torch.tensor([[2.0, 0.9], [0.9, 0.8]]).double()
MEAN = torch.tensor([1.0, -2.0]).double()


def regression(samples=30):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator).double()
    return x, x @ torch.tensor([[1.0], [2.0], [-1.0]]).double() + torch.randn(samples, 1, generator=generator).double()


def test_a_gaussian_is_that_of_torch():
    mine, theirs = Gaussian(MEAN, PRECISION), MultivariateNormal(MEAN, precision_matrix=PRECISION)
    points = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(mine.log_prob(points), theirs.log_prob(points))
    torch.testing.assert_close(mine.covariance, theirs.covariance_matrix)
    draws = mine.sample(200_000)
    torch.testing.assert_close(draws.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(draws.T.cov(), theirs.covariance_matrix, atol=0.03, rtol=0)
    torch.testing.assert_close(Gaussian.prior(2, 4.0).covariance, 0.25 * torch.eye(2).double())


def test_updates_chunk_by_chunk_are_exact_for_linear_regression():
    x, y = regression()
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    posterior = Gaussian.prior(3, 0.5)
    for part in range(3):
        rows = slice(10 * part, 10 * part + 10)
        posterior = laplace_update(posterior, model, "squared_error", (x[rows], y[rows]))
    precision = x.T @ x + 0.5 * torch.eye(3).double()
    torch.testing.assert_close(posterior.precision, precision, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.mean, torch.linalg.solve(precision, x.T @ y)[:, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("structure", ["diag", "kfac"])
def test_the_precision_is_the_curvature_at_the_mode(structure):
    x, _ = regression()
    y = (x[:, :1] > 0).double()
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    start = torch.linspace(-1, 1, 11).double()
    posterior = laplace_update(
        Gaussian.prior(11, 1.0), model, "binary_cross_entropy", (x, y), structure=structure, start=start
    )
    value = log_likelihood(model, "binary_cross_entropy", (x, y))
    gradient = torch.func.grad(value)(posterior.mean)
    torch.testing.assert_close(gradient, posterior.mean, atol=1e-3, rtol=0)  # that of the prior is minus the mean
    model = model.double()
    nn.utils.vector_to_parameters(posterior.mean, model.parameters())
    expected = 30 * estimate(Problem(model, "binary_cross_entropy", (x, y)), "fisher", structure, backend="torch")
    torch.testing.assert_close(posterior.precision, torch.eye(11).double() + expected.to_dense())


def test_a_function_without_a_maximum():
    with pytest.raises(CurvlabError, match="does not converge; take a stronger prior"):
        find_mode(lambda theta: theta.sum(), torch.zeros(2))


def test_the_grid_of_a_gaussian():
    exact, other = Gaussian(MEAN, PRECISION), Gaussian(MEAN + 0.3, 2 * torch.eye(2).double())
    grid = posterior_on_grid(lambda t: 7 + exact.log_prob(t), Gaussian(MEAN + 0.1, torch.eye(2).double()), points=301)
    assert float(grid.weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(grid.mean, MEAN, atol=1e-5, rtol=0)
    torch.testing.assert_close(grid.covariance, exact.covariance, atol=1e-4, rtol=0)
    torch_kl = kl_divergence(*(MultivariateNormal(g.mean, precision_matrix=g.precision) for g in (exact, other)))
    assert grid.kl_from(other) == pytest.approx(float(torch_kl), rel=1e-4)
    assert grid.kl_from(exact) == pytest.approx(0, abs=1e-5)
    assert grid.edge_mass < 1e-6
    assert posterior_on_grid(exact.log_prob, exact, radius=1.0).edge_mass > 1e-3


def test_the_sampler_of_a_gaussian():
    exact = Gaussian(MEAN, PRECISION)
    found = hamiltonian_monte_carlo(exact.log_prob, 3 * torch.ones(20, 2), draws=1500, warmup=100, leapfrog=4)
    values = found.values.flatten(0, 1)
    assert found.values.shape == (1500, 20, 2)
    assert 0.6 < found.acceptance < 0.95
    torch.testing.assert_close(values.mean(0), MEAN, atol=0.08, rtol=0)
    torch.testing.assert_close(values.T.cov(), exact.covariance, atol=0.1, rtol=0)
    assert split_rhat(found.values[..., 0]) < 1.05
    again = hamiltonian_monte_carlo(exact.log_prob, 3 * torch.ones(20, 2), draws=3, warmup=2, leapfrog=8)
    same = hamiltonian_monte_carlo(exact.log_prob, 3 * torch.ones(20, 2), draws=3, warmup=2, leapfrog=8)
    assert torch.equal(again.values, same.values)


def test_chains_in_two_modes_do_not_agree():
    def two_modes(theta):
        return torch.logsumexp(torch.stack([-((theta - 8) ** 2).sum() / 2, -((theta + 8) ** 2).sum() / 2]), 0)

    starts = torch.tensor([[8.0], [-8.0]] * 4)
    found = hamiltonian_monte_carlo(two_modes, starts, draws=100, warmup=50, leapfrog=8)
    assert split_rhat(found.values[..., 0]) > 3


def test_rhat_and_effective_size():
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)).double()
    assert split_rhat(noise) == pytest.approx(1, abs=0.01)
    assert effective_sample_size(noise) == pytest.approx(16000, rel=0.1)
    # Chain means that are 3 deviations apart: R-hat is sqrt(1 + var of the means).
    shifted = noise + 3 * torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    assert split_rhat(shifted) == pytest.approx(math.sqrt(1 + 9 * 2 * 5 / 7), rel=0.02)
    series = [torch.zeros(4).double()]
    for step in noise:
        series.append(0.8 * series[-1] + step)
    assert effective_sample_size(torch.stack(series[1:])) == pytest.approx(16000 * 0.2 / 1.8, rel=0.2)
    assert split_rhat(torch.ones(6, 2).double()) == 1
    assert split_rhat(torch.tensor([[0.0, 1.0]] * 6).double()) == math.inf
    assert effective_sample_size(torch.ones(6, 2).double()) == 12
