"""The homogeneous weight of a layer: its weight and bias as one matrix, for Kronecker factors.

A *key* says which parameters a block of a Kronecker structure has, and how they are read as a matrix ``(o, d)``:

- ``fc``: weight and bias of a module; the weight is ``(o, ...)``, the bias is the last column;
- ``fc.weight``, ``fc.bias``: one parameter alone;
- ``c_attn/transposed``: the weight is ``(inputs, o, ...)``;
- ``wte/embedding``: the weight is ``(inputs, o)``, and the factor of the inputs is diagonal;
- ``conv/group=2of4``: one of the groups of a convolution;
- ``attn.in_proj/group=0of3``: queries, keys or values in the packed projection of ``nn.MultiheadAttention``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace


@dataclass(frozen=True)
class HomogeneousWeight:
    """The homogeneous weight ``(o, d)`` of a layer: the flattened weight, with the bias as last column.

    Attributes:
        weight: Name of the weight; None if it is not among the parameters.
        bias: Name of the bias; None if it is not among the parameters.
        shape: ``(o, d)``.
        transposed: Whether the weight is ``(inputs, o, ...)``.
        kernel: Number of entries of the further dimensions of a transposed weight.
        diagonal: Whether the factor of the inputs is a diagonal matrix, which is stored as its diagonal.
        group: Index of the group of rows of the parameters.
        groups: Number of groups.
    """

    weight: str | None
    bias: str | None
    shape: tuple[int, int]
    transposed: bool = False
    kernel: int = 1
    diagonal: bool = False
    group: int = 0
    groups: int = 1

    @property
    def inputs(self) -> int:
        """Number of columns of the weight."""
        return self.shape[1] - (self.bias is not None)

    @property
    def is_plain(self) -> bool:
        """Whether the parameters of the layer, as they are, are the columns of the homogeneous weight."""
        return not self.transposed and not self.diagonal and self.groups == 1

    def join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Convert tensors ``(p, K)`` by parameter name to homogeneous weights ``(K, o, d)``."""
        parts = []
        for name in (self.weight, self.bias):
            if name is not None:
                flat = vectors[name].mT
                own = flat if self.groups == 1 else flat.unflatten(1, (self.groups, -1))[:, self.group]
                if name == self.weight and self.transposed:
                    parts.append(own.unflatten(1, (-1, self.shape[0], self.kernel)).transpose(1, 2).flatten(2))
                else:
                    parts.append(own.unflatten(1, (self.shape[0], -1)))
        return torch.cat(parts, dim=2)

    def split(self, homogeneous: Tensor) -> dict[str, Tensor]:
        """Convert homogeneous weights ``(K, o, d)`` to tensors ``(p, K)`` by parameter name, those of the own group."""
        weight, bias = homogeneous[:, :, : self.inputs], homogeneous[:, :, self.inputs :]
        if self.transposed:
            weight = weight.unflatten(2, (-1, self.kernel)).transpose(1, 2)
        parts = {self.weight: weight, self.bias: bias}
        return {name: part.flatten(1).mT for name, part in parts.items() if name is not None}


def make_key(name: str, kind: str = "", group: int = 0, groups: int = 1) -> str:
    """Return the key of a block.

    Args:
        name: Name of the module, or of one parameter.
        kind: ``transposed``, ``embedding`` or an empty text.
        group: Index of the group.
        groups: Number of groups.

    Examples:
        >>> make_key("fc"), make_key("wte", "embedding"), make_key("up", "transposed", 1, 4)
        ('fc', 'wte/embedding', 'up/transposed,group=1of4')
    """
    options = [*([kind] if kind else []), *([f"group={group}of{groups}"] if groups > 1 else [])]
    return f"{name}/{','.join(options)}" if options else name


