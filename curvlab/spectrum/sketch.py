"""Sketch of a symmetric matrix with random vectors, from which any one or two vectors can be left out.

References:
    Epperly, Tropp and Webber (2024), SIAM Journal on Matrix Analysis 45 (XTrace): leaving out one vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.operator import Products, norm

Draw = Callable[[np.random.Generator], Tensor]


class Sketch:
    """Random vectors ``omega``, an orthonormal basis ``Q`` of ``A omega``, and ``A Q``: two products per vector.

    Args:
        products: Products with the matrix ``A``.
        draw: A function that draws a random vector.
        generator: Random generator.

    Attributes:
        tests: The random vectors ``omega``, ``(m, P)``.
        basis: Orthonormal rows ``(m, P)``; the first ``j`` rows are a basis of the first ``j`` products.
        images: The products of the basis, ``(m, P)``.
        triangle: ``R``, ``(m, m)`` in float64: ``A omega_j = sum_i R_ij q_i``.
    """

    def __init__(self, products: Products, draw: Draw, generator: np.random.Generator) -> None:
        self._products, self._draw, self._generator = products, draw, generator
        self.tests = self.basis = self.images = torch.empty(
            0, products.size, dtype=products.dtype, device=products.device
        )
        self.triangle = np.zeros((0, 0))

    def __len__(self) -> int:
        """Return the number of vectors ``m``."""
        return len(self.tests)

    def extend(self, count: int) -> None:
        """Add ``count`` random vectors."""
        old, new = len(self), len(self) + count
        room = torch.empty(count, self._products.size, dtype=self.tests.dtype, device=self.tests.device)
        self.tests, self.basis, self.images = (
            torch.cat([rows, room]) for rows in (self.tests, self.basis, self.images)
        )
        self.triangle = np.pad(self.triangle, (0, count))
        for j in range(old, new):
            self.tests[j] = self._draw(self._generator)
            product = self._products(self.tests[j])
            self.basis[j] = self._next_direction(product, j)
            self.images[j] = self._products(self.basis[j])

    def _next_direction(self, product: Tensor, j: int) -> Tensor:
        """Orthogonalise a product against the basis, store its coefficients, and return the direction."""
        basis, length = self.basis[:j], norm(product)
        for _ in range(2):
            coefficients = basis @ product
            product -= basis.mT @ coefficients
            self.triangle[:j, j] += as_array(coefficients)
        rest = norm(product)
        if rest > 10 * torch.finfo(product.dtype).eps * length:
            self.triangle[j, j] = rest
        else:  # only rounding errors remain: use a random direction
            product = self._products.gaussian(self._generator)
            for _ in range(3):
                product /= norm(product)
                product -= basis.mT @ (basis @ product)
        return product / norm(product)

    def noise(self) -> float:
        """Return the accuracy of a product with a unit vector, estimated from the asymmetry of the matrix.

        Raises:
            CurvlabError: The operator is not symmetric, or changes between products.
        """
        off = float(np.linalg.norm(as_array(self.images @ self.tests.mT) - self.triangle))
        size = float(np.linalg.norm(self.triangle))
        if off > 10 * sqrt(self._products.eps) * size:
            raise CurvlabError(
                f"the operator is not symmetric, or changes between products: q' A v and v' A q differ by {off:.2g} "
                f"over all random vectors, and their size is {size:.2g}; make it symmetric and deterministic"
            )
        return off / (len(self) * sqrt(self._products.size))


@dataclass(frozen=True)
class LeftOut:
    """The directions of a sketch's basis that are lost if one or two of its vectors are left out.

    Without vector ``i``, the basis spans the complement of ``s_i``; without ``i`` and ``j``, the complement of both.
    The projection onto ``s_i`` and ``s_j`` is ``diag (s_i s_i' + s_j s_j') + off (s_i s_j' + s_j s_i')``.

    Attributes:
        directions: ``S``, ``(m, m)``, coefficients in the basis; column ``i`` is ``s_i``, of length 1.
        own: ``s_i' r_i``, ``(m,)``; all other ``s_i' r_j`` are zero.
        diag: The coefficient ``diag`` of each pair, ``(m, m)``.
        off: The coefficient ``off`` of each pair, ``(m, m)``.
        lost: The dimension of the span of each pair, 1 or 2, ``(m, m)``.
    """

    directions: np.ndarray
    own: np.ndarray
    diag: np.ndarray
    off: np.ndarray
    lost: np.ndarray

    @classmethod
    def of(cls, triangle: np.ndarray) -> "LeftOut":
        """Compute the directions for a sketch with this triangle."""
        u, singular, v = np.linalg.svd(triangle)
        # Without full rank, any direction outside the range is correct; the floor selects one.
        floor = np.finfo(float).eps * (singular[0] or 1.0)
        directions = (u / np.maximum(singular, floor)) @ v
        directions /= np.linalg.norm(directions, axis=0)
        cosines = directions.T @ directions
        np.fill_diagonal(cosines, 0.0)
        squared_sines = 1 - cosines**2
        parallel = squared_sines < 1e-9
        safe = np.where(parallel, 1.0, squared_sines)
        return cls(
            directions,
            (directions * triangle).sum(axis=0),
            np.where(parallel, 0.25, 1 / safe),
            np.where(parallel, cosines / 4, -cosines / safe),
            np.where(parallel, 1, 2),
        )


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a small tensor as a float64 array."""
    return tensor.double().cpu().numpy()
