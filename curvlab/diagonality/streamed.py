"""The block of any parameters, whose rows are kept if they fit in memory and else recomputed in every pass."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from curvlab.diagonality.blocks import Block, Draw, OffDiagonal, power_of_two
from curvlab.progress import Advance


class StreamedBlock(Block):
    """Block whose rows are kept from the first pass over the data if they fit in memory, and else recomputed.

    Args:
        rows: Starts a pass: yields batches ``(rows, P)``, the same in every call.
        size: ``P``.
        max_bytes: Limit of the memory of the tiles of one pass, and of the rows that are kept.
    """

    _WIDTH = 512

    def __init__(self, rows: Callable[[], Iterator[Tensor]], size: int, max_bytes: float) -> None:
        self.rows, self.size, self.max_bytes = rows, size, max_bytes
        self.width = min(size, self._WIDTH)
        self.groups = -(-size // self.width)
        self._count = 0
        self._diagonal: Tensor | None = None
        self._total = 0.0
        self._scale = 1.0

    def _grouped(self) -> Iterator[Tensor]:
        """Yield rows as ``(rows, O, d)``, padded with zeros after the last parameter."""
        for rows in self.rows():
            yield self._in_groups(rows / self._scale)

    def _in_groups(self, entries: Tensor) -> Tensor:
        padding = self.groups * self.width - self.size
        return torch.nn.functional.pad(entries, (0, padding)).view(*entries.shape[:-1], self.groups, self.width)

    def _first_pass(self) -> Tensor:
        if self._diagonal is None:
            kept: list[Tensor] = []
            for rows in self.rows():
                squares = rows.square().sum(dim=0)
                self._diagonal = squares if self._diagonal is None else self._diagonal + squares
                self._total += float(rows.double().sum(dim=1).square().sum())
                self._count += len(rows)
                if self._count * self.size * rows.itemsize <= self.max_bytes:
                    kept.append(rows)
                else:
                    kept.clear()
            assert self._diagonal is not None
            if kept:
                self.rows = partial(iter, kept)
            self._scale = power_of_two(sqrt(float(self._diagonal.max())))
            self._diagonal /= self._scale**2
            self._total /= self._scale**2
        return self._diagonal

    def unit(self) -> float:
        """Return the square of the power of two that the rows are divided by."""
        self._first_pass()
        return self._scale**2

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return self._first_pass()

    def total(self) -> float:
        """Return the signed sum of all entries."""
        self._first_pass()
        return self._total

    def columns(self, index: Tensor) -> Tensor:
        """Return the entries of the rows for some parameters, ``(rows, k)``."""
        self._first_pass()
        return torch.cat([rows[:, index] / self._scale for rows in self.rows()])

    def gram(self, index: Tensor) -> Tensor:
        """Return the entries between some parameters, ``(k, k)``."""
        total = self._first_pass().new_zeros(len(index), len(index))
        for rows in self.rows():
            columns = rows[:, index] / self._scale
            total.addmm_(columns.mT, columns)
        return total

    def operations(self) -> float:
        """Return the approximate number of operations of ``off_diagonal``."""
        self._first_pass()
        pairs = self.groups * (self.groups + 1) / 2
        passes = -(-pairs * self.width**2 * 8 // self.max_bytes)
        return self._count * (2 * pairs * self.width**2 + passes * 200 * self.size)

    def off_diagonal(self, advance: Advance) -> OffDiagonal:
        """Sum over all tiles, in each pass over as many as fit in memory."""
        sums = OffDiagonal()
        everything = torch.arange(self.width)
        draws = [Draw(o, p, everything) for o in range(self.groups) for p in range(o, self.groups)]
        for (o, p, _), tile in zip(draws, self.strips(draws), strict=True):
            if o == p:
                tile.diagonal().zero_()
            sums.add(tile, 1 if o == p else 2)
            advance(1 / len(draws))
        return sums

    def gram_operations(self) -> float:
        """Return infinity, because the Gram matrix of the rows would need all rows at once."""
        return float("inf")

    def square_sum(self) -> float:
        """Raise an error, because rows are not stored."""
        raise AssertionError("gram_operations() is infinite")

    def certain_zeros(self) -> float:
        """Return the fraction of entries in a row or column with zero diagonal."""
        return 1 - (int(torch.count_nonzero(self._first_pass())) / self.size) ** 2

    def tile_forms(self, left: Tensor, right: Tensor) -> Iterator[Tensor]:
        """Yield ``u' T v`` of all tiles."""
        forms = torch.zeros(len(left), self.groups, self.groups, dtype=left.dtype, device=left.device)
        for rows in self._grouped():
            forms += torch.einsum("nok,npk->kop", rows @ left.mT, rows @ right.mT)
        yield from forms

    def tile_bounds(self) -> Tensor:
        """Return ``sum |v_o|_1 |v_p|_1``."""
        sizes = torch.cat([rows.abs().sum(dim=2) for rows in self._grouped()])
        return sizes.mT @ sizes

    def column_scales(self) -> Tensor:
        """Return the root mean square of the rows at each position within a group."""
        return self._in_groups(self._first_pass()).mean(dim=0).sqrt()

    def strips(self, draws: Sequence[Draw]) -> Iterator[Tensor]:
        """Yield the sampled rows of tiles, in each pass as many as fit in memory."""
        start = 0
        while start < len(draws):
            end, held = start, 0.0
            while end < len(draws) and (end == start or held + len(draws[end].rows) * self.width * 8 <= self.max_bytes):
                held += len(draws[end].rows) * self.width * 8
                end += 1
            part = draws[start:end]
            like = self._first_pass()
            sums = [like.new_zeros(len(draw.rows), self.width) for draw in part]
            for rows in self._grouped():
                for tile, (o, p, positions) in zip(sums, part, strict=True):
                    tile.addmm_(rows[:, o, positions].mT, rows[:, p])
            yield from sums
            start = end

    def strip_operations(self, draw: Draw) -> float:
        """Return the approximate number of operations of one strip."""
        self._first_pass()
        return 2.0 * self._count * len(draw.rows) * self.width
