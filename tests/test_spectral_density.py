"""The spectral density, and what is made of it, against dense eigendecompositions."""

from collections.abc import Callable
from math import inf, pi, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.matrices import Dense, Implicit, Info
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.spectrum.density import SpectralDensity, spectral_density
from curvlab.spectrum.functions import condition_number, effective_dimension

INFO = Info("any", "dense", "any", "torch", 1)
few = settings(max_examples=40, deadline=None)


def symmetric(
    eigenvalues: list[float] | np.ndarray | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Dense:
    """A matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    return Dense((basis * values @ basis.mT).to(dtype), ParameterSpace(("w",), ((len(values),),)), INFO)


def eigenvalues_of(density: SpectralDensity) -> Tensor:
    assert density.exact
    assert torch.equal(density.weights, torch.full_like(density.nodes, 1 / density.size))
    return density.nodes[0]


def network(loss: str = "cross_entropy") -> Problem:
    """307 parameters, trained for a while: a few large eigenvalues, some negative ones of the Hessian, many small."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, dtype=torch.float64, generator=generator)
    y = (x @ torch.randn(12, 7, dtype=torch.float64, generator=generator)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(12, 15), nn.Tanh(), nn.Linear(15, 7)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return Problem(model, loss, (x, y))


# Small matrices: exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values", [[3.0], [0.0], [0.0] * 7, [1.0] * 7, [-2.0, 0.0, 0.0, 1.0, 1.0, 5.0]], ids=lambda v: str(v[:3])
)
def test_small_matrices_are_exact(values: list[float], dtype: torch.dtype) -> None:
    matrix = symmetric(values, dtype=dtype)
    density = spectral_density(matrix)
    tolerance = 100 * torch.finfo(dtype).eps
    assert torch.allclose(eigenvalues_of(density), torch.tensor(values).double(), rtol=0, atol=tolerance)
    assert (density.size, density.matvecs, density.resolution) == (len(values), len(values), 0.0)
    mean, error = density.expectation(lambda x: x)
    assert abs(mean - np.mean(values)) < tolerance
    assert error == 0
    distance, noise = density.wasserstein(torch.tensor(values))
    assert distance < tolerance
    assert noise == 0


@few
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 99))
def test_of_any_small_matrix(values: list[float], seed: int) -> None:
    density = spectral_density(symmetric(values, seed), probes=2, steps=6)
    assert torch.allclose(eigenvalues_of(density), torch.tensor(values).double().sort().values, atol=1e-12)


# Gauss quadrature -----------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 12), st.integers(0, 99), st.integers(0, 3))
def test_moments_of_a_probe(steps: int, seed: int, kind: int) -> None:
    """A rule averages polynomials of degree 2 steps - 1 as its probe does; where the space ends early, all of them."""
    spectrum = [
        np.linspace(-1, 2, 40),
        np.repeat([-1.0, 0.5, 2.0], [7, 13, 20]),
        np.zeros(40),
        np.repeat([0.0, 1.0], [39, 1]),
    ][kind]
    matrix = symmetric(spectrum, seed)
    density = spectral_density(matrix, probes=2, steps=steps, seed=seed)
    generator = np.random.default_rng(seed)
    distinct = len(np.unique(spectrum))
    assert torch.allclose(density.weights.sum(dim=1), torch.ones(2).double(), rtol=1e-12)
    assert bool((density.nodes.diff(dim=1) >= -1e-14).all())
    # Rounding errors may look like a direction more.
    assert min(steps, distinct) <= density.nodes.shape[1] <= min(steps, distinct + 1)
    assert density.matvecs <= 2 * (distinct + 1)
    first = generator.integers(0, 2, 40) * 2.0 - 1  # the vector of signs that a probe starts from
    for degree in range(2 * steps):
        power = np.linalg.matrix_power(matrix.to_dense().numpy(), degree)
        ours = float((density.weights[0] * density.nodes[0] ** degree).sum())
        assert abs(ours - first @ power @ first / 40) < 1e-10 * max(1, 2.0**degree)


