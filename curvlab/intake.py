"""The data of a problem: checks of their form, repeated passes, and a few samples for verification."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from curvlab.errors import CurvlabError, type_and_line
from curvlab.randomness import generator_holders, iterate_with_own_randomness, save_random_state

Pair = tuple[Tensor, Tensor]

_BATCH_SIZE = 500
_ANEW = "several passes are needed, and all must give the same samples in the same order"

_AS_TENSORS = "; give [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in data]"


class BatchSource(Protocol):
    """Data that can be iterated more than once: a DataLoader or a list of batches."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate from the first batch."""


class RepeatableData:
    """Data that can be iterated any number of times and are checked to be the same every time.

    Args:
        data: A DataLoader or list of ``(inputs, targets)`` batches, or one pair of tensors.

    Raises:
        CurvlabError: The data have another form, or can be iterated only once.
    """

    def __init__(self, data: BatchSource | Pair) -> None:
        if _is_pair(data):
            _check_pair(data, "the data", "the data have")
        elif _is_pair_of_arrays(data):
            raise CurvlabError(
                f"the data are {_describe(data)}: give tensors, (torch.as_tensor(inputs), torch.as_tensor(targets))"
            )
        elif not isinstance(data, Iterable):
            raise CurvlabError(
                f"data must be a DataLoader, a list of batches or a pair of tensors, not {type(data).__name__}"
            )
        elif isinstance(data, Iterator):
            raise CurvlabError("the data can be iterated only once: give a DataLoader or a list of batches")
        self._data = data
        self._start = save_random_state(generator_holders(data))  # the state from which every pass starts
        self._first: _Record | None = None

    def batches(self, size: int | None = None) -> Iterator[Pair]:
        """Iterate the data once, in batches of the given size, or in their own batches.

        Raises:
            CurvlabError: There are no samples, a batch is not a pair of ordinary tensors, an input is not finite, the
                data raise an error, or they differ from the first pass.
        """
        return _regroup(self._pass(size or _BATCH_SIZE), size)

    def count(self) -> int:
        """Return the number of samples; this may take a pass over the data."""
        return len(self._data[0]) if _is_pair(self._data) else self.first().count

    def first(self) -> "_Record":
        """Return the record of the first complete pass; if there was none yet, iterate the data."""
        if self._first is None:
            for _ in self._pass(_BATCH_SIZE):
                pass
        assert self._first is not None
        return self._first

    def _pass(self, pair_batch_size: int) -> Iterator[Pair]:
        record = _Record()
        # A pair of tensors is always the same data, although its batch size may change between passes.
        first = None if _is_pair(self._data) else self._first
        for index, (inputs, targets) in enumerate(self._own_batches(pair_batch_size)):
            record.add(inputs, targets)
            if first is not None:
                first.check_batch(index, record)
            yield inputs, targets
        if first is not None:
            first.check_end(record)
        elif not record.count:
            used_up = isinstance(getattr(self._data, "dataset", None), IterableDataset)
            raise CurvlabError(
                "the data have no samples" + (": an IterableDataset must restart at every pass" if used_up else "")
            )
        else:
            self._first = record

    def _own_batches(self, pair_batch_size: int) -> Iterator[Pair]:
        if _is_pair(self._data):
            if len(self._data[0]):
                parts = [torch.split(tensor, pair_batch_size) for tensor in self._data]
                yield from zip(*parts, strict=True)
            return
        index = -1
        for index, batch in enumerate(self._iterate()):
            if not _is_pair(batch):
                raise CurvlabError(
                    f"batch {index} of the data is not a pair of tensors (inputs, targets) but {_describe(batch)}"
                    + (_AS_TENSORS if _could_be_pair(batch) else "")
                    + self._batch_size_hint()
                )
            _check_pair(batch, f"batch {index}", f"batch {index} has", self._batch_size_hint())
            if len(batch[0]):
                yield batch[0], batch[1]
        expected = _expected_batches(self._data)
        if expected not in (None, index + 1):
            raise CurvlabError(
                f"the DataLoader ended after {index + 1} of {expected} batches: a StopIteration that its data set "
                "raises ends it silently"
            )

    def _iterate(self) -> Iterator[Any]:
        # A list holds its batches; other data may draw random numbers.
        held = isinstance(self._data, (list, tuple))
        batches = iter(self._data if held else iterate_with_own_randomness(self._data, self._start))
        index = 0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except CurvlabError:
                raise
            except Exception as error:
                raise CurvlabError(f"the data raise an error at batch {index}: {type_and_line(error)}") from error
            yield batch
            index += 1

    def _batch_size_hint(self) -> str:
        if isinstance(self._data, DataLoader) and self._data.batch_size is None and self._data.batch_sampler is None:
            return "; a DataLoader with batch_size=None gives single samples: set its batch_size"
        return ""


