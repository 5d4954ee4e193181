"""Training on all tasks at once: the upper bound."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curvlab.continual.strategies.base import Strategy

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class Joint(Strategy):
    """Train once on the samples of all tasks, mixed (multi-task learning), when the last task has come.

    Only the last row of the accuracy matrix is measured. The training is that of the last task: an epoch goes through
    the samples of all tasks, ``steps`` are those of the last task, and the learning rate is the first one.

    Memory: the samples of all tasks, which are made when they are due and not counted.
    """

    def tasks(self, learner: "Learner") -> Sequence[int]:
        """See ``Strategy``."""
        last = len(learner.stream) - 1
        return range(last + 1) if learner.task == last else ()
