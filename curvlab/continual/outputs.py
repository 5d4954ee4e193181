"""Active outputs of a network for each task: single, masked, multiple or growing heads.

A network has one last layer with all outputs that any task needs. A head is a set of rows of that layer. The loss uses
only the active outputs, so that the rows of inactive outputs have no gradient. With a growing head, the outputs of all
classes so far are active.
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
    """Active outputs of each task, and the output of each label.

    Args:
        stream: The tasks.
        head: ``single``: all outputs are active in every task, and output k is for class k. ``growing`` (class-IL): the
            outputs of the classes of all tasks so far. ``masked`` (task-IL): the outputs of the task's classes.
            ``multi`` (task-IL): each task has its own outputs, those of task 0 first.
        count: Number of outputs of the network.
        device: Device of the network.

    Attributes:
        classes: Total number of classes of the tasks; a class of two tasks is counted twice.

    Raises:
        CurvlabError: The head is unknown, or the network has too few outputs (with ``multi``, another number).

    Examples:
        >>> from curvlab.continual import split_classes
        >>> from curvlab.data import load
        >>> stream = split_classes(load("digits"), tasks=5)
        >>> outputs = Outputs(stream, "growing", 10, torch.device("cpu"))
        >>> outputs.active_mask(0, now=1).nonzero()[:, 0]
        tensor([0, 1, 2, 3])
    """

    def __init__(self, stream: Sequence[Task], head: Head, count: int, device: torch.device) -> None:
        if head not in get_args(Head):
            raise CurvlabError(f"head must be one of {', '.join(get_args(Head))}, not {head!r}")
        classes = [_classes(task) for task in stream]
        needed = sum(map(len, classes)) if head == "multi" else 1 + max(map(max, classes))
        if count < needed or (head == "multi" and count != needed):
            raise CurvlabError(
                f"head {head!r} needs {needed} outputs for these {len(stream)} tasks, but the model has {count}: "
                f"build it with {needed}"
            )
        self.head, self.count = head, count
        self.classes = sum(map(len, classes))
        #: Row t: the outputs of the classes of task t.
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
        #: Row t: the active outputs of task t; with a growing head, while t is the current task.
        self._active = self._own
        if head == "single":
            self._active = torch.ones_like(self._own)
        elif head == "growing":
            self._active = self._own.cumsum(0) > 0
        self._all_active = self._active.all(1).tolist()  # read at every step, without synchronising with the device
        self._own, self._active = self._own.to(device), self._active.to(device)

    def map_labels(self, y: Tensor, task: int) -> Tensor:
        """Return the indices of the outputs for labels ``(N,)`` of a task: ``(N,)``, on the device of ``y``."""
        output_of = self._output_of[task]
        return y.long() if output_of is None else output_of.to(y.device)[y.long()]

    def active_mask(self, task: int | Tensor, now: int | None) -> Tensor | None:
        """Return the mask of active outputs, booleans ``(C,)``, or ``(N, C)`` for one task per sample.

        Args:
            task: Task of all samples, or of each sample, ``(N,)``.
            now: Index of the current task, which with a growing head decides for all samples; None for the outputs that
                were active when each task was learnt.

        Returns:
            The mask; None if all outputs are active.
        """
        if self.head == "growing" and now is not None:
            task = now
        if isinstance(task, int):
            return None if self._all_active[task] else self._active[task]
        return None if all(self._all_active) else self._active[task]

    def past_masks(self, before: int) -> Tensor:
        """Return the outputs trained by the tasks before ``before``, as booleans ``(G, C)``, one row per softmax.

        With ``masked`` and ``multi`` there is one row for each task (tasks with the same outputs share a row).
        Otherwise there is one row, with the classes of all these tasks.
        """
        own = self._own[:before]
        if before == 0:
            return own
        masks: Tensor = own.unique(dim=0) if self.head in ("masked", "multi") else own.any(0, keepdim=True)
        return masks


def mean_loss(loss: TaskLoss, outputs: Tensor, y: Tensor, active: Tensor | None, scale: float = 1.0) -> Tensor:
    """Return the mean loss of a batch over the active outputs, a scalar.

    Args:
        loss: ``cross_entropy``, or ``squared_error``: half the squared distance to the target, which is ``scale`` at
            the output of the label and 0 elsewhere.
        outputs: ``(N, C)``.
        y: Indices of the outputs for the labels, ``(N,)``.
        active: Result of ``Outputs.active_mask``.
        scale: Value of the one-hot targets.
    """
    if loss == "cross_entropy":
        if active is not None:
            outputs = outputs.where(active, -torch.inf)
        return F.cross_entropy(outputs, y)
    difference = outputs - one_hot(y, outputs, scale)
    if active is not None:
        difference = difference.where(active, 0.0)
    return difference.square().sum() / (2 * len(outputs))


def one_hot(y: Tensor, like: Tensor, scale: float) -> Tensor:
    """Return targets with the shape, dtype and device of ``like``: ``scale`` at the outputs ``y``, 0 elsewhere."""
    return torch.zeros_like(like).scatter_(1, y[:, None], scale)


def _classes(task: Task) -> tuple[int, ...]:
    return tuple(range(task.dataset.num_classes)) if task.classes is None else task.classes
