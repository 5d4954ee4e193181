"""Extreme eigenvalues of a matrix that is known by its products, with errors that are known too.

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
_OVERLAP = 4.0  # over sqrt(P): more than a random vector has of an eigenvector (in one of 15,000 cases)
_UNLIKELY = 1e-2  # that a second search ends before it has met an eigenvalue that there is
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
        start: ``(P,)`` or ``(P, j)``: vectors to start from, such as those of a matrix nearby, beside a random part of
            0.3 of their length; None for a random one alone. The nearer they are, the better another eigenvalue hides
            that has overtaken theirs. ``stop="residual"`` goes on until it would have shown itself, which takes about
            as many products as a random start; ``stop="gap"`` does not, and saves about half of them.
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
    first, part = products.gaussian(generator), 1.0
    if start is not None:
        part = _RANDOM_PART / hypot(1.0, _RANDOM_PART)
        first = _combined(start, products) + first * (_RANDOM_PART / norm(first))
    search = _Search(products, which, tol, stop, generator)
    if method == "eigsh":
        values, vectors, residuals = by_arpack(products, k, which, tol, first)
        order = np.argsort(-search.extremity(values), kind="stable")
        products.largest = float(np.abs(values).max())
        converged = bool((residuals[order] <= search.allowed(values[order])).all())
        found = _Found(values[order], products.tensor(vectors.T[order]), residuals[order], converged, False)
    else:
        found = search.run(k, first, part)
    # A Krylov space has one vector of a multiple eigenvalue, and ARPACK as many as rounding errors give.
    if k > 1 and not found.whole:
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
    whole: bool  # whether it grew to the whole space, where all is known


@dataclass(frozen=True)
class _Search:
    products: Products
    which: Which
    tol: float
    stop: Stop
    generator: np.random.Generator

    def run(
        self, k: int, start: Tensor, part: float = 1.0, against: Tensor | None = None, above: float = np.inf
    ) -> _Found:
        """Search until ``k`` Ritz pairs have converged, or there is surely nothing as extreme as ``above``.

        Args:
            k: How many.
            start: ``(P,)``.
            part: The share of it, by length, that is random.
            against: ``(j, P)``, orthonormal rows that are left out.
            above: An extremity.
        """
        products = self.products
        basis = Lanczos(products, _capacity(products, k), start, self.generator, against)
        gaps, taken = np.zeros(k), products.count
        while True:
            basis.step()
            values, vectors = np.linalg.eigh(basis.matrix)
            order = np.argsort(-self.extremity(values), kind="stable")
            values, vectors = values[order], vectors[:, order]
            # What rounding leaves in a product bounds what its residual can show.
            outside = basis.beta * np.abs(vectors[-1, :k])
            residuals = np.hypot(outside, basis.noise)
            trusted = self.stop == "gap" and part < 1  # a start that is given
            # After so many products, none of them a restart's yet, another eigenvalue has come into sight.
            early = products.count - taken < _CAPACITY
            times = self.hidden(vectors[0, :k], part) if early and not trusted else 1.0
            shown = np.hypot(outside * times, basis.noise)
            if basis.size >= k and (basis.complete or products.exhausted or products.size > _CAPACITY):
                before, gaps = gaps, _gaps(values, k)
                converged = bool((self.errors(shown, gaps, before) <= self.allowed(values[:k])).all())
                beaten = self.beaten(basis, values, above)
                stuck = bool((shown <= 2 * basis.noise).all())
                if converged or beaten or stuck or products.exhausted:
                    rows = basis.combine(vectors[:, :k])
                    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)
                    return _Found(values[:k], rows, residuals, converged or beaten, basis.complete)
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

    def hidden(self, overlaps: np.ndarray, part: float) -> np.ndarray:
        """Return how many times what a residual shows an eigenvalue may be beyond, given the start's overlaps ``(k,)``.

        An eigenvector that has been missed is about ``part / sqrt(P)`` of the start, and the residual of a Ritz vector
        has that share of its eigenvalue's distance, over the start's overlap with the Ritz vector. Where the overlap is
        that of a random vector with one eigenvector, the distance is no more than the residual. With a start that is
        given, or a multiple eigenvalue, such as damping makes, the overlap is large, and the distance may be, too.
        """
        known = np.abs(overlaps) * self.products.size**0.5
        return np.where(known > _OVERLAP, np.maximum(known / part, 1.0), 1.0)

    def beaten(self, basis: Lanczos, values: np.ndarray, above: float) -> bool:
        """Return whether after that many products from a random start nothing can be as extreme as ``above``.

        The probability that the largest Ritz value of ``m`` products is below the largest eigenvalue by more than a
        share of the spectrum's length is at most ``1.648 sqrt(P) exp(-sqrt(share) (2 m - 1))`` (Kuczynski and
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
        # Without another Ritz value there is no gap yet.
        settled = np.isfinite(gaps) & (np.abs(gaps - before) <= _SETTLED * gaps)
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
