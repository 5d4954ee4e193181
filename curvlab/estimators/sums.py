"""Sums over many batches that are as accurate as one batch gives them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from curvlab.estimators.capture import working_dtype
from curvlab.problem import Problem

_BATCHES = 32  # that are added up in float32 before float64 takes them over


class Sums:
    """Sums by name, in at least float32: long ones of float32 in float64.

    In float32 a batch of one after another is added up at a rounding error each; of bfloat16, sums of some hundred
    terms do not grow any more. Each batch is added to ``running`` in place, and ended by ``next``.

    Args:
        shapes: Of each sum.
        problem: Whose dtype, device and number of samples they are of.

    Attributes:
        running: What the last few batches are added to, zero at first.
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
        """Return the sums over the number of samples, in at least float32; ``running`` is used up."""
        n = self._problem.num_samples
        if not self._whole:
            return {name: part.div_(n) for name, part in self.running.items()}
        return {name: self._whole.pop(name).add_(part).div_(n).to(self._dtype) for name, part in self.running.items()}
