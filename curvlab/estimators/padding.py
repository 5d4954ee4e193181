"""Padding of sequences: positions that do not count as inputs of a layer.

If a batch has an ``attention_mask`` ``(N, T)``, as those of Hugging Face have, a layer on ``(N, T, ...)`` is applied at
positions that hold no token. They have no gradient, but they would change the mean over positions in the Kronecker
factor ``A``, so that more padding would give other factors. A position is left out of this mean if the mask is zero
there *and* the gradient of the layer's output is: in a model that averages over all positions, padding counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlab.batches import Batch, Inputs
from curvlab.estimators.layers import Layer, has_last_channels


def find_padding(inputs: Inputs) -> list[Tensor]:
    """Return where the attention masks of a batch are zero, booleans ``(N, T)``; none if all positions hold tokens."""
    if not isinstance(inputs, Batch):
        return []
    named = zip(inputs.names, inputs.tensors, strict=True)
    masks = [mask == 0 for name, mask in named if "attention_mask" in name and mask.ndim == 2]
    return masks if any(bool(mask.any()) for mask in masks) else []


def padding_of(masks: Sequence[Tensor], layer: Layer, output: Tensor) -> Tensor | None:
    """Return the padding among the positions of a call, ``(N, positions)``; None if no mask fits its output."""
    if output.ndim < 3 or not has_last_channels(layer.module):
        return None
    for mask in masks:
        if mask.shape == output.shape[:2]:
            repeated = mask.view(*mask.shape, *[1] * (output.ndim - 3)).expand(output.shape[:-1])
            return repeated.flatten(1)
    return None


def without_gradient(padding: Tensor, slopes: Tensor) -> Tensor:
    """Return the positions of the padding, ``(..., positions)``, whose gradients ``(..., positions, o)`` are zero."""
    return padding & ~torch.any(slopes != 0, dim=-1)
