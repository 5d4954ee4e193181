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
    make_predictor,
    posterior_on_grid,
    predict_linear,
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
    assert Gaussian.prior(2, 0.3).precision[0, 0] == 0.3  # not rounded to float32


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


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])  # the mean of sixty times 0.1 is another number
def test_chains_that_do_not_move_are_not_converged(value):
    equal, apart = torch.full((60, 2), value).double(), torch.tensor([[value, value + 1]] * 60).double()
    assert (math.isnan(split_rhat(equal)), split_rhat(apart)) == (True, math.inf)
    assert math.isnan(effective_sample_size(equal))
    assert math.isnan(effective_sample_size(apart))


GAUSSIAN, THREE = Gaussian(MEAN, PRECISION), Gaussian.prior(3, 1.0)
CLASSES = (torch.eye(3)[[0, 1, 2, 0]], torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
ZEROS = torch.zeros(4, 2)


def logistic(outputs=1):
    return nn.Linear(3, outputs, bias=False)


def update(prior=THREE, data=CLASSES, **options):
    return laplace_update(prior, logistic(), "binary_cross_entropy", data, **options)


def sample(log_density=GAUSSIAN.log_prob, starts=ZEROS, **options):
    return hamiltonian_monte_carlo(log_density, starts, **({"draws": 4, "warmup": 2} | options))


def on_grid(log_density=GAUSSIAN.log_prob, around=GAUSSIAN, **options):
    return posterior_on_grid(log_density, around, **options)


REFUSED = {
    **{
        f"prior {bad!r}": (
            lambda bad=bad: Gaussian.prior(2, bad),
            "precision of a prior must be a finite number above 0",
        )
        for bad in (0, -1.0, math.nan, math.inf, None, "1", True)
    },
    "no parameters": (lambda: Gaussian.prior(0, 1.0), "size of a prior must be a whole number from 1, not 0"),
    "no mean": (lambda: Gaussian(None, PRECISION), r"mean of a Gaussian must be a dense real tensor \(P,\), not None"),
    "sizes": (
        lambda: Gaussian(torch.zeros(3), PRECISION),
        r"precision of a Gaussian must be .* \(3, 3\), not .*\(2, 2\)",
    ),
    "NaN": (lambda: Gaussian(MEAN, math.nan * PRECISION), "must be finite, but 4 entries"),
    "indefinite": (lambda: Gaussian(MEAN, -PRECISION), "must be positive definite to working precision; add"),
    "asymmetric": (lambda: Gaussian(MEAN, torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "must be symmetric; take"),
    "no draws of a Gaussian": (lambda: GAUSSIAN.sample(0), "count must be a whole number from 1, not 0"),
    "a seed": (lambda: GAUSSIAN.sample(1, -1), "seed must be a whole number from 0, not -1"),
    "points": (
        lambda: GAUSSIAN.log_prob(torch.zeros(4, 3)),
        r"points of this Gaussian are \(2,\) or \(K, 2\), not .*\(4, 3\)",
    ),
    "no dimension": (lambda: GAUSSIAN.log_prob(torch.tensor(0.0)), r"points of this Gaussian are \(2,\)"),
    "theta": (
        lambda: log_likelihood(logistic(), "binary_cross_entropy", CLASSES)(torch.zeros(5)),
        r"theta must be a dense real tensor \(3,\)",
    ),
    "no data": (lambda: update(data=None), "data must be a pair of tensors, inputs and targets, not None"),
    "batches": (lambda: update(data=[CLASSES, CLASSES]), "data must be a pair of tensors"),
    "targets": (
        lambda: update(data=(CLASSES[0], 2 * CLASSES[1])),
        "binary_cross_entropy needs targets between 0 and 1",
    ),
    "lengths": (lambda: update(data=(CLASSES[0], CLASSES[1][:2])), "4 inputs but 2 targets"),
    "no samples": (lambda: update(data=(CLASSES[0][:0], CLASSES[1][:0])), "the data have no samples"),
    "no prior": (lambda: update(None), r"prior must be a curvlab\.posterior\.Gaussian, not None"),
    "prior of two": (lambda: update(GAUSSIAN), r"over 2 parameters, but the model has 3 .* take Gaussian\.prior\(3"),
    "start": (lambda: update(start=torch.zeros(5)), r"start must be a dense real tensor \(3,\), not .*\(5,\)"),
    "start of one": (lambda: update(start=torch.zeros(1)), r"start must be a dense real tensor \(3,\), not .*\(1,\)"),
    "start of NaN": (lambda: update(start=torch.full((3,), math.nan)), "start must be finite, but 3 entries"),
    "a density of two": (lambda: find_mode(torch.square, torch.zeros(2)), "that returns a scalar tensor, not .*shape"),
    "no density": (lambda: find_mode(None, torch.zeros(2)), "log_density must be a function of .*, not None"),
    "NaN at the start": (lambda: find_mode(lambda t: t.sum().log(), -torch.ones(2)), "is nan at a start; start where"),
    "a constant": (
        lambda: find_mode(lambda t: torch.tensor(0.0), torch.zeros(2)),
        "log_density must be differentiable",
    ),
    "no entries": (lambda: find_mode(torch.sum, torch.zeros(0)), r"start must be a dense real tensor \(P,\)"),
    "a grid of three": (
        lambda: on_grid(THREE.log_prob, THREE),
        "around must be a Gaussian over two .*, not one over 3",
    ),
    "a grid around None": (lambda: on_grid(around=None), "around must be a Gaussian over two parameters, not None"),
    "a grid of one": (lambda: on_grid(points=1), "points must be a whole number from 3, not 1"),
    "no radius": (lambda: on_grid(radius=0.0), r"radius must be a finite number above 0, not 0\.0"),
    "radius -1": (lambda: on_grid(radius=-1), "radius must be a finite number above 0, not -1"),
    "NaN on the grid": (lambda: on_grid(lambda t: t.sum().log()), "not NaN on the whole grid"),
    "zero on the grid": (lambda: on_grid(lambda t: t.sum() * 0 - math.inf), "and finite somewhere"),
    "KL of three": (lambda: on_grid().kl_from(THREE), "other must be a Gaussian over two parameters, not one over 3"),
    "no draws": (lambda: sample(draws=0), "draws must be a whole number from 1, not 0"),
    "warmup": (lambda: sample(warmup=-1), "warmup must be a whole number from 0, not -1"),
    "leapfrog": (lambda: sample(leapfrog=0), "leapfrog must be a whole number from 1, not 0"),
    "target": (lambda: sample(target=1), "target must be above 0 and below 1, not 1"),
    "starts": (lambda: sample(starts=torch.zeros(2)), r"starts must be a dense real tensor \(chains, P\)"),
    "no chain": (lambda: sample(starts=torch.zeros(0, 2)), r"starts must be a dense real tensor \(chains, P\)"),
    "a start without density": (lambda: sample(lambda t: t.sum().log()), "the log density is -inf at a start"),
    "inputs": (lambda: make_predictor(logistic(), torch.zeros(4, 2)), "Linear raises an error on the inputs"),
    "no inputs": (lambda: make_predictor(logistic(), None), "inputs must be a tensor with at least one sample"),
    "two outputs": (lambda: make_predictor(logistic(2), CLASSES[0]), r"must have one output, the logit \(4, 1\), not"),
    "parameters": (
        lambda: make_predictor(logistic(), CLASSES[0])(torch.zeros(2, 5)),
        r"the parameters must be a dense real tensor \(K, 3\), not .*\(2, 5\)",
    ),
    "posterior": (
        lambda: predict_linear(logistic(), GAUSSIAN, CLASSES[0]),
        "a Gaussian over the 3 parameters of the model, not one over 2",
    ),
}
for diagnose in (split_rhat, effective_sample_size):
    REFUSED |= {
        f"{diagnose.__name__} {name}": (lambda of=diagnose, values=values: of(values), message)
        for name, values, message in (
            ("one draw", torch.zeros(1, 1), "at least 4 draws of each chain, not 1"),
            ("three draws", torch.zeros(3, 2), "at least 4 draws of each chain, not 3"),
            ("no chain", torch.zeros(4, 0), r"must be a dense real tensor \(draws, chains\)"),
            ("one dimension", torch.zeros(6), r"must be a dense real tensor \(draws, chains\)"),
            ("NaN", torch.full((6, 2), math.nan), "must be finite, but 12 entries"),
        )
    }


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_sentence(name):
    call, message = REFUSED[name]
    with pytest.raises(CurvlabError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_mode_at_infinity_is_not_found():
    """The classes are separated, and the prior is too weak: where the search ends, the gradient is small everywhere."""
    x = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [-2.0, 1.0, 1.0]])
    data = (x, (x[:, :1] > 0).float())
    with pytest.raises(CurvlabError, match=r"mode of the posterior is not found: .* Newton step .* a stronger prior"):
        update(Gaussian.prior(3, 1e-12), data)
    found = update(Gaussian.prior(3, 1e-3), data)
    value = log_likelihood(logistic(), "binary_cross_entropy", data)
    torch.testing.assert_close(torch.func.grad(value)(found.mean), 1e-3 * found.mean, atol=1e-6, rtol=0)


def test_a_hessian_that_is_not_positive_definite_is_named():
    """Two hidden units of a network at the saddle point zero."""
    model, (x, _) = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False)), regression()
    data = (x[:, :1], 2 * x[:, :1])
    with pytest.raises(
        CurvlabError, match="hessian at the mode is not positive definite: use the quantity fisher or ggn"
    ):
        laplace_update(Gaussian.prior(4, 0.01), model, "squared_error", data, quantity="hessian")


def test_tensors_in_float32_and_a_density_that_is_zero_on_half_of_the_grid():
    assert Gaussian(MEAN.float(), PRECISION.float()).log_prob(MEAN).dtype == torch.float64
    predict = make_predictor(logistic(), CLASSES[0])
    assert torch.equal(predict(torch.ones(2, 3)), torch.full((2, 4), 1.0).double().sigmoid())
    # KL(half normal || normal) = log 2, but for the cells on the border of the half.
    standard = Gaussian.prior(2, 1.0)
    half = posterior_on_grid(lambda t: standard.log_prob(t).where(t[0] > 0, -math.inf), standard, points=800)
    assert half.kl_from(standard) == pytest.approx(math.log(2), abs=1e-6)
