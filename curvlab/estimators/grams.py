"""Sums of products over samples and positions, in pieces that fit into a cache and are never written to memory."""

import torch
from torch import Tensor

_CACHE = 2e6  # bytes of a piece: with its operands, it stays in the cache of a core
_LARGE = 6.4e7  # bytes of a piece on an accelerator, which is idle in small ones
_FEW_POSITIONS = 5  # up to this number, products of pairs of positions are faster than one product per sample
_PANELS, _PANEL = 12, 128  # number of panels at most, and their columns at least
_TILE = 64  # rows that are mirrored at once


def add_gram_(total: Tensor, rows: Tensor, factor: float = 1.0) -> None:
    """Add ``factor rows' rows`` to the upper triangle of ``total``, in panels: from 13/24 of the cost of the product.

    Args:
        total: ``(d, d)``.
        rows: ``(n, d)``.
        factor: Factor of the products.
    """
    size = rows.shape[1]
    panels = min(_PANELS, size // _PANEL)
    if panels < 2:  # the product itself is not the main cost
        total.addmm_(rows.mT, rows, alpha=factor)
        return
    ends = [size * (i + 1) // panels for i in range(panels)]
    for start, end in zip([0, *ends], ends, strict=False):
        total[:end, start:end].addmm_(rows[:, :end].mT, rows[:, start:end], alpha=factor)


def mirror_(total: Tensor) -> Tensor:
    """Copy the upper triangle of ``total`` onto the lower one; a diagonal ``(d,)`` stays."""
    if total.ndim == 1:
        return total
    for start in range(0, len(total), _TILE):
        part, after = slice(start, start + _TILE), slice(start + _TILE, None)
        corner = total[part, part]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        total[after, part] = total[part, after].mT
    return total


def add_squares_(total: Tensor, gradients: Tensor, inputs: Tensor) -> None:
    """Add ``sum_n (sum_t g_nt a_nt')^2``, the squares of the entries, to ``total``.

    The square of a sum over few positions is a sum over pairs of positions, ``2 (g_t g_s) (a_t a_s)'``: one product
    over all samples. With more positions, the gradients of samples are formed in pieces, and squared there.

    Args:
        total: ``(o, d)``.
        gradients: ``g``, ``(N, T, o)``.
        inputs: ``a``, ``(N, T, d)``.
    """
    positions = gradients.shape[1]
    if positions <= _FEW_POSITIONS:
        for first in range(positions):
            left = gradients[:, first:] * gradients[:, first : first + 1]
            right = inputs[:, first:] * inputs[:, first : first + 1]
            left[:, 1:] *= 2
            total.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1))
        total.clamp_(min=0)  # rounding, where the positions of all samples cancel
        return
    size = (_CACHE if total.device.type == "cpu" else _LARGE) / total.element_size()
    samples = int(size // total.numel())
    if samples > 1:
        for g, a in zip(gradients.split(samples), inputs.split(samples), strict=True):
            total += torch.bmm(g.mT, a).square_().sum(dim=0)
        return
    pieces = -(-total.numel() // max(1, int(size)))
    outputs = -(-len(total) // min(pieces, len(total)))
    for g, a in zip(gradients.mT, inputs, strict=True):
        for part, some in zip(total.split(outputs), g.split(outputs), strict=True):
            product = some @ a
            part.addcmul_(product, product)
