"""Extreme eigenvalues of a matrix from matrix-vector products, with error estimates.

References:
    Kuczynski and Wozniakowski (1992), SIAM Journal on Matrix Analysis 13; Parlett (1998), The Symmetric Eigenvalue
    Problem.
"""

from dataclasses import dataclass, replace
from math import hypot
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.arguments import check_choice, check_real, check_real_tensor, check_whole, make_generator
from curvlab.spectrum.arpack import arpack_eigenpairs
from curvlab.spectrum.lanczos import Lanczos
from curvlab.spectrum.operator import Operator, Products, norm

Which = Literal["LA", "LM", "SA"]
Stop = Literal["gap", "residual"]
Method = Literal["lanczos", "eigsh"]

_CAPACITY = 32  # smallest capacity of a basis, in vectors
_ROOM = 8_000_000  # largest number of entries of a basis with a larger capacity
_SETTLED = 0.2  # relative change of a gap between products below which it is settled
_GAP_RESIDUAL = 4  # largest residual with stop="gap", in units of the tolerance
_RANDOM_PART = 0.3  # length of the random vector that is added to a given start of length 1
_OVERLAP = 4.0  # divided by sqrt(P): a random vector exceeds this overlap with an eigenvector once in 15,000 cases
_UNLIKELY = 1e-2  # probability that a second search ends before it finds an existing eigenvalue
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class EigenResult:
    """Eigenvalues and eigenvectors, the most extreme first.

    Attributes:
        values: Eigenvalues, ``(k,)``.
        vectors: Eigenvectors of length 1, ``(P, k)``.
        residuals: Norms of ``A v - theta v``, ``(k,)``. The distance from ``theta`` to the nearest eigenvalue is at
            most the residual.
        matvecs: Number of matrix-vector products.
        converged: Whether all error estimates are below the tolerance.
        stop: The error estimate that was compared with the tolerance: ``residual``, or ``gap`` for
            ``residual^2 / gap``.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    stop: Stop


def top_eigenvalues(
    operator: Operator,
    k: int = 1,
    which: Which = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    *,
    stop: Stop = "residual",
    method: Method = "lanczos",
) -> EigenResult:
    """Return the ``k`` most extreme eigenvalues by Lanczos' method with full orthogonalisation and restarts.

    For ``k > 1``, a second search among the vectors orthogonal to those found makes sure that a multiple eigenvalue is
    returned with its multiplicity. Up to dimension 32 all eigenvalues are computed.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        k: Number of eigenvalues.
        which: The largest (``LA``), the smallest (``SA``), or the largest in magnitude (``LM``) eigenvalues.
        tol: Relative error of an eigenvalue. An eigenvalue near zero is found up to an error of ``tol * sqrt(eps)``
            times the largest magnitude.
        max_matvecs: Largest number of products; None for 1,000, or ``20 k`` if that is more.
        start: Start vectors, ``(P,)`` or ``(P, j)``, such as the eigenvectors of a similar matrix. A random vector of
            0.3 of their length is added. None for a random start. If the start is very close to an eigenvector, a
            larger eigenvalue can stay hidden. ``stop="residual"`` continues until it would have appeared, which takes
            about as many products as a random start; ``stop="gap"`` does not, and takes about half as many.
        seed: Random seed of the random vectors.
        stop: Stopping rule. ``residual``: the residual is at most ``tol |theta|``. This is a certificate that an
            eigenvalue is within this distance; its actual error is of the order of the squared residual. ``gap``:
            ``residual^2 / gap`` is at most ``tol |theta|`` (Parlett 1998, theorem 11.7.1), where the gap is the
            distance to the nearest other Ritz value and has settled, and the residual is at most ``4 tol |theta|``.
            This takes 10 to 20 % fewer products, but is not a certificate: if the two largest eigenvalues differ by a
            few per cent, it sometimes returns a mixture of both (0.6 % error in 1 of 144 searches; never with
            ``residual``).
        method: ``lanczos`` (our implementation) or ``eigsh`` (ARPACK through SciPy, which stops by residuals).

    Raises:
        CurvlabError: An argument is not valid, a product is not finite, or the operator is not symmetric.

    Examples:
        >>> from curvlab import Problem, estimate
        >>> problem = Problem(torch.nn.Linear(2, 1), "squared_error", (torch.eye(2), torch.zeros(2, 1)))
        >>> top = top_eigenvalues(estimate(problem, "hessian", "implicit"))
        >>> round(float(top.values[0]), 4), top.converged
        (1.5, True)
    """
    for name, value, kinds in (("which", which, Which), ("stop", stop, Stop), ("method", method, Method)):
        check_choice(name, value, get_args(kinds))
    k, tol, generator = check_whole("k", k, 0), check_real("tol", tol, above=0), make_generator(seed)
    products = Products(operator, max(1_000, 20 * k) if max_matvecs is None else max_matvecs)
    k = check_eigenvalue_count(k, products.size)
    if max_matvecs is not None and max_matvecs < k:
        raise CurvlabError(f"{k} eigenvalues need at least {k} products: increase max_matvecs, which is {max_matvecs}")
    first, part = products.gaussian(generator), 1.0
    if start is not None:
        part = _RANDOM_PART / hypot(1.0, _RANDOM_PART)
        first = _combine_starts(start, products) + first * (_RANDOM_PART / norm(first))
    search = _Search(products, which, tol, stop, generator)
    if method == "eigsh":
        values, vectors, residuals = arpack_eigenpairs(products, k, which, tol, first)
        order = np.argsort(-search.extremity(values), kind="stable")
        products.largest = float(np.abs(values).max())
        converged = bool((residuals[order] <= search.error_bounds(values[order])).all())
        found = _EigenPairs(values[order], products.tensor(vectors.T[order]), residuals[order], converged, False)
    else:
        found = search.run(k, first, part)
    # A Krylov space contains one vector of a multiple eigenvalue; ARPACK finds others only through rounding errors.
    if k > 1 and not found.whole:
        found = search.complete(found)
    return EigenResult(
        products.unscale_tensor(found.values),
        found.rows.mT,
        products.unscale_tensor(found.residuals),
        products.count,
        bool(found.converged),
        "residual" if method == "eigsh" else stop,
    )


@dataclass(frozen=True)
class _EigenPairs:
    values: np.ndarray  # (k,), the most extreme first
    rows: Tensor  # (k, P)
    residuals: np.ndarray  # (k,)
    converged: bool
    whole: bool  # whether the basis is the whole space, so that all eigenvalues are known


@dataclass(frozen=True)
class _Search:
    products: Products
    which: Which
    tol: float
    stop: Stop
    generator: np.random.Generator

    def run(
        self, k: int, start: Tensor, part: float = 1.0, against: Tensor | None = None, above: float = np.inf
    ) -> _EigenPairs:
        """Search until ``k`` Ritz pairs converge, or until an eigenvalue as extreme as ``above`` is excluded.

        Args:
            k: Number of eigenvalues.
            start: Start vector, ``(P,)``.
            part: Length of the random part of the start vector, relative to its total length.
            against: Orthonormal rows ``(j, P)``; the search is restricted to their orthogonal complement.
            above: The extremity that ends the search if no eigenvalue can reach it.
        """
        products = self.products
        basis = Lanczos(products, _capacity(products, k), start, self.generator, against)
        gaps, taken = np.zeros(k), products.count
        while True:
            basis.step()
            values, vectors = np.linalg.eigh(basis.matrix)
            order = np.argsort(-self.extremity(values), kind="stable")
            values, vectors = values[order], vectors[:, order]
            # Rounding errors of a product are a lower bound for a residual.
            outside = basis.beta * np.abs(vectors[-1, :k])
            residuals = np.hypot(outside, basis.noise)
            trusted = self.stop == "gap" and part < 1  # a given start
            # After this many products, another eigenvalue has become visible.
            early = products.count - taken < _CAPACITY
            times = self.hidden_factor(vectors[0, :k], part) if early and not trusted else 1.0
            shown = np.hypot(outside * times, basis.noise)
            if basis.size >= k and (basis.complete or products.exhausted or products.size > _CAPACITY):
                before, gaps = gaps, _gaps(values, k)
                converged = bool((self.errors(shown, gaps, before) <= self.error_bounds(values[:k])).all())
                beaten = self.is_out_of_reach(basis, values, above)
                stuck = bool((shown <= 2 * basis.noise).all())
                if converged or beaten or stuck or products.exhausted:
                    rows = basis.combine(vectors[:, :k])
                    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)
                    return _EigenPairs(values[:k], rows, residuals, converged or beaten, basis.complete)
            if basis.full:
                keep = (k + basis.capacity) // 2
                basis.restart(vectors[:, :keep], values[:keep])

    def complete(self, found: _EigenPairs) -> _EigenPairs:
        """Search the orthogonal complement of the found vectors for eigenvalues more extreme than the last one."""
        k = len(found.values)
        while k < self.products.size:
            if self.products.exhausted:
                return replace(found, converged=False)
            last = self.extremity(found.values)[-1]
            start = self.products.gaussian(self.generator)
            more = self.run(1, start, against=found.rows, above=last)
            converged = found.converged and more.converged
            if self.extremity(more.values)[0] <= last + self.error_bounds(found.values)[-1]:
                return replace(found, converged=converged)
            values = np.concatenate([found.values, more.values])
            order = np.argsort(-self.extremity(values), kind="stable")[:k]
            rows = torch.cat([found.rows, more.rows])[order]
            residuals = np.concatenate([found.residuals, more.residuals])[order]
            found = replace(found, values=values[order], rows=rows, residuals=residuals, converged=converged)
        return found

    def hidden_factor(self, overlaps: np.ndarray, part: float) -> np.ndarray:
        """Return the factor by which a hidden eigenvalue can be farther away than the residual, ``(k,)``.

        A missed eigenvector has a component of about ``part / sqrt(P)`` in the start. It adds that share of the
        distance of its eigenvalue to the residual of a Ritz vector, divided by the overlap of the start with the Ritz
        vector. If the overlap is that of a random vector with one eigenvector, the distance is at most the residual.
        With a given start, or with a multiple eigenvalue (as in damped matrices), the overlap is large, and so can be
        the distance.

        Args:
            overlaps: Components of the start along the Ritz vectors, ``(k,)``.
            part: Relative length of the random part of the start.
        """
        known = np.abs(overlaps) * self.products.size**0.5
        return np.where(known > _OVERLAP, np.maximum(known / part, 1.0), 1.0)

    def is_out_of_reach(self, basis: Lanczos, values: np.ndarray, above: float) -> bool:
        """Return whether, after the products taken from a random start, no eigenvalue can be as extreme as ``above``.

        After ``m`` products, the probability that the largest Ritz value is below the largest eigenvalue by more than a
        given share of the spectrum's width is at most ``1.648 sqrt(P) exp(-sqrt(share) (2 m - 1))`` (Kuczynski and
        Wozniakowski 1992).
        """
        lowest, highest = values.min(), values.max()
        away = {"LA": [above - highest], "SA": [above + lowest], "LM": [above - highest, above + lowest]}[self.which]
        if not 0 < min(away) < np.inf:
            return False
        share = min(away) / (highest - lowest + min(away))
        return bool(1.648 * self.products.size**0.5 * np.exp(-(share**0.5) * (2 * basis.size - 1)) < _UNLIKELY)

    def errors(self, residuals: np.ndarray, gaps: np.ndarray, before: np.ndarray) -> np.ndarray:
        if self.stop == "residual":
            return residuals
        # Without another Ritz value, the gap is not defined yet.
        settled = np.isfinite(gaps) & (np.abs(gaps - before) <= _SETTLED * gaps)
        # An eigenvalue hidden between two Ritz values shows only in the residual, which therefore must be small, too.
        quadratic = np.maximum(residuals**2 / np.maximum(gaps, _TINY), residuals / _GAP_RESIDUAL)
        return np.where(settled, np.minimum(residuals, quadratic), residuals)

    def error_bounds(self, values: np.ndarray) -> np.ndarray:
        # Below this share of the largest magnitude, an eigenvalue counts as zero.
        resolution = self.products.eps**0.5
        zero = max(resolution * self.products.largest, _TINY)
        error: np.ndarray = self.tol * np.maximum(np.abs(values), zero)
        return error

    def extremity(self, values: np.ndarray) -> np.ndarray:
        magnitude: np.ndarray = np.abs(values)
        return magnitude if self.which == "LM" else values if self.which == "LA" else -values


def _capacity(products: Products, k: int) -> int:
    return max(2 * k + 10, _CAPACITY, min(_ROOM // products.size, 10 * _CAPACITY))


def _gaps(values: np.ndarray, k: int) -> np.ndarray:
    """Return the distances of the first ``k`` values to the nearest other value; infinite if there is none."""
    distances = np.abs(values[:k, None] - values[None, :])
    distances[np.arange(k), np.arange(k)] = np.inf
    nearest: np.ndarray = distances.min(axis=1)
    return nearest


def _combine_starts(start: Tensor, products: Products) -> Tensor:
    """Return the normalised sum of the given vectors, whose Krylov space soon contains all of them."""
    start = check_real_tensor("start", start)
    if start.ndim not in (1, 2) or len(start) != products.size:
        raise CurvlabError(
            f"start must have shape ({products.size},) or ({products.size}, j), not {tuple(start.shape)}"
        )
    columns = start.reshape(products.size, -1).to(products.device, torch.float64)
    columns = columns / columns.abs().amax(dim=0)  # squares of tiny numbers underflow
    combined: Tensor = (columns / columns.norm(dim=0)).sum(dim=1).to(products.dtype)
    if not bool(combined.isfinite().all()) or not bool(combined.any()):
        raise CurvlabError("start must not contain vectors that are zero or not finite, or that cancel each other")
    return combined / norm(combined)


def check_eigenvalue_count(k: int, size: int) -> int:
    """Check the number of eigenvalues ``k`` for a matrix of dimension ``size``.

    Raises:
        CurvlabError: ``k`` is not a whole number from 1 to ``size``.
    """
    k = check_whole("k", k, 0)
    if not 1 <= k <= size:
        raise CurvlabError(f"k must be from 1 to the dimension {size}, not {k}")
    return k
