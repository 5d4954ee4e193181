"""Extreme eigenvalues: against dense eigendecompositions and ARPACK, of matrices made to be hard, and of networks."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_under_test import ZOO, case
from torch import Tensor, nn

from curvlab import Problem, estimate
from curvlab.errors import CurvlabError
from curvlab.spectrum import EigenResult, deflated_power_iteration, top_eigenvalues
from curvlab.spectrum.eigenvalues import Which, _Search
from curvlab.spectrum.lanczos import Lanczos
from curvlab.spectrum.operator import Products, norm


@dataclass
class Matrix:
    """A dense matrix that shows no more than an operator has to, and counts."""

    matrix: Tensor
    products: int = field(default=0)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.matrix.shape)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def with_spectrum(values: np.ndarray, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    matrix = basis @ torch.diag(torch.from_numpy(np.asarray(values, dtype=np.float64))) @ basis.T
    return (matrix + matrix.T) / 2


def extreme(values: np.ndarray, which: Which, k: int) -> np.ndarray:
    """The oracle: sort them all."""
    key = {"LA": values, "SA": -values, "LM": np.abs(values)}[which]
    return values[np.argsort(-key, kind="stable")][:k]


def assert_right(result: EigenResult, matrix: Tensor, which: Which, tol: float, floor: float = 0.0) -> None:
    k = len(result.values)
    dense = torch.linalg.eigvalsh(matrix.double()).numpy()
    expected = extreme(dense, which, k)
    actual = result.values.double().numpy()
    if which == "LM":  # the sign of equal magnitudes is arbitrary
        expected, actual = np.abs(expected), np.abs(actual)
    scale = np.maximum(np.abs(expected), floor * np.abs(dense).max())
    assert (np.abs(actual - expected) <= tol * scale + 1e-300).all()
    true = residuals_of(result, matrix)
    assert bool((true <= 5 * result.residuals.double() + 1e-12 * np.abs(dense).max()).all())
    gram = result.vectors.mT @ result.vectors
    assert bool((gram - torch.eye(k, dtype=gram.dtype)).abs().max() < 1e-5)


def residuals_of(result: EigenResult, matrix: Tensor) -> Tensor:
    v = result.vectors.double()
    return torch.linalg.norm(matrix.double() @ v - v * result.values.double(), dim=0)


RANDOM = np.random.default_rng(0)
SPECTRA = {
    "gaussian": RANDOM.standard_normal(200),
    "negative": -np.logspace(-3, 2, 100),
    "clustered": np.r_[np.linspace(0, 1, 100), 1.0001, 1.0002, 1.001, [1.01] * 6, 2],
    "rank deficient": np.r_[np.zeros(150), np.logspace(-1, 1, 10)],
    "multiple": np.r_[[5.0] * 10, RANDOM.random(200)],
    "indefinite pairs": np.r_[np.arange(1, 30), -np.arange(1, 30)].astype(float),
    "zero": np.zeros(20),
    "identity": np.ones(30),
    "1 x 1": np.array([-3.0]),
    "tiny": 1e-150 * np.arange(10),
    "huge": 1e150 * np.arange(10),
}


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("name", SPECTRA)
class TestAgainstDense:
    @pytest.mark.parametrize(("stop", "tol"), [("gap", 1e-3), ("residual", 1e-3), ("residual", 1e-6)])
    def test_float64(self, name: str, k: int, which: Which, stop: str, tol: float) -> None:
        matrix = with_spectrum(SPECTRA[name])
        k = min(k, len(matrix))
        result = top_eigenvalues(Matrix(matrix), k, which, tol, stop=stop, seed=1)  # type: ignore[arg-type]
        assert result.converged
        # What is zero comes out as sqrt(eps) of the largest, times the tolerance.
        assert_right(result, matrix, which, tol, floor=1.5e-8)

    def test_float32(self, name: str, k: int, which: Which) -> None:
        if name in ("tiny", "huge"):
            pytest.skip("beyond float32")
        matrix = with_spectrum(SPECTRA[name]).float()
        k = min(k, len(matrix))
        result = top_eigenvalues(Matrix(matrix), k, which, 1e-3, seed=1)
        assert result.values.dtype == result.vectors.dtype == torch.float32
        assert_right(result, matrix, which, 2e-3, floor=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-10, 10).map(lambda x: round(x, 9)), min_size=1, max_size=40),
    k=st.integers(1, 5),
    which=st.sampled_from(["LA", "SA", "LM"]),
    seed=st.integers(0, 100),
)
def test_any_small_matrix(values: list[float], k: int, which: Which, seed: int) -> None:
    matrix = with_spectrum(np.array(values), seed)
    k = min(k, len(values))
    result = top_eigenvalues(Matrix(matrix), k, which, 1e-8, seed=seed, stop="residual")
    assert_right(result, matrix, which, 2e-8, floor=1e-6)


class TestGap:
    """``stop="gap"`` takes fewer products, and can be wrong: why it is not the default."""

    def test_takes_fewer_products(self) -> None:
        operator = Matrix(with_spectrum(np.r_[RANDOM.random(500), 1.5]))
        gap, residual = (top_eigenvalues(operator, stop=stop) for stop in ("gap", "residual"))  # type: ignore[arg-type]
        assert (gap.stop, residual.stop) == ("gap", "residual")
        assert gap.matvecs < residual.matvecs
        assert abs(float(gap.values[0]) - 1.5) < 1.5e-3
        assert residual.residuals[0] <= 1.5e-3 < gap.residuals[0]

    def test_the_estimate(self) -> None:
        """Of a gap that has settled the square over it, not below a quarter of the residual; else the residual."""
        search = _Search(Products(Matrix(torch.eye(40))), "LA", 1e-3, "gap", np.random.default_rng(0))
        residuals, gaps = np.array([1e-3, 0.1, 0.1, 0.1]), np.array([1.0, 0.2, 0.2, 0.01])
        before = np.array([1.1, 0.2, 0.5, 0.01])
        assert search.errors(residuals, gaps, before) == pytest.approx([2.5e-4, 0.05, 0.1, 0.1])
        assert (replace(search, stop="residual").errors(residuals, gaps, before) == residuals).all()

    def test_an_eigenvalue_that_hides(self) -> None:
        """Two eigenvalues 0.6 % apart, over many starts."""
        matrix = with_spectrum(np.r_[0.3 * np.random.default_rng(0).standard_normal(300), 0.994, 1.0])
        errors = {
            stop: [abs(float(top_eigenvalues(Matrix(matrix), seed=s, stop=stop).values[0]) - 1) for s in range(40)]
            for stop in ("gap", "residual")
        }
        assert sum(error > 1e-3 for error in errors["residual"]) < 0.5 * sum(error > 1e-3 for error in errors["gap"])


class TestCounts:
    def test_products_are_counted(self) -> None:
        operator = Matrix(with_spectrum(SPECTRA["gaussian"]))
        for k in (1, 4):
            before = operator.products
            assert top_eigenvalues(operator, k).matvecs == operator.products - before

    def test_no_more_than_there_are(self) -> None:
        """At most P products make everything known."""
        for n in (1, 2, 7):
            assert top_eigenvalues(Matrix(with_spectrum(np.arange(n)))).matvecs <= n

    def test_fewer_than_arpack(self) -> None:
        matrix = with_spectrum(np.r_[RANDOM.random(500), 1.5])
        ours = top_eigenvalues(Matrix(matrix)).matvecs
        theirs = top_eigenvalues(Matrix(matrix), method="eigsh").matvecs
        assert ours < 0.8 * theirs

    @pytest.mark.parametrize("k", [1, 3])
    def test_too_few_allowed(self, k: int) -> None:
        """Then it says so, and the residuals are those of what it returns."""
        matrix = with_spectrum(SPECTRA["gaussian"])
        for limit in (k, k + 1, k + 5):
            operator = Matrix(matrix)
            result = top_eigenvalues(operator, k, max_matvecs=limit)
            assert not result.converged
            assert result.matvecs == operator.products == limit
            assert torch.allclose(residuals_of(result, matrix), result.residuals, rtol=1e-8)

    def test_the_second_search_is_cut_short_too(self) -> None:
        matrix = with_spectrum(SPECTRA["multiple"])
        enough = top_eigenvalues(Matrix(matrix), 10)
        assert enough.converged
        for limit in range(12, enough.matvecs, 9):
            result = top_eigenvalues(Matrix(matrix), 10, max_matvecs=limit)
            assert result.matvecs <= limit
            assert not result.converged


@pytest.mark.parametrize("k", [1, 3])
def test_a_tolerance_beyond_the_dtype(k: int) -> None:
    """It ends when rounding errors are all that is left, and says that this was not enough."""
    matrix = with_spectrum(SPECTRA["gaussian"]).float()
    result = top_eigenvalues(Matrix(matrix), k, tol=1e-9)
    assert not result.converged
    assert result.matvecs < 300
    assert_right(result, matrix, "LA", 1e-6)


class TestRestarts:
    @pytest.mark.parametrize("k", [1, 3])
    def test_a_basis_that_is_full(self, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("curvlab.spectrum.eigenvalues._CAPACITY", 12)
        monkeypatch.setattr("curvlab.spectrum.eigenvalues._ROOM", 0)
        matrix = with_spectrum(np.linspace(0, 1, 300))
        result = top_eigenvalues(Matrix(matrix), k, tol=1e-8, stop="residual")
        assert result.matvecs > 50
        assert result.converged
        assert_right(result, matrix, "LA", 1e-8)

    def test_costs_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thick restart keeps what was learnt: far fewer products than starting again."""
        operator = Matrix(with_spectrum(np.linspace(0, 1, 300)))
        whole = top_eigenvalues(operator, tol=1e-8, stop="residual").matvecs
        monkeypatch.setattr("curvlab.spectrum.eigenvalues._CAPACITY", 40)
        monkeypatch.setattr("curvlab.spectrum.eigenvalues._ROOM", 0)
        assert top_eigenvalues(operator, tol=1e-8, stop="residual").matvecs < 2 * whole

    def test_the_basis(self) -> None:
        """``T = Q' A Q``, and what ``A Q`` has besides ``Q T`` is ``beta`` in the last column; after a restart, too."""
        matrix = with_spectrum(RANDOM.standard_normal(60))
        generator = np.random.default_rng(0)
        products = Products(Matrix(matrix))
        basis = Lanczos(products, 20, products.gaussian(generator), generator)
        for _ in range(45):
            if basis.full:
                values, vectors = np.linalg.eigh(basis.matrix)
                basis.restart(vectors[:, -7:], values[-7:])
            basis.step()
            q = basis.combine(np.eye(basis.size)).mT
            t = torch.from_numpy(basis.matrix)
            assert torch.allclose(q.mT @ q, torch.eye(basis.size, dtype=torch.float64), atol=1e-12)
            rest = matrix @ q - q @ t
            assert rest[:, :-1].norm() < 1e-12
            assert float(rest[:, -1].norm()) == pytest.approx(basis.beta, rel=1e-10)


