"""The state of a run after each of its tasks, in one file, and how much memory a method holds."""

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
from curvlab.parameters import ParameterSpace
from curvlab.training.checkpoint import CheckpointFile, model_tensors
from curvlab.training.options import Training

# What a method may hold besides tensors and plain values: a checkpoint is read without running anything else.
_HELD = (*CurvatureMatrix.kinds.values(), Info, HomogeneousWeight, Eigenbasis, Factors, ParameterSpace, slice, *STORED)
_BUFFERS = (Reservoir, Ring)
_PLAIN = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)


def read(file: CheckpointFile, began: str) -> dict[str, Any] | None:
    """Return what was last written, each tensor on the kind of device that it was on; None if there is no file.

    Args:
        file: Of the run.
        began: What ``weights`` returned of the model before the first task.

    Raises:
        CurvlabError: The file cannot be read, or belongs to another run; the message says what differs.
    """
    with safe_globals([*_HELD, *_BUFFERS]):
        states = file.read(map_location=None)
    if states is not None and states["began"] != began:
        raise CurvlabError(
            f"the run in checkpoint {file.path} began from other weights: build the model as it was then (one that was "
            "trained already is another), delete the checkpoint or choose another file"
        )
    return states


def weights(model: nn.Module) -> str:
    """Return a SHA-256 (hex) of all parameters and buffers of a model, those of a point of linearization included."""
    digest = hashlib.sha256()
    for name, tensor in model_tensors(model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_training(trainings: Sequence[Training]) -> dict[str, Any]:
    """Return the options of the training by name, with the length of each task, and its batch size where they differ.

    Args:
        trainings: The options of each task.
    """
    options = trainings[0].describe()
    del options["epochs"], options["steps"]
    length = "epochs" if trainings[0].steps is None else "steps"
    options[length] = tuple(getattr(training, length) for training in trainings)
    sizes = [training.batch_size for training in trainings]
    return options | {"batch_size": tuple(sizes) if len(set(sizes)) > 1 else sizes[0]}


def describe(strategy: Strategy) -> str:
    """Describe a method by its options, the same in every process; what is no plain value is named by its type."""
    options = ", ".join(
        f"{name}={value!r}" if _foreign(value, _PLAIN) is None else f"{name}: {type(value).__name__}"
        for name, value in vars(strategy).items()
    )
    return f"{type(strategy).__name__}({options})"


def check_held(strategy: Strategy, record: Mapping[str, Any]) -> None:
    """Require that a checkpoint can be read again with what the method holds and the record of a task.

    Raises:
        CurvlabError: There is something else in them; the message names it.
    """
    for owner, held in ((type(strategy).__name__, strategy.state()), ("the record of a task", record)):
        for name, value in held.items():
            foreign = _foreign(value, (*_PLAIN, Tensor, nn.Parameter, *_HELD, *_BUFFERS))
            if foreign is not None:
                way_out = "" if held is record else ", or override state and restore"
                raise CurvlabError(
                    f"{name} of {owner} holds a {foreign.__name__}, which a checkpoint does not keep: make it tensors "
                    f"or plain values{way_out}"
                )


def bytes_held(state: Any) -> int:
    """Return the bytes of all tensors in a state, memory that they share counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}
    return sum(storages.values())


def _foreign(value: object, known: tuple[type, ...]) -> type | None:
    """Return a type in lists, tuples and dictionaries that is not a known one."""
    if type(value) in (list, tuple, dict):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
        return next((found for part in parts if (found := _foreign(part, known)) is not None), None)
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
