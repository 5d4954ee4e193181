"""Sums over many batches that are as accurate as the sum of one batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from curvlab.estimators.capture import working_dtype
from curvlab.problem import Problem

_BATCHES = 32  # batches that are summed in float32 before they are added to a sum in float64


class Sums:
    """Sums by name, in at least float32; long sums of float32 are continued in float64.

    In float32 each batch adds a rounding error; in bfloat16 a sum of some hundred terms no longer grows. Each batch is
    added to ``running`` in place, and then ``next`` is called.

    Args:
        shapes: Shape of each sum.
        problem: Problem that gives dtype, device and number of samples.

    Attributes:
        running: Tensors to which the last few batches are added; zero at first.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], problem: Problem) -> None:
        self._problem = problem
        self._dtype = working_dtype(problem.dtype)
        self.running = {
            name: torch.zeros(shape, dtype=self._dtype, device=problem.device) for name, shape in shapes.items()
        }
        self._whole: dict[str, Tensor] = {}  # in float64; empty while all is in ``running``
        self._batches = 0

    def next(self) -> None:
        """End a batch."""
        self._batches += 1
        if self._batches % _BATCHES == 0 and self._dtype != torch.float64:
            for name, part in self.running.items():
                if name in self._whole:
                    self._whole[name] += part
                else:
                    self._whole[name] = part.double()
                part.zero_()

    def means(self) -> dict[str, Tensor]:
        """Return the sums divided by the number of samples, in at least float32; ``running`` is then invalid."""
        n = self._problem.num_samples
        if not self._whole:
            return {name: part.div_(n) for name, part in self.running.items()}
        return {name: part.copy_(self._whole.pop(name).add_(part).div_(n)) for name, part in self.running.items()}
