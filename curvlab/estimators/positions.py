"""A Linear or convolution layer as one matrix ``(o, d)`` that is applied at ``T`` positions of each sample.

At position ``t`` of sample ``n`` the layer multiplies ``a_nt``: the input features, or the patch under the kernel, with
a one appended for the bias. With the gradient ``g_nt`` of the output at that position, the gradient of a sample is
``sum_t g_nt a_nt'``, and the Kronecker factors are second moments of ``a`` and of ``g``. The patches of a convolution
are formed only where they are small: unfolding takes the memory of ``k k`` images and is slower.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curvlab.estimators.capture import Call, split_calls, working_dtype
from curvlab.estimators.grams import add_gram_, add_squares_
from curvlab.estimators.layers import Layer, has_last_channels, is_transposed_convolution
from curvlab.estimators.padding import without_gradient

_BYTES = 8e6  # approximate limit of the per-sample gradients of a layer that are held at once: they fit in a cache
_SMALL_PATCH = 150  # below this number of entries, unfolding is faster for convolutions without blocks of channels
_LARGE_WEIGHT = 65_536  # from this number of entries on, unfolding is faster for any convolution
_PATCH_BYTES = 1.6e7  # approximate limit of the patches that are held at once for a moment


class LinearPositions:
    """Inputs of one call of a Linear layer.

    Args:
        layer: The layer.
        inputs: ``(N, ..., features)``: the dimensions in between are positions.
        padding: Positions that do not count as inputs unless they have a gradient, booleans ``(N, T)``.
    """

    padding: Tensor | None = None

    def __init__(self, layer: Layer, inputs: Tensor, padding: Tensor | None = None) -> None:
        self._set_rows(layer, inputs.flatten(1, -2) if inputs.ndim > 2 else inputs.unsqueeze(1))
        self.padding = padding

    def _set_rows(self, layer: Layer, rows: Tensor) -> None:
        ones = rows.new_ones(*rows.shape[:2], 1)
        parts = ([rows] if layer.weight else []) + ([ones] if layer.bias else [])
        self.rows = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]  # (N, T, d)
        self.count, self.dtype = self.rows.shape[1], self.rows.dtype

    @property
    def has_padding(self) -> bool:
        """Whether means over positions may leave some out, which depends on the gradients of all rows."""
        return self.padding is not None

    def note(self, gradient: Tensor) -> None:
        """Take a row of the gradient into account: padding that has a gradient counts."""
        if self.padding is not None:
            self.padding = without_gradient(self.padding, self.gradient_rows(gradient))

    def counts(self) -> Tensor:
        """Return the number of positions that count, ``(N,)``; only with padding."""
        assert self.padding is not None
        return (~self.padding).sum(dim=1)

    def _shares(self, weights: Tensor | None = None) -> Tensor:
        """Return the weight of each position in a mean, multiplied by weights of the samples, ``(N, T)``."""
        assert self.padding is not None
        each = (1 if weights is None else weights) / self.counts().clamp(min=1).to(self.dtype)
        return ~self.padding * each.unsqueeze(1)

    def add_moment_(self, total: Tensor, weights: Tensor | None = None) -> None:
        """Add ``sum_n w_n / T sum_t a_nt a_nt'`` to the upper triangle of a ``(d, d)``."""
        if self.padding is None:
            rows = self.rows if weights is None else self.rows * weights.sqrt().view(-1, 1, 1)
            add_gram_(total, rows.flatten(0, 1), 1 / self.count)
        else:
            add_gram_(total, (self.rows * self._shares(weights).sqrt().unsqueeze(2)).flatten(0, 1))

    def means(self) -> Tensor:
        """Return the mean over positions, ``(N, d)``."""
        if self.padding is None:
            return self.rows.mean(dim=1)
        return torch.einsum("nt,ntd->nd", self._shares(), self.rows)

    def squared_norms(self) -> Tensor:
        """Return the mean over positions of ``|a_nt|^2``, ``(N,)``."""
        if self.padding is None:
            return self.rows.square().sum(dim=(1, 2)) / self.count
        return (self.rows.square().sum(dim=2) * self._shares()).sum(dim=1)

    def add_gradient_moment_(self, total: Tensor, gradient: Tensor, weights: Tensor | None = None) -> None:
        """Add ``sum_n w_n sum_t g_nt g_nt'``, of the output's gradient, to the upper triangle of an ``(o, o)``."""
        rows = self.gradient_rows(gradient)
        rows = rows if weights is None else rows * weights.sqrt().view(-1, 1, 1)
        add_gram_(total, rows.flatten(0, 1))

    def input_rows(self) -> Tensor:
        """Return ``a_nt``, ``(N, T, d)``."""
        return self.rows

    def gradient_norms(self, gradient: Tensor) -> Tensor:
        """Return ``sum_t |g_nt|^2``, ``(N,)``."""
        return self.gradient_rows(gradient).square().sum(dim=(1, 2))

    def gradient_sums(self, gradient: Tensor) -> Tensor:
        """Return the sum over positions of the gradient of the outputs, ``(N, o)``."""
        return self.gradient_rows(gradient).sum(dim=1)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Return ``g_nt``, ``(N, T, o)``."""
        return gradient.flatten(1, -2) if gradient.ndim > 2 else gradient.unsqueeze(1)

    def squared_gradients(self, gradient: Tensor) -> float:
        """Return ``sum_n |sum_t g_nt a_nt'|^2``."""
        if self.count == 1:
            return float(self.squared_norms() @ self.gradient_norms(gradient))
        return _total(self.sample_gradients(gradient))

    def add_squares_(self, total: Tensor, gradient: Tensor) -> None:
        """Add ``sum_n (sum_t g_nt a_nt')^2``, the squares of the entries, to an ``(o, d)``."""
        add_squares_(total, self.gradient_rows(gradient), self.input_rows())

    def sample_gradients(self, gradient: Tensor) -> Iterator[Tensor]:
        """Yield ``sum_t g_nt a_nt'``, ``(n, o, d)``, some samples at a time."""
        rows = self.gradient_rows(gradient)
        step = _step(rows.shape[2] * self.rows.shape[2], gradient)
        for g, a in zip(rows.split(step), self.rows.split(step), strict=True):
            yield g.mT @ a