def group_layers(space: ParameterSpace, keys: Collection[str] | None = None) -> dict[str, HomogeneousWeight]:
    """Group the parameters of a space into layers.

    Args:
        space: The parameters.
        keys: Keys of the blocks (see the module); None for the names of the modules.

    Raises:
        CurvlabError: A parameter is neither the weight of a layer (two or more dimensions) nor its bias, or the keys do
            not cover every parameter once.

    Examples:
        >>> group_layers(ParameterSpace(("weight", "fc.weight", "fc.bias"), ((4, 3), (2, 4), (2,))))["fc"].shape
        (2, 5)
        >>> group_layers(ParameterSpace(("wte.weight",), ((9, 4),)), ["wte/embedding"])["wte/embedding"].shape
        (4, 9)
    """
    if keys is None:
        return _group_by_module(space)
    layers: dict[str, HomogeneousWeight] = {}
    shapes = dict(zip(space.names, space.shapes, strict=True))
    for key in keys:
        layer = _read_key(key, shapes)
        if layer is None:
            raise _wrong_keys(space, keys)
        layers[key] = layer
    found = [(n, la.group, la.groups) for la in layers.values() for n in (la.weight, la.bias) if n is not None]
    groups = {name: count for name, _, count in found}
    expected = [(name, group, groups.get(name, 1)) for name in space.names for group in range(groups.get(name, 1))]
    if sorted(found) != sorted(expected):
        raise _wrong_keys(space, keys)
    position = {name: index for index, name in enumerate(space.names)}
    first = {key: min(position[n] for n in (la.weight, la.bias) if n is not None) for key, la in layers.items()}
    return {key: layers[key] for key in sorted(layers, key=lambda key: (first[key], layers[key].group))}


def _wrong_keys(space: ParameterSpace, keys: Collection[str]) -> CurvlabError:
    return CurvlabError(
        f"the factors must belong to the layers {sorted(_group_by_module(space))}, not to {sorted(keys)}"
    )


def _read_key(key: str, shapes: Mapping[str, tuple[int, ...]]) -> HomogeneousWeight | None:
    """Return the layer of a key, or None if no parameter fits it."""

    def own(name: str) -> dict[str, str]:
        if name in shapes:
            return {"bias" if len(shapes[name]) == 1 else "weight": name}
        for mark in (".", "_"):
            full = {kind: f"{name}{mark}{kind}".removeprefix(".") for kind in ("weight", "bias")}
            if found := {kind: parameter for kind, parameter in full.items() if parameter in shapes}:
                return found
        return {}

    names, options = own(key), ""
    if not names:
        base, _, options = key.rpartition("/")
        names = own(base)
    kinds = options.split(",") if options else []
    diagonal, group, groups = "embedding" in kinds, 0, 1
    transposed = diagonal or "transposed" in kinds
    for kind in kinds:
        index, _, count = kind.removeprefix("group=").partition("of")
        if kind not in ("embedding", "transposed"):
            if not (kind.startswith("group=") and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
                return None
            group, groups = int(index), int(count)
    weight = shapes.get(names.get("weight", ""))
    bias = shapes.get(names.get("bias", ""))
    if not names or (weight is not None and len(weight) < 2) or (bias is not None and len(bias) != 1):
        return None
    if weight is None:
        assert bias is not None
        rows, columns = bias[0] // groups, 1
    elif transposed:
        rows = weight[1]
        columns = weight[0] // groups * prod(weight[2:]) + (bias is not None)
    else:
        rows = weight[0] // groups
        columns = prod(weight[1:]) + (bias is not None)
    if (weight is not None and weight[0] % groups) or (bias is not None and bias[0] != rows * groups):
        return None
    kernel = prod(weight[2:]) if weight is not None and transposed else 1
    return HomogeneousWeight(
        names.get("weight"), names.get("bias"), (rows, columns), transposed, kernel, diagonal, group, groups
    )


def _group_by_module(space: ParameterSpace) -> dict[str, HomogeneousWeight]:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in zip(space.names, space.shapes, strict=True):
        layer, _, key = name.rpartition(".")
        if not ((key == "weight" and len(shape) >= 2) or (key == "bias" and len(shape) == 1)):
            raise CurvlabError(
                f"Kronecker factors need the weight (two or more dimensions) and bias of a layer; {name} of shape "
                f"{shape} is neither: put it into another part of a Composite"
            )
        shapes.setdefault(layer, {})[key] = shape
    return {name: _layer(name, of_layer) for name, of_layer in shapes.items()}


def _layer(name: str, shapes: Mapping[str, tuple[int, ...]]) -> HomogeneousWeight:
    outputs = {shape[0] for shape in shapes.values()}
    if len(outputs) > 1:
        raise CurvlabError(
            f"the weight and bias of {name or 'the model'} must have the same number of outputs, not {outputs}"
        )
    names = {key: f"{name}.{key}".removeprefix(".") for key in shapes}
    columns = sum(prod(shape[1:]) for shape in shapes.values())
    return HomogeneousWeight(names.get("weight"), names.get("bias"), (outputs.pop(), columns))
