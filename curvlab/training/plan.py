"""Options and samples of ``fit``, checked before the first step."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvlab.checks import real_number, whole_number
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Likelihood
from curvlab.training.lengths import check_one_task, count_steps, get_batch_size
from curvlab.training.options import Training
from curvlab.training.samples import Samples, check_samples, check_weights, reference, require_module
from curvlab.training.state import fork_random_state, restore_modes


@dataclass(frozen=True)
class Plan:
    """Options and samples of a run.

    Attributes:
        training: Options of the training on one task.
        loss: The loss to minimise.
        data: Training inputs and targets.
        evaluation: Inputs and targets to evaluate on; None for no evaluation.
        evaluate_every: Number of steps between two records; None for one epoch.
        target: Evaluation accuracy at which the run stops; None to do all steps.
        checkpoint_every: Number of steps between two checkpoints.

    Raises:
        CurvlabError: An option is out of its range, or two options exclude each other.
    """

    training: Training
    loss: Likelihood
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
            self.evaluation is None
            or self.loss.name != "cross_entropy"
            or not 0 < real_number(self.target, "target") <= 1
        ):
            raise CurvlabError(
                "target must be an accuracy above 0 and at most 1, with evaluation data and the loss cross_entropy"
            )

    @property
    def batches(self) -> int:
        """Number of steps per epoch."""
        return math.ceil(len(self.data[0]) / get_batch_size(self.training))

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return count_steps(self.training, self.batches)

    @property
    def record_every(self) -> int:
        """Number of steps between two records."""
        return self.evaluate_every or self.batches

    def check(self, model: nn.Module) -> None:
        """Check that the model can be trained and that the samples fit the model and the loss.

        Raises:
            CurvlabError: A check fails.
        """
        require_module(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise CurvlabError("the model has no trainable parameters; set requires_grad=True for at least one")
        check_weights(model, "at the start of training")
        with restore_modes(model), fork_random_state(reference(model).device):
            model.eval()
            check_samples(model, self.data, self.loss, "training")
            if self.evaluation is not None:
                check_samples(model, self.evaluation, self.loss, "evaluation")

    def describe(self) -> dict[str, Any]:
        """Return the options that must be equal to continue from a checkpoint, by name."""
        options = self.training.describe()
        if options["clip_norm"] is None:  # older checkpoints do not have it
            del options["clip_norm"]
        for name in ("lr_decay", "min_lr", "epochs"):
            del options[name]
        return options | {
            "loss": self.loss.name,
            "steps": self.steps,
            "evaluate_every": self.record_every,
            "target": self.target,
        }
