"""Iterative solution of linear systems that uses only products, with a checked residual."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvlab.errors import CurvlabError

Multiply = Callable[[Tensor], Tensor]


def solve(multiply: Multiply, b: Tensor, tol: float, max_products: int) -> Tensor:
    """Return ``x`` with ``||b - M x|| <= tol ||b||`` in every column for a symmetric ``M``.

    The method is conjugate gradients, or MINRES if a direction shows that ``M`` is not positive definite. The residual
    that is compared with the tolerance is computed from ``x``, not by the recurrence.

    Args:
        multiply: A function that returns ``M V`` for ``(P, K)``.
        b: ``(P, K)``.
        tol: The relative residual to reach.
        max_products: The largest number of products, with all columns at once or with one column.

    Raises:
        CurvlabError: The tolerance is not reached.
    """
    largest = b.abs().amax(dim=0)
    unit = torch.where(largest > 0, largest, 1)  # squares of very small or large numbers underflow or overflow
    return _solve(multiply, b / unit, tol, max_products) * unit


def _solve(multiply: Multiply, b: Tensor, tol: float, max_products: int) -> Tensor:
    products = 0

    def count_and_multiply(vectors: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return multiply(vectors)

    size = _dots(b, b).sqrt()
    x, residual, error, method = torch.zeros_like(b), b, 1.0, _conjugate_gradients
    while bool(size.any()) and not error <= tol:
        correction = method(count_and_multiply, residual, tol * size / 2, max_products - products)
        if correction is None:
            method = _minres
            continue
        x = x + correction
        residual, previous = b - count_and_multiply(x), error
        error = float((_dots(residual, residual).sqrt() / size)[size != 0].max())
        # Solve again for the residual, as long as it decreases by half.
        if not error <= tol and not error < previous / 2:
            raise CurvlabError(
                f"solve did not converge: after {products} products the relative residual is {error:.2g}, above the "
                f"tolerance {tol:.2g}; increase the damping, or tol or max_products of solve"
            )
    return x


def _conjugate_gradients(multiply: Multiply, b: Tensor, limit: Tensor, max_products: int) -> Tensor | None:
    """Return an approximate solution for all columns at once, or None if the matrix is not positive definite."""
    x, residual, direction, energy = torch.zeros_like(b), b, b, _dots(b, b)
    for _ in range(max_products):
        unsolved = energy.sqrt() > limit
        if not bool(unsolved.any()):
            break
        product = multiply(direction)
        curvature = _dots(direction, product)
        rounding = torch.finfo(b.dtype).eps * (_dots(direction, direction) * _dots(product, product)).sqrt()
        if not bool((curvature > rounding)[unsolved].all()):
            return None
        step = torch.where(unsolved, energy / curvature, 0).to(b.dtype)
        x, residual = x + step * direction, residual - step * product
        previous, energy = energy, _dots(residual, residual)
        direction = residual + torch.where(unsolved, energy / previous, 0).to(b.dtype) * direction
    return x


def _minres(multiply: Multiply, b: Tensor, limit: Tensor, max_products: int) -> Tensor:
    """Return an approximate solution, computed column by column."""

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        return multiply(torch.tensor(vector).to(b).reshape(-1, 1)).reshape(-1).double().cpu().numpy()

    from scipy.sparse.linalg import LinearOperator, minres

    operator = LinearOperator((len(b), len(b)), matvec=product, dtype=np.float64)
    columns = []
    for column, to_reach in zip(b.mT.double().cpu().numpy(), limit.tolist(), strict=True):
        share = max(1, max_products // b.shape[1])
        rtol = to_reach / max(float(np.linalg.norm(column)), to_reach)
        columns.append(torch.from_numpy(minres(operator, column, rtol=rtol, maxiter=share)[0]))
    return torch.stack(columns, dim=1).to(b)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=0, dtype=torch.float64)
