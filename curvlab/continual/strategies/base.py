"""Base class of the methods of continual learning."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class Strategy:
    """Base class of all methods; its hooks implement naive fine-tuning.

    A strategy gets its options in the constructor, and stores what it needs of past tasks in its attributes. The loop
    works on a copy, so that one object can be used in many runs. The attributes are saved in checkpoints and counted as
    the memory of the method. They can be tensors, numbers, strings, curvature matrices, and tuples, lists and
    dictionaries of these. A method with attributes of other types overrides ``state`` and ``restore``.
    """

    def start(self, learner: "Learner") -> None:
        """Prepare the first task; raise an error here for a model or a loss that the method does not support."""

    def tasks(self, learner: "Learner") -> Sequence[int]:
        """Return the tasks whose samples to train on now, by default the current task only."""
        return (learner.task,)

    def before_task(self, learner: "Learner") -> None:
        """Prepare the first step of a task."""

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Return the loss of a batch of new samples, a scalar; the step uses its gradient."""
        return learner.loss(learner.model(batch.x), batch.y, batch.task)

    def after_backward(self, learner: "Learner") -> None:
        """Change the gradients after the backward pass, for example add the gradient of a penalty or project them."""

    def after_step(self, learner: "Learner") -> None:
        """Update the state after a step of the optimizer."""

    def after_task(self, learner: "Learner") -> None:
        """Consolidate a task, after its last step and before the evaluation."""

    def state(self) -> Mapping[str, Any]:
        """Return the state for checkpoints, which is also counted as the memory of the method."""
        return vars(self)

    def restore(self, learner: "Learner", state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned, in a new process."""
        del learner
        vars(self).update(state)
