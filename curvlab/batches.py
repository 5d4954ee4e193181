"""Batches of any nesting of tensors with one row per sample: tuples, dicts, dataclasses, mappings of tokenizers."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError

_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Batch:
    """Tensors with one row per sample, in the form in which a model takes them.

    It has the few methods of a tensor that act on samples: ``len``, slices, ``split`` and ``clone``.

    Attributes:
        tensors: The tensors, in a fixed order.
        form: Function from such tensors to the form of the data.
        names: Where each tensor is in the data, for messages: ``['input_ids']``.
        constants: What is passed on with every sample, by place: numbers, texts and None, and tuples for lists of them.
    """

    tensors: tuple[Tensor, ...]
    form: Callable[[Sequence[Tensor]], Any]
    names: tuple[str, ...]
    constants: Mapping[str, Any]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.tensors[0])

    def __getitem__(self, samples: slice) -> "Batch":
        """Return some samples."""
        return self.map(lambda tensor: tensor[samples])

    @property
    def value(self) -> Any:
        """The batch in the form of the data."""
        return self.form(self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of samples, and then the other dimensions of all tensors."""
        return (len(self), *(size for tensor in self.tensors for size in tensor.shape[1:]))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch with a function of every tensor."""
        return replace(self, tensors=tuple(map(function, self.tensors)))

    def clone(self) -> "Batch":
        """Return a batch with copies of the tensors."""
        return self.map(torch.clone)

    def split(self, size: int) -> tuple["Batch", ...]:
        """Return consecutive parts of at most ``size`` samples."""
        parts = [tensor.split(size) for tensor in self.tensors]
        return tuple(replace(self, tensors=part) for part in zip(*parts, strict=True))


#: The inputs of some samples: one tensor, or several.
Inputs = Tensor | Batch


def make_batch(value: Any, what: str) -> Batch:
    """Return a batch in the form of the data as a ``Batch``.

    Args:
        value: A nesting of tuples, lists, dicts, other mappings and dataclasses. Its leaves are tensors or NumPy arrays
            with one row per sample; numbers, texts and None are passed on.
        what: What it is, for error messages: ``batch 3``.

    Raises:
        CurvlabError: A leaf is of another type, there is no tensor, the numbers of rows differ, or a list has a number
            or a text for every sample.
    """
    tensors: list[Tensor] = []
    names: list[str] = []
    constants: dict[str, Any] = {}
    form = _collect(value, "", what, tensors, names, constants)
    if not tensors:
        raise CurvlabError(f"{what} holds no tensor")
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.ndim:
            raise CurvlabError(f"{name or 'the tensor'} of {what} is one number, not one row per sample")
        if len(tensor) != len(tensors[0]):
            raise CurvlabError(
                f"{what} has {len(tensors[0])} rows in {names[0]} but {len(tensor)} in {name}: every tensor needs one "
                "row per sample, in its first dimension"
            )
    rows = len(tensors[0])
    for name, constant in constants.items():
        if isinstance(constant, tuple) and len(constant) == rows > 1:  # it would be passed on whole with every sample
            raise CurvlabError(
                f"{name or 'the value'} of {what} is a list of {rows} values, one per sample, which only a tensor can "
                "be: make it a tensor (or a tuple, if every sample needs all of it)"
            )
    return Batch(tuple(tensors), lambda given: form(iter(given)), tuple(names), constants)


def _collect(
    value: Any, where: str, what: str, tensors: list[Tensor], names: list[str], constants: dict[str, Any]
) -> Callable[[Iterator[Tensor]], Any]:
    """Collect the tensors and constants of a value; return the function that makes the value from its tensors."""
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        names.append(where)
        return next
    if isinstance(value, _CONSTANTS):
        constants[where] = value
        return lambda _: value
    if isinstance(value, list) and value and all(isinstance(item, _CONSTANTS) for item in value):
        constants[where] = tuple(value)
        return lambda _: copy(value)

    def parts(items: Mapping[Any, Any], label: str) -> dict[Any, Callable[[Iterator[Tensor]], Any]]:
        return {
            key: _collect(item, where + label.format(key), what, tensors, names, constants)
            for key, item in items.items()
        }

    if isinstance(value, Mapping):
        own = parts(value, "[{!r}]")
        return lambda given: _fill(value, {key: make(given) for key, make in own.items()})
    if is_dataclass(value) and not isinstance(value, type):
        own = parts({field.name: getattr(value, field.name) for field in fields(value) if field.init}, ".{}")
        return lambda given: replace(value, **{key: make(given) for key, make in own.items()})
    if isinstance(value, (tuple, list)):
        own = parts(dict(enumerate(value)), "[{}]")
        kind = type(value)
        if hasattr(kind, "_make"):  # a named tuple
            return lambda given: kind._make(make(given) for make in own.values())
        return lambda given: kind(make(given) for make in own.values())
    raise CurvlabError(
        f"{where or 'the value'} of {what} is of type {type(value).__name__}: a batch is made of tensors with one row "
        "per sample, in tuples, lists, dicts or dataclasses"
    )


def _fill(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the same type with other values."""
    if not isinstance(mapping, MutableMapping):
        return items
    filled = copy(mapping)
    filled.update(items)
    return filled


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """Return the samples of several inputs of the same form together."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    columns = zip(*(part.tensors for part in parts if isinstance(part, Batch)), strict=True)
    return replace(first, tensors=tuple(torch.cat(column) for column in columns))


def kinds(inputs: Inputs) -> tuple[object, ...]:
    """Return the shapes of a sample, the dtypes and the constants: samples of the same kind fit into one batch."""
    constants = () if isinstance(inputs, Tensor) else tuple(inputs.constants.items())
    return (*((tensor.shape[1:], tensor.dtype) for tensor in tensors_of(inputs)), *constants)


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the tensors of inputs."""
    return (inputs,) if isinstance(inputs, Tensor) else inputs.tensors


def map_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Return inputs with a function of every tensor."""
    return function(inputs) if isinstance(inputs, Tensor) else inputs.map(function)


def with_tensors(inputs: Inputs, tensors: Sequence[Tensor]) -> Inputs:
    """Return inputs of the same form with other tensors."""
    return tensors[0] if isinstance(inputs, Tensor) else replace(inputs, tensors=tuple(tensors))


def call_form(inputs: Inputs) -> Any:
    """Return the inputs in the form in which a model takes them."""
    return inputs if isinstance(inputs, Tensor) else inputs.value
