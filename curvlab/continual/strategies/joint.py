"""Joint training on all tasks: the upper bound."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curvlab.continual.strategies.base import Strategy

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class Joint(Strategy):
    """Joint training (multi-task learning): train once on the mixed samples of all tasks, at the last task.

    Only the last row of the accuracy matrix is measured. The options are those of the last task, except for the
    learning rate, which is the initial one. An epoch uses the samples of all tasks.

    Memory: the samples of all tasks, which are transformed when they are needed and not counted.
    """

    def tasks(self, learner: "Learner") -> Sequence[int]:
        """Implement the hook of ``Strategy``."""
        last = len(learner.stream) - 1
        return range(last + 1) if learner.task == last else ()
