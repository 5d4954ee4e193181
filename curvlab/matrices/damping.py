"""Damping: a number, or one number per parameter, that is added to the diagonal before a matrix is inverted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from curvlab.checks import real_number
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.parameters import ParameterSpace, Pattern, is_pattern, matches

#: The ``damping`` of ``solve``, ``inverse_diagonal``, ``det``, ``logdet`` and ``sample``: a number; a flat ``(P,)``; a
#: dict of numbers and tensors with the shape of the parameter, by parameter name or pattern of names (a glob pattern or
#: a compiled regular expression for whole names); or a ``FactoredDamping``. In a dict, a name counts before a pattern,
#: and every parameter needs one entry.
DampingLike = Union[float, Tensor, Mapping[Pattern, float | Tensor], "FactoredDamping"]


@dataclass(frozen=True)
class FactoredDamping:
    """Damping of Kronecker factors in place of their product: ``(S + sqrt(d) / pi I) (x) (A + pi sqrt(d) I)``.

    This is the factored Tikhonov regularization of K-FAC (Martens and Grosse, 2015, Section 6.3), with
    ``pi = sqrt((tr A / dim A) / (tr S / dim S))``. It differs from the block ``S (x) A + d I`` by
    ``pi sqrt(d) S (x) I + sqrt(d) / pi I (x) A``, so that its inverse is smaller. A number as ``damping`` is exact, at
    the same cost; use this class to compare with implementations of K-FAC that invert the damped factors. A block that
    is zero becomes ``d I``, the limit of small factors.

    It is for ``kfac`` and ``tkfac`` with one pair of factors per layer, alone or as parts of a ``Composite``, whose
    other parts get ``d I``.

    Attributes:
        damping: ``d``, at least 0: a number, or one number per layer in the forms of ``DampingLike``.

    Examples:
        >>> from curvlab.matrices import KFAC, Info
        >>> from curvlab.matrices.kronecker import Factors
        >>> space = ParameterSpace(("fc.weight",), ((1, 1),))
        >>> info = Info("fisher", "kfac", "cross_entropy", "torch", 10)
        >>> matrix = KFAC({"fc": Factors(torch.full((1, 1, 1), 4.0), torch.ones(1, 1, 1))}, space, info)
        >>> matrix.det(damping=0.25), matrix.det(damping=FactoredDamping(0.25))  # 4 + 0.25, (4 + 1) (1 + 0.25)
        (tensor(4.2500), tensor(6.2500))
    """

    damping: float | Tensor | Mapping[Pattern, float | Tensor]


@dataclass(frozen=True)
class Damping:
    """A diagonal matrix ``D``, checked, with the dtype and device of the matrix to which it is added.

    Attributes:
        space: The parameters.
        parts: A number ``()`` or a flat ``(p,)`` by parameter name.
        text: The damping in error messages.
        factored: Whether it is a ``FactoredDamping``.
    """

    space: ParameterSpace
    parts: Mapping[str, Tensor]
    text: str
    factored: bool = False

    @classmethod
    def of(cls, damping: DampingLike, space: ParameterSpace, dtype: torch.dtype, device: torch.device) -> "Damping":
        """Check and convert the ``damping`` of a user.

        Raises:
            CurvlabError: It is not a finite real number, a vector of this space, a dict of these by parameter name or
                pattern, or a ``FactoredDamping`` of one of these.
        """
        if isinstance(damping, FactoredDamping):
            factors = cls.of(damping.damping, space, dtype, device)
            if factors.factored:
                raise CurvlabError("a factored damping needs a number, or one number per layer, not a factored damping")
            return replace(factors, text=f"{factors} (factored)", factored=True)
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

    @property
    def exact(self) -> "Damping":
        """The diagonal matrix itself, also if it is a ``FactoredDamping``."""
        return replace(self, factored=False)

    def over(self, names: Sequence[str]) -> Tensor:
        """Return the damping of some parameters: ``()`` if all have the same number, else flat, in the order of names.

        A vector that requires a gradient stays a vector, because the gradient is with respect to each entry.

        Raises:
            UnsupportedError: It is a ``FactoredDamping``, which is not a diagonal matrix.
        """
        if self.factored:
            raise UnsupportedError(
                "a factored damping needs a kfac or tkfac matrix, whose Kronecker factors it damps: give its number, "
                "which is added to the diagonal"
            )
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
    patterns = [key for key in damping if key not in space.slices and is_pattern(key)]
    found = {
        name: [name] if name in damping else [pattern for pattern in patterns if matches(pattern, name)]
        for name in space.names
    }
    missing = [name for name, keys in found.items() if not keys]
    known = {*space.names, *(pattern for pattern in patterns if any(matches(pattern, name) for name in space.names))}
    unknown = [key for key in damping if key not in known]
    if missing or unknown:
        raise CurvlabError(
            "damping by name needs one entry per parameter, by its name or by a pattern: missing "
            f"{missing}, unknown {unknown}"
        )
    for name, keys in found.items():
        if len(keys) > 1:
            raise CurvlabError(
                f"the damping of {name} is given by several patterns, {', '.join(map(_text, keys))}: give it by one "
                "pattern, or by its name, which counts before patterns"
            )
    # A tensor that is given for several parameters stays one object.
    tensors = {id(value): _tensor(value, f"damping of {_text(key)}", dtype, device) for key, value in damping.items()}
    parts = {}
    for name, shape in zip(space.names, space.shapes, strict=True):
        tensor = tensors[id(damping[found[name][0]])]
        if tensor.ndim and tuple(tensor.shape) != shape:
            raise CurvlabError(
                f"damping of {name} must be a number or a tensor of shape {shape}, not {tuple(tensor.shape)}"
            )
        parts[name] = tensor.reshape(-1) if tensor.ndim else tensor
    return parts


def _text(key: object) -> str:
    return f"re.compile({key.pattern!r})" if isinstance(key, re.Pattern) else str(key)


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
