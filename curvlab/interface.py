"""The interface between data and model: inputs and targets of a batch, and the outputs of the model for them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.batches import Batch, Inputs, call_form, make_batch
from curvlab.errors import CurvlabError, UnsupportedError, type_and_line

Pair = tuple[Inputs, Tensor]
Forward = Callable[[Any, Any], Any]
Targets = Callable[[Any], Any]

_WAY_OUT = (
    "give forward=lambda model, batch: ... and targets=lambda batch: ... to Problem, which take the outputs and the "
    "targets from a batch"
)


@dataclass(frozen=True)
class Interface:
    """How a problem takes inputs and targets from a batch of the data, and outputs from the model.

    Without functions of the user: a batch is a pair of inputs and targets, or a mapping with the targets in ``labels``.
    A model takes a tensor as one argument; a mapping by keywords and a tuple by position, if its ``forward`` has such
    arguments, else as one argument. Its output is a tensor, or has ``logits``.

    Attributes:
        forward: The user's function of model and batch that returns the outputs; None for the default.
        targets: The user's function of the batch that returns the targets; None for the default.
        class_dim: Dimension of the outputs with the numbers of a term.
        moves_targets: Whether the targets have the dimensions of the outputs, so that ``class_dim`` is theirs, too.
        shift: Number of terms by which the outputs precede their labels, for models that predict the next token.
        decoder_inputs: Function of the labels that returns the ``decoder_input_ids``, for models with a decoder.
    """

    forward: Forward | None = None
    targets: Targets | None = None
    class_dim: int = -1
    moves_targets: bool = False
    shift: int = 0
    decoder_inputs: Callable[[Any], Any] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the outputs are the model's own outputs for one argument, with the terms in the last dimension."""
        return self.forward is None and self.class_dim == -1 and not self.shift

    def split(self, batch: Any, what: str) -> Pair:
        """Return the inputs and targets of a batch.

        Args:
            batch: A batch in the form of the data.
            what: What it is, for error messages.

        Raises:
            CurvlabError: It has no inputs and targets, or the user's function fails.
        """
        if self.targets is not None:
            try:
                targets = self.targets(batch)
            except Exception as error:
                raise CurvlabError(f"targets(batch) raises an error on {what}: {type_and_line(error)}") from error
            own_inputs = self.forward is None and (is_pair(batch) or _has_labels(batch))
            inputs = self._without_targets(batch) if own_inputs else batch
        elif is_pair(batch) or _has_labels(batch):
            targets = batch["labels"] if _has_labels(batch) else batch[1]
            inputs = batch if self.forward is not None else self._without_targets(batch)
        else:
            raise CurvlabError(f"{what} is not a pair (inputs, targets) but {describe(batch)}: {_WAY_OUT}")
        targets = _to_tensor(targets, f"the targets of {what}")
        if self.moves_targets and targets.ndim > 2:
            targets = targets.movedim(self.class_dim, -1)
        if self.shift and targets.ndim > 1:
            targets = targets[:, self.shift :]
        if isinstance(inputs, Batch):
            return inputs, targets
        if isinstance(inputs, (Tensor, np.ndarray)):
            return _to_tensor(inputs, f"the inputs of {what}"), targets
        return make_batch(inputs, what), targets

    def _without_targets(self, batch: Any) -> Any:
        if not _has_labels(batch):
            return batch[0]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.decoder_inputs is not None and "decoder_input_ids" not in batch:
            inputs["decoder_input_ids"] = self.decoder_inputs(batch["labels"])
        return inputs

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Return the model's outputs, ``(N, *S, C)`` or ``(N,)``.

        Raises:
            UnsupportedError: They are not one tensor.
        """
        value = call_form(inputs)
        found = _call(model, value) if self.forward is None else self.forward(model, value)
        if self.forward is None:
            found = _logits(found)
        if not isinstance(found, Tensor):
            where = f"forward(model, batch) of {type(model).__name__}" if self.forward else type(model).__name__
            raise UnsupportedError(
                f"{where} must return one tensor (N, C) or (N, *S, C), not {type(found).__name__}: "
                + ("return the outputs that the loss takes" if self.forward else _WAY_OUT)
            )
        if self.class_dim != -1 and found.ndim > 1:
            if not -found.ndim <= self.class_dim < found.ndim or self.class_dim in (0, -found.ndim):
                raise UnsupportedError(
                    f"class_dim={self.class_dim} is not a dimension of outputs {tuple(found.shape)} after the samples"
                )
            found = found.movedim(self.class_dim, -1)
        return found[:, : -self.shift] if self.shift and found.ndim > 2 else found


def describe(batch: object) -> str:
    """Return a short description of a batch for error messages."""
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(str, list(batch)[:6]))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(part).__name__ for part in batch[:4])})"
    return f"a {type(batch).__name__}"


def is_pair(batch: object) -> bool:
    """Return whether a batch is a pair of inputs and targets."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    inputs, targets = batch
    arrays = (Tensor, np.ndarray)
    return isinstance(targets, arrays) or (isinstance(inputs, arrays) and isinstance(targets, list))


def _has_labels(batch: object) -> bool:
    return isinstance(batch, Mapping) and "labels" in batch


def _to_tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CurvlabError(f"{what} are {describe(value)}, from which no tensor can be made: give tensors") from error


def _call(model: nn.Module, value: Any) -> Any:
    signature = inspect.signature(_innermost(model).forward)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        try:
            signature.bind(**value)
        except TypeError:
            return model(value)
        return model(**value)
    if isinstance(value, (tuple, list)):
        try:
            signature.bind(*value)
        except TypeError:
            return model(value)
        return model(*value)
    return model(value)


def takes_labels(model: nn.Module) -> bool:
    """Return whether the model's forward may take ``labels``, from which it computes a loss: also any keywords."""
    parameters = inspect.signature(_innermost(model).forward).parameters
    return "labels" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def own_loss(model: nn.Module, batch: Mapping[str, Any], place: Callable[[Tensor], Tensor]) -> float | None:
    """Return the loss that a model computes from the labels of a batch; None if it returns none.

    Args:
        model: The model.
        batch: A batch with ``labels``.
        place: Function that returns a tensor on the device of the model and in its dtype.

    Raises:
        UnsupportedError: The model takes ``labels``, and raises an error.
    """
    inputs = make_batch(batch, "batch 0").map(place).value
    try:
        found = _call(model, inputs)
    except Exception as error:
        if "labels" in inspect.signature(_innermost(model).forward).parameters:
            raise UnsupportedError(
                f"{type(model).__name__} raises an error on the first batch with its labels: {type_and_line(error)}"
            ) from error
        return None  # a forward of any keywords, but not of these
    value = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else None


def two_dimensional(outputs: Tensor) -> Tensor:
    """Return outputs with a last dimension for the numbers of a term: ``(N,)`` is one number per sample."""
    return outputs.unsqueeze(1) if outputs.ndim == 1 else outputs


def _innermost(model: nn.Module) -> nn.Module:
    """Return the module inside a compiled one, whose ``forward`` has named arguments."""
    return model._modules.get("_orig_mod") or model


def _logits(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found
    if isinstance(found, Mapping) and "logits" in found:
        return found["logits"]
    return getattr(found, "logits", found) if is_dataclass(found) or hasattr(found, "logits") else found
