"""Averaged gradient episodic memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlab.continual.buffers import Ring
from curvlab.continual.options import check_whole
from curvlab.continual.strategies.base import Strategy

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class AGEM(Strategy):
    """Averaged gradient episodic memory (Chaudhry et al., 2019): steps do not raise the loss of past samples.

    Where the gradient ``g`` and that of the loss of samples of earlier tasks, ``r``, have a negative product, ``g`` is
    replaced by ``g - (g'r / r'r) r`` (equation 11).

    Memory: the last samples of each class of each task, as they are seen for the first time.

    Args:
        per_class: Samples that are kept of each class of each task.
        batch_size: Samples of earlier tasks, drawn at every step, that the second gradient is of.

    Raises:
        CurvlabError: A size is no whole number from 1.
    """

    def __init__(self, per_class: int = 1, *, batch_size: int = 256) -> None:
        check_whole("per_class", per_class)
        check_whole("batch_size", batch_size)
        self.per_class, self.batch_size = per_class, batch_size

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        del learner
        self.memory = Ring(self.per_class)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """See ``Strategy``."""
        if learner.epoch == 0:
            self.memory.add({"x": batch.x, "y": batch.y, "task": batch.tasks})
        return super().loss(learner, batch)

    def after_backward(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        past = self.memory.draw(self.batch_size, learner.generator, before=learner.task)
        if not past:
            return
        parameters = list(learner.parameters.values())
        loss = learner.loss(learner.model(past["x"]), past["y"], past["task"])
        gradients, of_past = [], []
        for p, of_p in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if of_p is not None:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                gradients.append(p.grad)
                of_past.append(of_p)
        project_(gradients, of_past)


def project_(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Take out of a gradient, in place, what is against a reference, both given in parts."""
    product = sum(map(_dot, gradients, reference))
    if product < 0:
        share = product / sum(map(_dot, reference, reference))
        for part, of_part in zip(gradients, reference, strict=True):
            part.sub_(of_part, alpha=share)


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))
