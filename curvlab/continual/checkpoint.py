"""Checkpoint of a run after each task, and the memory that a method uses."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from curvlab.continual.buffers import Reservoir, Ring
from curvlab.continual.strategies.base import Strategy
from curvlab.errors import CurvlabError
from curvlab.matrices import CurvatureMatrix, Info
from curvlab.matrices.kronecker import Eigenbasis, Factors
from curvlab.matrices.layers import HomogeneousWeight
from curvlab.matrices.penalty import STORED
from curvlab.parameters import ParameterSpace, to_plain_selection
from curvlab.training.checkpoint import CheckpointFile, model_tensors
from curvlab.training.options import Training

# Types that a method may store besides tensors and plain values: loading a checkpoint runs no other code.
_LIBRARY = (Info, HomogeneousWeight, Eigenbasis, Factors, ParameterSpace, slice)
_STORABLE = (*CurvatureMatrix.kinds.values(), *_LIBRARY, *STORED)
_BUFFERS = (Reservoir, Ring)
_PLAIN = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)


def read(file: CheckpointFile, began: str) -> dict[str, Any] | None:
    """Return the last state that was written, each tensor on its former type of device; None if there is no file.

    Args:
        file: Checkpoint file of the run.
        began: Result of ``hash_weights`` for the model before the first task.

    Raises:
        CurvlabError: The file cannot be read, or belongs to another run; the message names the differences.
    """
    with safe_globals([*_STORABLE, *_BUFFERS]):
        states = file.read(map_location=None)
    if states is not None and states["began"] != began:
        raise CurvlabError(
            f"the run in checkpoint {file.path} started from other weights: pass the model with its initial weights "
            "(not the trained model), delete the checkpoint or choose another file"
        )
    return states


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all parameters and buffers of a model, including the point of linearization."""
    digest = hashlib.sha256()
    for name, tensor in model_tensors(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_training(trainings: Sequence[Training]) -> dict[str, Any]:
    """Return the training options by name, with the length of each task, and the batch sizes if they differ.

    Args:
        trainings: Options of each task.
    """
    options = trainings[0].describe()
    del options["epochs"], options["steps"]
    length = "epochs" if trainings[0].steps is None else "steps"
    options[length] = tuple(getattr(training, length) for training in trainings)
    sizes = [training.batch_size for training in trainings]
    return options | {"batch_size": tuple(sizes) if len(set(sizes)) > 1 else sizes[0]}


def name_parameters(strategy: Strategy, model: nn.Module) -> None:
    """Replace functions and regular expressions in the option ``params`` of a method by the names that they select.

    Names can be stored in a checkpoint, and compared with those of a run that continues from it.

    Raises:
        CurvlabError: One selects no trainable parameter of the model.
    """
    for options in (vars(strategy), vars(strategy).get("curvature")):
        if isinstance(options, dict) and "params" in options:
            options["params"] = to_plain_selection(options["params"], model)


def describe(strategy: Strategy) -> str:
    """Return a description of a method by its options, equal in every process; other than plain values, only types."""
    options = ", ".join(
        f"{name}={value!r}" if _find_foreign_type(value, _PLAIN) is None else f"{name}: {type(value).__name__}"
        for name, value in vars(strategy).items()
    )
    return f"{type(strategy).__name__}({options})"


def check_storable(strategy: Strategy, record: Mapping[str, Any]) -> None:
    """Check that the state of the method and the record of a task can be restored from a checkpoint.

    Raises:
        CurvlabError: One contains an object of another type; the message names it.
    """
    for owner, values in ((type(strategy).__name__, strategy.state()), ("the record of a task", record)):
        for name, value in values.items():
            foreign = _find_foreign_type(value, (*_PLAIN, Tensor, nn.Parameter, *_STORABLE, *_BUFFERS))
            if foreign is not None:
                way_out = "" if values is record else ", or override state and restore"
                raise CurvlabError(
                    f"{name} of {owner} holds a value of type {foreign.__name__}, which a checkpoint cannot store: use "
                    f"tensors or plain values{way_out}"
                )


def count_bytes(state: Any) -> int:
    """Return the total bytes of all tensors in a state; shared memory is counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}
    return sum(storages.values())


def _find_foreign_type(value: object, known: tuple[type, ...]) -> type | None:
    """Return the first type in nested lists, tuples and dictionaries that is not known; None if all are known."""
    if type(value) in (list, tuple, dict):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
        return next((found for part in parts if (found := _find_foreign_type(part, known)) is not None), None)
    return None if type(value) in known else type(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value))
