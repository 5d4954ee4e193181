"""Measured time and memory of a computation, and their extrapolation to more samples."""

import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_QUICK, _REPEATED = 0.25, 0.05  # seconds: shorter work than _QUICK is repeated until _REPEATED has passed in total


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the minimum of some measurements, because other load of the machine only adds time."""
    taken: list[float] = []
    while not taken or (len(taken) < 5 and min(taken) < _QUICK and sum(taken) < _REPEATED):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)


def extrapolate(points: Sequence[tuple[int, float]], n: int) -> float:
    """Return the value at ``n`` on the line through the last two points, with a slope from constant to proportional."""
    (after, high), (before, low) = points[-1], points[max(len(points) - 2, 0)]
    slope = (high - low) / (after - before) if after > before else 0.0
    return high + min(max(slope, 0.0), high / after) * (n - after)


def measure_peak(work: Callable[[], object]) -> int:
    """Return the peak memory in bytes of the tensors that a computation creates, without the workspace of kernels."""
    with _Allocations() as allocations:
        work()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):
    """Mode that counts the bytes of live tensors, on any device, without tensors that existed before."""

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