class TestWarmStart:
    def test_from_a_matrix_nearby(self) -> None:
        matrix = with_spectrum(np.r_[RANDOM.random(300), 1.2])
        change = with_spectrum(RANDOM.standard_normal(301), seed=5)
        nearby = matrix + 1e-3 * change
        cold = top_eigenvalues(Matrix(nearby))
        start = top_eigenvalues(Matrix(matrix)).vectors
        warm, certain = (top_eigenvalues(Matrix(nearby), start=start, stop=stop) for stop in ("gap", "residual"))  # type: ignore[arg-type]
        assert warm.matvecs <= 0.6 * cold.matvecs
        assert certain.matvecs <= 1.1 * cold.matvecs
        assert_right(warm, nearby, "LA", 1e-3)
        assert_right(certain, nearby, "LA", 1e-3)

    def test_from_several(self) -> None:
        matrix = with_spectrum(np.r_[RANDOM.random(300), 1.2, 1.4, 1.6])
        found = top_eigenvalues(Matrix(matrix), 3, tol=1e-6)
        warm = top_eigenvalues(Matrix(matrix), 3, start=found.vectors, stop="gap")
        assert warm.matvecs < top_eigenvalues(Matrix(matrix), 3).matvecs
        assert_right(warm, matrix, "LA", 1e-3)

    @pytest.mark.parametrize("which", ["LA", "SA", "LM"])
    def test_from_another_eigenvector(self, which: Which) -> None:
        """From which no product ever leads away."""
        matrix = torch.diag(torch.linspace(-4, 3, 50, dtype=torch.float64))
        for start in torch.eye(50, dtype=torch.float64)[::7]:
            assert_right(top_eigenvalues(Matrix(matrix), which=which, start=start), matrix, which, 1e-3)

    def test_lengths_do_not_matter(self) -> None:
        matrix = with_spectrum(SPECTRA["gaussian"])
        start = torch.randn(200, 2, dtype=torch.float64)
        equal, other = (top_eigenvalues(Matrix(matrix), start=start * scale) for scale in (1, torch.tensor([1, 1e6])))
        assert torch.allclose(equal.vectors, other.vectors)

    def test_shapes(self) -> None:
        operator = Matrix(with_spectrum(np.arange(10)))
        ones = torch.ones(10, dtype=torch.float64)
        for good in (ones, ones[:, None], torch.eye(10, dtype=torch.float64)[:, :3], ones.float()):
            assert top_eigenvalues(operator, start=good).converged
        for bad in (torch.ones(9), torch.ones(3, 10), torch.zeros(10), torch.full((10,), torch.nan)):
            with pytest.raises(CurvlabError, match="start"):
                top_eigenvalues(operator, start=bad)
        with pytest.raises(CurvlabError, match="cancel"):
            top_eigenvalues(operator, start=torch.stack([ones, -ones], dim=1))


