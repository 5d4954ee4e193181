"""Damping: a number, or one number per parameter, that is added to the diagonal before a matrix is inverted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.checks import real_number
from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace

#: The ``damping`` of ``solve``, ``logdet`` and ``sample``: a number; a flat ``(P,)``; or a dict of numbers and tensors
#: with the shape of the parameter, by parameter name.
DampingLike = float | Tensor | Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Damping:
    """A diagonal matrix ``D``, checked, with the dtype and device of the matrix to which it is added.

    Attributes:
        space: The parameters.
        parts: A number ``()`` or a flat ``(p,)`` by parameter name.
        text: The damping in error messages.
    """

    space: ParameterSpace
    parts: Mapping[str, Tensor]
    text: str

    @classmethod
    def of(cls, damping: DampingLike, space: ParameterSpace, dtype: torch.dtype, device: torch.device) -> "Damping":
        """Check and convert the ``damping`` of a user.

        Raises:
            CurvlabError: It is not a finite real number, a vector of this space, or a dict of these by parameter name.
        """
        if isinstance(damping, Mapping):
            return cls(space, _by_name(damping, space, dtype, device), "diag(damping)")
        tensor = _tensor(damping, "damping, unless it is a tensor or a dict,", dtype, device)
        if tensor.ndim == 0:
            return cls(space, dict.fromkeys(space.names, tensor), f"{tensor.item():g} I")
        if tensor.shape != (space.total,):
            raise CurvlabError(
                f"damping must be a number, a vector of shape ({space.total},) or a dict by parameter name, not a "
                f"tensor of shape {tuple(tensor.shape)}"
            )
        return cls(space, dict(zip(space.names, tensor.split(list(space.sizes)), strict=True)), "diag(damping)")

    def over(self, names: Sequence[str]) -> Tensor:
        """Return the damping of some parameters: ``()`` if all have the same number, else flat, in the order of names.

        A vector that requires a gradient stays a vector, because the gradient is with respect to each entry.
        """
        parts = [self.parts[name] for name in names]
        if parts[0].ndim == 0 and all(part is parts[0] for part in parts):
            return parts[0]
        sizes = (self.space.slices[name] for name in names)
        flat = torch.cat([part.expand(size.stop - size.start) for part, size in zip(parts, sizes, strict=True)])
        one = not flat.requires_grad and len(flat) > 0 and bool((flat == flat[0]).all())
        return flat[0] if one else flat

    def __str__(self) -> str:
        """Return the text for error messages: ``0.1 I`` or ``diag(damping)``."""
        return self.text


def _by_name(
    damping: Mapping[Any, Any], space: ParameterSpace, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    missing = [name for name in space.names if name not in damping]
    unknown = [name for name in damping if name not in space.slices]
    if missing or unknown:
        raise CurvlabError(f"damping by name needs one entry per parameter: missing {missing}, unknown {unknown}")
    # A tensor that is given for several parameters stays one object.
    tensors = {id(value): _tensor(value, f"damping of {name}", dtype, device) for name, value in damping.items()}
    parts = {}
    for name, shape in zip(space.names, space.shapes, strict=True):
        tensor = tensors[id(damping[name])]
        if tensor.ndim and tuple(tensor.shape) != shape:
            raise CurvlabError(
                f"damping of {name} must be a number or a tensor of shape {shape}, not {tuple(tensor.shape)}"
            )
        parts[name] = tensor.reshape(-1) if tensor.ndim else tensor
    return parts


def _tensor(value: object, what: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return finite real numbers in the dtype and on the device of the matrix."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        value = torch.from_numpy(value.astype(np.float64))
    if not isinstance(value, Tensor):
        value = torch.tensor(real_number(value, what), dtype=torch.float64)
    if value.dtype == torch.bool or value.is_complex() or value.is_quantized or value.layout != torch.strided:
        raise CurvlabError(f"{what} must be dense and real, not a {value.layout} tensor of {value.dtype}")
    if value.is_meta or (value.ndim and value.device not in (device, torch.device("cpu"))):
        raise CurvlabError(f"{what} is on {value.device}, but the matrix is on {device}: move one of them with to()")
    value = value.to(device=device, dtype=dtype)
    if not bool(value.isfinite().all()):
        raise CurvlabError(
            f"{what} must be finite in {dtype}: it holds NaN, infinity or numbers outside the range of that dtype"
        )
    return value
