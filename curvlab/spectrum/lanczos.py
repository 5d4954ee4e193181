"""The Lanczos basis with full orthogonalisation, and the projected matrix.

References:
    Lanczos (1950), Journal of Research of the National Bureau of Standards 45; Parlett (1998), The Symmetric
    Eigenvalue Problem, chapter 13; Wu and Simon (2000), SIAM Journal on Matrix Analysis 22 (thick restart).
"""

from math import hypot, isfinite, sqrt

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.operator import Products, norm

_TINY = 1e-300


class Lanczos:
    """An orthonormal basis ``Q`` of a Krylov space, extended by one product at a time, with ``T = Q' A Q``.

    Every new direction is orthogonalised against the whole basis. If the Krylov space is exhausted, the basis continues
    with a random direction. ``A Q - Q T = beta q e'`` is zero except in the last column.

    Args:
        products: Products with the matrix ``A``.
        capacity: Largest number of directions in the basis.
        start: Start vector ``(P,)`` of any length.
        generator: Generator for random directions.
        against: Orthonormal rows ``(j, P)`` to which the basis stays orthogonal; ``A`` is then restricted to their
            orthogonal complement.

    Attributes:
        size: Number of directions whose product has been computed.
        beta: Length of the part of the last product outside the basis; 0 if the basis is the whole space.
        noise: Accuracy of products: the largest asymmetry of their coefficients, or the rounding error.
    """

    def __init__(
        self,
        products: Products,
        capacity: int,
        start: Tensor,
        generator: np.random.Generator,
        against: Tensor | None = None,
    ) -> None:
        self._products, self._generator, self._against = products, generator, against
        dimension = products.size - (0 if against is None else len(against))
        self.capacity = min(capacity, dimension)
        self._whole = dimension
        # One row more than the capacity, for the next direction.
        self._basis = torch.empty(self.capacity + 1, products.size, dtype=products.dtype, device=products.device)
        self._matrix = np.zeros((self.capacity, self.capacity))
        self._coupling = np.zeros(0)  # coefficients of the next product that are known in advance
        self.size, self.beta, self.noise = 0, 0.0, 0.0
        self._append(start.clone(), norm(start), 0.0)

    @property
    def matrix(self) -> np.ndarray:
        """``T``, ``(size, size)`` in float64."""
        return self._matrix[: self.size, : self.size]

    @property
    def full(self) -> bool:
        """Whether the basis has reached its capacity."""
        return self.size == self.capacity

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space, so that ``T`` has all eigenvalues."""
        return self.size == self._whole

    def step(self) -> None:
        """Compute a product and extend the basis.

        Raises:
            CurvlabError: The operator is not symmetric, or changes between products.
        """
        m = self.size
        direction, basis = self._basis[m], self._basis[: m + 1]
        product = self._products(direction)
        # Subtract the known coefficients and the diagonal first; then one pass over the basis removes rounding errors.
        along = float(direction @ product)
        coupled = np.flatnonzero(self._coupling)
        if len(coupled):
            known = self._products.tensor(self._coupling[coupled[0] :])
            product.addmv_(basis[coupled[0] : m].mT, known, alpha=-1)
        product.sub_(direction, alpha=along)
        rest = basis @ product
        product.addmv_(basis.mT, rest, alpha=-1)
        column = rest.double().cpu().numpy() + np.append(self._coupling, along)
        left = norm(product)
        if not isfinite(along + left):
            raise self._products.overflow_error()
        length = hypot(float(np.linalg.norm(column)), left)
        self._check(column, length)
        self._matrix[: m + 1, m] = self._matrix[m, : m + 1] = column
        self.size = m + 1
        accurate = self._against is None and norm(rest) < 0.5 * left
        self._append(product, left, length, accurate)

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """Return ``Q S`` as rows ``(j, P)`` for coefficients ``S`` ``(size, j)``."""
        return self._products.tensor(coefficients).mT @ self._basis[: self.size]

    def restart(self, coefficients: np.ndarray, values: np.ndarray) -> None:
        """Restart with the Ritz vectors ``Q S``, ``S`` ``(size, j)``, and their Ritz values: a thick restart."""
        j = len(values)
        following = self._basis[self.size].clone()
        self._basis[:j] = self.combine(coefficients)
        self._basis[j] = following
        self._matrix[:] = 0
        np.fill_diagonal(self._matrix[:j, :j], values)
        self._coupling = self.beta * coefficients[-1]
        self.size = j

    def _append(self, vector: Tensor, rest: float, length: float, accurate: bool = False) -> None:
        """Normalise ``vector``, the part of a product outside the basis with norm ``rest``, as the next direction."""
        m = self.size
        while not accurate:
            before = rest
            self._orthogonalise(vector)
            rest = norm(vector)
            accurate = rest > 0.5 * before or rest < _TINY  # "twice is enough": Parlett (1998), section 6.9
        if self.complete:
            self.beta = 0.0
            return
        # A vector of rounding errors is not a direction.
        scale = max(length, self._products.largest) if m else length
        self.beta = rest if rest > 10 * torch.finfo(vector.dtype).eps * scale else 0.0
        self._coupling = np.zeros(m)
        self._coupling[-1:] = self.beta
        if not self.beta:
            vector = self._products.gaussian(self._generator)
            for _ in range(3):
                vector /= norm(vector)
                self._orthogonalise(vector)
            rest = norm(vector)
        torch.div(vector, rest, out=self._basis[m])

    def _orthogonalise(self, vector: Tensor) -> None:
        for rows in (self._against, self._basis[: self.size]):
            if rows is not None and len(rows):
                vector.addmv_(rows.mT, rows @ vector, alpha=-1)

    def _check(self, column: np.ndarray, length: float) -> None:
        off = float(np.linalg.norm(column[:-1] - self._coupling))
        eps = self._products.eps
        self._products.largest = max(self._products.largest, length)  # rounding errors are relative to this
        self.noise = max(self.noise, off, eps * self._products.largest)
        if off > 10 * sqrt(eps) * self._products.largest:
            raise CurvlabError(
                f"the operator is not symmetric, or changes between products: two coefficients that should be equal "
                f"differ by {off:.2g}, and the lengths of products are up to {self._products.largest:.2g}; make it "
                "symmetric and deterministic"
            )
