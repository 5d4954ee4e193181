"""Functions of the whole spectrum: condition number and effective dimension."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.arguments import check_real, make_generator
from curvlab.spectrum.density import (
    check_probes,
    exact_eigenvalues,
    gauss_rule,
    is_exhausted,
    is_small,
    iterate_quadratures,
)
from curvlab.spectrum.eigenvalues import Which, top_eigenvalues
from curvlab.spectrum.estimate import Estimate, mean_and_error
from curvlab.spectrum.lanczos import Lanczos
from curvlab.spectrum.operator import Operator, Products, checked_product

_FORMED = 100  # up to this dimension, forming the matrix takes no more products than its extreme eigenvalues
_ENDS: tuple[Which, Which] = ("SA", "LA")


def condition_number(
    operator: Operator, damping: float = 0.0, tol: float = 1e-3, max_matvecs: int | None = None, seed: int = 0
) -> float:
    """Return the condition number of ``A + damping I`` from its extreme eigenvalues.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        damping: A number that is added to the diagonal.
        tol: Relative error of the eigenvalues of the damped matrix.
        max_matvecs: Largest number of products for each end of the spectrum; None for 1,000.
        seed: Random seed of the random vectors.

    Returns:
        The largest magnitude of an eigenvalue divided by the smallest, with the relative error ``tol``. The error is
        larger, up to 0.1, if ``tol`` is below the rounding errors of products. From about 1e13 in float64 and 1e5 in
        float32, the smallest eigenvalue cannot be distinguished from zero, and the value is infinity.

    Raises:
        CurvlabError: The matrix is indefinite, so that its eigenvalue nearest to zero is not an extreme one; or the
            search for an extreme eigenvalue does not converge.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((100,),)), Info("", "diag", "", "", 1)
        >>> matrix = Diagonal(torch.arange(100.0), space, info)
        >>> condition_number(matrix), round(condition_number(matrix, damping=1.0))
        (inf, 100)
    """
    damping, tol = check_real("damping", damping), check_real("tol", tol, above=0)
    make_generator(seed)
    Products(operator, max_matvecs)  # checks both arguments
    low, high, rounding = _ends(_Shifted(operator, damping), tol, max_matvecs, seed)
    near, far = sorted((abs(low), abs(high)))
    if near <= 10 * rounding:
        return float("inf")
    if low < 0 < high:
        raise CurvlabError(
            f"A + {damping:g} I is indefinite: its eigenvalues are from {low:.3g} to {high:.3g}, and the one nearest "
            f"to zero is unknown; use a damping above {damping - low:.3g}, which makes the matrix positive definite"
        )
    return far / near


def _ends(operator: Operator, tol: float, max_matvecs: int | None, seed: int) -> tuple[float, float, float]:
    """Return the smallest and the largest eigenvalue, and the rounding error of the one nearer to zero.

    Raises:
        CurvlabError: One of the searches does not converge.
    """
    products = Products(operator)
    if products.size <= (_FORMED if max_matvecs is None else min(_FORMED, max_matvecs)):
        values, noise = exact_eigenvalues(products)
        return float(values[0]), float(values[-1]), noise + products.eps * float(values.abs().max())
    # Stop by residuals, because gaps are unreliable before the search has found the outermost eigenvalue.
    results = [top_eigenvalues(operator, 1, which, tol, max_matvecs, seed=seed, stop="residual") for which in _ENDS]
    eps, largest = products.eps, max(abs(float(result.values[0])) for result in results)
    nearer = min((0, 1), key=lambda end: abs(float(results[end].values[0])))
    value, residual = (abs(float(of[0])) for of in (results[nearer].values, results[nearer].residuals))
    # An eigenvalue near zero is found only up to ``tol sqrt(eps)`` of the largest; search again with a finer tolerance.
    finest = 100 * eps**0.5
    if value <= 10 * residual and residual > 100 * eps * largest and finest < tol:
        results[nearer] = top_eigenvalues(operator, 1, _ENDS[nearer], finest, max_matvecs, seed=seed)
    # A residual below this limit is only rounding errors.
    limit = max(tol * eps**0.5, 100 * eps) * largest
    for result in results:
        if not (result.converged or float(result.residuals[0]) <= limit):
            raise CurvlabError(
                f"an extreme eigenvalue did not converge: after {result.matvecs} products it is "
                f"{float(result.values[0]):.3g}, with a residual of {float(result.residuals[0]):.2g}; increase "
                "max_matvecs, tol or the damping"
            )
    low, high = (float(result.values[0]) for result in results)
    return low, high, min(float(results[nearer].residuals[0]), limit)


def effective_dimension(
    operator: Operator, damping: float, *, probes: int = 10, steps: int = 100, seed: int = 0
) -> Estimate:
    """Estimate the effective dimension ``tr A (A + damping I)^-1``: the number of eigenvalues above the damping.

    The method is stochastic Lanczos quadrature. For each probe, the Gauss rule is an upper bound, and the Gauss-Radau
    rule with a node at zero is a lower bound (Golub and Meurant, 2010, chapter 6). The value is halfway between. The
    standard error includes half of their distance and the spread over probes. A small matrix is formed, as in
    ``spectral_density``.

    Args:
        operator: Any positive semi-definite matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        damping: A number above 0.
        probes: Number of random sign vectors.
        steps: Largest number of products per probe.
        seed: Random seed of the probes.

    Returns:
        The estimate. It is ``converged`` if the probes dominate the error, so that more steps would not reduce it.

    Raises:
        CurvlabError: The matrix has a negative eigenvalue, the damping is below the rounding errors, or an argument is
            not valid.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((4,),)), Info("", "diag", "", "", 1)
        >>> float(effective_dimension(Diagonal(torch.tensor([9.0, 1.0, 0.0, 0.0]), space, info), damping=1.0).value)
        1.4
    """
    products, generator = Products(operator), make_generator(seed)
    probes, steps = check_probes(probes, steps)
    damping = check_real("damping", damping)
    if damping <= 0:
        raise CurvlabError(
            f"damping must be above 0, not {damping}: without damping the effective dimension is the rank"
        )
    if is_small(products, probes, steps):
        values, noise = exact_eigenvalues(products)
        clamped = _clamp(values.numpy(), noise, products, damping)
        value = torch.tensor((clamped / (clamped + damping)).sum())
        return Estimate(value, torch.zeros_like(value), products.count, True, products.size)
    rules = [_bounds(lanczos, products, damping) for lanczos in iterate_quadratures(products, probes, steps, generator)]
    bounds = products.size * torch.tensor(rules, dtype=torch.float64)
    value, error = mean_and_error(bounds.mean(dim=1))
    gap = (bounds[:, 1] - bounds[:, 0]).mean().clamp(min=0.0) / 2
    return Estimate(value, error.hypot(gap), products.count, bool(gap <= error), probes)


@dataclass(frozen=True)
class _Shifted:
    """``A + shift I``."""

    operator: Operator
    shift: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

    def matvec(self, vector: Tensor) -> Tensor:
        added = self.shift * vector  # first, because the operator may write into the vector
        return checked_product(self.operator, vector) + added


def _clamp(values: np.ndarray, noise: float, products: Products, damping: float) -> np.ndarray:
    """Return the eigenvalues, with negative rounding errors set to zero.

    Raises:
        CurvlabError: An eigenvalue is negative beyond rounding errors, or the damping is below them.
    """
    rounding = 10 * (noise + products.eps * np.abs(values).max())
    if values.min() < -rounding:
        raise CurvlabError(
            f"the matrix is not positive semi-definite: an eigenvalue is {values.min():.3g} or less, and rounding "
            f"errors are at most {rounding:.2g}; use the effective dimension of a Fisher or a GGN"
        )
    if damping < rounding:
        raise CurvlabError(
            f"a damping of {damping:.2g} is below the rounding errors of the eigenvalues, {rounding:.2g}, which would "
            "be counted as eigenvalues: use float64 or a larger damping"
        )
    return values.clip(min=0.0)


def _bounds(lanczos: Lanczos, products: Products, damping: float) -> tuple[float, float]:
    """Return the Gauss-Radau rule (lower bound) and the Gauss rule (upper bound) of ``x / (x + damping)``."""

    def average(matrix: np.ndarray) -> float:
        nodes, weights = gauss_rule(matrix)
        noise = float(products.unscale(np.array(lanczos.noise)))
        clamped = _clamp(products.unscale(nodes), noise, products, damping)
        return float(weights @ (clamped / (clamped + damping)))

    matrix, beta = lanczos.matrix, lanczos.beta
    above = average(matrix)
    if is_exhausted(lanczos, products):
        return above, above
    # Add a row whose diagonal entry gives an eigenvalue at zero, or just below a node that rounding made negative.
    nodes, vectors = np.linalg.eigh(matrix)
    at = min(0.0, nodes[0]) - torch.finfo(products.dtype).eps * np.abs(nodes).max()
    extended = np.pad(matrix, (0, 1))
    extended[-1, -2] = extended[-2, -1] = beta
    extended[-1, -1] = at + beta**2 * (vectors[-1] ** 2 / (nodes - at)).sum()
    return average(extended), above
