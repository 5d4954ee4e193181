"""The block of a Linear layer, whose rows have rank one: only the two factors are stored."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from curvlab.diagonality.blocks import Block, Draw, OffDiagonal, power_of_two
from curvlab.estimators.rows import LinearFactors
from curvlab.progress import Advance

_SAMPLES = 1000


class OuterBlock(Block):
    """Block with rows ``v[o, i] = left[n, r, o] right[n, i]``; a tile is ``right' diag(sum_r left_o left_p) right``.

    Zeros of both factors are skipped: samples on which a group is inactive, positions that are never active, and
    samples on which a panel of rarely active positions is zero. Panels of columns, rarest first, each multiplied by the
    columns from its own start on, use the symmetry within a tile.

    Args:
        left: ``(N, R, O)``.
        right: ``(N, d)``.
        transposed: Whether the parameters are ordered by position first, then by group.
    """

    _PANELS = 6
    _MIN_PANEL = 48
    _COMMON = 0.7

    def __init__(self, left: Tensor, right: Tensor, transposed: bool = False) -> None:
        units = [power_of_two(float(torch.linalg.vector_norm(factor, torch.inf))) for factor in (left, right)]
        self._unit = (units[0] * units[1]) ** 2
        self.num_positions = right.shape[1]
        counts = torch.stack([torch.count_nonzero(part, dim=0) for part in right.split(_SAMPLES)]).sum(dim=0)
        order = counts.argsort()
        self._alive = order[counts[order] > 0]
        # Only the positions that are active on some sample are kept, rarest first.
        self.left, self.right = left / units[0], right[:, self._alive].div_(units[1])
        self.transposed = transposed
        self.groups, self.width = left.shape[2], len(self._alive)
        self.size = self.groups * self.num_positions
        panels = max(1, min(self._PANELS, self.width // self._MIN_PANEL))
        edges = [self.width * i // panels for i in range(panels + 1)]
        masks = [(a, b, (self.right[:, a:b] != 0).any(dim=1)) for a, b in pairwise(edges) if b > a]
        # From the first panel on that is non-zero on most samples, skipping samples costs more than it saves.
        rare = next((i for i, panel in enumerate(masks) if _share(panel[2]) > self._COMMON), len(masks))
        self._rare = masks[:rare]
        self._common = [(a, b) for a, b, _ in masks[rare:]]

    @classmethod
    def of_weight(cls, factors: LinearFactors) -> "OuterBlock":
        """Return the block of a Linear layer's weight."""
        n, r, o = factors.gradients.shape
        if o <= 4 * factors.inputs.shape[1]:
            return cls(factors.gradients, factors.inputs)
        # Few inputs and many outputs: group by input, which gives few and large tiles.
        inputs = factors.inputs.repeat_interleave(r, dim=0).unsqueeze(1)
        return cls(inputs, factors.gradients.reshape(n * r, o), transposed=True)

    @classmethod
    def of_bias(cls, factors: LinearFactors) -> "OuterBlock":
        """Return the block of a Linear layer's bias: one group."""
        gradients = factors.gradients.flatten(0, 1)
        return cls(gradients.new_ones(len(gradients), 1, 1), gradients)

    @classmethod
    def of_layer(cls, factors: LinearFactors) -> "OuterBlock":
        """Return the block of weight and bias together, the bias as the last column of the homogeneous weight."""
        ones = factors.inputs.new_ones(len(factors.inputs), 1)
        return cls(factors.gradients, torch.cat([factors.inputs, ones], dim=1))

    def _weights(self, o: int, p: int) -> Tensor:
        if self.left.shape[1] == 1:
            return self.left[:, 0, o] * self.left[:, 0, p]
        return (self.left[:, :, o] * self.left[:, :, p]).sum(dim=1)

    def unit(self) -> float:
        """Return the square of the product of the powers of two that the factors were divided by."""
        return self._unit

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        full = self.right.new_zeros(self.groups, self.num_positions)
        for left, right in self._samples():
            full[:, self._alive] += left.square().sum(dim=1).mT @ right.square()
        return (full.mT if self.transposed else full).reshape(-1)

    def total(self) -> float:
        """Return the signed sum of all entries."""
        return sum(
            float((left.double().sum(dim=2).square().sum(dim=1) * right.double().sum(dim=1).square()).sum())
            for left, right in self._samples()
        )

    def _samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the factors some samples at a time: a result for all samples at once would double the memory."""
        return zip(self.left.split(_SAMPLES), self.right.split(_SAMPLES), strict=True)

    def columns(self, index: Tensor) -> Tensor:
        """Return the entries of the rows for some parameters, ``(N R, k)``."""
        return torch.cat(list(self._columns(index)))

    def gram(self, index: Tensor) -> Tensor:
        """Return the entries between some parameters, ``(k, k)``."""
        total = self.right.new_zeros(len(index), len(index))
        for columns in self._columns(index):
            total.addmm_(columns.mT, columns)
        return total

    def _columns(self, index: Tensor) -> Iterator[Tensor]:
        if self.transposed:
            group, position = index % self.groups, index // self.groups
        else:
            group, position = index // self.num_positions, index % self.num_positions
        compact = torch.full((self.num_positions,), -1, device=index.device)
        compact[self._alive] = torch.arange(self.width, device=index.device)
        alive = compact[position] >= 0
        for left, right in self._samples():
            columns = left.new_zeros(left.shape[0], left.shape[1], len(index))
            columns[:, :, alive] = left[:, :, group[alive]] * right[:, compact[position[alive]]].unsqueeze(1)
            yield columns.flatten(0, 1)

    def operations(self) -> float:
        """Return the approximate number of operations of ``off_diagonal``."""
        active = (self.left != 0).any(dim=1).to(self.right.dtype)
        pairs = (active.mT @ active).triu().sum()
        parts = [(a, b, _share(mask)) for a, b, mask in self._rare] + [(a, b, 1.0) for a, b in self._common]
        return float(pairs) * sum(2.0 * (b - a) * (self.width - a) * share for a, b, share in parts)

    def off_diagonal(self, advance: Advance) -> OffDiagonal:
        """Sum over all tiles."""
        sums = OffDiagonal()
        share = 2 / (self.groups * (self.groups + 1))
        for o in range(self.groups):
            for p in range(o, self.groups):
                weights = self._weights(o, p)
                for a, b, x, kept in self._panels(weights):
                    tile = (x[:, : b - a] * kept.unsqueeze(1)).mT @ x
                    if o == p:
                        tile.diagonal().zero_()
                    twice = 1 if o == p else 2
                    sums.add(tile[:, : b - a], twice)
                    sums.add(tile[:, b - a :], 2 * twice)
                advance(share)
        return sums

    def _panels(self, weights: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield panels ``a:b``, the positions from ``a`` on of the samples that are active there, and their weights."""
        active = weights != 0
        for a, b, mask in self._rare:
            rows = (active & mask).nonzero().squeeze(1)
            yield a, b, self.right[:, a:].index_select(0, rows), weights[rows]
        if self._common:
            start = self._common[0][0]
            rows = active.nonzero().squeeze(1)
            x, kept = self.right[:, start:].index_select(0, rows), weights[rows]
            for a, b in self._common:
                yield a, b, x[:, a - start :], kept

    def gram_operations(self) -> float:
        """Return the approximate number of operations of ``square_sum``."""
        n, r, o = self.left.shape
        return float(n) ** 2 * (self.width + r**2 * o)

    def square_sum(self) -> float:
        """Return ``sum_nm (x_n . x_m)^2 sum_rs (g_nr . g_ms)^2``, a strip of samples at a time."""
        n, r, o = self.left.shape
        step = max(1, int(2e7 / (n * r * r)))
        total = 0.0
        for a in range(0, n, step):
            x = self.right[a : a + step] @ self.right[a:].mT
            g = self.left[a : a + step].reshape(-1, o) @ self.left[a:].reshape(-1, o).mT
            g = g.square_().view(x.shape[0], r, x.shape[1], r).sum(dim=(1, 3)) if r > 1 else g.square_()
            products = x.square_().mul_(g)
            # The square part of the strip counts once, the part to the right of it twice.
            total += 2 * float(products.sum(dtype=torch.float64))
            total -= float(products[:, : x.shape[0]].sum(dtype=torch.float64))
        return total

    def certain_zeros(self) -> float:
        """Return the fraction of entries whose two groups or two positions are never active on the same sample."""
        pairs = 1
        for factor in ((self.left != 0).any(dim=1), self.right != 0):
            active = factor.to(self.right.dtype)
            pairs *= int(torch.count_nonzero(active.mT @ active))
        return 1 - pairs / self.size**2

    def tile_forms(self, left: Tensor, right: Tensor) -> Iterator[Tensor]:
        """Yield ``u' T v`` of all tiles."""
        flat = self.left.flatten(0, 1)
        repeats = self.left.shape[1]
        for u, v in zip(left, right, strict=True):
            scale = (self.right @ u) * (self.right @ v)
            yield flat.mT @ (flat * scale.repeat_interleave(repeats).unsqueeze(1))

    def tile_bounds(self) -> Tensor:
        """Return ``sum |g_o| |g_p| |x|_1^2``."""
        flat = self.left.flatten(0, 1).abs()
        scale = self.right.abs().sum(dim=1).square().repeat_interleave(self.left.shape[1])
        return flat.mT @ (flat * scale.unsqueeze(1))

    def column_scales(self) -> Tensor:
        """Return the root mean square of the inputs at each position."""
        return self.right.square().mean(dim=0).sqrt()

    def strips(self, draws: Sequence[Draw]) -> Iterator[Tensor]:
        """Yield the sampled rows of tiles."""
        transposed = self.right.mT.contiguous()
        n = len(self.right)
        for o, p, positions in draws:
            weights = self._weights(o, p)
            active = weights.nonzero().squeeze(1)
            chosen = transposed.index_select(0, positions.to(transposed.device))
            if len(active) < 0.6 * n:
                yield (chosen.index_select(1, active) * weights[active]) @ self.right.index_select(0, active)
            else:
                yield (chosen * weights) @ self.right

    def strip_operations(self, draw: Draw) -> float:
        """Return the approximate number of operations of one strip."""
        return 2.0 * len(self.right) * len(draw.rows) * self.width


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
