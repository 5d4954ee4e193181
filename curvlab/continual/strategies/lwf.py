"""Learning without forgetting: distillation from the network before the task."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.continual.options import check_number, check_positive
from curvlab.continual.strategies.base import Strategy
from curvlab.training.checkpoint import model_tensors

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner


class LwF(Strategy):
    """Learning without forgetting (Li and Hoiem, 2016): the outputs of old tasks on new samples are preserved.

    The objective is ``loss + strength * sum_i D_i``, with means over the batch. With cross-entropy, ``D_i`` is the
    Kullback-Leibler divergence from ``softmax(z / temperature)`` of the old network to that of the current network,
    over the outputs of old task ``i``. These are equations 2 and 3 up to a constant, without the factor
    ``temperature ** 2`` of some implementations. With squared error, ``D_i`` is half the squared distance of these
    outputs (Shon et al., 2022), without a temperature. With a single or growing head there is one ``D``, over the
    outputs of all classes so far.

    The old network is in eval mode. There is no warm-up of the new head.

    Memory: a copy of the network. Each step also needs its forward pass.

    Args:
        strength: Strength of the distillation.
        temperature: Temperature of both softmax functions.

    Raises:
        CurvlabError: The strength is negative, or the temperature is not positive.
    """

    def __init__(self, strength: float = 1.0, *, temperature: float = 2.0) -> None:
        check_number("strength", strength)
        check_positive("temperature", temperature)
        self.strength, self.temperature = strength, temperature

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        del learner
        self.old: nn.Module | None = None

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Implement the hook of ``Strategy``."""
        outputs = learner.model(batch.x)
        loss = learner.loss(outputs, batch.y, batch.task)
        if self.old is None or self.strength == 0:
            return loss
        with torch.no_grad():
            before = self.old(batch.x)
        for columns in self.columns:
            loss = loss + self.strength * self._distance(outputs[:, columns], before[:, columns], learner.loss_name)
        return loss

    def before_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.columns = [row.nonzero()[:, 0] for row in learner.outputs.past_masks(learner.task)]

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.old = copy.deepcopy(learner.model).eval().requires_grad_(False)

    def state(self) -> Mapping[str, Any]:
        """Implement the hook of ``Strategy``."""
        old = {} if self.old is None else model_tensors(self.old)
        return {"strength": self.strength, "temperature": self.temperature, "old": old}

    def restore(self, learner: "Learner", state: Mapping[str, Any]) -> None:
        """Implement the hook of ``Strategy``."""
        super().restore(learner, state)
        self.after_task(learner)  # for the last task before the checkpoint

    def _distance(self, outputs: Tensor, before: Tensor, loss: str) -> Tensor:
        if loss == "squared_error":
            return (outputs - before).square().sum() / (2 * len(outputs))
        new, old = (F.log_softmax(z / self.temperature, dim=1) for z in (outputs, before))
        return F.kl_div(new, old, reduction="batchmean", log_target=True)
