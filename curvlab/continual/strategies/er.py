"""Experience replay."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curvlab.continual.buffers import Reservoir, Ring
from curvlab.continual.options import check_whole
from curvlab.continual.strategies.base import Strategy
from curvlab.errors import CurvlabError

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class ER(Strategy):
    """Experience replay (Chaudhry et al., 2019, On tiny episodic memories): past samples are added to every batch.

    New and past samples go through the network in one pass, and the loss is the mean over all of them. Samples are
    offered to the memory in the first epoch, after the draw of the step, so that the memory also contains samples of
    the current task.

    Memory: at most ``buffer_size`` samples. A reservoir is a uniform random sample of all samples so far. A ring keeps
    the most recent samples of each class of each task; each class has the same share from the start, so that the ring
    is full only at the end.

    Args:
        buffer_size: Maximum number of stored samples.
        batch_size: Number of samples drawn per step; None for the batch size of the task.
        buffer: ``reservoir`` or ``ring``.

    Raises:
        CurvlabError: A size is not a whole number from 1, or the buffer is unknown.
    """

    def __init__(
        self, buffer_size: int, *, batch_size: int | None = None, buffer: Literal["reservoir", "ring"] = "reservoir"
    ) -> None:
        if buffer not in ("reservoir", "ring"):
            raise CurvlabError(f"buffer must be reservoir or ring, not {buffer!r}")
        check_whole("buffer_size", buffer_size)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        self.buffer_size, self.batch_size, self.buffer = buffer_size, batch_size, buffer

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``.

        Raises:
            CurvlabError: A ring has fewer places than there are classes of all tasks.
        """
        if self.buffer == "reservoir":
            self.memory: Reservoir | Ring = Reservoir(self.buffer_size)
            return
        rings = learner.outputs.classes
        if self.buffer_size < rings:
            raise CurvlabError(
                f"a ring of {self.buffer_size} samples is too small for the {rings} classes of the tasks: "
                f"buffer_size must be at least {rings}"
            )
        self.memory = Ring(self.buffer_size // rings)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Implement the hook of ``Strategy``."""
        drawn = self.memory.draw(self.batch_size or learner.batch_size, learner.generator)
        if learner.epoch == 0:
            self.memory.add({"x": batch.x, "y": batch.y, "task": batch.tasks}, learner.generator)
        if not drawn:
            return learner.loss(learner.model(batch.x), batch.y, batch.task)
        x, y = torch.cat([batch.x, drawn["x"]]), torch.cat([batch.y, drawn["y"]])
        return learner.loss(learner.model(x), y, torch.cat([batch.tasks, drawn["task"]]))
