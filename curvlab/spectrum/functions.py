"""Numbers that are made of a whole spectrum: the condition number and the effective dimension."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.arguments import generator_of, real
from curvlab.spectrum.density import check_probes, eigenvalues_of_formed, exhausted, gauss, quadratures, small
from curvlab.spectrum.eigenvalues import Which, top_eigenvalues
from curvlab.spectrum.estimate import Estimate, mean_and_error
from curvlab.spectrum.lanczos import Lanczos
from curvlab.spectrum.operator import Operator, Products, product_of

_FORMED = 100  # parameters up to which the whole matrix costs no more products than its ends
_ENDS: tuple[Which, Which] = ("SA", "LA")


def condition_number(
    operator: Operator, damping: float = 0.0, tol: float = 1e-3, max_matvecs: int | None = None, seed: int = 0
) -> float:
    """Return the condition number of ``A + damping I``, by the eigenvalues at both ends.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        damping: Added to the diagonal.
        tol: Relative error of the eigenvalues of the damped matrix.
        max_matvecs: Products that may be taken for an end, at most; None for 1,000.
        seed: Of the random vectors.

    Returns:
        The magnitude of the largest eigenvalue over that of the smallest, with the relative error ``tol``; more where
        that is below the rounding errors of products, up to 0.1. Beyond, the smallest eigenvalue cannot be told from
        zero and the value is infinity.

    Raises:
        CurvlabError: The matrix is indefinite, so that its eigenvalue nearest to zero is at no end; or an end is not
            reached.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((100,),)), Info("", "diag", "", "", 1)
        >>> matrix = Diagonal(torch.arange(100.0), space, info)
        >>> condition_number(matrix), round(condition_number(matrix, damping=1.0))
        (inf, 100)
    """
    damping, tol = real("damping", damping), real("tol", tol, above=0)
    generator_of(seed)
    Products(operator, max_matvecs)  # which checks both
    low, high, rounding = _ends(_Shifted(operator, damping), tol, max_matvecs, seed)
    near, far = sorted((abs(low), abs(high)))
    if near <= 10 * rounding:
        return float("inf")
    if low < 0 < high:
        raise CurvlabError(
            f"A + {damping:g} I is indefinite: its eigenvalues reach from {low:.3g} to {high:.3g}, and the one nearest "
            f"to zero is at neither end; a damping above {damping - low:.3g} makes it positive definite"
        )
    return far / near


def _ends(operator: Operator, tol: float, max_matvecs: int | None, seed: int) -> tuple[float, float, float]:
    """Return the smallest and the largest eigenvalue, and the error that rounding has left in the one nearer to zero.

    Raises:
        CurvlabError: One is not reached.
    """
    products = Products(operator)
    if products.size <= (_FORMED if max_matvecs is None else min(_FORMED, max_matvecs)):
        values, noise = eigenvalues_of_formed(products)
        return float(values[0]), float(values[-1]), noise + products.eps * float(values.abs().max())
    # By residuals: a gap has not settled while the search has yet to meet the last eigenvalue.
    results = [top_eigenvalues(operator, 1, which, tol, max_matvecs, seed=seed, stop="residual") for which in _ENDS]
    eps, largest = products.eps, max(abs(float(result.values[0])) for result in results)
    # A residual so small is all rounding errors.
    limit = max(tol * eps**0.5, 100 * eps) * largest
    for result in results:
        if not (result.converged or float(result.residuals[0]) <= limit):
            raise CurvlabError(
                f"an end of the spectrum is not reached: after {result.matvecs} products it is "
                f"{float(result.values[0]):.3g}, with a residual of {float(result.residuals[0]):.2g}; raise "
                "max_matvecs, tol or the damping"
            )
    low, high = (float(result.values[0]) for result in results)
    nearer = min(results, key=lambda result: abs(float(result.values[0])))
    return low, high, min(float(nearer.residuals[0]), limit)


def effective_dimension(
    operator: Operator, damping: float, *, probes: int = 10, steps: int = 100, seed: int = 0
) -> Estimate:
    """Estimate the effective dimension ``tr A (A + damping I)^-1``: how many eigenvalues count beside the damping.

    By stochastic Lanczos quadrature. The Gauss rule of a probe is above what it sees and the Gauss-Radau rule with a
    node at zero below (Golub and Meurant, 2010, chapter 6): the value is halfway between, and the standard error
    includes half of their distance beside the spread over probes. A small matrix is formed, as by ``spectral_density``.

    Args:
        operator: Any positive semi-definite matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        damping: Above 0.
        probes: Random vectors of signs.
        steps: Products a probe, at most.
        seed: Of the probes.

    Returns:
        The estimate; ``converged`` says whether the error is that of the probes, and more steps would not lessen it.

    Raises:
        CurvlabError: The matrix has a negative eigenvalue, the damping is within rounding errors, or an argument is not
            right.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((4,),)), Info("", "diag", "", "", 1)
        >>> float(effective_dimension(Diagonal(torch.tensor([9.0, 1.0, 0.0, 0.0]), space, info), damping=1.0).value)
        1.4
    """
    products, generator = Products(operator), generator_of(seed)
    probes, steps = check_probes(probes, steps)
    damping = real("damping", damping)
    if damping <= 0:
        raise CurvlabError(f"damping must be above 0, not {damping}: without it the effective dimension is the rank")
    if small(products, probes, steps):
        values, noise = eigenvalues_of_formed(products)
        clamped = _clamp(values.numpy(), noise, products, damping)
        value = torch.tensor((clamped / (clamped + damping)).sum())
        return Estimate(value, torch.zeros_like(value), products.count, True, products.size)
    rules = [_bounds(lanczos, products, damping) for lanczos in quadratures(products, probes, steps, generator)]
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
        added = self.shift * vector  # first, as the operator may write into the vector
        return product_of(self.operator, vector) + added


def _clamp(values: np.ndarray, noise: float, products: Products, damping: float) -> np.ndarray:
    """Return eigenvalues with those that are zero but for rounding errors at zero.

    Raises:
        CurvlabError: One is negative beyond that, or the damping is within it.
    """
    rounding = 10 * (noise + products.eps * np.abs(values).max())
    if values.min() < -rounding:
        raise CurvlabError(
            f"the matrix is not positive semi-definite: an eigenvalue is {values.min():.3g} or less, where rounding "
            f"errors are at most {rounding:.2g}; take the effective dimension of a Fisher or a GGN"
        )
    if damping < rounding:
        raise CurvlabError(
            f"a damping of {damping:.2g} is within the rounding errors of the eigenvalues, {rounding:.2g}, which would "
            "count as eigenvalues beside it: take float64 or a larger damping"
        )
    return values.clip(min=0.0)


def _bounds(lanczos: Lanczos, products: Products, damping: float) -> tuple[float, float]:
    """Return what the Gauss-Radau and the Gauss rule give for ``x / (x + damping)``: from below and from above."""

    def average(matrix: np.ndarray) -> float:
        nodes, weights = gauss(matrix)
        noise = float(products.restored(np.array(lanczos.noise)))
        clamped = _clamp(products.restored(nodes), noise, products, damping)
        return float(weights @ (clamped / (clamped + damping)))

    matrix, beta = lanczos.matrix, lanczos.beta
    above = average(matrix)
    if exhausted(lanczos, products):
        return above, above
    # A further row, whose diagonal entry makes an eigenvalue at zero, or just below where rounding has put one there.
    nodes, vectors = np.linalg.eigh(matrix)
    at = min(0.0, nodes[0]) - torch.finfo(products.dtype).eps * np.abs(nodes).max()
    extended = np.pad(matrix, (0, 1))
    extended[-1, -2] = extended[-2, -1] = beta
    extended[-1, -1] = at + beta**2 * (vectors[-1] ** 2 / (nodes - at)).sum()
    return average(extended), above
