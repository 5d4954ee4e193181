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
    """Dark experience replay, and with ``beta`` DER++ (Buzzega et al., 2020): past samples keep the outputs they had.

    Minimised is ``loss + alpha * mean (h - h_then)^2 + beta * loss of past samples`` (equations 5 and 6). The
    first mean is over samples and outputs, as in the authors' code, whose values of ``alpha`` are meant for that; the
    equation sums over outputs. It is over the outputs that counted when the sample was seen. The two terms have draws
    of their own; all samples go through the network in one pass, where that code has one for each (which is another
    thing with BatchNorm only).

    Every sample of every step is offered to the memory, a reservoir, with the outputs of that step. In several epochs
    one can so come in more than once, with other outputs: those of the first epoch alone would be of a network that has
    hardly learnt them.

    With a ``growing`` head a sample keeps the outputs of the classes that had come by then, so that nothing is kept of
    the outputs of later classes. The authors have all outputs from the start: that is ``head="single"``.

    Memory: at most ``buffer_size`` samples with their outputs.

    Args:
        buffer_size: Samples that are kept.
        alpha: Weight of the outputs.
        beta: Weight of the labels; 0 for DER.
        batch_size: Samples of a draw; None for as many as there are new ones in a full batch.

    Raises:
        CurvlabError: A size is no whole number from 1, or a weight is negative.
    """

    def __init__(self, buffer_size: int, *, alpha: float, beta: float = 0.0, batch_size: int | None = None) -> None:
        check_number("alpha", alpha)
        check_number("beta", beta)
        check_whole("buffer_size", buffer_size)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        self.buffer_size, self.alpha, self.beta, self.batch_size = buffer_size, alpha, beta, batch_size

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        del learner
        self.memory = Reservoir(self.buffer_size)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """See ``Strategy``."""
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
        counted = learner.outputs.counting(then["task"], now=None)
        if counted is None:
            return F.mse_loss(outputs, then["outputs"])
        squares = (outputs - then["outputs"]).square() * counted
        of_samples: Tensor = squares.sum(1) / counted.sum(1)
        return of_samples.mean()
