"""Parameter spaces: the names and shapes of the trainable parameters of a model, and their flat vectors."""

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from glob import escape
from inspect import signature
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError
from curvlab.text import did_you_mean

Vectors = Tensor | Mapping[str, Tensor]

#: A pattern of parameter names: a glob pattern (``"fc*.weight"``) or a compiled regular expression. Both have to match
#: the whole name.
Pattern = str | re.Pattern[str]
#: ``params`` of all functions: a pattern, a function ``(name, parameter) -> bool``, or a sequence of these, which
#: selects each parameter that one of them selects.
Selector = Pattern | Callable[[str, nn.Parameter], bool]
Selection = Selector | Sequence[Selector]


def is_pattern(value: object) -> TypeGuard[Pattern]:
    """Return whether a value is a glob pattern or a regular expression for texts."""
    return isinstance(value, str) or (isinstance(value, re.Pattern) and isinstance(value.pattern, str))


def matches(pattern: Pattern, name: str) -> bool:
    r"""Return whether a pattern matches a whole parameter name.

    Examples:
        >>> matches("fc*.weight", "fc1.weight"), matches(re.compile(r"fc\d"), "fc1.weight")
        (True, False)
    """
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.fullmatch(name) is not None


def check_selection(select: Selection | None) -> Selector | list[Selector] | None:
    """Return a selection whose types have been checked; a sequence as a list.

    Raises:
        CurvlabError: It is empty, or a part of it is not a pattern or a function.
    """
    if select is None or _is_selector(select):
        return select
    several: Any = select
    selectors: list[Selector] = list(several) if isinstance(several, Iterable) else [several]
    if not all(map(_is_selector, selectors)):
        raise CurvlabError(
            "params must be patterns of names, such as 'fc*.weight', compiled regular expressions or functions of name "
            f"and parameter, not {describe_value(select)}"
        )
    if not selectors:
        raise CurvlabError("params is empty: give at least one pattern of parameter names")
    return selectors


def to_plain_selection(select: Any, model: nn.Module) -> Any:
    """Return glob patterns that select the same parameters of a model, in place of functions and regular expressions.

    Anything else, such as glob patterns and None, is returned unchanged.

    Raises:
        CurvlabError: As ``ParameterSpace.of``.
    """
    selectors = select if isinstance(select, (list, tuple)) else [select]
    if all(isinstance(selector, str) for selector in selectors) or not all(map(_is_selector, selectors)):
        return select
    return [escape(name) for name in ParameterSpace.of(model, select).names]


def _is_selector(value: object) -> TypeGuard[Selector]:
    return is_pattern(value) or (callable(value) and not isinstance(value, (type, nn.Module)))


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
    def of(cls, model: nn.Module, select: Selection | None = None) -> "ParameterSpace":
        r"""Return the space of the trainable parameters of a model.

        Args:
            model: Any module.
            select: Glob patterns of parameter names (``"fc*.weight"``), compiled regular expressions for whole names,
                or functions ``(name, parameter) -> bool``: one or several, each of which has to select a trainable
                parameter. None for all.

        Raises:
            CurvlabError: No parameter is trainable, the sequence is empty, or a pattern or function selects nothing.

        Examples:
            >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
            >>> ParameterSpace.of(model, re.compile(r"1\..*")).names
            ('1.weight', '1.bias')
            >>> ParameterSpace.of(model, lambda name, parameter: parameter.ndim == 2).names
            ('0.weight', '1.weight')
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise CurvlabError(f"{type(model).__name__} has no trainable parameter: set requires_grad on at least one")
        checked = check_selection(select)
        if checked is not None:
            selectors = checked if isinstance(checked, list) else [checked]
            selected = set[str]().union(*(_select(selector, trainable) for selector in selectors))
            trainable = {name: p for name, p in trainable.items() if name in selected}
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


def _select(selector: Selector, trainable: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names that a pattern or function selects.

    Raises:
        CurvlabError: It selects nothing, or a function does not return a bool.
    """
    if isinstance(selector, (str, re.Pattern)):
        names = [name for name in trainable if matches(selector, name)]
        if not names:
            raise CurvlabError(f"no trainable parameter matches {_describe(selector)}{_hint(selector, trainable)}")
        return names
    with suppress(ValueError):  # a few functions of other languages have no signature
        try:
            signature(selector).bind("", nn.Parameter())
        except TypeError as error:
            raise CurvlabError(
                f"a function in params takes two arguments, the name and the parameter, but this one does not: {error}"
            ) from error
    answers = {name: selector(name, parameter) for name, parameter in trainable.items()}
    for name, answer in answers.items():
        if not isinstance(answer, bool):
            raise CurvlabError(
                f"a function in params must return a bool for each name and parameter, but for {name} it returned "
                f"{describe_value(answer)}"
            )
    if not any(answers.values()):
        raise CurvlabError(
            f"the function in params selects none of the {len(trainable)} trainable parameters; the first one is "
            f"{next(iter(trainable))!r}"
        )
    return [name for name, answer in answers.items() if answer]


def _describe(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else f"the regular expression {pattern.pattern!r}"


def _hint(pattern: Pattern, names: Iterable[str]) -> str:
    if isinstance(pattern, re.Pattern):
        part = next((name for name in names if pattern.search(name)), None)
        if part is not None:
            return f", which has to match a whole name, not a part of {part!r}"
        return f"; the first one is {next(iter(names))!r}"
    return did_you_mean(pattern, names) or f"; the first one is {next(iter(names))!r}"