def test_an_exhausted_space_leaves_exact_weights() -> None:
    """Three eigenvalues, so three nodes; the weights are those of the probe's parts in the eigenspaces."""
    matrix = symmetric(np.repeat([-1.0, 0.5, 2.0], [50, 30, 20]))
    density = spectral_density(matrix, probes=3, steps=30)
    assert density.matvecs <= 12
    assert density.resolution < 1e-12 or density.nodes.shape[1] > 3
    values, vectors = torch.linalg.eigh(matrix.to_dense())
    z = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 100) * 2.0 - 1)
    parts = (vectors.mT @ z).square() / 100
    expected = torch.stack([parts[(values - at).abs() < 1e-9].sum() for at in (-1.0, 0.5, 2.0)])
    seen = torch.stack([density.weights[0][(density.nodes[0] - at).abs() < 1e-9].sum() for at in (-1.0, 0.5, 2.0)])
    assert torch.allclose(seen, expected, atol=1e-12)
    assert float(seen.sum()) == pytest.approx(1, abs=1e-12)


def test_probes_of_different_lengths() -> None:
    """A probe that meets one eigenvector less has a node less: the last is repeated without weight."""
    matrix = torch.eye(8, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # (1, 1) has the eigenvalue 3, all that is orthogonal 1
    dense = Dense(matrix, ParameterSpace(("w",), ((8,),)), INFO)
    densities = [spectral_density(dense, probes=3, steps=2, seed=seed) for seed in range(20)]
    lengths = [(density.weights > 0).sum(dim=1).tolist() for density in densities]
    mixed = next(density for density, row in zip(densities, lengths, strict=True) if len(set(row)) == 2)
    short = int((mixed.weights > 0).sum(dim=1).argmin())
    assert mixed.nodes[short].tolist() == pytest.approx([1.0, 1.0])
    assert mixed.weights[short].tolist() == [1.0, 0.0]
    long = int((mixed.weights > 0).sum(dim=1).argmax())
    assert torch.allclose(mixed.nodes[long], torch.tensor([1.0, 3.0]).double(), atol=1e-14)
    assert torch.allclose(mixed.weights[long], torch.tensor([0.75, 0.25]).double(), atol=1e-14)
    assert bool(mixed.expectation(torch.log)[0].isfinite())  # of the node that is repeated, not of a zero
    assert mixed.matvecs == sum((mixed.weights > 0).sum(dim=1).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_zero_and_identity(dtype: torch.dtype) -> None:
    for value in (0.0, 1.0):
        matrix = Dense(value * torch.eye(30, dtype=dtype), ParameterSpace(("w",), ((30,),)), INFO)
        density = spectral_density(matrix, probes=2, steps=5)
        assert torch.allclose(density.nodes, torch.full((2, 1), value).double(), atol=10 * torch.finfo(dtype).eps)
        assert density.weights.tolist() == [[1.0], [1.0]]
        assert (density.exact, density.matvecs, density.resolution) == (False, 2, 0.0)
        assert density.wasserstein(torch.full((30,), value)) == pytest.approx((0.0, 0.0), abs=1e-6)


# The error ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_z_scores_of_expectations(dtype: torch.dtype) -> None:
    """Of functions that twenty steps average without error: their deviations are those of the probes, as stated."""
    values = torch.cat([torch.linspace(-1, 1, 190), torch.linspace(3, 10, 10)]).double()
    matrix = symmetric(values, dtype=dtype)
    functions: list[Callable[[Tensor], Tensor]] = [lambda x: x, torch.square, lambda x: (-x).exp(), torch.cos]
    z = []
    for seed in range(60):
        density = spectral_density(matrix, probes=6, steps=20, seed=seed)
        z.append([float((density.expectation(f)[0] - f(values).mean()) / density.expectation(f)[1]) for f in functions])
    scores = np.array(z)
    # Student's distribution with 5 degrees of freedom has the standard deviation sqrt(5/3); heavy tails make it noisy.
    assert np.abs(scores.mean(axis=0)).max() < 4 * sqrt(5 / 3 / 60)
    assert 0.85 < scores.std() < 1.75
    assert 0.9 < (np.abs(scores) < 2.571).mean() < 0.99


def test_error_of_the_cdf_and_the_density() -> None:
    """The means over many seeds are those of the matrix, and the stated errors their spread."""
    values = torch.cat([torch.zeros(60), torch.linspace(0.5, 1, 30), torch.linspace(4, 5, 10)]).double()
    matrix, points = symmetric(values), torch.tensor([0.25, 2.0])
    densities = [spectral_density(matrix, probes=3, steps=25, seed=seed) for seed in range(64)]
    grid = torch.tensor([0.0, 0.75, 4.5]).double()
    gaussians = (-((values - grid[:, None]) ** 2) / (2 * 0.3**2)).exp().mean(dim=1) / (0.3 * sqrt(2 * pi))
    for shares, truth in (
        ([density.cdf(points) for density in densities], torch.tensor([0.6, 0.9])),
        ([density.pdf(grid, 0.3) for density in densities], gaussians),
    ):
        estimates, errors = (torch.stack(parts) for parts in zip(*shares, strict=True))
        spread = estimates.std(dim=0)
        assert bool(((estimates.mean(dim=0) - truth).abs() < 4 * spread / 8).all())
        assert torch.allclose(errors.square().mean(dim=0).sqrt(), spread, rtol=0.3)


def test_the_density_integrates_to_one() -> None:
    density = spectral_density(symmetric(np.linspace(-1, 3, 80)), probes=3, steps=10)
    grid = torch.linspace(-3, 5, 2001).double()
    assert abs(float(torch.trapezoid(density.pdf(grid, 0.1)[0], grid)) - 1) < 1e-9
    assert density.cdf(torch.tensor([-1.1, 3.1]))[0].tolist() == pytest.approx([0, 1])


def test_logarithmic_density() -> None:
    """Over powers of ten of each sign: what is at zero is in neither."""
    values = torch.tensor([-100.0, -1.0, 0.0, 0.01, 1.0, 1.0, 1.0, 10.0]).double()
    density = spectral_density(symmetric(values))
    decades = torch.linspace(-6, 6, 2401).double()
    shares = [torch.trapezoid(density.pdf(sign * 10**decades, 0.1, log=True)[0], decades) for sign in (1, -1)]
    assert [float(share) for share in shares] == pytest.approx([5 / 8, 2 / 8], abs=1e-6)
    top = 1 / (0.1 * sqrt(2 * pi))
    at = density.pdf(torch.tensor([1.0, -1.0, 10.0]), 0.1, log=True)[0]
    assert at.tolist() == pytest.approx([3 / 8 * top, 1 / 8 * top, 1 / 8 * top], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quantity", ["hessian", "fisher"])
def test_wasserstein_distance_of_a_network(quantity: str, dtype: torch.dtype) -> None:
    """With 25 steps of 4 probes, a third of the products that the matrix itself takes.

    The distance has two parts. The rule of a probe and what the probe sees agree on polynomials of degree 49, so they
    are at most pi (b - a) / (4 * 25) apart: twice Jackson's bound for functions with slope 1. The distribution function
    of what signs see has at a point where the matrix' own is F the variance 2 F (1 - F) / P at most (it is that of a
    projection's quadratic form), so that over n probes the root mean square of the area in between is at most
    sqrt(2 / (n P)) times the integral of sqrt(F (1 - F)); three of that are allowed.
    """
    problem = network()
    values = torch.linalg.eigvalsh(estimate(problem, quantity, "dense").to_dense())
    problem = Problem(problem.model.to(dtype), "cross_entropy", problem.data)
    density = spectral_density(estimate(problem, quantity, "implicit"), probes=4, steps=25)
    assert (density.exact, density.size, density.matvecs) == (False, 307, 100)
    distance, noise = density.wasserstein(values)
    f = torch.arange(1, 307).double() / 307
    probes = sqrt(2 / (4 * 307)) * float((f * (1 - f)).sqrt() @ values.diff())
    steps = pi * float(values[-1] - values[0]) / (4 * 25)
    assert density.resolution == pytest.approx(steps, rel=0.01)  # the outermost nodes are inside
    assert distance < steps + 3 * probes
    # The bound of the steps is for the worst of spectra; of this one they see enough, and the rest is the probes'.
    assert distance < 3 * probes
    assert 0.2 * probes < noise < 2 * probes
    assert distance < 3 * noise + density.resolution
    # A single eigenvalue, the mean, would be off by much more.
    assert wasserstein_distance(values, [float(values.mean())]) > 3 * (3 * probes)


def test_wasserstein_counts_probes_alike() -> None:
    """By hand: rows (0, 1) and (1, 1), so the mean has a quarter at 0."""
    nodes = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double()
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double()
    density = SpectralDensity(nodes, weights, 10, False, 3, 0.0)
    distance, noise = density.wasserstein(torch.tensor([1.0, 1.0, 1.0]))
    assert distance == pytest.approx(0.25)
    # The distribution function at 0 is 1/2 or 0: the standard error of two such is 1/4.
    assert noise == pytest.approx(0.25)
    assert density.expectation(lambda x: x)[0] == pytest.approx(0.75)
    assert density.expectation(lambda x: x)[1] == pytest.approx(0.25)


def test_seeds() -> None:
    matrix = symmetric(np.linspace(0, 1, 50))
    one, same, other = (spectral_density(matrix, probes=2, steps=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.nodes, same.nodes)
    assert torch.equal(one.weights, same.weights)
    assert not torch.equal(one.nodes, other.nodes)
    assert not torch.equal(one.nodes[0], one.nodes[1])


def test_refusals() -> None:
    matrix = symmetric([1.0, 2.0])
    for arguments, message in (
        ({"probes": 1}, "probes must be at least 2, not 1: one probe gives no standard error"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(CurvlabError, match=message):
            spectral_density(matrix, **arguments)
    density = spectral_density(matrix)
    with pytest.raises(CurvlabError, match="width must be above 0"):
        density.pdf(torch.ones(1), 0.0)
    with pytest.raises(CurvlabError, match="must not contain zero"):
        density.pdf(torch.zeros(1), 0.1, log=True)
    skew = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    space = ParameterSpace(("w",), ((2,),))
    with pytest.raises(CurvlabError, match="not symmetric"):
        spectral_density(Implicit(lambda v: skew @ v, space, INFO, dtype=torch.float64))
    with pytest.raises(CurvlabError, match="not finite"):
        spectral_density(Implicit(lambda v: v / 0, space, INFO, dtype=torch.float64))


# Condition number -----------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=12), st.floats(0, 2), st.booleans())
def test_condition_number(values: list[float], damping: float, negative: bool) -> None:
    sign = -1 if negative else 1
    matrix = symmetric(sign * np.array(values))
    expected = (max(values) + damping) / (min(values) + damping)
    assert condition_number(matrix, sign * damping, tol=1e-4) == pytest.approx(expected, rel=3e-4)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e4), (torch.float64, 1e8)])
def test_large_and_infinite_condition_numbers(dtype: torch.dtype, largest: float) -> None:
    for size in (30, 200):  # formed, and by its ends
        matrix = symmetric(np.concatenate([[1 / largest], np.linspace(0.3, 1, size)]), dtype=dtype)
        exact = torch.linalg.eigvalsh(matrix.to_dense().double())  # rounding the matrix has changed the smallest
        assert condition_number(matrix) == pytest.approx(float(exact[-1] / exact[0]), rel=0.02)
        rank_deficient = symmetric(np.concatenate([np.zeros(size), [1.0, 2.0, 3.0]]), dtype=dtype)
        assert condition_number(rank_deficient) == inf
        assert condition_number(rank_deficient, 0.5) == pytest.approx(7, rel=2e-3)
        assert condition_number(-1.0 * rank_deficient) == inf
    assert condition_number(symmetric(np.linspace(-5, -1, 150), dtype=dtype)) == pytest.approx(5, rel=2e-3)
    assert condition_number(symmetric([0.0], dtype=dtype)) == inf
    assert condition_number(symmetric([-3.0], dtype=dtype)) == 1


def test_refused_condition_numbers() -> None:
    for values in ([-1.0, 2.0, 5.0], np.concatenate([[-1.0], np.linspace(2, 5, 200)])):
        with pytest.raises(CurvlabError, match=r"indefinite: its eigenvalues are from -1 to 5.*damping above 1, "):
            condition_number(symmetric(values))
    assert condition_number(symmetric([-1.0, 2.0, 5.0]), 1.5) == pytest.approx(13, rel=2e-3)
    with pytest.raises(CurvlabError, match=r"an extreme eigenvalue did not converge: after 3 products.*max_matvecs"):
        condition_number(symmetric(np.linspace(1, 2, 200)), max_matvecs=3)


# Effective dimension --------------------------------------------------------------------------------------------------


def dimension(values: Tensor, damping: float) -> float:
    return float((values / (values + damping)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effective_dimension_of_small_matrices(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 0.0, 0.1, 2.0, 9.0]).double()
    result = effective_dimension(symmetric(values, dtype=dtype), 0.3)
    assert float(result.value) == pytest.approx(dimension(values, 0.3), rel=20 * torch.finfo(dtype).eps)
    assert (float(result.standard_error), result.converged, result.matvecs) == (0.0, True, 5)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_effective_dimension_covers(damping: float) -> None:
    values = torch.cat([torch.zeros(100), torch.logspace(-4, 1, 100)]).double()
    truth = dimension(values, damping)
    results = [effective_dimension(symmetric(values), damping, probes=5, steps=20, seed=s) for s in range(40)]
    covered = np.mean([float(low) <= truth <= float(high) for low, high in (r.interval for r in results)])
    assert covered >= 0.85  # of 40 at 95 %, 34 or more with probability 0.99
    if all(r.converged for r in results):
        estimates = np.array([float(r.value) for r in results])
        assert abs(estimates.mean() - truth) < 4 * estimates.std() / sqrt(40)
    else:
        assert damping == 1e-3  # a ten-thousandth of the largest eigenvalue, for which twenty steps are too few


def test_effective_dimension_with_too_few_steps() -> None:
    """Three steps cannot see a damping a millionth of the largest eigenvalue: the error says so."""
    values = torch.logspace(-8, 0, 200).double()
    truth = dimension(values, 1e-6)
    short = effective_dimension(symmetric(values), 1e-6, probes=5, steps=3)
    assert not short.converged
    assert abs(float(short.value) - truth) < float(short.half_width)
    assert float(short.standard_error) > 0.2 * truth
    long = effective_dimension(symmetric(values), 1e-6, probes=2, steps=95)
    assert abs(float(long.value) - truth) < float(long.half_width)
    assert float(long.standard_error) < 0.05 * truth
    assert (short.matvecs, long.matvecs) == (15, 190)


def test_effective_dimension_of_a_projection() -> None:
    """Its Krylov spaces end after two steps, so that the rule is exact for each probe."""
    matrix = symmetric(np.repeat([0.0, 4.0], [60, 40]))
    result = effective_dimension(matrix, 1.0, probes=4, steps=10)
    assert result.matvecs <= 12
    z = np.random.default_rng(0).integers(0, 2, 100) * 2.0 - 1
    parts = float(z @ matrix.to_dense().numpy() @ z) / 4 / 100
    density = spectral_density(matrix, probes=4, steps=10)
    assert float((density.weights * (density.nodes > 2)).sum(dim=1)[0]) == pytest.approx(parts, rel=1e-10)
    expected = 100 * density.expectation(lambda x: x / (x + 1))[0]
    assert float(result.value) == pytest.approx(float(expected), rel=1e-10)


def test_refused_effective_dimensions() -> None:
    for size in (3, 300):
        values = np.concatenate([[-0.01], np.linspace(0, 1, size)])
        with pytest.raises(CurvlabError, match=r"not positive semi-definite: an eigenvalue is -0.0"):
            effective_dimension(symmetric(values), 1.0, probes=2, steps=60)
    with pytest.raises(CurvlabError, match="damping must be above 0"):
        effective_dimension(symmetric([1.0]), 0.0)
    with pytest.raises(CurvlabError, match="probes"):
        effective_dimension(symmetric([1.0]), 1.0, probes=1)
    rounding = symmetric(np.concatenate([[-1e-7], np.linspace(0, 1, 20)]), dtype=torch.float32)
    assert effective_dimension(rounding, 0.1).value > 0


@pytest.mark.parametrize("size", [40, 2000])
def test_a_damping_within_rounding_errors_is_refused(size: int) -> None:
    """Rounding errors of null eigenvalues would count as eigenvalues beside it."""
    basis = torch.linalg.qr(torch.randn(size, 10)).Q

    class LowRank:
        shape, dtype, device = (size, size), torch.float32, torch.device("cpu")

        def matvec(self, vector: Tensor) -> Tensor:
            return basis @ (basis.mT @ vector)

    assert float(effective_dimension(LowRank(), 1e-3, probes=10, steps=30).value) == pytest.approx(10, rel=0.5)
    with pytest.raises(CurvlabError, match="below the rounding errors"):
        effective_dimension(LowRank(), 1e-8, probes=10, steps=30)
