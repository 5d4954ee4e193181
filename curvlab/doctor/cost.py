"""Measured time and memory of a computation, and their extrapolation to more samples."""

import time
from collections.abc import Callable, Sequence

import torch

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
