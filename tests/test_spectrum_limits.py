"""Spectra at the limits: of any magnitude, of operators and bad arguments, and of searches that miss something.

Every function of ``curvlab.spectrum`` is right there, or says in one sentence why it cannot be.
"""

from collections.abc import Callable
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import Tensor

from curvlab import EigenvalueRecorder
from curvlab.errors import CurvlabError
from curvlab.spectrum import (
    condition_number,
    deflated_power_iteration,
    diagonal,
    effective_dimension,
    spectral_density,
    top_eigenvalues,
    trace,
)
from curvlab.spectrum.eigenvalues import _Search
from curvlab.spectrum.estimate import Estimate
from curvlab.spectrum.operator import Products

P = 60


class By:
    """An operator that shows no more than an operator has to, and counts."""

    def __init__(self, matvec: Callable[[Tensor], object], size: int = P, dtype: object = torch.float64) -> None:
        self.shape, self.dtype, self.device = (size, size), dtype, torch.device("cpu")
        self._matvec, self.products = matvec, 0

    def matvec(self, vector: Tensor) -> object:
        self.products += 1
        return self._matvec(vector)


def by(matrix: Tensor) -> By:
    return By(lambda v: matrix @ v, len(matrix), matrix.dtype)


def by_diagonal(entries: Tensor) -> By:
    return By(lambda v: entries * v, len(entries), entries.dtype)


