"""Inputs and targets for training: checks against the model and the loss, and selection of batches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError, first_line
from curvlab.likelihoods import Likelihood

Samples = tuple[Tensor, Tensor]


def check_samples(model: nn.Module, data: Samples, loss: Likelihood, what: str) -> None:
    """Check that the samples are finite and fit the model and the loss.

    Args:
        model: Any module with one output tensor ``(N, C)``; it is called on one sample, in its current mode.
        data: Inputs ``(N, ...)`` and targets ``(N, ...)``.
        loss: The loss for these targets.
        what: Name of the samples in error messages: ``"training"`` or ``"evaluation"``.

    Raises:
        CurvlabError: There are no samples, the lengths differ, a value is NaN or infinite, a shape or type does not
            fit, or a label is out of range.
    """
    if (
        not isinstance(data, (tuple, list))
        or len(data) != 2
        or not all(isinstance(part, Tensor) and part.ndim > 0 for part in data)
    ):
        raise CurvlabError(
            f"the {what} data must be a pair of tensors (inputs, targets) with one row per sample; convert arrays and "
            "lists with torch.as_tensor"
        )
    inputs, targets = data
    if len(inputs) != len(targets):
        raise CurvlabError(f"the {what} data have {len(inputs)} inputs but {len(targets)} targets; give as many")
    if len(inputs) == 0:
        raise CurvlabError(f"the {what} data have no samples; give at least one")
    for name, part in (("inputs", inputs), ("targets", targets)):
        if not is_finite(part):
            first = int(torch.isfinite(part.flatten()).logical_not().nonzero()[0]) // part[0].numel()
            raise CurvlabError(f"the {what} {name} hold NaN or infinite values, first in sample {first}")
    with translate_model_errors(f"cannot take the {what} inputs"), torch.no_grad():
        outputs = model(take(data, slice(0, 1), reference(model))[0])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise CurvlabError(f"the model must return one tensor of shape (N, C); for one sample it returned {shape}")
    # The check of all targets needs only the shape of the outputs, so one number is expanded to it.
    loss.check(outputs.new_zeros(()).expand(len(targets), outputs.shape[1]), targets)


def require_module(model: object) -> None:
    """Check that the model is a module.

    Raises:
        CurvlabError: It is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise CurvlabError(f"the model must be a torch.nn.Module, not {given}")


def check_weights(model: nn.Module, when: str) -> None:
    """Check that parameters and buffers are finite.

    Args:
        model: The model to check.
        when: End of the error message, such as ``"at the start of training"``.

    Raises:
        CurvlabError: A tensor holds NaN or infinite values; the message names it.
    """
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if not is_finite(tensor):
                raise CurvlabError(f"{kind} {name} holds NaN or infinite values {when}")


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite; always true for integers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def reference(model: nn.Module) -> Tensor:
    """Return a tensor with the device and floating-point dtype of the model: its first parameter."""
    return next(model.parameters(), torch.zeros(()))


def take(data: Samples, index: Tensor | slice, like: Tensor) -> Samples:
    """Return samples by index, with the device and floating-point dtype of ``like``; class labels become int64."""
    inputs, targets = (part[index].to(like.device, like.dtype if part.is_floating_point() else None) for part in data)
    return inputs, targets if targets.is_floating_point() else targets.long()


#: Exceptions that a model raises on inputs that do not fit it, or when memory is insufficient.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)


def make_model_error(cause: Exception, what: str, subject: str = "the model") -> CurvlabError:
    """Return an error for an exception that a model raised: ``<subject> <what>: <first line of the cause>``."""
    reason = first_line(cause)
    if reason.startswith("Expected more than 1 value per channel"):
        reason = "batch normalisation needs more than one sample per batch; choose another batch_size"
    return CurvlabError(f"{subject} {what}: {reason}")


@contextmanager
def translate_model_errors(what: str) -> Iterator[None]:
    """Context that replaces exceptions of a model (shapes, dtypes, memory) by one sentence, with the cause kept.

    Raises:
        CurvlabError: The result of ``make_model_error``.
    """
    try:
        yield
    except MODEL_ERRORS as error:
        raise make_model_error(error, what) from error
