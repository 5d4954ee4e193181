"""Does a forward pass choose rows by their values, as a mixture of experts does?"""

from typing import Any

import torch
from torch import Tensor

from curvlab.dispatch import DispatchMode

#: Operations whose result has other rows, or rows in another order, depending on values.
_BY_VALUE = ("nonzero", "masked_select", "masked_scatter", "unique", "_unique", "sort", "argsort", "topk")
_BY_INDEX = ("index", "index_select", "index_put", "index_add", "index_copy")


class SelectionWatch(DispatchMode):
    """A dispatch mode that records whether rows are chosen by values.

    Then a call with one row per sample may have, for other samples, as many rows but of other samples.

    Attributes:
        selects: Whether an operation did so, until now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selects = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation and run it."""
        if not self.selects:
            name = func._schema.name.partition("::")[2].rstrip("_")
            given = [*args, *(kwargs or {}).values()]
            self.selects = name.startswith(_BY_VALUE) or (name in _BY_INDEX and _moves_rows(given))
        return func(*args, **(kwargs or {}))


def _moves_rows(given: list[Any]) -> bool:
    """Return whether the first dimension is indexed by a mask, or by numbers other than 0, 1, 2, ..."""
    where, *rest = given[1:]
    indices = where if isinstance(where, list | tuple) else rest if where == 0 else []  # or (x, dim, index)
    index = indices[0] if indices else None
    if not isinstance(index, Tensor) or index.ndim != 1:
        return isinstance(index, Tensor) and index.dtype == torch.bool
    return index.dtype == torch.bool or not bool((index == torch.arange(len(index), device=index.device)).all())
