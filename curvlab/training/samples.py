"""Inputs and targets for training: checked once against the model and the loss, then taken batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.losses import Loss

Samples = tuple[Tensor, Tensor]


def check_samples(model: nn.Module, data: Samples, loss: Loss, what: str) -> None:
    """Require that these samples are finite, that the model takes them and that the loss fits their targets.

    Args:
        model: Any module with one output tensor ``(N, C)``; it is run on one sample, in the mode it is in.
        data: Inputs ``(N, ...)`` and targets ``(N, ...)``.
        loss: The loss that they are for.
        what: What to call them in an error: ``"training"``, ``"evaluation"``.

    Raises:
        CurvlabError: No samples, lengths that differ, a value that is not finite, a shape or type that does
            not fit, a label out of range.
    """
    if (
        not isinstance(data, (tuple, list))
        or len(data) != 2
        or not all(isinstance(part, Tensor) and part.ndim > 0 for part in data)
    ):
        raise CurvlabError(
            f"the {what} data must be a pair of tensors (inputs, targets) with one row a sample; torch.as_tensor makes "
            "one of an array or a list"
        )
    inputs, targets = data
    if len(inputs) != len(targets):
        raise CurvlabError(f"the {what} data have {len(inputs)} inputs but {len(targets)} targets")
    if len(inputs) == 0:
        raise CurvlabError(f"the {what} data have no samples")
    for name, part in (("inputs", inputs), ("targets", targets)):
        if not is_finite(part):
            first = int(torch.isfinite(part.flatten()).logical_not().nonzero()[0]) // part[0].numel()
            raise CurvlabError(f"the {what} {name} hold NaN or infinite values, the first in sample {first}")
    with model_errors(f"cannot take the {what} inputs"), torch.no_grad():
        outputs = model(take(data, slice(0, 1), reference(model))[0])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise CurvlabError(f"the model must return one tensor (N, C); for one sample it returned {shape}")
    # The check of all targets needs the outputs' shape only, so one number is spread over it.
    loss.check(outputs.new_zeros(()).expand(len(targets), outputs.shape[1]), targets)


def require_module(model: object) -> None:
    """Require a module.

    Raises:
        CurvlabError: It is something else.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise CurvlabError(f"the model must be a torch.nn.Module, not {given}")


def check_weights(model: nn.Module, when: str) -> None:
    """Require finite parameters and buffers.

    Raises:
        CurvlabError: One holds NaN or infinite values; the message names it and says ``when``.
    """
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if not is_finite(tensor):
                raise CurvlabError(f"{kind} {name} holds NaN or infinite values {when}")


def is_finite(tensor: Tensor) -> bool:
    """Say whether every entry is finite; always so for integers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def reference(model: nn.Module) -> Tensor:
    """Return a tensor on the device and in the floating dtype of the model: its first parameter."""
    return next(model.parameters(), torch.zeros(()))


def take(data: Samples, index: Tensor | slice, like: Tensor) -> Samples:
    """Take samples by index, to the device and the floating dtype of ``like``; class labels as int64."""
    inputs, targets = (part[index].to(like.device, like.dtype if part.is_floating_point() else None) for part in data)
    return inputs, targets if targets.is_floating_point() else targets.long()


#: What a model raises on inputs that do not suit it, or for want of memory.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)


def model_error(cause: Exception, what: str, of: str = "the model") -> CurvlabError:
    """Return one sentence in place of what a model has raised: ``<of> <what>: <first line of the cause>``."""
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    if reason.startswith("Expected more than 1 value per channel"):
        reason = "a batch has one sample, of which batch normalisation has no variance: choose another batch_size"
    return CurvlabError(f"{of} {what}: {reason}")


@contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Turn what a model raises on its inputs (shapes, dtypes, memory) into one sentence, the cause kept.

    Raises:
        CurvlabError: As ``model_error`` returns it.
    """
    try:
        yield
    except MODEL_ERRORS as error:
        raise model_error(error, what) from error