def symmetric(values: object, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    eigenvalues = torch.as_tensor(np.asarray(values, dtype=float))
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    matrix = basis * eigenvalues @ basis.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


FUNCTIONS: dict[str, Callable[..., object]] = {
    "top_eigenvalues": top_eigenvalues,
    "eigsh": lambda operator: top_eigenvalues(operator, method="eigsh"),
    "deflated_power_iteration": deflated_power_iteration,
    "spectral_density": lambda operator: spectral_density(operator, probes=2, steps=5),
    "spectral_density, exact": spectral_density,
    "trace, xtrace": lambda operator: trace(operator, max_matvecs=20),
    "trace, hutch++": lambda operator: trace(operator, max_matvecs=20, method="hutch++"),
    "trace, hutchinson": lambda operator: trace(operator, max_matvecs=20, method="hutchinson"),
    "trace, exact": trace,
    "diagonal, xdiag": lambda operator: diagonal(operator, max_matvecs=20),
    "diagonal, hutchinson": lambda operator: diagonal(operator, max_matvecs=20, method="hutchinson"),
    "condition_number": condition_number,
    "condition_number, by ends": lambda operator: condition_number(operator, 0.1, max_matvecs=P - 1),
    "effective_dimension": lambda operator: effective_dimension(operator, 1.0, probes=2, steps=5),
    "effective_dimension, exact": lambda operator: effective_dimension(operator, 1.0),
}


# Operators ------------------------------------------------------------------------------------------------------------

_DIAGONAL = torch.linspace(1, 2, P).double()
_NO_OPERATORS: dict[str, tuple[object, str]] = {
    "a matrix": (torch.eye(P), "a Tensor is not an operator, because it has no matvec"),
    "an array": (np.eye(P), "a ndarray is not an operator, because it has no"),
    "nothing": (None, "a NoneType is not an operator, because it has no shape"),
    "whole numbers": (By(lambda v: 500 * v, dtype=torch.int64), "real floating-point dtype, not int64"),
    "booleans": (By(lambda v: v, dtype=torch.bool), "real floating-point dtype, not bool"),
    "complex": (By(lambda v: v, dtype=torch.complex128), "real floating-point dtype, not complex128"),
    "NumPy's dtype": (By(lambda v: v, dtype=np.float64), "real floating-point dtype, not <class 'numpy.float64'>"),
    "gives whole numbers": (By(lambda v: (500 * v).long()), "numbers, not int64"),
    "gives booleans": (By(lambda v: v > 0), "numbers, not bool"),
    "gives complex": (By(lambda v: v * 1j), "numbers, not complex128"),
    "gives an array": (By(lambda v: v.numpy()), "matvec must return a tensor, not a ndarray"),
    "gives nothing": (By(lambda v: None), "must return a tensor, not a NoneType"),
    "gives a number": (By(lambda v: 1.0), "must return a tensor, not a float"),
    "gives sparse": (By(lambda v: v.to_sparse()), "layout sparse_coo"),
    "gives columns": (By(lambda v: v.unsqueeze(1)), r"must return shape \(60,\), not \(60, 1\)"),
    "gives a scalar": (By(lambda v: v.sum()), r"must return shape \(60,\), not \(\)"),
    "gives fewer": (By(lambda v: v[1:]), r"must return shape \(60,\), not \(59,\)"),
    "elsewhere": (By(lambda v: v.to("meta")), "device is cpu, but its product is on meta"),
    "NaN": (By(lambda v: v * nan), "product 1 of the operator is not finite"),
    "infinite": (By(lambda v: v * inf), "product 1 of the operator is not finite"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_operator(function: str) -> None:
    for name, (operator, message) in _NO_OPERATORS.items():
        with pytest.raises(CurvlabError, match=message) as caught:
            FUNCTIONS[function](operator)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [None, 3, (3,), (3, 4), (0, 0), (3.0, 3.0), "ab"])
def test_shapes_that_are_none(function: str, shape: object) -> None:
    operator = By(lambda v: v)
    operator.shape = shape  # type: ignore[assignment]
    with pytest.raises(CurvlabError, match="a square matrix is needed"):
        FUNCTIONS[function](operator)


def test_devices() -> None:
    operator = by_diagonal(_DIAGONAL)
    operator.device = "cpu"  # type: ignore[assignment]
    assert float(top_eigenvalues(operator).values) == pytest.approx(2, rel=1e-3)
    operator.device = "nowhere"  # type: ignore[assignment]
    with pytest.raises(CurvlabError, match="device 'nowhere' is unknown to torch"):
        top_eigenvalues(operator)


def _numbers(result: object) -> list[Tensor]:
    if isinstance(result, float):
        return [torch.tensor(result)]
    names = ("values", "nodes", "value", "residuals", "weights", "standard_error")
    return [getattr(result, name) for name in names if hasattr(result, name)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_matvec_may_do(function: str) -> None:
    """Write into its argument, give a view of it or of a buffer, a graph, an expanded or a wider tensor."""
    buffer = torch.zeros(P, dtype=torch.float64)
    entries = _DIAGONAL.clone().requires_grad_()
    expected = _numbers(FUNCTIONS[function](by_diagonal(_DIAGONAL)))
    for matvec in (
        lambda v: v.mul_(_DIAGONAL),
        lambda v: v.mul_(_DIAGONAL)[:],
        lambda v: torch.mul(v, _DIAGONAL, out=buffer),
        lambda v: entries * v,
        lambda v: (v * _DIAGONAL).flip(0).flip(0).detach(),
    ):
        for ours, theirs in zip(_numbers(FUNCTIONS[function](By(matvec))), expected, strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.requires_grad


def test_products_that_are_coarser_than_they_say() -> None:
    """Float32 products of an operator in float64: their rounding errors bound what can be reached, and it says so."""
    matrix = symmetric(np.linspace(1, 2, 100)).float()
    operator = By(lambda v: matrix @ v.float(), 100)
    assert top_eigenvalues(operator, tol=1e-5).converged
    assert not top_eigenvalues(operator, tol=1e-8).converged
    coarse = symmetric(np.linspace(1, 2, 100)).bfloat16()
    assert not top_eigenvalues(by(coarse), tol=1e-3).converged
    result = top_eigenvalues(by(coarse), tol=0.05)
    truth = torch.linalg.eigvalsh(coarse.double())[-1]
    assert result.converged
    assert abs(float(result.values[0]) / float(truth) - 1) < 0.05


@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1, 30, 1e4])
def test_half_precision(scale: float) -> None:
    """Right within its digits, from the smallest to the largest numbers of float16."""
    matrix = (symmetric(np.linspace(0, 1, P)) * scale).half()
    exact = torch.linalg.eigvalsh(matrix.double())
    result = top_eigenvalues(by(matrix), 2, tol=0.02)
    assert torch.allclose(result.values.double(), exact.flip(0)[:2], rtol=0.02)
    traced = trace(by(matrix), max_matvecs=40)
    assert abs(float(traced.value) - float(exact.sum())) <= float(traced.half_width)


# Magnitudes -----------------------------------------------------------------------------------------------------------

VALUES = np.r_[0.001, np.linspace(0.1, 0.5, P - 4), 0.8, 1.0, 1.0]
SCALES = [(torch.float64, 10.0**p) for p in (-300, -155, -80, 160, 300)]
SCALES += [(torch.float32, 10.0**p) for p in (-37, -15, 15, 37)]


@pytest.fixture(params=SCALES, ids=lambda scale: f"{str(scale[0])[6:]}-{scale[1]:g}")
def scaled(request: pytest.FixtureRequest) -> tuple[By, float, float, By]:
    """An operator, its scale, the tolerance of its dtype, and the same one at the scale 1."""
    dtype, scale = request.param
    matrix = symmetric(VALUES)
    # The nearest power of two scales without rounding.
    scale = 2.0 ** round(np.log2(scale))
    return by((matrix * scale).to(dtype)), scale, 1e-9 if dtype == torch.float64 else 1e-4, by(matrix.to(dtype))


def test_eigenvalues_of_any_magnitude(scaled: tuple[By, float, float, By]) -> None:
    operator, scale, accuracy, _ = scaled
    for options, expected in (
        ({"k": 4}, [1, 1, 0.8, 0.5]),
        ({"k": 2, "which": "SA"}, [0.001, 0.1]),
        ({"k": 1, "which": "LM", "stop": "gap"}, [1]),
        ({"k": 3, "method": "eigsh"}, [1, 1, 0.8]),
        ({"k": 1, "start": 1e-30 * torch.ones(P)}, [1]),
    ):
        operator.products = 0
        result = top_eigenvalues(operator, tol=1e-3, **options)  # type: ignore[arg-type]
        assert result.converged
        assert np.allclose(result.values.double().numpy() / scale, expected, rtol=1e-3)
        assert bool((result.residuals.double() / scale < 2e-3).all())
        assert result.matvecs == operator.products
        gram = result.vectors.mT @ result.vectors
        assert torch.allclose(gram.double(), torch.eye(len(gram)).double(), atol=max(accuracy, 1e-6))
    power = deflated_power_iteration(operator, steps=100)
    assert np.allclose(power.values.double().numpy() / scale, [1, 1, 0.8], rtol=1e-3)


def test_estimates_of_any_magnitude(scaled: tuple[By, float, float, By]) -> None:
    """Those of the matrix at the scale 1, times the scale; so are their errors, and precisions are the same."""
    operator, scale, accuracy, one = scaled
    for function, methods in ((trace, ("xtrace", "hutch++", "hutchinson")), (diagonal, ("xdiag", "hutchinson"))):
        for options in ({"max_matvecs": 20}, {}):
            for method in methods:
                ours, theirs = (function(of, method=method, **options) for of in (operator, one))  # type: ignore[operator]
                assert torch.allclose(ours.value / scale, theirs.value, rtol=accuracy, atol=accuracy)
                assert torch.allclose(ours.standard_error / scale, theirs.standard_error, rtol=0.1, atol=accuracy)
                assert ours.precision == pytest.approx(theirs.precision, rel=0.1, abs=accuracy)
                assert ours.converged == theirs.converged


def test_densities_of_any_magnitude(scaled: tuple[By, float, float, By]) -> None:
    operator, scale, accuracy, one = scaled
    for options in ({"probes": 3, "steps": 8}, {}):
        ours, theirs = (spectral_density(of, **options) for of in (operator, one))  # type: ignore[arg-type]
        assert torch.allclose(ours.nodes / scale, theirs.nodes, rtol=accuracy, atol=accuracy)
        assert torch.allclose(ours.weights, theirs.weights, atol=accuracy)
        assert ours.resolution / scale == pytest.approx(theirs.resolution, rel=accuracy)
        (mean, error), (their_mean, their_error) = (of.expectation(lambda x: x) for of in (ours, theirs))
        assert float(mean) / scale == pytest.approx(float(their_mean), rel=accuracy)
        assert float(error) / scale == pytest.approx(float(their_error), rel=1e-3)
        heights, their_heights = (
            of.pdf(at * torch.tensor([0.3, 1.0]).double(), 0.1 * at) for of, at in ((ours, scale), (theirs, 1.0))
        )
        for some, others in zip(heights, their_heights, strict=True):
            assert torch.allclose(some * scale, others, rtol=1e-3, atol=1e-12)
        distance, noise = ours.wasserstein(scale * torch.as_tensor(VALUES))
        their_distance, their_noise = theirs.wasserstein(torch.as_tensor(VALUES))
        assert distance / scale == pytest.approx(their_distance, rel=1e-3, abs=accuracy)
        assert noise / scale == pytest.approx(their_noise, rel=1e-3)


def test_functions_of_any_magnitude(scaled: tuple[By, float, float, By]) -> None:
    operator, scale, accuracy, one = scaled
    assert condition_number(operator) == pytest.approx(1000, rel=2e-3)
    assert condition_number(operator, scale, max_matvecs=P - 1) == pytest.approx(2 / 1.001, rel=2e-3)
    for options in ({"probes": 3, "steps": 6}, {}):
        ours = effective_dimension(operator, 0.3 * scale, **options)  # type: ignore[arg-type]
        theirs = effective_dimension(one, 0.3, **options)  # type: ignore[arg-type]
        assert float(ours.value) == pytest.approx(float(theirs.value), rel=accuracy)
        assert float(ours.standard_error) == pytest.approx(float(theirs.standard_error), rel=1e-3)


def test_ordinary_magnitudes_take_no_product_more_and_no_other_vector() -> None:
    """An operator that is not quite linear, such as by finite differences, sees the vectors that it always saw."""
    for dtype, scales in ((torch.float64, (1e-60, 1e60)), (torch.float32, (1e-8, 1e8))):
        for scale in scales:
            products = Products(by_diagonal(scale * torch.linspace(0.1, 1, 200, dtype=dtype)))
            products(torch.ones(200, dtype=dtype))
            assert (products.exponent, products.count) == (0, 1)


def test_what_no_dtype_has_room_for() -> None:
    large = By(lambda v: v.double().mul(1e39), 2000, torch.float32)
    for function in ("top_eigenvalues", "eigsh", "deflated_power_iteration"):
        with pytest.raises(CurvlabError, match="too large for float32: use float64"):
            FUNCTIONS[function](large)
    for function, operator in (
        (trace, by_diagonal(torch.full((2000,), 1e306, dtype=torch.float64))),
        (trace, by_diagonal(torch.full((40,), 1e307, dtype=torch.float64))),
        (lambda of: spectral_density(of, probes=2, steps=3), By(lambda v: v.mul(1e300).mul(1e300), 2000)),
    ):
        with pytest.raises(CurvlabError, match=r"too large for float64: multiply|not finite: the model.*NaN; check"):
            function(operator)  # type: ignore[operator]
    with pytest.raises(CurvlabError, match="rescaled, which takes one more product: increase max_matvecs"):
        top_eigenvalues(by_diagonal(1e-300 * torch.ones(50).double()), max_matvecs=1)


def test_scales_that_a_random_vector_does_not_see() -> None:
    """The first probe misses the large eigenvalue, the second meets it: refused, as the scale is that of the first."""
    generator = np.random.default_rng(0)
    signs = generator.integers(0, 2, (2, 4000)) * 2.0 - 1
    i, j = next(
        (i, j) for i in range(10) for j in range(i) if signs[0, i] == signs[0, j] and signs[1, i] != signs[1, j]
    )

    def matvec(v: Tensor) -> Tensor:
        product = v.clone()
        product[i] += 1e300 * (v[i] - v[j])
        product[j] -= 1e300 * (v[i] - v[j])
        return product

    with pytest.raises(CurvlabError, match="too large"):
        spectral_density(By(matvec, 4000), probes=2, steps=10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero(dtype: torch.dtype) -> None:
    operator = By(torch.zeros_like, 100, dtype)
    for k in (1, 3):
        result = top_eigenvalues(operator, k)
        assert result.converged
        assert not result.values.any()
    for function in (trace, diagonal):
        estimate = function(operator, max_matvecs=20)  # type: ignore[operator]
        assert not estimate.value.any()
        assert estimate.precision == 0
    assert not spectral_density(operator, probes=2, steps=5).nodes.any()
    assert condition_number(operator) == inf


def test_precisions_of_any_magnitude() -> None:
    for scale in (1e-300, 1.0, 1e300):
        estimate = Estimate(
            scale * torch.tensor([3.0, 4.0]).double(), scale * torch.tensor([0.0, 1.0]).double(), 9, True, 6
        )
        assert estimate.precision == pytest.approx(2.570582 / 5)


def test_errors_of_entries_of_other_magnitudes() -> None:
    """A block of 1 and one of 1e-200: each entry's error is that of its own block."""
    block = symmetric(np.linspace(1, 2, 30))
    both = By(lambda v: torch.cat([block @ v[:30], 1e-200 * (block @ v[30:])]))
    result = diagonal(both, method="hutchinson", max_matvecs=20)
    covered = (result.value - torch.cat([block.diagonal(), 1e-200 * block.diagonal()])).abs() <= result.half_width
    assert float(covered[30:].double().mean()) > 0.8
    assert float(result.standard_error[30:].max()) < 1e-198


# Searches that miss something -----------------------------------------------------------------------------------------


def wrong(result: object, exact: np.ndarray, which: str, tol: float, floor: float) -> bool:
    """Whether it says that it has converged, and one of the values is further off than it says."""
    key = {"LA": exact, "SA": -exact, "LM": np.abs(exact)}[which]
    values = result.values.double().numpy()  # type: ignore[attr-defined]
    expected = exact[np.argsort(-key, kind="stable")][: len(values)]
    if which == "LM":
        values, expected = np.abs(values), np.abs(expected)
    allowed = 1.05 * tol * np.maximum(np.abs(expected), floor * np.abs(exact).max())
    return bool(result.converged and (np.abs(values - expected) > allowed).any())  # type: ignore[attr-defined]


RANDOM = np.random.default_rng(0)
HARD = {
    "pairs": np.r_[np.linspace(0.5, 5, 50), -np.linspace(0.5, 5, 50)],
    "pairs that nearly cancel": np.r_[5, -5.004, 4, -4, RANDOM.uniform(-0.1, 0.1, 100)],
    "clustered": np.r_[1 - 1e-6 * RANDOM.random(20), RANDOM.random(100) * 0.5],
    "tiny gaps": np.r_[1, 1 - 1e-4, 1 - 2e-4, 1 - 1e-2, RANDOM.random(100) * 0.9],
    "16 decades": np.logspace(-16, 0, 100),
    "16 decades of both signs": np.r_[np.logspace(-16, 0, 50), -np.logspace(-16, -1, 50)],
    "rank one": np.r_[7.0, np.zeros(99)],
    "rank one, negative": np.r_[-7.0, np.zeros(99)],
    "damped": np.r_[1.0, 0.8, 0.8, 0.5, np.full(200, 0.3)],
    "double below a single": np.r_[1.0, 0.8, 0.8, 0.5, RANDOM.random(200) * 0.3],
    "two values": np.repeat([1.0, 2.0], 50),
    "multiple": np.r_[[5.0] * 10, RANDOM.random(100)],
    "P = 1": np.array([3.0]),
    "P = 2": np.array([-1.0, 2.0]),
    "P = 2, equal": np.array([2.0, 2.0]),
}


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", HARD)
def test_converged_is_true(name: str, which: str) -> None:
    for dtype in (torch.float64, torch.float32):
        matrix = symmetric(HARD[name], dtype=dtype)
        exact, floor = torch.linalg.eigvalsh(matrix.double()).numpy(), torch.finfo(dtype).eps ** 0.5
        for k in {1, min(3, len(matrix))}:
            for seed in range(2):
                result = top_eigenvalues(by(matrix), k, which, seed=seed)  # type: ignore[arg-type]
                assert result.converged
                assert not wrong(result, exact, which, 1e-3, floor)
            # ARPACK's criterion is relative to the eigenvalue: where rounding is larger, the machine's BLAS decides
            # whether it is ever met.
            wanted = np.sort(-np.abs(exact) if which == "LM" else -exact if which == "LA" else exact)[:k]
            reachable = 1e-3 * np.abs(wanted).min() > 100 * torch.finfo(dtype).eps * np.abs(exact).max()
            if k < len(matrix) and reachable and not name.startswith(("rank one", "16 decades")):
                assert not wrong(top_eigenvalues(by(matrix), k, which, method="eigsh"), exact, which, 1e-3, floor)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["residual", "gap"])
def test_a_large_multiple_eigenvalue_hides_another(stop: str) -> None:
    """A damped matrix of rank one: almost all of a random vector is an eigenvector of the damping."""
    entries = torch.full((200_000,), 0.3).double()
    entries[0] = 0.8
    results = [top_eigenvalues(by_diagonal(entries), stop=stop, seed=seed) for seed in range(15)]  # type: ignore[arg-type]
    assert [float(result.values[0]) for result in results] == pytest.approx([0.8] * 15)
    assert max(result.matvecs for result in results) < 8


@pytest.mark.parametrize("size", [60, 3000])
@pytest.mark.parametrize("over", [1.02, 1.2, 2.0])
@pytest.mark.parametrize("bulk", ["continuous", "one value"])
def test_a_start_that_another_has_overtaken(size: int, over: float, bulk: str) -> None:
    """The eigenvector of a nearby matrix's largest eigenvalue, which is not the largest any more."""
    rest = RANDOM.random(size - 2) * 0.5 if bulk == "continuous" else np.full(size - 2, 0.3)
    operator = by_diagonal(torch.as_tensor(np.r_[1.0, over, rest]))
    start = torch.zeros(size).double()
    start[0] = 1
    missed = sum(
        abs(float(top_eigenvalues(operator, start=start, seed=seed).values[0]) - over) > 1e-3 * over
        for seed in range(20)
    )
    assert missed <= 2  # of the random part, an eigenvector has next to nothing once in a while
    unluckier = sum(
        abs(float(top_eigenvalues(operator, seed=seed).values[0]) - over) > 1e-3 * over for seed in range(20)
    )
    assert missed <= unluckier + 1


def test_starts_in_invariant_subspaces() -> None:
    """From which no product leads away: blocks that know nothing of each other, and the null space."""
    one, other = symmetric(np.linspace(0, 1, 40)), symmetric(np.linspace(0, 3, 40))
    blocks = torch.block_diag(one, other, torch.zeros(20, 20).double())
    eigenvector = torch.linalg.eigh(one).eigenvectors[:, -1]
    for start in (
        torch.cat([eigenvector, torch.zeros(60)]),
        torch.cat([torch.randn(40).double(), torch.zeros(60)]),
        torch.cat([torch.zeros(80), torch.ones(20)]),
        torch.cat([torch.eye(40)[:, :3], torch.zeros(60, 3)]),
    ):
        for method in ("lanczos", "eigsh"):
            result = top_eigenvalues(by(blocks), start=start, method=method)  # type: ignore[arg-type]
            assert result.converged
            assert float(result.values[0]) == pytest.approx(3, rel=1e-3)


def test_a_random_part_is_in_every_start() -> None:
    """Of 0.3 of its length, another one with another seed."""
    size, seen = 5000, []

    def matvec(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return v * torch.linspace(0, 1, size)

    start = torch.zeros(size)
    start[3] = 1e-20
    for seed in (0, 1):
        top_eigenvalues(By(matvec, size, torch.float32), start=start, max_matvecs=1, seed=seed)
    for first in seen:
        rest = first.clone()
        rest[3] = 0
        assert float(rest.norm() / first[3]) == pytest.approx(0.3, rel=0.02)
    assert not torch.equal(*seen)


def test_saves_products_without_a_certificate() -> None:
    operator = by_diagonal(torch.as_tensor(np.r_[RANDOM.random(3000), 1.2]))
    start = torch.zeros(3001)
    start[-1] = 1
    cold, warm = (top_eigenvalues(operator, start=of, stop="gap") for of in (None, start))
    assert warm.matvecs <= 0.7 * cold.matvecs
    assert float(warm.values[0]) == pytest.approx(1.2, rel=1e-3)


@pytest.mark.parametrize("largest", [1e9, 1e11, 1e12])
def test_condition_numbers_that_are_not_infinite(largest: float) -> None:
    matrix = symmetric(np.r_[1 / largest, np.linspace(0.3, 1, 150)])
    exact = torch.linalg.eigvalsh(matrix)
    assert condition_number(by(matrix)) == pytest.approx(float(exact[-1] / exact[0]), rel=0.02)


# Arguments ------------------------------------------------------------------------------------------------------------

_STARTS = [
    (torch.ones(P).numpy(), "start must be a tensor, not a NumPy array: use torch.from_numpy"),
    ([1.0] * P, "start must be a tensor, not a list"),
    (torch.zeros(P), "start must not contain vectors that are zero"),
    (torch.full((P,), nan), "not finite"),
    (torch.full((P,), inf), "not finite"),
    (torch.ones(P) * 1j, "start must be real, not complex"),
    (torch.ones(P).to_sparse(), "start is sparse"),
    (torch.ones(P, device="meta"), "start is on the meta device"),
    (torch.ones(P + 1), "start must have shape"),
    (torch.ones(P, 0), "start must not contain vectors that are zero"),
    (torch.ones(P, 1, 1), "start must have shape"),
    (torch.tensor(1.0), "start must have shape"),
]


@pytest.mark.parametrize("method", ["lanczos", "eigsh"])
def test_starts(method: str) -> None:
    operator = by_diagonal(_DIAGONAL)
    for start, message in _STARTS:
        with pytest.raises(CurvlabError, match=message):
            top_eigenvalues(operator, start=start, method=method)  # type: ignore[arg-type]
    for good in (torch.ones(P).long(), 1e-200 * torch.ones(P).double(), 1e200 * torch.eye(P).double(), _DIAGONAL > 1.5):
        assert float(top_eigenvalues(operator, start=good, method=method).values[0]) == pytest.approx(2, rel=1e-3)  # type: ignore[arg-type]


_SEEDS = [(seed, "seed") for seed in (-1, 1.0, None, "0", True, nan, torch.tensor(0), [1])]
_WHOLE = [1.5, True, None, "3", nan, inf, torch.tensor(3), [1], 3j]
_POSITIVE = [0, 0.0, -1.0, nan, inf, "0.1", True, 1j, [1.0], torch.tensor(0.1), 10**400]


def _bad(**arguments: list[object]) -> list[tuple[dict[str, object], str]]:
    return [({name: value}, name) for name, values in arguments.items() for value in values]


_NONE = [None]
_BAD: dict[str, tuple[Callable[..., object], list[tuple[dict[str, object], str]]]] = {
    "top_eigenvalues": (
        top_eigenvalues,
        _bad(
            k=[*_WHOLE, 0, -1, P + 1],
            which=[None, "LR", 1, ["LA"]],
            stop=[None, "never", True],
            method=[None, "power", 2],
            tol=[*_POSITIVE, None],
            max_matvecs=[value for value in [*_WHOLE, 0, -3] if value is not None],
        ),
    ),
    "deflated_power_iteration": (deflated_power_iteration, _bad(k=[*_WHOLE, 0, P + 1], steps=[*_WHOLE, 0])),
    "spectral_density": (spectral_density, _bad(probes=[*_WHOLE, 0, 1], steps=[*_WHOLE, 0, -2])),
    "trace": (
        trace,
        _bad(method=[None, "xdiag", 1], precision=_POSITIVE, max_matvecs=[*_WHOLE, 0, 5]),
    ),
    "diagonal": (
        diagonal,
        _bad(method=[None, "xtrace", 1], precision=_POSITIVE, max_matvecs=[*_WHOLE, 0, 5]),
    ),
    "condition_number": (
        condition_number,
        _bad(
            damping=[None, nan, inf, "1", True, torch.ones(3)],
            tol=[*_POSITIVE, None],
            max_matvecs=[value for value in [*_WHOLE, 0] if value is not None],
        ),
    ),
    "effective_dimension": (
        lambda operator, **options: effective_dimension(operator, **({"damping": 1.0} | options)),
        _bad(damping=[*_POSITIVE, None, torch.ones(3)], probes=[*_WHOLE, 1], steps=[*_WHOLE, 0]),
    ),
}


@pytest.mark.parametrize("name", _BAD)
def test_arguments(name: str) -> None:
    function, bad = _BAD[name]
    operator = by_diagonal(_DIAGONAL)
    for options, message in bad + [({"seed": seed}, what) for seed, what in _SEEDS]:
        with pytest.raises(CurvlabError, match=message) as caught:
            function(operator, **options)
        assert "\n" not in str(caught.value)
    assert operator.products == 0
    function(operator, seed=10**60)
    function(operator, seed=np.int64(3))


@pytest.mark.parametrize("function", [trace, diagonal])
def test_odd_numbers_of_products(function: Callable[..., Estimate]) -> None:
    exact = symmetric(np.linspace(1, 2, P))
    for most in (7, 9, 21, np.int64(33)):
        result = function(by(exact), max_matvecs=most)
        assert most - 1 <= result.matvecs <= most
        truth = exact.diagonal() if function is diagonal else exact.trace()
        assert float(((result.value - truth).abs() <= result.half_width).double().mean()) > 0.8


def test_arguments_of_a_density() -> None:
    density = spectral_density(by_diagonal(_DIAGONAL))
    points = torch.ones(1)
    for width in [*_POSITIVE, None]:
        with pytest.raises(CurvlabError, match="width"):
            density.pdf(points, width)  # type: ignore[arg-type]
    for points_ in (np.ones(2), [1.0], None, torch.ones(2) * 1j):
        for method in (lambda of: density.pdf(of, 0.1), density.cdf):
            with pytest.raises(CurvlabError, match="points"):
                method(points_)  # type: ignore[arg-type]
        with pytest.raises(CurvlabError, match="eigenvalues"):
            density.wasserstein(points_)  # type: ignore[arg-type]


def test_arguments_of_the_recorder() -> None:
    data = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    wholes = [value for value in _WHOLE if value is not None]
    bad = _bad(
        k=[*wholes, None, 0],
        every=[*wholes, 0],
        seed=[1.5, None, -1, True],
        tol=[*_POSITIVE, None],
        max_matvecs=[*wholes, 0],
        which=[None, "LR"],
        per=[None, "neuron"],
    )
    for options, message in [*bad, ({"density_probes": 1.5}, "probes"), ({"density_steps": True}, "steps")]:
        with pytest.raises(CurvlabError, match=message):
            EigenvalueRecorder(data, **options)  # type: ignore[arg-type]


# The parts ------------------------------------------------------------------------------------------------------------


def test_the_accuracy_of_products_is_that_of_the_coarsest() -> None:
    products = Products(By(lambda v: v.bfloat16()))
    assert products.eps == torch.finfo(torch.float64).eps
    products(torch.ones(P).double())
    assert products.eps == torch.finfo(torch.bfloat16).eps
    assert Products(By(lambda v: v, dtype=torch.float16)).eps == torch.finfo(torch.float16).eps


def test_how_far_a_hidden_eigenvalue_may_be() -> None:
    """The residual for the overlap of a random vector, else times the overlap over an eigenvector's share."""
    search = _Search(Products(By(lambda v: v, 10_000)), "LA", 1e-3, "residual", np.random.default_rng(0))
    overlaps = np.array([0.0, -0.03, 0.05, -1.0])
    assert search.hidden_factor(overlaps, 1.0) == pytest.approx([1, 1, 5, 100])
    assert search.hidden_factor(overlaps, 0.25) == pytest.approx([1, 1, 20, 400])
