"""Extreme eigenvalues of a matrix that is known by its products, with errors that are known too."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.arguments import choice, generator_of, real, real_tensor, whole
from curvlab.spectrum.arpack import by_arpack
from curvlab.spectrum.lanczos import Lanczos
from curvlab.spectrum.operator import Operator, Products, norm

Which = Literal["LA", "LM", "SA"]
Stop = Literal["gap", "residual"]
Method = Literal["lanczos", "eigsh"]

_CAPACITY = 32  # directions a basis has room for at least
_ROOM = 8_000_000  # numbers that it may take where it is larger
_SETTLED = 0.2  # relative change of a gap from one product to the next
_GAP_RESIDUAL = 4  # times the tolerance: the residual that stop="gap" may leave
_RANDOM_PART = 0.3  # of a start that is given, beside its own length of 1
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class EigenResult:
    """Eigenvalues, the most extreme first.

    Attributes:
        values: ``(k,)``.
        vectors: ``(P, k)``, of length 1.
        residuals: ``(k,)``, norms of ``A v - theta v``: some eigenvalue is that near to ``theta``.
        matvecs: Products taken.
        converged: Whether all errors came below the tolerance.
        stop: The estimate of the error that was compared with it: ``residual``, or ``gap`` for ``residual^2 / gap``.
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
    """Return the ``k`` most extreme eigenvalues by Lanczos' method, fully orthogonalised, restarted when long.

    For several eigenvalues a second search, among the vectors orthogonal to those found, makes sure that an eigenvalue
    of higher multiplicity comes as often as it should. Up to dimension 32 all eigenvalues are computed.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        k: How many.
        which: The largest (``LA``), the smallest (``SA``), or the largest in magnitude (``LM``).
        tol: Error of an eigenvalue, relative to its magnitude. An eigenvalue near zero is found to ``tol`` times
            ``sqrt(eps)`` of the largest magnitude.
        max_matvecs: Products that may be taken, at most; None for 1,000, or ``20 k`` if that is more.
        start: ``(P,)`` or ``(P, j)``: vectors to start from, such as those of a matrix nearby; None for a random one.
        seed: Of the random vectors.
        stop: When to stop. ``residual``: the residual is at most ``tol |theta|``, which is a certificate that an
            eigenvalue is that near; its error is of the order of the residual's square. ``gap``: ``residual^2 / gap``
            is (Parlett 1998, theorem 11.7.1), with the gap to the nearest other Ritz value, once that has settled, and
            the residual is at most ``4 tol |theta|``. That takes a tenth to a fifth fewer products and is no
            certificate: where the two largest eigenvalues are within a few per cent it sometimes took a mixture of
            them for the first (in 1 of 144 searches, 0.6 % off; in none with ``residual``).
        method: ``lanczos`` (ours), or ``eigsh``: ARPACK, as SciPy has it, which stops by residuals.

    Raises:
        CurvlabError: An argument is not right; a product is not finite; the operator is not symmetric.

    Examples:
        >>> from curvlab import Problem, estimate
        >>> problem = Problem(torch.nn.Linear(2, 1), "squared_error", (torch.eye(2), torch.zeros(2, 1)))
        >>> top = top_eigenvalues(estimate(problem, "hessian", "implicit"))
        >>> round(float(top.values[0]), 4), top.converged
        (1.5, True)
    """
    for name, value, kinds in (("which", which, Which), ("stop", stop, Stop), ("method", method, Method)):
        choice(name, value, get_args(kinds))
    k, tol, generator = whole("k", k, 0), real("tol", tol, above=0), generator_of(seed)
    products = Products(operator, max(1_000, 20 * k) if max_matvecs is None else max_matvecs)
    k = number_of(k, products.size)
    if max_matvecs is not None and max_matvecs < k:
        raise CurvlabError(f"{k} eigenvalues take {k} products at least: max_matvecs must not be {max_matvecs}")
    first = products.gaussian(generator)
    if start is not None:
        first = _combined(start, products) + first * (_RANDOM_PART / norm(first))
    search = _Search(products, which, tol, stop, generator)
    if method == "eigsh":
        values, vectors, residuals = by_arpack(products, k, which, tol, first)
        order = np.argsort(-search.extremity(values), kind="stable")
        products.largest = float(np.abs(values).max())
        converged = bool((residuals[order] <= search.allowed(values[order])).all())
        found = _Found(values[order], products.tensor(vectors.T[order]), residuals[order], converged, False, False)
    else:
        found = search.run(k, first)
        # Multiple eigenvalues, and a start within an invariant subspace, each hide others from a Krylov space.
        if not found.whole and (k > 1 or (found.invariant and start is not None)):
            found = search.complete(found)
    return EigenResult(
        products.restored_tensor(found.values),
        found.rows.mT,
        products.restored_tensor(found.residuals),
        products.count,
        bool(found.converged),
        "residual" if method == "eigsh" else stop,
    )


