"""Dark experience replay."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from curvlab.continual.buffers import Reservoir, Rows
from curvlab.continual.options import check_number, check_whole
from curvlab.continual.strategies.base import Strategy

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class DER(Strategy):
    """Dark experience replay, and with ``beta`` DER++ (Buzzega et al., 2020): past samples keep their outputs.

    The objective is ``loss + alpha * mean (h - h_then)^2 + beta * loss of past samples`` (equations 5 and 6). The first
    mean is over samples and outputs, as in the authors' code, for which their values of ``alpha`` are chosen; the
    equation has a sum over outputs. It uses the outputs that were active when the sample was stored. The samples of the
    two terms are drawn separately. All samples go through the network in one pass; the authors' code has one pass for
    each term, which differs only with BatchNorm.

    Every sample of every step is offered to the memory, a reservoir, with the outputs of that step. With several
    epochs, a sample can be stored more than once, with different outputs. (Outputs of the first epoch alone would come
    from a network that has hardly been trained on the task.)

    With a ``growing`` head, a sample is stored with the outputs of the classes so far, so that outputs of later classes
    are not constrained. The authors have all outputs from the start, which is ``head="single"``.

    Memory: at most ``buffer_size`` samples with their outputs.

    Args:
        buffer_size: Maximum number of stored samples.
        alpha: Weight of the distance to the stored outputs.
        beta: Weight of the loss of past samples; 0 for DER.
        batch_size: Number of samples per draw; None for the batch size of the task.

    Raises:
        CurvlabError: A size is not a whole number from 1, or a weight is negative.
    """

    def __init__(self, buffer_size: int, *, alpha: float, beta: float = 0.0, batch_size: int | None = None) -> None:
        check_number("alpha", alpha)
        check_number("beta", beta)
        check_whole("buffer_size", buffer_size)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        self.buffer_size, self.alpha, self.beta, self.batch_size = buffer_size, alpha, beta, batch_size

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        del learner
        self.memory = Reservoir(self.buffer_size)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Implement the hook of ``Strategy``."""
        count = self.batch_size or learner.batch_size
        dark, labelled = (self.memory.draw(count, learner.generator) if w else {} for w in (self.alpha, self.beta))
        inputs = [batch.x, *(drawn["x"] for drawn in (dark, labelled) if drawn)]
        outputs, *past = learner.model(torch.cat(inputs)).split([len(x) for x in inputs])
        loss = learner.loss(outputs, batch.y, batch.task)
        if dark:
            loss = loss + self.alpha * self._distance(learner, past[0], dark)
        if labelled:
            loss = loss + self.beta * learner.loss(past[-1], labelled["y"], labelled["task"])
        rows = {"x": batch.x, "y": batch.y, "task": batch.tasks, "outputs": outputs}
        self.memory.add(rows, learner.generator)
        return loss

    def _distance(self, learner: "Learner", outputs: Tensor, then: Rows) -> Tensor:
        active = learner.outputs.active_mask(then["task"], now=None)
        if active is None:
            return F.mse_loss(outputs, then["outputs"])
        squares = (outputs - then["outputs"]).square() * active
        distances: Tensor = squares.sum(1) / active.sum(1)
        return distances.mean()
