"""Batches of training samples of one task, or of several tasks mixed."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvlab.continual.learner import Batch, Learner

_TRANSFORM_AT_ONCE = 2**24  # values: samples of several tasks are transformed for many batches at once, up to this


class Source:
    """Training samples of the current step of the stream.

    The transformed samples of a single task are kept in memory; samples of several tasks are transformed when they are
    needed.

    Args:
        learner: State of the run.
        tasks: Indices of the tasks; their samples are numbered consecutively.
    """

    def __init__(self, learner: Learner, tasks: Sequence[int]) -> None:
        self.learner, self.tasks = learner, tuple(tasks)
        self.starts = torch.tensor([0] + [learner.stream[task].sizes["train"] for task in tasks]).cumsum(0)
        self.held = learner.samples(self.tasks[0]) if len(self.tasks) == 1 else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Batch]:
        """Yield the samples with the numbers in ``order``; the last batch may be smaller."""
        if self.held is not None:
            x, y, task = self.held
            for index in order.to(y.device).split(batch_size):
                yield Batch(x.index_select(0, index), y.index_select(0, index), task)
            return
        values = self.learner.stream[self.tasks[0]].dataset.x_train[0].numel()
        at_once = max(_TRANSFORM_AT_ONCE // (values * batch_size), 1) * batch_size
        for several in order.split(at_once):
            made = self._select(several)
            yield from map(Batch, *(part.split(batch_size) for part in made))

    def _select(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        which = torch.bucketize(numbers, self.starts[1:-1], right=True)
        parts, places = [], []
        for i in which.unique().tolist():
            places.append((which == i).nonzero()[:, 0])
            task = self.tasks[i]
            x, y = self.learner.stream[task].take(numbers[places[-1]] - self.starts[i])
            part = self.learner.batch(x, y, task)
            parts.append((part.x, part.y, part.tasks))
        back = torch.cat(places).argsort()
        x, y, tasks = (torch.cat(part)[back.to(part[0].device)] for part in zip(*parts, strict=True))
        return x, y, tasks
