"""What ``fit`` is to do: its options and samples, checked before the first step."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvlab.checks import whole_number
from curvlab.errors import CurvlabError
from curvlab.losses import Loss
from curvlab.training.lengths import check_one_task, count_steps, get_batch_size
from curvlab.training.options import Training
from curvlab.training.samples import Samples, check_samples, check_weights, reference, require_module
from curvlab.training.state import modes_restored, random_state_restored


@dataclass(frozen=True)
class Plan:
    """What a run is to do, and when.

    Attributes:
        training: Its options, of one task.
        loss: What it minimises.
        data: Training inputs and targets.
        evaluation: Inputs and targets to evaluate on; None for none.
        evaluate_every: Steps between two records; None for an epoch.
        target: Evaluation accuracy at which the run stops; None for no such end.
        checkpoint_every: Steps between two checkpoints.

    Raises:
        CurvlabError: An option is out of its range, or two do not go together.
    """

    training: Training
    loss: Loss
    data: Samples
    evaluation: Samples | None
    evaluate_every: int | None
    target: float | None
    checkpoint_every: int

    def __post_init__(self) -> None:
        check_one_task(self.training)
        whole_number(self.checkpoint_every, "checkpoint_every", 1)
        if self.evaluate_every is not None:
            whole_number(self.evaluate_every, "evaluate_every", 1)
        if self.target is not None and (
            self.evaluation is None or self.loss.name != "cross_entropy" or not 0 < self.target <= 1
        ):
            raise CurvlabError(
                "target is an accuracy above 0 and at most 1; it needs evaluation data and the loss cross_entropy"
            )

    @property
    def batches(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.data[0]) / get_batch_size(self.training))

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return count_steps(self.training, self.batches)

    @property
    def record_every(self) -> int:
        """Steps between two records."""
        return self.evaluate_every or self.batches

    def check(self, model: nn.Module) -> None:
        """Require a model that can be trained, and samples that fit it and the loss.

        Raises:
            CurvlabError: One of these does not hold.
        """
        require_module(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise CurvlabError("the model has no trainable parameters (requires_grad is False for all)")
        check_weights(model, "at the start of training")
        with modes_restored(model), random_state_restored(reference(model).device):
            model.eval()
            check_samples(model, self.data, self.loss, "training")
            if self.evaluation is not None:
                check_samples(model, self.evaluation, self.loss, "evaluation")

    def describe(self) -> dict[str, Any]:
        """Return the options that a checkpoint must agree in, by name."""
        options = self.training.describe()
        if options["clip_norm"] is None:  # which older checkpoints do not have
            del options["clip_norm"]
        for name in ("lr_decay", "min_lr", "epochs"):
            del options[name]
        return options | {
            "loss": self.loss.name,
            "steps": self.steps,
            "evaluate_every": self.record_every,
            "target": self.target,
        }
