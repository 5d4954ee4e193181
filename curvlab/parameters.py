"""Parameter spaces: the names and shapes of the trainable parameters of a model, and their flat vectors."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError
from curvlab.text import did_you_mean

Vectors = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class ParameterSpace:
    """Names and shapes of parameters, in the order of ``model.named_parameters()``.

    A tied parameter appears once, under its first name; frozen parameters do not appear. A flat vector is the
    concatenation of the row-major flattened tensors.

    Examples:
        >>> space = ParameterSpace.of(nn.Linear(2, 3))
        >>> space.names, space.total
        (('weight', 'bias'), 9)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, select: Sequence[str] | str | None = None) -> "ParameterSpace":
        """Return the space of the trainable parameters of a model.

        Args:
            model: Any module.
            select: Glob patterns of parameter names (``"fc*.weight"``); None for all.

        Raises:
            CurvlabError: No parameter is trainable, the list of patterns is empty, or a pattern matches nothing.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise CurvlabError(f"{type(model).__name__} has no trainable parameter: set requires_grad on at least one")
        if select is not None:
            patterns = (
                [select] if isinstance(select, str) else list(select) if isinstance(select, Iterable) else [select]
            )
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise CurvlabError(
                    f"params must be patterns of names, such as 'fc*.weight', not {describe_value(select)}"
                )
            if not patterns:
                raise CurvlabError("params is empty: give at least one pattern of parameter names")
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in trainable):
                    hint = did_you_mean(pattern, trainable) or f"; the first one is {next(iter(trainable))!r}"
                    raise CurvlabError(f"no trainable parameter matches {pattern!r}{hint}")
            trainable = {n: p for n, p in trainable.items() if any(fnmatchcase(n, pat) for pat in patterns)}
        return cls(tuple(trainable), tuple(tuple(p.shape) for p in trainable.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def total(self) -> int:
        """Number of parameters ``P``."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The slice of each tensor in the flat vector."""
        ends = torch.tensor((0, *self.sizes)).cumsum(0).tolist()
        return {name: slice(a, b) for name, a, b in zip(self.names, ends[:-1], ends[1:], strict=True)}

    def restrict(self, names: Container[str]) -> "ParameterSpace":
        """Return the space of the parameters with the given names, in the order of this space."""
        kept = [(n, s) for n, s in zip(self.names, self.shapes, strict=True) if n in names]
        return ParameterSpace(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    def flatten(self, vectors: Vectors) -> Tensor:
        """Flatten a dict of parameter-shaped tensors to ``(P,)``; return a flat ``(P,)`` or ``(P, K)`` unchanged.

        Raises:
            CurvlabError: A name is missing or unknown, or a shape is wrong.
        """
        if isinstance(vectors, Tensor):
            if vectors.ndim not in (1, 2) or vectors.shape[0] != self.total:
                raise CurvlabError(
                    f"a vector of this space has shape ({self.total},) or ({self.total}, K); "
                    f"this one has {tuple(vectors.shape)}"
                )
            return vectors
        if set(vectors) != set(self.names):
            missing, unknown = sorted(set(self.names) - set(vectors)), sorted(set(vectors) - set(self.names))
            raise CurvlabError(
                f"the names of the vector must be those of the parameters: missing {missing}, unknown {unknown}"
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(vectors[name].shape) != shape:
                raise CurvlabError(f"{name} must have shape {shape} in the vector, not {tuple(vectors[name].shape)}")
        return torch.cat([vectors[name].reshape(-1) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat ``(P,)`` by parameter name, as views with the shapes of the parameters.

        Raises:
            CurvlabError: It is not a tensor ``(P,)``.
        """
        if not isinstance(vector, Tensor) or vector.shape != (self.total,):
            raise CurvlabError(f"a vector of this space has shape ({self.total},), not {describe_value(vector)}")
        return {
            name: vector[part].view(shape) for (name, part), shape in zip(self.slices.items(), self.shapes, strict=True)
        }
