"""Time and memory of a computation, and what they come to on more samples."""

import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_QUICK, _REPEATED = 0.25, 0.05  # seconds: what takes less is measured again, until it has taken so long in all


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the least of some measurements: what else the machine does only adds to it."""
    taken: list[float] = []
    while not taken or (len(taken) < 5 and min(taken) < _QUICK and sum(taken) < _REPEATED):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)


def extrapolate(points: Sequence[tuple[int, float]], n: int) -> float:
    """Return the value at ``n`` of the line through the last two points, between constant and proportional."""
    (after, high), (before, low) = points[-1], points[max(len(points) - 2, 0)]
    slope = (high - low) / (after - before) if after > before else 0.0
    return high + min(max(slope, 0.0), high / after) * (n - after)


def measure_peak(work: Callable[[], object]) -> int:
    """Return the peak in bytes of the tensors that a computation makes, without what kernels use inside."""
    with _Allocations() as allocations:
        work()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that come and go, on any device; those that were there before do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
