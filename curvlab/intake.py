"""The data of a problem: checks of their form, repeated passes, and a few samples for verification."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from curvlab.batches import Inputs, concatenate, kinds, tensors_of
from curvlab.errors import CurvlabError, type_and_line
from curvlab.interface import Interface, Pair, describe, is_pair
from curvlab.randomness import generator_holders, iterate_with_own_randomness, save_random_state

_BATCH_SIZE = 500
_ANEW = "several passes are needed, and all must give the same samples in the same order"


class BatchSource(Protocol):
    """Data that can be iterated more than once: a DataLoader or a list of batches."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate from the first batch."""


class RepeatableData:
    """Data that can be iterated any number of times and are checked to be the same every time.

    Args:
        data: A DataLoader, data set or list of batches, or one batch of all samples: a pair of tensors or arrays, or a
            mapping.
        interface: How inputs and targets are taken from a batch.

    Raises:
        CurvlabError: The data have another form, or can be iterated only once.
    """

    def __init__(self, data: Any, interface: Interface) -> None:
        self._interface = interface
        self._whole: Pair | None = None
        if isinstance(data, Dataset):
            data = DataLoader(data, batch_size=_BATCH_SIZE)
        if _is_whole(data):
            self._whole = interface.split(data, "the data")
            _check_pair(self._whole, "the data", "the data have")
        elif not isinstance(data, Iterable):
            raise CurvlabError(
                "data must be a DataLoader, a data set, a list of batches, a pair of tensors or a mapping, not "
                f"{describe(data)}"
            )
        elif isinstance(data, Iterator):
            raise CurvlabError("the data can be iterated only once: give a DataLoader or a list of batches")
        self._data: Any = data
        holders = generator_holders(data) if self._whole is None else ()
        self._start = save_random_state(holders)  # the state from which every pass starts
        self._first: _Record | None = None

    def batches(self, size: int | None = None) -> Iterator[Pair]:
        """Iterate the data once, in batches of the given size, or in their own batches.

        Raises:
            CurvlabError: There are no samples, no inputs and targets can be taken from a batch, an input is not finite,
                the data raise an error, or they differ from the first pass.
        """
        return _regroup(self._pass(size or _BATCH_SIZE), size)

    def count(self) -> int:
        """Return the number of samples; this may take a pass over the data."""
        return len(self._whole[0]) if self._whole is not None else self.first().count

    def first(self) -> "_Record":
        """Return the record of the first complete pass; if there was none yet, iterate the data."""
        if self._first is None:
            for _ in self._pass(_BATCH_SIZE):
                pass
        assert self._first is not None
        return self._first

    def peek(self) -> Any:
        """Return the first batch in the form of the data; None if there is none."""
        return next(self._iterate(), None) if self._whole is None else self._data

    def _pass(self, batch_size: int) -> Iterator[Pair]:
        record = _Record()
        # One batch of all samples is always the same data, although its batch size may change between passes.
        first = None if self._whole is not None else self._first
        for index, (inputs, targets) in enumerate(self._own_batches(batch_size)):
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

    def _own_batches(self, batch_size: int) -> Iterator[Pair]:
        if self._whole is not None:
            inputs, targets = self._whole
            if len(inputs):
                yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
            return
        index = -1
        for index, batch in enumerate(self._iterate()):
            what = f"batch {index}"
            try:
                pair = self._interface.split(batch, what)
                _check_pair(pair, what, f"{what} has")
            except CurvlabError as error:
                raise CurvlabError(f"{error}{self._batch_size_hint()}") from error
            if len(pair[0]):
                yield pair
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
        self._seen: list[tuple[complex, ...]] = []  # a batch: samples, sums of the inputs, sum of the targets
        self._kept: dict[int, Pair] = {}
        self._last: dict[int, Pair] = {}

    def add(self, inputs: Inputs, targets: Tensor) -> None:
        """Add a batch.

        Raises:
            CurvlabError: The batch holds NaN or infinite values.
        """
        self._seen.append((len(inputs), *map(_finite_sum, (*tensors_of(inputs), targets))))
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
            groups.setdefault((kinds(x), kinds(y)), []).append((x, y))
        return [_join(group) for group in groups.values()]


def _join(pairs: list[Pair]) -> Pair:
    """Return the samples of several batches together."""
    return concatenate([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


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


def _is_whole(data: object) -> bool:
    """Return whether the data are one batch of all samples and not an iterable over batches."""
    return isinstance(data, Mapping) or is_pair(data)


def _check_pair(batch: Pair, what: str, has: str) -> None:
    """Raise an error for tensors whose rows are not samples."""
    inputs, targets = batch
    for tensor in tensors_of(inputs):
        _check_tensor(tensor, f"the inputs of {what}")
    _check_tensor(targets, f"the targets of {what}")
    if len(inputs) != len(targets):
        raise CurvlabError(f"{has} {len(inputs)} inputs but {len(targets)} targets")


def _check_tensor(tensor: Tensor, what: str) -> None:
    if tensor.is_nested:
        raise CurvlabError(f"{what} are nested (ragged) tensors: pad them to one shape")
    if tensor.layout != torch.strided:
        raise CurvlabError(f"{what} are {str(tensor.layout).removeprefix('torch.')} tensors: convert with to_dense()")
    if tensor.is_quantized:
        raise CurvlabError(f"{what} are quantized: convert with dequantize()")
    if tensor.is_meta:
        raise CurvlabError(f"{what} are on the meta device, where tensors have no values")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise CurvlabError(f"{what} have the class {type(tensor).__name__}: give plain tensors")
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        raise CurvlabError(f"{what} are {tensor.dtype}: convert with float()")
    if tensor.ndim == 0:
        raise CurvlabError(f"{what} are one number, not one row per sample")


def _expected_batches(data: object) -> int | None:
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None  # the length of an IterableDataset is at best a guess
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a sampler of unknown length
        return None


def _regroup(batches: Iterable[Pair], size: int | None) -> Iterator[Pair]:
    """Yield the same samples in the same order in batches of ``size``; some may be smaller.

    The last one may be, and one whose next sample has another shape, such as a sequence of another length.
    """
    if size is None:
        yield from batches
        return
    held: list[Pair] = []
    count = 0
    for inputs, targets in batches:
        if held and (kinds(held[0][0]), kinds(held[0][1])) != (kinds(inputs), kinds(targets)):
            yield _join(held)
            held, count = [], 0
        while len(inputs):
            take = size - count
            held.append((inputs[:take], targets[:take]))
            count += len(held[-1][0])
            inputs, targets = inputs[take:], targets[take:]
            if count == size:
                yield _join(held)
                held, count = [], 0
        # A loader may reuse its tensors for the next batch, so copy.
        held = [_join(held)] if held else []
    if held:
        yield _join(held)
