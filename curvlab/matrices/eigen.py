"""Eigenvalues of blocks, and checks that a block is invertible or positive definite."""

from collections.abc import Callable

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices.damping import Damping


def damped_eigh(matrix: Tensor, undamped: Callable[[], tuple[Tensor, Tensor]], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of a block plus its damping.

    Args:
        matrix: ``(p, p)``.
        undamped: Returns the eigenvalues and eigenvectors of the block, which are reused if the damping is a number.
        shift: The damping, ``()`` or ``(p,)``.
    """
    if shift.ndim:
        return symmetric_eigh(matrix + shift.diag())
    values, vectors = undamped()
    return values + shift, vectors


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of a symmetric matrix, computed in float64.

    In float32, LAPACK sometimes fails to converge for rank-deficient curvature. For a diagonal matrix, given as its
    diagonal ``(d,)``, the eigenvectors are the identity, also given as its diagonal.

    Raises:
        CurvlabError: The matrix is not finite or not symmetric.
    """
    if matrix.ndim == 1:
        if not bool(matrix.isfinite().all()):
            raise CurvlabError("the matrix, or one of its blocks or factors, is not finite or not symmetric")
        return matrix, torch.ones_like(matrix)
    wide = matrix.double()
    if wide.numel():
        off = (wide - wide.mT).detach().abs().max()
        if not bool(off <= wide.detach().abs().max() * torch.finfo(matrix.dtype).eps ** 0.5):
            raise CurvlabError("the matrix, or one of its blocks or factors, is not finite or not symmetric")
    values, vectors = torch.linalg.eigh(wide)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def invert(eigenvalues: Tensor, damping: Damping) -> Tensor:
    """Return the reciprocal eigenvalues of damped blocks, ``(..., n)``: one row per block.

    Raises:
        CurvlabError: A block is singular to working precision, or not finite.
    """
    return require_invertible(eigenvalues, damping).reciprocal()


def require_invertible(eigenvalues: Tensor, damping: Damping) -> Tensor:
    """Return the eigenvalues of damped blocks, ``(..., n)``, after checking that none is zero up to rounding.

    Raises:
        CurvlabError: A block is singular to working precision, or not finite.
    """
    if not eigenvalues.shape[-1]:  # an empty parameter
        return eigenvalues
    smallest, largest = eigenvalues.abs().amin(dim=-1), eigenvalues.abs().amax(dim=-1)
    singular = ~(smallest > _resolution(largest))  # true also for NaN and infinity
    if bool(singular.any()):
        raise CurvlabError(
            f"F + {damping} is singular: the magnitudes of its eigenvalues are between "
            f"{smallest[singular][0].item():.2g} and {largest[singular][0].item():.2g}; increase the damping"
        )
    return eigenvalues


def require_positive(eigenvalues: Tensor, damping: Damping) -> Tensor:
    """Return the eigenvalues of damped blocks, ``(..., n)``, after checking that they are positive beyond rounding.

    Raises:
        CurvlabError: A block is not positive definite, or not finite.
    """
    if not eigenvalues.shape[-1]:  # an empty parameter
        return eigenvalues
    smallest, largest = eigenvalues.amin(dim=-1), eigenvalues.abs().amax(dim=-1)
    if not bool((smallest > _resolution(largest)).all()):  # true also for NaN and infinity
        raise CurvlabError(
            f"F + {damping} is not positive definite: its smallest eigenvalue is {smallest.min().item():.2g}; "
            "increase the damping"
        )
    return eigenvalues


def _resolution(largest: Tensor) -> Tensor:
    # A zero eigenvalue is computed as a few rounding errors of the largest eigenvalue of its block.
    limits = torch.finfo(largest.dtype)
    return (10 * limits.eps * largest).clamp(min=limits.tiny)
