"""Training on samples of every task so far: the upper bound of methods that see the tasks in their order."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlab.continual.strategies.base import Strategy

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class Oracle(Strategy):
    """Train on a batch of each task so far at every step (the oracle of the authors' code of Shon et al., 2022).

    The loss is the mean over the tasks so far of the loss of one batch each. The batches of past tasks are drawn with
    replacement from all of their training samples and have the size of a full batch. Unlike ``Joint``, it learns the
    tasks in their order, so the accuracy after each of them is measured.

    Memory: the samples of all tasks, which the stream holds and which are not counted.
    """

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """See ``Strategy``."""
        batches = [batch, *(_draw(learner, past) for past in range(learner.task))]
        losses = [learner.loss(learner.model(one.x), one.y, one.task) for one in batches]
        return torch.stack(losses).mean()


def _draw(learner: "Learner", task: int) -> "Batch":
    chosen = learner.stream[task]
    rows = torch.randint(chosen.sizes["train"], (learner.batch_size,), generator=learner.generator)
    return learner.batch(*chosen.take(rows), task)