@dataclass(frozen=True)
class _Found:
    values: np.ndarray  # (k,), the most extreme first
    rows: Tensor  # (k, P)
    residuals: np.ndarray  # (k,)
    converged: bool
    invariant: bool  # whether the Krylov space of the start ended
    whole: bool  # whether it grew to the whole space, where all is known


@dataclass(frozen=True)
class _Search:
    products: Products
    which: Which
    tol: float
    stop: Stop
    generator: np.random.Generator

    def run(self, k: int, start: Tensor, against: Tensor | None = None, above: float = -np.inf) -> _Found:
        """Search until ``k`` Ritz pairs have converged, or the first is surely less extreme than ``above``."""
        products = self.products
        basis = Lanczos(products, _capacity(products, k), start, self.generator, against)
        gaps = np.zeros(k)
        invariant = False
        while True:
            basis.step()
            invariant |= basis.beta == 0 and not basis.complete
            values, vectors = np.linalg.eigh(basis.matrix)
            order = np.argsort(-self.extremity(values), kind="stable")
            values, vectors = values[order], vectors[:, order]
            # What rounding leaves in a product bounds what its residual can show.
            residuals = np.hypot(basis.beta * np.abs(vectors[-1, :k]), basis.noise)
            if basis.size >= k and (basis.complete or products.exhausted or products.size > _CAPACITY):
                before, gaps = gaps, _gaps(values, k)
                converged = bool((self.errors(residuals, gaps, before) <= self.allowed(values[:k])).all())
                beaten = self.extremity(values[:1])[0] + residuals[0] < above and residuals[0] <= 0.1 * abs(values[0])
                stuck = bool((residuals <= 2 * basis.noise).all())
                if converged or beaten or stuck or products.exhausted:
                    rows = basis.combine(vectors[:, :k])
                    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)
                    return _Found(values[:k], rows, residuals, converged or beaten, invariant, basis.complete)
            if basis.full:
                keep = (k + basis.capacity) // 2
                basis.restart(vectors[:, :keep], values[:keep])

    def complete(self, found: _Found) -> _Found:
        """Look among the vectors orthogonal to those found for eigenvalues that are more extreme than the last."""
        k = len(found.values)
        while k < self.products.size:
            if self.products.exhausted:
                return replace(found, converged=False)
            last = self.extremity(found.values)[-1]
            start = self.products.gaussian(self.generator)
            more = self.run(1, start, against=found.rows, above=last)
            converged = found.converged and more.converged
            if self.extremity(more.values)[0] <= last + self.allowed(found.values)[-1]:
                return replace(found, converged=converged)
            values = np.concatenate([found.values, more.values])
            order = np.argsort(-self.extremity(values), kind="stable")[:k]
            rows = torch.cat([found.rows, more.rows])[order]
            residuals = np.concatenate([found.residuals, more.residuals])[order]
            found = replace(found, values=values[order], rows=rows, residuals=residuals, converged=converged)
        return found

    def errors(self, residuals: np.ndarray, gaps: np.ndarray, before: np.ndarray) -> np.ndarray:
        if self.stop == "residual":
            return residuals
        settled = np.abs(gaps - before) <= _SETTLED * gaps
        # An eigenvalue hidden between two Ritz values shows in the residual alone, so that must be small, too.
        quadratic = np.maximum(residuals**2 / np.maximum(gaps, _TINY), residuals / _GAP_RESIDUAL)
        return np.where(settled, np.minimum(residuals, quadratic), residuals)

    def allowed(self, values: np.ndarray) -> np.ndarray:
        # Below some share of the largest, an eigenvalue counts as zero.
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
    """Return the distances of the first ``k`` from the nearest other; infinite if there is none."""
    distances = np.abs(values[:k, None] - values[None, :])
    distances[np.arange(k), np.arange(k)] = np.inf
    nearest: np.ndarray = distances.min(axis=1)
    return nearest


def _combined(start: Tensor, products: Products) -> Tensor:
    """Return one vector, of length 1, whose Krylov space soon has all the given ones."""
    start = real_tensor("start", start)
    if start.ndim not in (1, 2) or len(start) != products.size:
        raise CurvlabError(f"start is ({products.size},) or ({products.size}, j), not {tuple(start.shape)}")
    columns = start.reshape(products.size, -1).to(products.device, torch.float64)
    columns = columns / columns.abs().amax(dim=0)  # squares of what is tiny are zero
    combined: Tensor = (columns / columns.norm(dim=0)).sum(dim=1).to(products.dtype)
    if not bool(combined.isfinite().all()) or not bool(combined.any()):
        raise CurvlabError("start has a vector that is zero or not finite, or its vectors cancel")
    return combined / norm(combined)


def number_of(k: int, size: int) -> int:
    """Return a number of eigenvalues that a matrix of that size has.

    Raises:
        CurvlabError: It is not whole, below 1 or above the size.
    """
    k = whole("k", k, 0)
    if not 1 <= k <= size:
        raise CurvlabError(f"k is from 1 to the dimension {size}, not {k}")
    return k