class EmbeddingPositions(LinearPositions):
    """Inputs of the calls of an embedding: ``a_nt`` is the unit vector of an index, zero for the padding index.

    Moments of the inputs are diagonal; they are sums over the counts of the indices, without a matrix of the size of
    the vocabulary.

    Args:
        layer: The layer.
        inputs: Indices ``(N, ...)``, one tensor per call; the uses are further positions.
        padding: As for ``LinearPositions``, one per call.
    """

    def __init__(self, layer: Layer, inputs: Sequence[Tensor], padding: Sequence[Tensor | None] = ()) -> None:
        module: Any = layer.module
        self.indices = torch.cat([x.reshape(len(x), -1) for x in inputs], dim=1).long()  # (N, T)
        self.used = self.indices != (-1 if module.padding_idx is None else module.padding_idx)
        self.vocabulary, self.count = len(module.weight), self.indices.shape[1]
        self.dtype = working_dtype(module.weight.dtype)
        if any(mask is not None for mask in padding):
            pairs = zip(inputs, padding, strict=True)
            masks = [
                mask if mask is not None else torch.zeros_like(x, dtype=torch.bool).flatten(1) for x, mask in pairs
            ]
            self.padding = torch.cat(masks, dim=1)

    def add_moment_(self, total: Tensor, weights: Tensor | None = None) -> None:
        """Add ``sum_n w_n / T sum_t a_nt a_nt'`` to its diagonal ``(d,)``."""
        used = self.used.to(total)
        shares = used / self.count if self.padding is None else used * self._shares()
        shares = shares if weights is None else shares * weights.to(total).unsqueeze(1)
        total.index_add_(0, self.indices.flatten(), shares.flatten())

    def squared_norms(self) -> Tensor:
        """Return the mean over positions of ``|a_nt|^2``, ``(N,)``."""
        if self.padding is None:
            return self.used.to(self.dtype).mean(dim=1)
        return (self.used * self._shares()).sum(dim=1)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Return ``g_nt``, ``(N, T, o)``."""
        return gradient.reshape(len(gradient), self.count, -1)

    @cached_property
    def _groups(self) -> tuple[Tensor, Tensor]:
        """The pairs of a sample and an index, and the number of the pair of each position, flat."""
        samples = torch.arange(len(self.indices), device=self.indices.device).unsqueeze(1)
        pairs, number = torch.unique(samples * self.vocabulary + self.indices, return_inverse=True)
        return pairs, number

    def index_sums(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nonzero columns of ``sum_t g_nt a_nt'``, ``(pairs, o)``, and their indices ``(pairs,)``."""
        rows = self.gradient_rows(gradient)
        pairs, number = self._groups
        sums = rows.new_zeros(len(pairs), rows.shape[2])
        sums.index_add_(0, number.flatten(), (rows * self.used.unsqueeze(2)).flatten(0, 1))
        return sums, pairs % self.vocabulary

    def squared_gradients(self, gradient: Tensor) -> float:
        """Return ``sum_n |sum_t g_nt a_nt'|^2``."""
        return float(self.index_sums(gradient)[0].square().sum())


