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

from curvlab.continual.task import Task
from curvlab.errors import CurvlabError

Head = Literal["single", "growing", "masked", "multi"]
TaskLoss = Literal["cross_entropy", "squared_error"]


class Outputs:
    """Which outputs count, and which one stands for a label.

    Args:
        stream: The tasks.
        head: ``single``: all outputs count in every task, and output k stands for class k. ``growing`` (class-IL): as
            far as the classes of the tasks until now go. ``masked`` (task-IL): those of the task's classes. ``multi``
            (task-IL): each task has outputs of its own, those of task 0 first.
        count: How many outputs the network has.
        device: Of the network.

    Attributes:
        classes: How many the tasks have, one that is in two tasks counted twice.

    Raises:
        CurvlabError: There is no such head, or the network has not as many outputs as it needs.

    Examples:
        >>> from curvlab.continual import split_classes
        >>> from curvlab.data import load
        >>> stream = split_classes(load("digits"), tasks=5)
        >>> outputs = Outputs(stream, "growing", 10, torch.device("cpu"))
        >>> outputs.counting(0, now=1).nonzero()[:, 0]
        tensor([0, 1, 2, 3])
    """

    def __init__(self, stream: Sequence[Task], head: Head, count: int, device: torch.device) -> None:
        if head not in get_args(Head):
            raise CurvlabError(f"head is one of {', '.join(get_args(Head))}, not {head!r}")
        classes = [_classes(task) for task in stream]
        needed = sum(map(len, classes)) if head == "multi" else 1 + max(map(max, classes))
        if count < needed or (head == "multi" and count != needed):
            raise CurvlabError(
                f"head {head!r} needs {needed} outputs for these {len(stream)} tasks, and the model has {count}: "
                f"build it with {needed}"
            )
        self.head, self.count = head, count
        self.classes = sum(map(len, classes))
        #: Row t: the outputs that stand for the classes of task t.
        self._own = torch.zeros(len(stream), count, dtype=torch.bool)
        self._output_of: list[Tensor | None] = []
        first = 0
        for own, present in zip(self._own, classes, strict=True):
            if head == "multi":
                output_of = torch.full((1 + max(present),), -1)
                output_of[list(present)] = torch.arange(first, first + len(present))
                own[first : first + len(present)] = True
                first += len(present)
                self._output_of.append(output_of.to(device))
            else:
                own[list(present)] = True
                self._output_of.append(None)
        #: Row t: those that count for task t, with a growing head while t is the last one that has come.
        self._counts = self._own
        if head == "single":
            self._counts = torch.ones_like(self._own)
        elif head == "growing":
            self._counts = self._own.cumsum(0) > 0
        self._whole = self._counts.all(1).tolist()  # looked up at every step, without waiting for the device
        self._own, self._counts = self._own.to(device), self._counts.to(device)

    def of_labels(self, y: Tensor, task: int) -> Tensor:
        """Return the outputs ``(N,)``, on the device of ``y``, that stand for the labels ``(N,)`` of a task."""
        output_of = self._output_of[task]
        return y.long() if output_of is None else output_of.to(y.device)[y.long()]

    def counting(self, task: int | Tensor, now: int | None) -> Tensor | None:
        """Return which outputs count, booleans ``(C,)``, or ``(N, C)`` for the tasks ``(N,)`` of samples.

        Args:
            task: The task of a batch, or of each of its samples.
            now: The last task that has come; with a growing head, what counts for all. None for those that counted
                when each task was learnt.

        Returns:
            None if all of them do.
        """
        if self.head == "growing" and now is not None:
            task = now
        if isinstance(task, int):
            return None if self._whole[task] else self._counts[task]
        return None if all(self._whole) else self._counts[task]

    def learnt(self, before: int) -> Tensor:
        """Return which outputs the tasks before one have taught, as booleans ``(G, C)``, a row for each softmax.

        That is a row for each task where each task has outputs that count for it alone (``masked``, ``multi``; tasks
        with the same outputs have one together), and otherwise one row, of all classes so far.
        """
        own = self._own[:before]
        if before == 0:
            return own
        learnt: Tensor = own.unique(dim=0) if self.head in ("masked", "multi") else own.any(0, keepdim=True)
        return learnt


def mean_loss(loss: TaskLoss, outputs: Tensor, y: Tensor, counting: Tensor | None, scale: float = 1.0) -> Tensor:
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
            outputs = outputs.where(counting, -torch.inf)
        return F.cross_entropy(outputs, y)
    difference = outputs - one_hot(y, outputs, scale)
    if counting is not None:
        difference = difference.where(counting, 0.0)
    return difference.square().sum() / (2 * len(outputs))


def one_hot(y: Tensor, like: Tensor, scale: float) -> Tensor:
    """Return targets in the shape, dtype and device of ``like``: ``scale`` at the outputs ``y``, else 0."""
    return torch.zeros_like(like).scatter_(1, y[:, None], scale)


def _classes(task: Task) -> tuple[int, ...]:
    return tuple(range(task.dataset.num_classes)) if task.classes is None else task.classes
