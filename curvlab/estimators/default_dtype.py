"""Context manager for the default dtype, for libraries that create buffers in it instead of the model's dtype."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype within the block.

    Examples:
        >>> with default_dtype(torch.float64):
        ...     torch.zeros(2).dtype
        torch.float64
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
