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
    """Learning without forgetting (Li and Hoiem, 2016): old outputs are to stay what they were on the new samples.

    Minimised is ``loss + strength * sum_i D_i``, the mean over the batch. With cross-entropy, ``D_i`` is the Kullback-
    Leibler divergence from the old network's ``softmax(z / temperature)`` to the present one's over the outputs
    of old task ``i``: equations 2 and 3 but for a constant, so without the factor ``temperature ** 2`` that some codes
    have. With squared error it is half the squared distance of these outputs (Shon et al., 2022), without a
    temperature. With a single or growing head there is one ``D``, over the outputs of all classes so far.

    The old network is in eval mode. The new head is not warmed up alone.

    Memory: a copy of the network, and its forward pass at every step.

    Args:
        strength: Of the distillation.
        temperature: Of both softmaxes.

    Raises:
        CurvlabError: The strength is negative, or the temperature is not positive.
    """

    def __init__(self, strength: float = 1.0, *, temperature: float = 2.0) -> None:
        check_number("strength", strength)
        check_positive("temperature", temperature)
        self.strength, self.temperature = strength, temperature

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        del learner
        self.old: nn.Module | None = None

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """See ``Strategy``."""
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
        """See ``Strategy``."""
        self.columns = [row.nonzero()[:, 0] for row in learner.outputs.learnt(learner.task)]

    def after_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        self.old = copy.deepcopy(learner.model).eval().requires_grad_(False)

    def state(self) -> Mapping[str, Any]:
        """See ``Strategy``."""
        old = {} if self.old is None else model_tensors(self.old)
        return {"strength": self.strength, "temperature": self.temperature, "old": old}

    def restore(self, learner: "Learner", state: Mapping[str, Any]) -> None:
        """See ``Strategy``."""
        super().restore(learner, state)
        self.after_task(learner)  # the task that was the last one then

    def _distance(self, outputs: Tensor, before: Tensor, loss: str) -> Tensor:
        if loss == "squared_error":
            return (outputs - before).square().sum() / (2 * len(outputs))
        new, old = (F.log_softmax(z / self.temperature, dim=1) for z in (outputs, before))
        return F.kl_div(new, old, reduction="batchmean", log_target=True)
