"""Checks of the entries of matrices: dtypes, devices, finite values; and their norm."""

import math
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError, first_line

#: PRECISE: the dtypes that support eigenvalues and inverses. DTYPES: all dtypes of entries; half precision supports
#: products and files only.
PRECISE = (torch.float32, torch.float64)
DTYPES = (torch.float16, torch.bfloat16, *PRECISE)


def check_tensors(tensors: Iterable[object]) -> None:
    """Check that the tensors of a matrix are dense and have one floating-point dtype and one device.

    Raises:
        CurvlabError: A tensor is not.
    """
    kinds = set()
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            raise CurvlabError(
                f"a matrix needs dense tensors in {', '.join(map(str, DTYPES))}, not {describe_value(tensor)}"
            )
        kinds.add((tensor.dtype, tensor.device))
    if len(kinds) > 1:
        raise CurvlabError("the tensors of a matrix have different dtypes or devices: move them with to()")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums of numbers of this dtype: float32 or float64."""
    return torch.promote_types(dtype, torch.float32)


def frobenius(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Frobenius norm of all entries together, a scalar tensor in float64.

    Entries are scaled, because squares of small entries underflow and squares of large entries overflow.
    """
    tensors = [tensor.double() for tensor in tensors]
    largest = torch.stack([t.detach().abs().amax() if t.numel() else t.new_zeros(()) for t in tensors]).amax()
    scale = torch.where(largest > 0, largest, 1)
    norms = torch.stack([torch.linalg.vector_norm(tensor / scale) for tensor in tensors])
    norm: Tensor = scale * torch.linalg.vector_norm(norms)
    return norm


def move(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Move a tensor to another device or dtype.

    Raises:
        CurvlabError: The device is not available, or the largest entry is too large or too small for the dtype.
    """
    try:
        moved = tensor.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = first_line(error)
        raise CurvlabError(f"the matrix cannot be moved to {device!r}: {reason}") from error
    if moved.is_meta:
        raise CurvlabError("the matrix cannot be moved to 'meta', where tensors have no entries")
    limits = torch.finfo(moved.dtype)
    if moved.dtype != tensor.dtype and limits.smallest_normal > torch.finfo(tensor.dtype).smallest_normal:
        largest = float(tensor.detach().abs().amax()) if tensor.numel() else 0.0
        if math.isfinite(largest) and largest and not limits.smallest_normal <= largest <= limits.max:
            raise CurvlabError(
                f"the largest entry, {largest:.2g}, is outside the range of {moved.dtype}: rescale the matrix first"
            )
    return moved


def require_finite(vectors: Tensor) -> Tensor:
    """Return the right-hand sides of a linear system after checking that they are finite.

    Raises:
        CurvlabError: A right-hand side is not finite.
    """
    with suppress(RuntimeError):  # under torch.func.vmap the values are unknown
        if not bool(vectors.isfinite().all()):
            raise CurvlabError("the right-hand side of solve holds NaN or infinity")
    return vectors
