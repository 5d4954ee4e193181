"""The default dtype, for code of others that makes its buffers in it whatever the model's dtype is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make a dtype the default within the block.

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
