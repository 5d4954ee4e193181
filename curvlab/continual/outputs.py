"""Which outputs of a network belong to a task: one head, masked, growing or several heads, all in one place.

A network has one last layer with all outputs that it will ever need. What is called several heads are parts of it: a
head is a set of rows of that layer, and outputs that do not count have no part in the loss, so that their rows have no
gradient. A growing head is the same with the outputs of the classes that have come so far.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from curvlab.continual.tasks import Task
from curvlab.errors import CurvlabError

Head = Literal["single", "growing", "masked", "multi"]


class Outputs:
    """Which outputs count, and which one stands for a label.

    Args:
        stream: The tasks.
        head: ``single``: all outputs count in every task, and output k stands for class k. ``growing`` (class-IL): as
            far as the classes of the tasks until now go. ``masked`` (task-IL): those of the task's classes. ``multi``
            (task-IL): each task has outputs of its own, those of task 0 first.
        count: How many outputs the network has.
        device: Of the network.

    Raises:
        CurvlabError: There is no such head, or the network has fewer outputs than it needs.
    """

    def __init__(self, stream: Sequence[Task], head: Head, count: int, device: torch.device) -> None:
        if head not in get_args(Head):
            raise CurvlabError(f"head is one of {', '.join(get_args(Head))}, not {head!r}")
        classes = [_classes(task) for task in stream]
        needed = sum(map(len, classes)) if head == "multi" else 1 + max(map(max, classes))
        if count < needed or (head == "multi" and count != needed):
            raise CurvlabError(
                f"head {head!r} of these {len(stream)} tasks needs {needed} outputs, and the model has {count}: "
                f"build it with {needed}"
            )
        self.head, self.count = head, count
        self._counts = torch.zeros(len(stream), count, dtype=torch.bool)
        self._output_of: list[Tensor | None] = []
        first = 0
        for i, present in enumerate(classes):
            output_of = None
            if head == "single":
                self._counts[i] = True
            elif head == "multi":
                self._counts[i, first : first + len(present)] = True
                output_of = torch.full((1 + max(present),), -1)
                output_of[list(present)] = torch.arange(first, first + len(present))
                first += len(present)
            else:
                self._counts[i, list(present)] = True
                if head == "growing" and i:
                    self._counts[i] |= self._counts[i - 1]
            self._output_of.append(output_of)
        self._counts = self._counts.to(device)
        self._whole = [bool(row.all()) for row in self._counts]

    def of_labels(self, y: Tensor, task: int) -> Tensor:
        """Return the outputs ``(N,)`` that stand for the labels ``(N,)`` of a task."""
        output_of = self._output_of[task]
        return y.long() if output_of is None else output_of.to(y.device)[y.long()]

    def counting(self, task: int | Tensor, now: int) -> Tensor | None:
        """Return which outputs count, booleans ``(C,)``, or ``(N, C)`` for the tasks ``(N,)`` of samples.

        Args:
            task: The task of a batch, or of each of its samples.
            now: The last task that has come; with a growing head, what counts for all.

        Returns:
            None if all of them do.
        """
        if self.head == "growing":
            task = now
        if isinstance(task, int):
            return None if self._whole[task] else self._counts[task]
        return None if all(self._whole) else self._counts[task]


def mean_loss(loss: str, outputs: Tensor, y: Tensor, counting: Tensor | None, scale: float = 1.0) -> Tensor:
    """Return the mean loss of a batch, a scalar; outputs that do not count have no part in it.

    Args:
        loss: ``cross_entropy``, or ``squared_error``: half the squared distance to ``scale`` at the output that stands
            for the label and 0 at the others.
        outputs: ``(N, C)``.
        y: The outputs that stand for the labels, ``(N,)``.
        counting: As ``Outputs.counting`` returns it.
        scale: Of the one-hot targets.
    """
    if loss == "cross_entropy":
        if counting is not None:
            outputs = outputs.masked_fill(~counting, -torch.inf)
        return F.cross_entropy(outputs, y)
    difference = outputs - one_hot(y, outputs, scale)
    if counting is not None:
        difference = difference * counting
    return difference.square().sum() / (2 * len(outputs))


def one_hot(y: Tensor, like: Tensor, scale: float) -> Tensor:
    """Return targets in the shape, dtype and device of ``like``: ``scale`` at the outputs ``y``, else 0."""
    return torch.zeros_like(like).scatter_(1, y[:, None], scale)


def _classes(task: Task) -> tuple[int, ...]:
    return tuple(range(task.dataset.num_classes)) if task.classes is None else task.classes