class _Record:
    """The record of a pass: the number of samples, checksums of the batches, and a few samples.

    The number of samples is known only at the end, so the samples at all powers of two are kept; one is near the
    middle.
    """

    def __init__(self) -> None:
        self.count = 0
        self._threads = torch.get_num_threads()
        self._seen: list[tuple[complex, ...]] = []  # a batch: samples, sum of the inputs, sum of the targets
        self._kept: dict[int, Pair] = {}
        self._last: dict[int, Pair] = {}

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Raises:
            CurvlabError: The batch holds NaN or infinite values.
        """
        self._seen.append((len(inputs), *map(_finite_sum, (inputs, targets))))
        end = self.count + len(inputs)
        powers = [1 << k for k in range(end.bit_length())]

        def take(indices: Iterable[int]) -> dict[int, Pair]:
            # Copies, because a view would keep the whole batch in memory.
            rows = {i: slice(i - self.count, i - self.count + 1) for i in indices if self.count <= i < end}
            return {i: (inputs[row].clone(), targets[row].clone()) for i, row in rows.items()}

        self._kept |= take((0, *powers, *(power + 1 for power in powers)))
        self._last = {i: b for i, b in self._last.items() if i >= end - 2} | take((end - 2, end - 1))
        self.count = end

    def check_batch(self, index: int, later: "_Record") -> None:
        """Raise an error if a batch of a later pass differs from this pass."""
        if index >= len(self._seen):
            raise CurvlabError(
                f"the data gave {self.count} samples in the first pass and {later.count} or more in this one: {_ANEW}"
            )
        (size, *sums), (size_now, *sums_now) = self._seen[index], later._seen[index]
        if size != size_now:
            raise CurvlabError(
                f"batch {index} of the data had {size} samples in the first pass and {size_now} in this one: {_ANEW}"
            )
        # The rounding of a sum depends on the number of threads.
        if sums != sums_now and self._threads == later._threads:
            raise CurvlabError(f"batch {index} of the data differs from the same batch of the first pass: {_ANEW}")

    def check_end(self, later: "_Record") -> None:
        """Raise an error if a later pass ended with a different number of samples."""
        if later.count != self.count:
            raise CurvlabError(
                f"the data gave {self.count} samples in the first pass and {later.count or 'none'} in this one: {_ANEW}"
            )

    def probe(self) -> list[Pair]:
        """Return two samples from the beginning, two from about the middle and two from the end, grouped by shape."""
        n = self.count
        middle = min((1 << k for k in range(1, n.bit_length())), key=lambda i: abs(2 * i - n + 1), default=0)
        kept = self._kept | self._last
        groups: dict[object, list[Pair]] = {}
        for index in sorted({0, 1, middle, middle + 1, n - 2, n - 1} & kept.keys()):
            x, y = kept[index]
            groups.setdefault((x.shape, x.dtype, y.shape, y.dtype), []).append((x, y))
        return [(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])) for group in groups.values()]


def plain_entries(tensor: Tensor) -> Tensor:
    """Return the entries of a sparse, quantized or 8-bit float tensor as an ordinary tensor; else the tensor."""
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 2 else tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite."""
    tensor = plain_entries(tensor)
    # A sum is faster than a mask. It is not finite if an entry is not finite, but it may also overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors with finite entries and the same shape and dtype are equal."""
    one, other = plain_entries(one.detach()), plain_entries(other.detach())
    # NumPy compares words five times as fast as torch compares entries. Words differ for 0.0 and -0.0, hence the rest.
    if all(_is_plain(tensor) and tensor.nbytes % 8 == 0 for tensor in (one, other)):
        words, others = (tensor.reshape(-1).view(torch.uint8).numpy().view("int64") for tensor in (one, other))
        if np.array_equal(words, others):
            return True
    return torch.equal(one, other)


