"""The entries of matrices: their dtypes and devices, their norm, and whether they are finite."""

import math
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from curvlab.checks import shown
from curvlab.errors import CurvlabError, first_line

#: The dtypes in which a matrix is inverted, and all those of its entries: half precision is for products and files.
PRECISE = (torch.float32, torch.float64)
DTYPES = (torch.float16, torch.bfloat16, *PRECISE)


def check_tensors(tensors: Iterable[object]) -> None:
    """Require that the tensors of a matrix are dense, of one floating dtype and on one device.

    Raises:
        CurvlabError: One is not; the message says what it is.
    """
    kinds = set()
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            raise CurvlabError(
                f"a matrix is made of dense tensors in {', '.join(map(str, DTYPES))}, not {shown(tensor)}"
            )
        kinds.add((tensor.dtype, tensor.device))
    if len(kinds) > 1:
        raise CurvlabError("the tensors of a matrix differ in dtype or device: move them with to()")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of this one are added up."""
    return torch.promote_types(dtype, torch.float32)


def frobenius(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of all the entries together, a scalar tensor in float32 at least.

    In float64 and scaled: squares of small entries vanish, and those of large ones overflow.
    """
    tensors = [tensor.double() for tensor in tensors]
    largest = torch.stack([t.detach().abs().amax() if t.numel() else t.new_zeros(()) for t in tensors]).amax()
    scale = torch.where(largest > 0, largest, 1)
    norms = torch.stack([torch.linalg.vector_norm(tensor / scale) for tensor in tensors])
    norm: Tensor = scale * torch.linalg.vector_norm(norms)
    return norm


def move(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor elsewhere, in which its largest entry keeps its digits.

    Raises:
        CurvlabError: There is no such device, or the largest entry is too large or small for the dtype.
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
                f"entries of the matrix reach {largest:.2g}, which is beyond {moved.dtype}: scale it first"
            )
    return moved


def require_finite(vectors: Tensor) -> Tensor:
    """Return right-hand sides, of which a system has no solution that is right unless they are finite.

    Raises:
        CurvlabError: One is not.
    """
    with suppress(RuntimeError):  # under torch.func.vmap values are not known
        if not bool(vectors.isfinite().all()):
            raise CurvlabError("the right-hand side of solve holds NaN or infinity")
    return vectors