class TestArpack:
    @pytest.mark.parametrize("which", ["LA", "SA", "LM"])
    @pytest.mark.parametrize("k", [1, 4])
    def test_is_an_option(self, which: Which, k: int) -> None:
        matrix = with_spectrum(SPECTRA["gaussian"])
        result = top_eigenvalues(Matrix(matrix), k, which, 1e-6, method="eigsh")
        assert result.stop == "residual"
        assert torch.allclose(residuals_of(result, matrix), result.residuals, atol=1e-12)
        assert_right(result, matrix, which, 1e-6)
        assert_right(top_eigenvalues(Matrix(matrix), k, which, 1e-6), matrix, which, 1e-6)

    def test_what_it_cannot_do(self) -> None:
        operator = Matrix(with_spectrum(np.arange(5)))
        with pytest.raises(CurvlabError, match="eigsh cannot compute all eigenvalues"):
            top_eigenvalues(operator, 5, method="eigsh")
        with pytest.raises(CurvlabError, match="eigsh fails"):
            top_eigenvalues(Matrix(torch.zeros(50, 50)), method="eigsh")
        assert not top_eigenvalues(
            Matrix(with_spectrum(SPECTRA["gaussian"]).float()), tol=1e-9, method="eigsh"
        ).converged
        with pytest.raises(CurvlabError, match="more than 10 products"):
            top_eigenvalues(Matrix(with_spectrum(SPECTRA["gaussian"])), method="eigsh", max_matvecs=10)


