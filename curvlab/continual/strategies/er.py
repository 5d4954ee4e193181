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
    """Experience replay (Chaudhry et al., 2019, On tiny episodic memories): every batch is joined by past samples.

    Both go through the network in one pass, and the loss is the mean over all of them. A sample is offered to the
    memory when it is seen for the first time, after the step's draw, so that the present task is in it too.

    Memory: at most ``buffer_size`` samples. A reservoir is a uniform sample of all that were seen; a ring keeps the
    last ones of each class of each task, with the same share for each from the start, so that it is full at the end
    only.

    Args:
        buffer_size: Samples that are kept in all.
        batch_size: Samples drawn from them a step; None for as many as there are new ones in a full batch.
        buffer: ``reservoir`` or ``ring``.

    Raises:
        CurvlabError: A size is no whole number from 1, or there is no such buffer.
    """

    def __init__(
        self, buffer_size: int, *, batch_size: int | None = None, buffer: Literal["reservoir", "ring"] = "reservoir"
    ) -> None:
        if buffer not in ("reservoir", "ring"):
            raise CurvlabError(f"buffer is reservoir or ring, not {buffer!r}")
        check_whole("buffer_size", buffer_size)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        self.buffer_size, self.batch_size, self.buffer = buffer_size, batch_size, buffer

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``.

        Raises:
            CurvlabError: A ring has no place for each class of each task.
        """
        if self.buffer == "reservoir":
            self.memory: Reservoir | Ring = Reservoir(self.buffer_size)
            return
        rings = learner.outputs.classes
        if self.buffer_size < rings:
            raise CurvlabError(
                f"a ring of {self.buffer_size} samples has no place for each of the {rings} classes of the tasks: "
                f"its size must be at least {rings}"
            )
        self.memory = Ring(self.buffer_size // rings)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """See ``Strategy``."""
        drawn = self.memory.draw(self.batch_size or learner.batch_size, learner.generator)
        if learner.epoch == 0:
            self.memory.add({"x": batch.x, "y": batch.y, "task": batch.tasks}, learner.generator)
        if not drawn:
            return learner.loss(learner.model(batch.x), batch.y, batch.task)
        x, y = torch.cat([batch.x, drawn["x"]]), torch.cat([batch.y, drawn["y"]])
        return learner.loss(learner.model(x), y, torch.cat([batch.tasks, drawn["task"]]))
