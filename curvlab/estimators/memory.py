"""Bounded memory: the peak of a computation is measured on a few samples, which gives the size of its pieces."""

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from curvlab.batches import tensors_of
from curvlab.checks import describe_value
from curvlab.dispatch import DispatchMode
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.interface import Pair
from curvlab.problem import Problem
from curvlab.text import format_bytes

#: Named limits in bytes: ``estimate(memory="small")``. ``doctor`` shows the pieces that each of them gives.
MEMORY: Mapping[str, float] = {"small": 1e9, "medium": 4e9, "large": 16e9}

_UNITS = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*")
_SHARE = 0.7  # of the limit; the rest is for the gaps of the allocator
_TRIALS = 8
_STEP = 3  # factor between trials where the line through the last two, which is not exact, gives more
_GROWTH = 1.3  # smaller gains are not worth a trial

_limit: ContextVar[float] = ContextVar("limit", default=float("inf"))


def parse_memory(memory: str | float) -> float:
    """Return a limit in bytes.

    Args:
        memory: Number of bytes, a number with a unit (``"2GB"``, ``"512 MiB"``), or one of ``MEMORY``.

    Raises:
        CurvlabError: It is neither.

    Examples:
        >>> parse_memory("2GB"), parse_memory("small"), parse_memory(5e8)
        (2000000000.0, 1000000000.0, 500000000.0)
    """
    if isinstance(memory, str) and memory in MEMORY:
        return MEMORY[memory]
    found = _SIZE.fullmatch(memory.lower()) if isinstance(memory, str) else None
    if found and found[2] in _UNITS:
        memory = float(found[1]) * _UNITS[found[2]]
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 < memory < float("inf"):
        raise CurvlabError(
            f"memory must be a size such as '2GB', a number of bytes, or one of {', '.join(MEMORY)}, not "
            f"{describe_value(memory)}"
        )
    return float(memory)


@contextmanager
def limited(limit: float) -> Iterator[None]:
    """Limit the pieces of the computations inside, in bytes."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def at_most(usual: float, share: float) -> float:
    """Return a limit in bytes of pieces that a computation makes: the usual one, or less inside of ``limited``.

    Args:
        usual: The limit if memory is not limited.
        share: Share of the whole limit that such a piece may take.
    """
    return min(usual, share * _limit.get())


def fit_batch_size(what: str, problem: Problem, limit: float, work: Callable[[Problem], float]) -> int:
    """Return the largest number of samples at once for which the peak of a computation stays below a limit.

    The peak is measured on one sample, and on more as long as they fit.

    Args:
        what: What is computed, for the error message.
        problem: Model, loss and data. Its longest batch is an upper bound.
        limit: Bytes, in addition to model and data.
        work: The computation; it returns the bytes that it holds in addition on many batches.

    Raises:
        UnsupportedError: Not even one sample at a time stays below the limit.
    """
    (inputs, targets), most = _largest_batch(problem)

    def peak(size: int) -> float:
        held: list[float] = []
        few = problem.with_data([(inputs[:size], targets[:size])])
        return measure_process_peak(lambda: held.append(work(few)), problem.device) + held[0]

    peak(1)  # the first call also imports modules
    size, taken = 1, peak(1)
    if not count_fitting(1, taken, limit, most):
        raise _too_much(what, taken / _SHARE, limit)
    slope = 0.0  # bytes per sample, beyond those that any number of samples takes
    for _ in range(_TRIALS):
        line = size + int((_SHARE * limit - taken) / slope) if slope > 0 else most
        larger = max(count_fitting(size, taken, limit, most), min(line, most, _STEP * size))
        if larger < _GROWTH * size or (more := peak(larger)) > _SHARE * limit:
            break
        size, taken, slope = larger, more, (more - taken) / (larger - size)
    return size


def count_fitting(samples: int, peak: float, limit: float, most: int) -> int:
    """Return how many samples at once fit for certain, since the peak is at most proportional to their number.

    Args:
        samples: Number of samples whose peak is known.
        peak: Its peak in bytes.
        limit: Bytes.
        most: An upper bound of the result.
    """
    return min(most, int(samples * _SHARE * limit / max(peak, 1.0)))


def check_fits(what: str, needed: float) -> None:
    """Check that the sums of a computation fit, before they are made.

    Raises:
        UnsupportedError: They need more bytes than the limit.
    """
    if needed > (limit := _limit.get()):
        raise _too_much(what, needed, limit)


def _too_much(what: str, needed: float, limit: float) -> UnsupportedError:
    return UnsupportedError(
        f"{what} needs about {format_bytes(needed)} even for one sample at a time, more than memory="
        f"{format_bytes(limit)}: use another structure, such as diag, kfac or implicit, or select parameters with "
        "params=[...]"
    )


def _largest_batch(problem: Problem) -> tuple[Pair, int]:
    """Return the batch with the largest samples, and how many of its samples are a batch of the data at most."""

    def size(pair: Pair) -> tuple[int, int]:
        tensors = [*tensors_of(pair[0]), pair[1]]
        return sum(tensor.nbytes for tensor in tensors) // len(pair[1]), len(pair[1])

    largest = max(problem.batches(), key=size)
    return largest, len(largest[1])


def measure_peak(work: Callable[[], object]) -> int:
    """Return the peak memory in bytes of the tensors that a computation creates, without the workspace of kernels."""
    with _Allocations() as allocations:
        work()
    return int(allocations.peak)


def measure_process_peak(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory in bytes of a computation, with the workspace of kernels.

    On an accelerator it is the peak of torch's allocator; on a CPU the growth of the process's resident memory, or of
    the tensors where that is unknown (not Linux) or smaller (the allocator of the process holds free memory).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the recorded peak starts at the present size
        before = _resident_peak()
    except (OSError, AttributeError, StopIteration):
        return measure_peak(work)
    tensors = measure_peak(work)
    return max(tensors, _resident_peak() - before)


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class _Allocations(DispatchMode):
    """Mode that counts the bytes of live tensors, on any device, without tensors that existed before."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self.known[storage] = True
        answer = func(*args, **(kwargs or {}))
        for storage in _storages(answer):
            if storage not in self.known:
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                finalize(storage, self._free, storage.nbytes())
        return answer

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