class TestPowerIteration:
    def test_finds_the_largest_magnitudes(self) -> None:
        matrix = with_spectrum(np.r_[0.1 * RANDOM.standard_normal(50), 3.0, -2.0, 1.0])
        result = deflated_power_iteration(Matrix(matrix), steps=100)
        assert result.converged
        assert np.allclose(result.values.numpy(), [3, -2, 1], rtol=1e-4)
        assert torch.allclose(residuals_of(result, matrix), result.residuals, atol=1e-10)

    def test_is_off_where_published_curves_were_made_with_it(self) -> None:
        """18 steps do not separate eigenvalues 2 % apart; Lanczos needs no more products and does."""
        matrix = with_spectrum(np.r_[0.3 * np.random.default_rng(1).standard_normal(200), 0.98, 1.0])
        power = deflated_power_iteration(Matrix(matrix), k=1)
        lanczos = top_eigenvalues(Matrix(matrix), max_matvecs=power.matvecs)
        assert not power.converged
        assert abs(float(power.values[0]) - 1) > 2e-3
        assert abs(float(lanczos.values[0]) - 1) < 1e-4

    def test_counts_and_stops(self) -> None:
        operator = Matrix(with_spectrum(SPECTRA["gaussian"]))
        result = deflated_power_iteration(operator)
        assert result.matvecs == operator.products == 3 * 18
        assert deflated_power_iteration(Matrix(torch.eye(4))).matvecs == 3 * 2  # it sees no change

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_does_not_find_an_eigenvalue_twice(self, dtype: torch.dtype) -> None:
        """Where those found are all, rounding errors along them are no direction."""
        u = torch.randn(50, dtype=dtype)
        u /= u.norm()
        result = deflated_power_iteration(Matrix(100 * torch.outer(u, u)))
        assert np.allclose(result.values.numpy(), [100, 0, 0], atol=1e-3)
        gram = result.vectors.mT @ result.vectors
        assert torch.allclose(gram, torch.eye(3, dtype=dtype), atol=1e-4)

    def test_hard_matrices(self) -> None:
        assert not deflated_power_iteration(Matrix(torch.zeros(4, 4))).values.any()
        assert float(deflated_power_iteration(Matrix(torch.tensor([[-2.0]])), k=1).values) == -2
        with pytest.raises(CurvlabError, match="k must be from 1 to the dimension 4, not 5"):
            deflated_power_iteration(Matrix(torch.eye(4)), k=5)
        with pytest.raises(CurvlabError, match="steps must be at least 1"):
            deflated_power_iteration(Matrix(torch.eye(4)), steps=0)


