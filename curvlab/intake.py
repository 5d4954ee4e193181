"""The data of a problem: what has their form, passes over them, and a few samples from several places."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.randomness import random_state, with_own_randomness

Batch = tuple[Tensor, Tensor]

_BATCH_SIZE = 500


class BatchSource(Protocol):
    """Data that can be gone through more than once: a DataLoader or a list of batches."""

    def __iter__(self) -> Iterator[Any]:
        """Start from the first batch."""


class Intake:
    """Data that are gone through any number of times.

    Args:
        data: A DataLoader or list of ``(inputs, targets)`` batches, or one pair of tensors.

    Raises:
        CurvlabError: The data have another form, or can be read only once.
    """

    def __init__(self, data: BatchSource | Batch) -> None:
        if _is_pair(data):
            if len(data[0]) != len(data[1]):
                raise CurvlabError(f"the data have {len(data[0])} inputs but {len(data[1])} targets")
        elif not isinstance(data, Iterable):
            raise CurvlabError(
                f"data is a DataLoader, a list of batches or a pair of tensors, not {type(data).__name__}"
            )
        elif isinstance(data, Iterator):
            raise CurvlabError("the data can be gone through only once: give a DataLoader or a list of batches")
        self._data = data
        self._start = random_state(None if _is_pair(data) else data)  # that every pass starts from
        self._first: _Record | None = None

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Go through the data once, in batches of a size or, without one, in their own.

        Raises:
            CurvlabError: There are no samples, a batch is not a pair, or an input is not finite.
        """
        return _regroup(self._pass(size or _BATCH_SIZE), size)

    def count(self) -> int:
        """Return the number of samples, by a pass over the data if need be."""
        return len(self._data[0]) if _is_pair(self._data) else self.first().count

    def first(self) -> "_Record":
        """Return what the first whole pass has shown; without one so far, go through the data."""
        if self._first is None:
            for _ in self._pass(_BATCH_SIZE):
                pass
        assert self._first is not None
        return self._first

    def _pass(self, pair_batch_size: int) -> Iterator[Batch]:
        record = _Record()
        for inputs, targets in self._own_batches(pair_batch_size):
            for tensor in (inputs, targets):
                if tensor.is_floating_point() and not is_finite(tensor):
                    raise CurvlabError("the data hold NaN or infinite values")
            record.add(inputs, targets)
            yield inputs, targets
        if not record.count:
            raise CurvlabError("the data have no samples")
        if self._first is None:
            self._first = record

    def _own_batches(self, pair_batch_size: int) -> Iterator[Batch]:
        if _is_pair(self._data):
            if not len(self._data[0]):
                return
            inputs, targets = self._data
            yield from zip(torch.split(inputs, pair_batch_size), torch.split(targets, pair_batch_size), strict=True)
            return
        # A list holds its batches; anything else may draw them.
        held = isinstance(self._data, (list, tuple))
        for index, batch in enumerate(self._data if held else with_own_randomness(self._data, self._start)):
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
                raise CurvlabError(f"batch {index} of the data is not a pair of tensors (inputs, targets)")
            if len(batch[0]) != len(batch[1]):
                raise CurvlabError(f"batch {index} has {len(batch[0])} inputs but {len(batch[1])} targets")
            if len(batch[0]):
                yield batch[0], batch[1]


class _Record:
    """What a pass shows: how many samples there are, and a few of them.

    The length is known only at the end. So the samples at every power of two are kept, of which one is near the middle.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kept: dict[int, Batch] = {}
        self._last: dict[int, Batch] = {}

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        end = self.count + len(inputs)
        powers = [1 << k for k in range(end.bit_length())]

        def take(indices: Iterable[int]) -> dict[int, Batch]:
            # Copies, which do not keep the whole batch.
            rows = {i: slice(i - self.count, i - self.count + 1) for i in indices if self.count <= i < end}
            return {i: (inputs[row].clone(), targets[row].clone()) for i, row in rows.items()}

        self._kept |= take((0, *powers, *(power + 1 for power in powers)))
        self._last = {i: b for i, b in self._last.items() if i >= end - 2} | take((end - 2, end - 1))
        self.count = end

    def probe(self) -> list[Batch]:
        """Return two samples from the beginning, two from about the middle and two from the end, grouped by shape."""
        n = self.count
        middle = min((1 << k for k in range(1, n.bit_length())), key=lambda i: abs(2 * i - n + 1), default=0)
        kept = self._kept | self._last
        groups: dict[object, list[Batch]] = {}
        for index in sorted({0, 1, middle, middle + 1, n - 2, n - 1} & kept.keys()):
            x, y = kept[index]
            groups.setdefault((x.shape, x.dtype, y.shape, y.dtype), []).append((x, y))
        return [(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])) for group in groups.values()]


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite."""
    # A sum is quicker than a mask, and is not finite where an entry is not; it may overflow where all are.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _is_pair(data: BatchSource | Batch) -> TypeGuard[Batch]:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)


def _regroup(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """Yield the same samples in the same order in batches of exactly ``size``, but for the last."""
    if size is None:
        yield from batches
        return
    held: list[Batch] = []
    count = 0
    for inputs, targets in batches:
        while len(inputs):
            take = size - count
            held.append((inputs[:take], targets[:take]))
            count += len(held[-1][0])
            inputs, targets = inputs[take:], targets[take:]
            if count == size:
                yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
                held, count = [], 0
    if held:
        yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