def _is_plain(tensor: Tensor) -> bool:
    ordinary = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_floating_point()
    return ordinary and tensor.is_contiguous() and not tensor.is_neg()


def _finite_sum(tensor: Tensor) -> complex:
    total = tensor.detach().sum()
    if not bool(total.isfinite()):
        if not bool(tensor.isfinite().all()):
            raise CurvlabError("the data hold NaN or infinite values")
        return 0.0  # the sum overflows
    return complex(total)


def _is_pair(data: object) -> TypeGuard[Pair]:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)


def _could_be_pair(batch: object) -> bool:
    """Return whether a batch is a pair of objects that can be converted to tensors."""
    return (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(part, (Tensor, np.ndarray, list, tuple)) for part in batch)
    )


def _is_pair_of_arrays(data: object) -> bool:
    """Return whether the data are a pair of arrays, or of an array and a tensor: two batches would be sequences."""
    return _could_be_pair(data) and any(isinstance(part, (Tensor, np.ndarray)) for part in cast("Sequence[Any]", data))


def _check_pair(batch: Pair, what: str, has: str, unbatched: str = "") -> None:
    """Raise an error for tensors whose rows are not samples."""
    for role, tensor in zip(("inputs", "targets"), batch, strict=True):
        if tensor.is_nested:
            raise CurvlabError(f"the {role} of {what} are nested (ragged) tensors: pad them to one shape")
        if tensor.layout != torch.strided:
            raise CurvlabError(
                f"the {role} of {what} are {str(tensor.layout).removeprefix('torch.')} tensors: convert with to_dense()"
            )
        if tensor.is_quantized:
            raise CurvlabError(f"the {role} of {what} are quantized: convert with dequantize()")
        if tensor.is_meta:
            raise CurvlabError(f"the {role} of {what} are on the meta device, where tensors have no values")
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise CurvlabError(f"the {role} of {what} have the class {type(tensor).__name__}: give plain tensors")
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise CurvlabError(f"the {role} of {what} are {tensor.dtype}: convert with float()")
        if tensor.ndim == 0:
            raise CurvlabError(f"the {role} of {what} are one number, not one row per sample{unbatched}")
    if len(batch[0]) != len(batch[1]):
        raise CurvlabError(f"{has} {len(batch[0])} inputs but {len(batch[1])} targets{unbatched}")


def _expected_batches(data: object) -> int | None:
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None  # the length of an IterableDataset is at best a guess
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a sampler of unknown length
        return None


def _describe(batch: object) -> str:
    if isinstance(batch, (tuple, list)):
        kind = type(batch).__name__
        return f"a {kind} of {len(batch)} ({', '.join(type(part).__name__ for part in batch[:4])})"
    return f"a {type(batch).__name__}"


def _regroup(batches: Iterable[Pair], size: int | None) -> Iterator[Pair]:
    """Yield the same samples in the same order in batches of ``size``; the last batch may be smaller."""
    if size is None:
        yield from batches
        return
    held: list[Pair] = []
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
        # A loader may reuse its tensors for the next batch, so copy.
        held = [(torch.cat([x for x, _ in held]), torch.cat([y for _, y in held]))] if held else []
    if held:
        yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