class TestOperatorsOfOnesOwn:
    """What a ``matvec`` may do with what it is given and returns."""

    DIAGONAL = torch.arange(50, dtype=torch.float64)

    def operators(self) -> dict[str, Matrix]:
        buffer = torch.zeros(50, dtype=torch.float64)
        weights = nn.Parameter(torch.diag(self.DIAGONAL))
        behaviours = {
            "writes into its argument": lambda v: v.mul_(self.DIAGONAL),
            "uses one buffer": lambda v: torch.mul(v, self.DIAGONAL, out=buffer),
            "has a graph": lambda v: weights @ v,
        }
        operators = {}
        for name, behaviour in behaviours.items():
            operators[name] = Matrix(torch.diag(self.DIAGONAL))
            operators[name].matvec = behaviour  # type: ignore[method-assign, assignment]
        return operators

    @pytest.mark.parametrize("method", ["lanczos", "eigsh"])
    def test_any_of_these(self, method: str) -> None:
        for name, operator in self.operators().items():
            result = top_eigenvalues(operator, 2, tol=1e-8, method=method)  # type: ignore[arg-type]
            assert np.allclose(result.values.numpy(), [49, 48], rtol=1e-6), name
            assert not result.vectors.requires_grad

    def test_the_identity_returns_its_argument(self) -> None:
        operator = Matrix(torch.eye(50, dtype=torch.float64))
        operator.matvec = lambda v: v  # type: ignore[method-assign, assignment]
        result = top_eigenvalues(operator)
        assert float(result.values[0]) == pytest.approx(1)
        assert float(result.vectors.norm()) == pytest.approx(1)

    def test_products_that_are_finite_with_a_form_that_is_not(self) -> None:
        u = torch.full((2000,), 2000**-0.5)
        operator = Matrix(torch.zeros(2000, 2000))
        operator.matvec = lambda v: (1e39 * (u.double() @ v.double()) * u.double()).float()  # type: ignore[method-assign, assignment]
        with pytest.raises(CurvlabError, match=r"too large|not finite"):
            top_eigenvalues(operator, start=u)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"k": 0}, "k must be from 1 to the dimension 6, not 0"),
            ({"k": 7}, "k must be from 1 to the dimension 6, not 7"),
            ({"k": 3, "max_matvecs": 2}, "3 eigenvalues need at least 3 products"),
            ({"max_matvecs": 0}, "max_matvecs must be at least 1, not 0"),
            ({"tol": 0.0}, "tol must be above 0"),
            ({"seed": -1}, "seed must be at least 0"),
            ({"start": torch.ones(6) * 1j}, "start must be real, not complex"),
            ({"tol": float("nan")}, "tol must be above 0"),
            ({"which": "LR"}, "which"),
            ({"stop": "never"}, "stop"),
            ({"method": "power"}, "method"),
        ],
    )
    def test_of_arguments(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(CurvlabError, match=message):
            top_eigenvalues(Matrix(torch.eye(6)), **options)  # type: ignore[arg-type]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("solve", [top_eigenvalues, deflated_power_iteration])
    def test_of_products_that_are_not_finite(self, bad: float, solve: object) -> None:
        matrix = torch.eye(6)
        matrix[2, 3] = bad
        with pytest.raises(CurvlabError, match="product 1 of the operator is not finite"):
            solve(Matrix(matrix))  # type: ignore[operator]

    def test_of_a_matrix_that_is_not_symmetric(self) -> None:
        with pytest.raises(CurvlabError, match="not symmetric"):
            top_eigenvalues(Matrix(torch.randn(50, 50)))

    def test_of_products_that_change(self) -> None:
        class Noisy(Matrix):
            def matvec(self, vector: Tensor) -> Tensor:
                return super().matvec(vector) + 0.1 * torch.randn_like(vector)

        with pytest.raises(CurvlabError, match="changes between products"):
            top_eigenvalues(Noisy(with_spectrum(SPECTRA["gaussian"])))

    @pytest.mark.parametrize("shape", [(3, 4), (0, 0), (5,)])
    def test_of_what_is_not_square(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(CurvlabError, match="square"):
            top_eigenvalues(Matrix(torch.zeros(shape)))

    def test_of_a_product_of_another_shape(self) -> None:
        class Longer(Matrix):
            def matvec(self, vector: Tensor) -> Tensor:
                return torch.cat([vector, vector])

        with pytest.raises(CurvlabError, match=r"shape \(4,\), not \(8,\)"):
            top_eigenvalues(Longer(torch.eye(4)))


class TestNetworks:
    @pytest.mark.parametrize("name", ZOO)
    def test_every_model(self, name: str) -> None:
        """Products of the Hessian and of one of the Fishers, in turn, if a model has them, against the dense matrix."""
        problem = case(name).problem
        fishers = "fisher", "empirical_fisher", "fisher:samples=2"
        for quantity in ("hessian", fishers[list(ZOO).index(name) % len(fishers)]):
            try:
                operator = estimate(problem, quantity, "implicit")
            except CurvlabError as error:
                assert "derivative" in str(error)  # noqa: PT017 - only then may there be none
                continue
            if operator.shape[0] > 600:
                continue
            assert_right(top_eigenvalues(operator, 2), operator.to_dense(), "LA", 1e-3, floor=1e-6)

    def test_a_multiple_eigenvalue_of_a_real_model(self) -> None:
        """Least squares with several outputs: every eigenvalue comes once an output."""
        x = torch.randn(40, 5, dtype=torch.float64)
        problem = Problem(nn.Linear(5, 4, bias=False).double(), "squared_error", (x, torch.zeros(40, 4).double()))
        result = top_eigenvalues(estimate(problem, "ggn", "implicit"), 6, tol=1e-8)
        inputs = torch.linalg.eigvalsh(x.T @ x / 40).flip(0)
        assert torch.allclose(result.values, inputs.repeat_interleave(4)[:6], rtol=1e-8)

    def test_a_layer(self) -> None:
        problem = case("mlp").problem
        operator = estimate(problem, "ggn", "implicit", params=["2.*"])
        space = problem.space.restrict(operator.space.names)
        assert operator.space == space
        assert_right(top_eigenvalues(operator), operator.to_dense(), "LA", 1e-3)

    def test_other_structures(self) -> None:
        problem = case("mlp").problem
        for structure in ("kfac", "diag", "dense", "block_diag", "ekfac"):
            matrix = estimate(problem, "fisher", structure)
            assert float(top_eigenvalues(matrix, tol=1e-8).values[0]) == pytest.approx(float(matrix.eigenvalues()[-1]))


@pytest.mark.parametrize("k", [1, 2])
def test_small_matrices_are_done_whole(k: int) -> None:
    """Where a search could end before an eigenvalue has shown itself, and all products cost nothing."""
    matrix = with_spectrum(np.array([1.5, 2, 2, 2, 2, 2.999, 3]))
    for seed in range(50):
        values = top_eigenvalues(Matrix(matrix), k, tol=0.1, seed=seed).values
        assert torch.allclose(values, torch.tensor([3, 2.999], dtype=torch.float64)[:k], rtol=1e-12)


def test_a_norm_in_float32() -> None:
    """Trap: torch's own adds up naively."""
    vector = torch.rand(3_000_000)
    exact = float(vector.double().norm())
    assert norm(vector) == pytest.approx(exact, rel=1e-9)


def test_the_seed_decides() -> None:
    operator = Matrix(with_spectrum(SPECTRA["gaussian"]))
    first, same, other = (top_eigenvalues(operator, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, same.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    state = torch.get_rng_state()
    top_eigenvalues(operator)
    assert torch.equal(torch.get_rng_state(), state)
