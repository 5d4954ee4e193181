"""What a method of continual learning is: a handful of hooks that the loop calls."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class Strategy:
    """Naive fine-tuning, and the base of every other method: each hook does here what naive fine-tuning does.

    A strategy is given its options when it is made, and keeps what it needs of past tasks in its attributes. The loop
    works on a copy, so that one object can be used in many runs. What is in the attributes goes into the checkpoints
    and is counted as the memory that the method holds: tensors, numbers, strings, curvature matrices, and tuples, lists
    and dictionaries of them. A method that holds anything else overrides ``state`` and ``restore``.
    """

    def start(self, learner: "Learner") -> None:
        """Before the first task; the place to refuse a model or a loss that the method cannot be used with."""

    def tasks(self, learner: "Learner") -> Sequence[int]:
        """Return the tasks whose training samples are learnt from now, by default the present one alone."""
        return (learner.task,)

    def before_task(self, learner: "Learner") -> None:
        """Before the first step of a task."""

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Return the loss of a batch of new samples, a scalar; its gradient is what the step is made of."""
        return learner.loss(learner.model(batch.x), batch.y, batch.task)

    def after_backward(self, learner: "Learner") -> None:
        """Change gradients, once they are there: add that of a penalty, or project them."""

    def after_step(self, learner: "Learner") -> None:
        """After the step of the optimizer."""

    def after_task(self, learner: "Learner") -> None:
        """After the last step of a task and before it is evaluated: the place to consolidate."""

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint keeps of the method, and what is counted as its memory."""
        return vars(self)

    def restore(self, learner: "Learner", state: Mapping[str, Any]) -> None:
        """Take up what ``state`` has returned, in a new process."""
        del learner
        vars(self).update(state)
