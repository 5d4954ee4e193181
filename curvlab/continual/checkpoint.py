"""The state of a run after each of its tasks, in one file, and how much memory a method holds."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.serialization import safe_globals

from curvlab.continual.buffers import Reservoir, Ring
from curvlab.matrices import CurvatureMatrix, Info, Penalty
from curvlab.matrices.kronecker import Eigenbasis, Factors
from curvlab.matrices.layers import Layer
from curvlab.matrices.penalty import _Term
from curvlab.parameters import ParameterSpace
from curvlab.training.checkpoint import CheckpointFile

# What a method may hold besides tensors and plain values: a checkpoint is read without running anything else.
_HELD = (*CurvatureMatrix.kinds.values(), Info, Layer, Eigenbasis, Factors, ParameterSpace, Penalty, _Term)
_BUFFERS = (Reservoir, Ring)


def read(file: CheckpointFile) -> dict[str, Any] | None:
    """Return what was last written, each tensor on the kind of device that it was on; None if there is no file.

    Raises:
        CurvlabError: The file cannot be read, or belongs to another run; the message says what differs.
    """
    with safe_globals([*_HELD, *_BUFFERS]):
        return file.read(map_location=None)


def bytes_held(state: Any) -> int:
    """Return the bytes of all tensors in a state, memory that they share counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}
    return sum(storages.values())


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
