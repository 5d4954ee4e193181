"""Loss and accuracy of a model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvlab.checks import whole_number
from curvlab.errors import CurvlabError
from curvlab.likelihoods import Likelihood, get_likelihood
from curvlab.training.samples import Samples, check_samples, reference, require_module, take, translate_model_errors
from curvlab.training.state import fork_random_state, restore_modes


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: Mean loss per sample, in nats for likelihoods.
        accuracy: Fraction of samples classified correctly, 0 to 1; None for losses without classes.
    """

    loss: float
    accuracy: float | None

    def __str__(self) -> str:
        return f"loss {self.loss:.3g}" + ("" if self.accuracy is None else f", accuracy {self.accuracy:.1%}")


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: str = "cross_entropy", batch_size: int = 1000
) -> Evaluation:
    """Evaluate a model in eval mode; its modes and the random state are restored afterwards.

    Args:
        model: Any module with one output tensor ``(N, C)``.
        x: Inputs ``(N, ...)`` on any device; they are moved to the model batch by batch.
        y: Targets for the loss: class indices ``(N,)`` or values ``(N, C)``.
        loss: Name of a loss in ``curvlab.likelihoods``.
        batch_size: Samples per forward pass.

    Raises:
        CurvlabError: The samples do not fit the model or the loss, or the loss is not finite.

    Examples:
        >>> from torch import nn
        >>> evaluate(nn.Identity(), torch.eye(3), torch.tensor([0, 1, 0])).accuracy
        0.666...
    """
    batch_size = whole_number(batch_size, "batch_size", 1)
    criterion = get_likelihood(loss)
    require_module(model)
    with restore_modes(model):
        model.eval()
        check_samples(model, (x, y), criterion, "evaluation")
        return measure(model, (x, y), criterion, batch_size)


def measure(model: nn.Module, data: Samples, loss: Likelihood, batch_size: int = 1000) -> Evaluation:
    """Evaluate a model as ``evaluate`` does, on samples that have already been checked.

    Raises:
        CurvlabError: The loss is not finite, or the model fails on a batch.
    """
    classes = loss.name == "cross_entropy"
    like = reference(model)
    # The sums stay on the device, so that there is one synchronisation for all batches.
    total = torch.zeros((), dtype=torch.float64, device=like.device)
    correct = torch.zeros((), dtype=torch.int64, device=like.device)
    size = len(data[0])
    with (
        restore_modes(model),
        fork_random_state(like.device),
        torch.no_grad(),
        translate_model_errors("fails in evaluation"),
    ):
        model.eval()
        for start in range(0, size, batch_size):
            inputs, targets = take(data, slice(start, start + batch_size), like)
            outputs = model(inputs)
            total += loss.values(outputs, targets).sum(dtype=torch.float64)
            if classes:
                correct += (outputs.argmax(dim=1) == targets).sum()
    mean = float(total) / size
    if not math.isfinite(mean):
        raise CurvlabError(
            f"the loss on the evaluation data is {mean}: the outputs of the model overflow or contain NaN; "
            "check the weights and the scale of the inputs"
        )
    return Evaluation(mean, int(correct) / size if classes else None)
