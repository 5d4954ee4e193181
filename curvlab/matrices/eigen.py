"""Eigenvalues of blocks: how they are computed, and which have an inverse."""

from collections.abc import Callable

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices.damping import Damping


def damped_eigh(matrix: Tensor, undamped: Callable[[], tuple[Tensor, Tensor]], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of a block plus its damping.

    Args:
        matrix: ``(p, p)``.
        undamped: Its own, which serve every damping that is one number.
        shift: ``()`` or ``(p,)``.
    """
    if shift.ndim:
        return symmetric_eigh(matrix + shift.diag())
    values, vectors = undamped()
    return values + shift, vectors


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, computed in float64.

    In float32 LAPACK fails to converge on rank-deficient curvature, depending on batch size and threads.

    Raises:
        CurvlabError: The matrix is not finite or not symmetric.
    """
    wide = matrix.double()
    if wide.numel():
        off = (wide - wide.mT).detach().abs().max()
        if not bool(off <= wide.detach().abs().max() * torch.finfo(matrix.dtype).eps ** 0.5):
            raise CurvlabError("a matrix, or a block or factor of one, is not finite or not symmetric")
    values, vectors = torch.linalg.eigh(wide)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def invert(eigenvalues: Tensor, damping: Damping) -> Tensor:
    """Return the reciprocals of the eigenvalues of damped blocks, ``(..., n)``: a row is one block's.

    Raises:
        CurvlabError: A block is singular to working precision, or not finite.
    """
    if not eigenvalues.shape[-1]:  # of an empty parameter
        return eigenvalues
    smallest, largest = eigenvalues.abs().amin(dim=-1), eigenvalues.abs().amax(dim=-1)
    singular = ~(smallest > _resolution(largest))  # also where they are NaN or infinite
    if bool(singular.any()):
        raise CurvlabError(
            f"F + {damping} is singular: its eigenvalues reach from {smallest[singular][0].item():.2g} to "
            f"{largest[singular][0].item():.2g} in size; raise the damping"
        )
    return eigenvalues.reciprocal()


def require_positive(eigenvalues: Tensor, damping: Damping) -> Tensor:
    """Return the eigenvalues of damped blocks, ``(..., n)``, which are positive beyond rounding.

    Raises:
        CurvlabError: A block is not positive definite, or not finite.
    """
    if not eigenvalues.shape[-1]:  # of an empty parameter
        return eigenvalues
    smallest, largest = eigenvalues.amin(dim=-1), eigenvalues.abs().amax(dim=-1)
    if not bool((smallest > _resolution(largest)).all()):  # also where they are NaN or infinite
        raise CurvlabError(
            f"F + {damping} is not positive definite: its smallest eigenvalue is {smallest.min().item():.2g}; "
            "raise the damping"
        )
    return eigenvalues


def _resolution(largest: Tensor) -> Tensor:
    # Eigenvalues that are zero come out as a few rounding errors of the largest in their block.
    limits = torch.finfo(largest.dtype)
    return (10 * limits.eps * largest).clamp(min=limits.tiny)