class TransposedConvPositions(LinearPositions):
    """Inputs of one call of a transposed convolution, or of a group of it.

    It is a convolution with a stride of one and the mirrored kernel, of the image with zeros between its entries.

    Args:
        layer: The layer.
        inputs: ``(N, channels, ...)``, of the group.
    """

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        module: Any = layer.module
        images, sizes = inputs, []
        pads: list[int] = []  # last dimension first; negative ones crop
        geometry = (module.kernel_size, module.stride, module.dilation, module.padding, module.output_padding)
        for dim, (size, (k, s, d, p, extra)) in enumerate(
            zip(inputs.shape[2:], zip(*geometry, strict=True), strict=True), start=2
        ):
            spread = (size - 1) * s + 1
            zeros = images.new_zeros(*images.shape[:dim], spread, *images.shape[dim + 1 :])
            images = zeros.index_copy(dim, torch.arange(0, spread, s, device=inputs.device), images)
            sizes.append(spread + d * (k - 1) + extra - 2 * p)
            pads = [d * (k - 1) - p, sizes[-1] - 1 + p - (spread - 1), *pads]
        images = F.pad(images, pads)
        seen = []
        for offset in product(*map(range, module.kernel_size)):
            index: list[slice] = [slice(None), slice(None)]
            for k, o, d, size in zip(module.kernel_size, offset, module.dilation, sizes, strict=True):
                index.append(slice((k - 1 - o) * d, (k - 1 - o) * d + size))
            seen.append(images[tuple(index)])
        self._set_rows(layer, torch.stack(seen, dim=2).flatten(1, 2).flatten(2).mT)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Return ``g_nt``, ``(N, T, o)``."""
        return gradient.flatten(2).mT


class ConvPositions:
    """Inputs of one call of a convolution, or of a group of it.

    Args:
        layer: The layer.
        inputs: ``(N, channels, ...)``, of the group.
    """

    has_padding = False  # its positions are those under a kernel

    def note(self, gradient: Tensor) -> None:
        """Do nothing: see ``LinearPositions``."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        self.layer = layer
        module: Any = layer.module
        self.kernel: tuple[int, ...] = module.kernel_size
        self.stride: tuple[int, ...] = module.stride
        self.dilation: tuple[int, ...] = module.dilation
        self.inputs = inputs
        # The padding that the module itself uses, last dimension first, for any padding and mode.
        self.pads: list[int] = module._reversed_padding_repeated_twice
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = [size + sum(self._padding(i)) for i, size in enumerate(inputs.shape[2:])]
        self.spatial = tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        )
        self.count = prod(self.spatial)

    def _padding(self, dimension: int) -> list[int]:
        """Return the padding before and after a spatial dimension."""
        end = len(self.pads) - 2 * dimension
        return self.pads[end - 2 : end]

    @cached_property
    def images(self) -> Tensor:
        """The inputs, padded."""
        return F.pad(self.inputs, self.pads, mode=self.mode) if any(self.pads) else self.inputs

    @property
    def _channels(self) -> int:
        return self.inputs.shape[1]

    def add_moment_(self, total: Tensor, weights: Tensor | None = None) -> None:
        """Add ``sum_n w_n / T sum_t a_nt a_nt'`` to the upper triangle of a ``(d, d)``.

        The patches of some samples at a time are formed: correlations of the images need no patches, but PyTorch takes
        1.2 to 4 times as long for them.
        """
        size = len(total) - bool(self.layer.bias)
        if self.layer.bias:
            total[-1, -1] += len(self.inputs) if weights is None else weights.sum()
        if not self.layer.weight:
            return
        step = max(1, int(_PATCH_BYTES / (size * self.count * self.inputs.element_size())))
        for start in range(0, len(self.images), step):
            images, roots = self.images[start : start + step], None
            if weights is not None:
                roots = weights[start : start + step].sqrt()
                images = images * roots.view(-1, *[1] * (images.ndim - 1))
            columns = self._columns(images)
            add_gram_(total[:size, :size], columns.mT, 1 / self.count)
            if self.layer.bias:
                sums = columns.sum(dim=1) if roots is None else columns @ roots.repeat_interleave(self.count)
                total[:size, -1].add_(sums, alpha=1 / self.count)

    def _columns(self, images: Tensor) -> Tensor:
        """Return the patches of padded images as columns, ``(d, N T)``, without the one for the bias."""
        channels_first = images.transpose(0, 1).contiguous()
        seen = [self._at_offset(channels_first, offset) for offset in product(*map(range, self.kernel))]
        return torch.stack(seen, dim=1).flatten(2).flatten(0, 1)

    def _at_offset(self, images: Tensor, offset: tuple[int, ...]) -> Tensor:
        """Return the part of the images at one offset of the kernel, ``(N, channels, ...)``."""
        index: list[slice] = [slice(None), slice(None)]
        for o, size, s, d in zip(offset, self.spatial, self.stride, self.dilation, strict=True):
            index.append(slice(o * d, o * d + s * (size - 1) + 1, s))
        return images[tuple(index)]

    @cached_property
    def _patches(self) -> Tensor:
        """The patches under the kernel, ``(N, d, T)``, without the one for the bias."""
        seen = [self._at_offset(self.images, offset) for offset in product(*map(range, self.kernel))]
        return torch.stack(seen, dim=2).flatten(1, 2).flatten(2)

    def _weight_gradient(
        self,
        images: Tensor,
        gradient: Tensor,
        padding: Sequence[int] | None = None,
        groups: int = 1,
    ) -> Tensor:
        weight = images.new_empty(gradient.shape[1], images.shape[1] // groups, *self.kernel)
        none = [0] * len(self.kernel)
        pads = none if padding is None else list(padding)
        answer: Tensor = torch.ops.aten.convolution_backward(
            gradient, images, weight, None, self.stride, pads, self.dilation, False, none, groups, [False, True, False]
        )[1]
        return answer

    def _unfolds(self, outputs: int) -> bool:
        """Return whether the gradients are faster from the patches than by a convolution in groups.

        This depends on shapes alone, so that results do not depend on the load of the machine. For a kernel with one
        entry, the patches are the images. oneDNN convolves in blocks of eight channels in float32, at the speed of a
        matrix product; without such blocks it unfolds sample by sample, which is as fast as our unfolding for large
        patches only. In three dimensions, and in float64, our unfolding is slower (``benchmarks/convolutions.py``).
        """
        entries = self._channels * prod(self.kernel)
        if prod(self.kernel) == 1:
            return True
        if outputs * entries >= _LARGE_WEIGHT:
            return True
        blocks = self._channels % 8 == 0 and outputs % 8 == 0
        small = entries < _SMALL_PATCH and len(self.kernel) < 3
        return small and not blocks and self.inputs.dtype == torch.float32

    def means(self) -> Tensor:
        """Return the mean over positions, ``(N, d)``."""
        n = len(self.images)
        ones = self.images.new_ones(n, 1)
        if not self.layer.weight:
            return ones
        dims = tuple(range(2, self.images.ndim))
        seen = [self._at_offset(self.images, o).mean(dim=dims) for o in product(*map(range, self.kernel))]
        means = torch.stack(seen, dim=2).flatten(1)
        return torch.cat([means, ones], dim=1) if self.layer.bias else means

    def squared_norms(self) -> Tensor:
        """Return the mean over positions of ``|a_nt|^2``, ``(N,)``."""
        total = self.images.new_full((len(self.images),), float(self.count if self.layer.bias else 0))
        if self.layer.weight:
            energy = self.images.square().sum(dim=1, keepdim=True)
            for offset in product(*map(range, self.kernel)):
                total += self._at_offset(energy, offset).flatten(1).sum(dim=1)
        mean: Tensor = total / self.count
        return mean

    def add_gradient_moment_(self, total: Tensor, gradient: Tensor, weights: Tensor | None = None) -> None:
        """Add ``sum_n w_n sum_t g_nt g_nt'``, of the output's gradient, to the upper triangle of an ``(o, o)``."""
        rows = gradient.flatten(2)
        if weights is not None:
            rows = rows * weights.sqrt().view(-1, 1, 1)
        if rows.shape[1] > rows.shape[2]:  # one moment per sample would take more memory than the gradients
            add_gram_(total, rows.mT.flatten(0, 1))
        else:
            total += (rows @ rows.mT).sum(dim=0)

    def input_rows(self) -> Tensor:
        """Return ``a_nt``, ``(N, T, d)``: the patches, which take the memory of one image for each kernel entry."""
        ones = self.inputs.new_ones(len(self.inputs), self.count, 1)
        parts = ([self._patches.mT] if self.layer.weight else []) + ([ones] if self.layer.bias else [])
        return torch.cat(parts, dim=2)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Return ``g_nt``, ``(N, T, o)``."""
        return gradient.flatten(2).mT

    def gradient_norms(self, gradient: Tensor) -> Tensor:
        """Return ``sum_t |g_nt|^2``, ``(N,)``."""
        return gradient.flatten(1).square().sum(dim=1)

    def gradient_sums(self, gradient: Tensor) -> Tensor:
        """Return the sum over positions of the gradient of the outputs, ``(N, o)``."""
        return gradient.flatten(2).sum(dim=2)

    def squared_gradients(self, gradient: Tensor) -> float:
        """Return ``sum_n |sum_t g_nt a_nt'|^2``."""
        return _total(self.sample_gradients(gradient))

    def add_squares_(self, total: Tensor, gradient: Tensor) -> None:
        """Add ``sum_n (sum_t g_nt a_nt')^2``, the squares of the entries, to an ``(o, d)``."""
        if self.layer.bias or not self._unfolds(gradient.shape[1]):
            for rows in self.sample_gradients(gradient):
                total += rows.square_().sum(dim=0)
        else:
            add_squares_(total, self.gradient_rows(gradient), self._patches.mT)

    def sample_gradients(self, gradient: Tensor) -> Iterator[Tensor]:
        """Yield ``sum_t g_nt a_nt'``, ``(n, o, d)``, some samples at a time."""
        outputs = gradient.shape[1]
        if not self.layer.weight:
            yield gradient.flatten(2).sum(dim=2, keepdim=True)
            return
        step = _step(outputs * self._channels * prod(self.kernel), gradient)
        unfolds = self._unfolds(outputs)
        # The convolution pads by itself, without a copy, if it can: with equally many zeros before and after.
        before, after = zip(*map(self._padding, range(len(self.kernel))), strict=True)
        pads_itself = self.mode == "constant" and before == after
        given = self._patches if unfolds else self.inputs if pads_itself else self.images
        for g, some in zip(gradient.split(step), given.split(step), strict=True):
            if unfolds:
                weight_gradient = g.flatten(2) @ some.mT
            else:
                n = len(g)
                # As a convolution with n groups, one for each sample.
                weight_gradient = self._weight_gradient(
                    some.reshape(1, -1, *some.shape[2:]),
                    g.reshape(1, -1, *g.shape[2:]),
                    padding=before if pads_itself else None,
                    groups=n,
                ).reshape(n, outputs, -1)
            if self.layer.bias:
                weight_gradient = torch.cat([weight_gradient, g.flatten(2).sum(dim=2, keepdim=True)], dim=2)
            yield weight_gradient


class JoinedPositions:
    """Inputs of several calls of a layer: its uses are further positions (Eschenhagen et al. 2023).

    The gradient of the outputs is joined (see ``curvlab.estimators.capture.join_calls``).

    Args:
        parts: Positions of the calls.
        calls: The calls.
    """

    def __init__(self, parts: Sequence[LinearPositions | ConvPositions], calls: Sequence[Call]) -> None:
        self.parts, self.calls = parts, calls
        self.count = sum(part.count for part in parts)

    def _pairs(self, gradient: Tensor) -> Iterator[tuple[LinearPositions | ConvPositions, Tensor]]:
        return zip(self.parts, split_calls(gradient, self.calls), strict=True)

    @property
    def has_padding(self) -> bool:
        """Whether a call has padding."""
        return any(part.has_padding for part in self.parts)

    def note(self, gradient: Tensor) -> None:
        """Take a row of the gradient into account: see ``LinearPositions``."""
        for part, slope in self._pairs(gradient):
            part.note(slope)

    def _shares(self, like: Tensor) -> list[Tensor]:
        """Return the shares of the calls in a mean over the positions of all, ``(N,)`` each; only with padding."""
        full = torch.ones(self.calls[0].shape[0], device=like.device)
        counts = [
            part.counts() if isinstance(part, LinearPositions) and part.has_padding else full * part.count
            for part in self.parts
        ]
        total = torch.stack(counts).sum(dim=0).clamp(min=1)
        return [count.to(like) / total for count in counts]

    def _mean(self, values: list[Tensor]) -> Tensor:
        """Return the mean of means over the positions of the calls, ``(N, ...)``."""
        shares = [part.count / self.count for part in self.parts]
        if self.has_padding:
            shares = [share.view(-1, *[1] * (values[0].ndim - 1)) for share in self._shares(values[0])]
        return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(dim=0)

    def add_moment_(self, total: Tensor, weights: Tensor | None = None) -> None:
        """Add ``sum_n w_n / T sum_t a_nt a_nt'`` to the upper triangle of a ``(d, d)``."""
        if self.has_padding:
            for part, share in zip(self.parts, self._shares(total), strict=True):
                part.add_moment_(total, share if weights is None else share * weights)
            return
        for part in self.parts:
            moment = torch.zeros_like(total)
            part.add_moment_(moment, weights)
            total.add_(moment, alpha=part.count / self.count)

    def means(self) -> Tensor:
        """Return the mean over positions, ``(N, d)``."""
        return self._mean([part.means() for part in self.parts])

    def squared_norms(self) -> Tensor:
        """Return the mean over positions of ``|a_nt|^2``, ``(N,)``."""
        return self._mean([part.squared_norms() for part in self.parts])

    def add_gradient_moment_(self, total: Tensor, gradient: Tensor, weights: Tensor | None = None) -> None:
        """Add ``sum_n w_n sum_t g_nt g_nt'``, of the output's gradient, to the upper triangle of an ``(o, o)``."""
        for part, slope in self._pairs(gradient):
            part.add_gradient_moment_(total, slope, weights)

    def input_rows(self) -> Tensor:
        """Return ``a_nt``, ``(N, T, d)``."""
        return torch.cat([part.input_rows() for part in self.parts], dim=1)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Return ``g_nt``, ``(N, T, o)``."""
        return torch.cat([part.gradient_rows(slope) for part, slope in self._pairs(gradient)], dim=1)

    def gradient_norms(self, gradient: Tensor) -> Tensor:
        """Return ``sum_t |g_nt|^2``, ``(N,)``."""
        return torch.stack([part.gradient_norms(slope) for part, slope in self._pairs(gradient)]).sum(dim=0)

    def gradient_sums(self, gradient: Tensor) -> Tensor:
        """Return the sum over positions of the gradient of the outputs, ``(N, o)``."""
        return torch.stack([part.gradient_sums(slope) for part, slope in self._pairs(gradient)]).sum(dim=0)

    def squared_gradients(self, gradient: Tensor) -> float:
        """Return ``sum_n |sum_t g_nt a_nt'|^2``."""
        return _total(self.sample_gradients(gradient))

    def sample_gradients(self, gradient: Tensor) -> Iterator[Tensor]:
        """Yield ``sum_t g_nt a_nt'``, ``(n, o, d)``, some samples at a time."""
        parts = [part.sample_gradients(slope) for part, slope in self._pairs(gradient)]
        for some in zip(*parts, strict=True):  # the calls of one layer yield the same samples
            yield reduce(torch.add, some)


class ReducedPositions(LinearPositions):
    """A layer reduced to one position: the mean of its inputs and the sum of its gradients (K-FAC-reduce)."""

    def __init__(self, whole: LinearPositions | ConvPositions | JoinedPositions) -> None:
        self.whole, self.count = whole, 1

    @cached_property
    def rows(self) -> Tensor:  # type: ignore[override]
        """The means, ``(N, 1, d)``; with padding, after all gradients are known."""
        return self.whole.means().unsqueeze(1)

    @property
    def has_padding(self) -> bool:
        """Whether the layer has padding."""
        return self.whole.has_padding

    def note(self, gradient: Tensor) -> None:
        """Take a row of the gradient into account."""
        self.whole.note(gradient)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients, ``(N, 1, o)``."""
        return self.whole.gradient_sums(gradient).unsqueeze(1)

    def squared_gradients(self, gradient: Tensor) -> float:
        """Return ``sum_n |sum_t g_nt a_nt'|^2`` of the gradients without reduction."""
        return self.whole.squared_gradients(gradient)

    def sample_gradients(self, gradient: Tensor) -> Iterator[Tensor]:
        """Yield the gradients without reduction."""
        return self.whole.sample_gradients(gradient)


Positions = LinearPositions | ConvPositions | JoinedPositions


def call_positions(layer: Layer, inputs: Tensor, padding: Tensor | None = None) -> LinearPositions | ConvPositions:
    """Return the positions of one call of a layer."""
    if layer.is_embedding:
        return EmbeddingPositions(layer, [inputs], [padding])
    if is_transposed_convolution(layer.module):
        return TransposedConvPositions(layer, inputs)
    if has_last_channels(layer.module):
        return LinearPositions(layer, inputs, padding)
    return ConvPositions(layer, inputs)


def positions(layer: Layer, calls: Sequence[Call], leave_out: bool = False) -> Positions:
    """Return the positions of all calls of a layer; their inputs are tensors.

    Args:
        layer: The layer.
        calls: The calls.
        leave_out: Whether means leave out padding (see ``curvlab.estimators.padding``). All gradients must then be
            given to ``note`` first.
    """
    pairs = [(call.inputs, call.padding if leave_out else None) for call in calls if call.inputs is not None]
    if layer.is_embedding:
        return EmbeddingPositions(layer, *zip(*pairs, strict=True))
    parts = [call_positions(layer, inputs, padding) for inputs, padding in pairs]
    return parts[0] if len(parts) == 1 else JoinedPositions(parts, calls)


def _total(rows: Iterator[Tensor]) -> float:
    return sum(float(some.square_().sum()) for some in rows)


def _step(entries: int, like: Tensor) -> int:
    return max(1, int(_BYTES / (entries * like.element_size())))
