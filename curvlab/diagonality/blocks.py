"""A diagonal block of a Gram-type curvature, given by its rows and read in tiles of bounded memory.

The ``P`` parameters of a block are ``O`` groups of ``d``. A tile is the ``(d, d)`` part between groups ``o`` and
``p``. The block is symmetric, so tiles with ``o <= p`` contain all entries. All sums here are over samples, without
the ``1/N`` and in units of ``unit()``; the statistics divide once. The unit keeps squares of entries in the range of
the dtype: if a network fits its data to 1e-12, the fourth powers of its gradients, which the Frobenius norm sums, are
zero in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import frexp, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from curvlab.progress import Advance


@dataclass
class OffDiagonal:
    """Sums over the off-diagonal entries of a symmetric block."""

    abs_sum: float = 0.0
    square_sum: float = 0.0
    abs_max: float = 0.0
    nonzeros: int = 0

    def add(self, entries: Tensor, times: int) -> None:
        """Add a rectangle of entries that occurs ``times`` times in the block."""
        if entries.numel() == 0:
            return
        # torch sums pairwise, with full precision; its vector norms sum one by one, with large errors in float32.
        sizes = entries.abs()
        self.abs_sum += times * float(sizes.sum())
        self.square_sum += times * float(sizes.square().sum())
        self.abs_max = max(self.abs_max, float(sizes.max()))
        self.nonzeros += times * int(torch.count_nonzero(entries))


def power_of_two(high: float) -> float:
    """Return the power of two next above a number; one for zero and non-finite numbers.

    Division by it is exact; it is bounded such that float32 can represent its reciprocal too.
    """
    return 2.0 ** max(-100, min(100, frexp(high)[1])) if high and isfinite(high) else 1.0


class Draw(NamedTuple):
    """A sampled strip of a tile: the given rows (indices in ``0 .. d-1``) of the tile between two groups."""

    first: int
    second: int
    rows: Tensor


class Block(ABC):
    """Interface between a block and its statistics."""

    groups: int
    width: int
    size: int

    @abstractmethod
    def unit(self) -> float:
        """Return the unit of every sum and entry of this block."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``, in the order of the parameters."""

    @abstractmethod
    def total(self) -> float:
        """Return the signed sum of all entries: the squared sum of each row, summed over rows."""

    @abstractmethod
    def columns(self, index: Tensor) -> Tensor:
        """Return the entries of the rows for some parameters, ``(rows, k)``."""

    @abstractmethod
    def gram(self, index: Tensor) -> Tensor:
        """Return the entries between some parameters, ``(k, k)``."""

    @abstractmethod
    def operations(self) -> float:
        """Return the approximate number of multiplications and additions of ``off_diagonal``."""

    @abstractmethod
    def off_diagonal(self, advance: Advance) -> OffDiagonal:
        """Sum over all tiles; call ``advance`` with the fraction done, one in total."""

    @abstractmethod
    def gram_operations(self) -> float:
        """Return the approximate number of operations of ``square_sum``; infinite if it is not available."""

    @abstractmethod
    def square_sum(self) -> float:
        """Return the squared Frobenius norm, from the Gram matrix of the rows."""

    @abstractmethod
    def certain_zeros(self) -> float:
        """Return the fraction of entries known to be zero without forming them."""

    @abstractmethod
    def tile_forms(self, left: Tensor, right: Tensor) -> Iterator[Tensor]:
        """Yield ``u' T v`` for all tiles, ``(O, O)``, for pairs of vectors ``(K, d)``."""

    @abstractmethod
    def tile_bounds(self) -> Tensor:
        """Return an upper bound of the absolute sum of every tile, ``(O, O)``."""

    @abstractmethod
    def column_scales(self) -> Tensor:
        """Return the root mean square of the entries of the rows at each position within a group, ``(d,)``."""

    @abstractmethod
    def strips(self, draws: Sequence[Draw]) -> Iterator[Tensor]:
        """Yield the sampled rows of tiles, ``(len(rows), d)`` each."""

    @abstractmethod
    def strip_operations(self, draw: Draw) -> float:
        """Return the approximate number of operations of one strip."""
