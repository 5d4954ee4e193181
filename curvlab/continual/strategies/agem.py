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
    """Averaged gradient episodic memory (Chaudhry et al., 2019): steps do not increase the loss of past samples.

    If the gradient ``g`` and the gradient ``r`` of the loss of samples of earlier tasks have a negative inner product,
    ``g`` is replaced by ``g - (g'r / r'r) r`` (equation 11).

    Memory: the most recent samples of each class of each task, added in the first epoch.

    Args:
        per_class: Number of stored samples per class of a task.
        batch_size: Number of samples of earlier tasks, drawn at every step, for the gradient ``r``.

    Raises:
        CurvlabError: A size is not a whole number from 1.
    """

    def __init__(self, per_class: int = 1, *, batch_size: int = 256) -> None:
        check_whole("per_class", per_class)
        check_whole("batch_size", batch_size)
        self.per_class, self.batch_size = per_class, batch_size

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        del learner
        self.memory = Ring(self.per_class)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Implement the hook of ``Strategy``."""
        if learner.epoch == 0:
            self.memory.add({"x": batch.x, "y": batch.y, "task": batch.tasks})
        return super().loss(learner, batch)

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        past = self.memory.draw(self.batch_size, learner.generator, before=learner.task)
        if not past:
            return
        parameters = list(learner.parameters.values())
        loss = learner.loss(learner.model(past["x"]), past["y"], past["task"])
        gradients, past_gradients = [], []
        for p, past_gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if past_gradient is not None:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                gradients.append(p.grad)
                past_gradients.append(past_gradient)
        project_(gradients, past_gradients)


def project_(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Project a gradient, in place, so that its inner product with a reference is not negative; both are in parts."""
    product = sum(map(_dot, gradients, reference))
    if product < 0:
        share = product / sum(map(_dot, reference, reference))
        for part, reference_part in zip(gradients, reference, strict=True):
            part.sub_(reference_part, alpha=share)


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))
