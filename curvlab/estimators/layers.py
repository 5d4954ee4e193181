"""The layers of a model: modules with the names of their selected parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.matrices.layers import make_key
from curvlab.parameters import ParameterSpace
from curvlab.structures import Kronecker, Structure


class AttentionProjection(nn.Module):
    """Stand-in for a linear layer that an ``nn.MultiheadAttention`` computes with its own parameters.

    Args:
        attention: The module.
        kind: ``q``, ``k``, ``v`` or ``out``.
        shape: Shape of the weight, with those of all groups.
        parameter: Its weight.
    """

    def __init__(
        self, attention: nn.MultiheadAttention, kind: str, shape: tuple[int, ...], parameter: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.attention, self.kind, self.parameter = attention, kind, parameter
        self.weight = torch.empty(shape, device="meta")


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Modules whose output is linear in the weight, position by position.
KRONECKER_MODULES = (nn.Linear, *_CONVOLUTIONS, nn.Embedding, AttentionProjection)


@dataclass(frozen=True)
class Layer:
    """A module with its weight and bias.

    Attributes:
        name: Name of the module; empty for the model itself.
        module: The module.
        weight: Name of its weight; None if it is not selected.
        bias: Name of its bias; None if it is not selected. It is the last column of the homogeneous weight.
        alone: Whether the one parameter is a block of its own, whose key is the name of the parameter.
        group: Index of the group of rows of the parameters that the layer uses.
        groups: Number of groups.
    """

    name: str
    module: nn.Module
    weight: str | None
    bias: str | None
    alone: bool = False
    group: int = 0
    groups: int = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the selected parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def kind(self) -> str:
        """Class name of the module."""
        return type(self.module.attention if isinstance(self.module, AttentionProjection) else self.module).__name__

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding: its inputs are unit vectors, given by their indices."""
        return isinstance(self.module, nn.Embedding)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is ``(inputs, outputs, ...)``."""
        return self.is_embedding or is_transposed_convolution(self.module) or is_linear_transposed(self.module)

    @property
    def key(self) -> str:
        """Key of the layer in a matrix (see ``curvlab.matrices.layers``)."""
        name = self.parameters[0] if self.alone else self.name
        kind = "embedding" if self.is_embedding else "transposed" if self.is_transposed else ""
        return make_key(name, kind, self.group, self.groups)

    def blocks(self, separate: bool) -> "list[Layer]":
        """Return the blocks of the layer: one per group of a convolution, or two if weight and bias are separate."""
        parts = [self]
        if (groups := getattr(self.module, "groups", 1)) > 1:
            parts = [replace(self, group=group, groups=groups) for group in range(groups)]
        if separate:
            pairs = [(replace(part, bias=None, alone=True), replace(part, weight=None, alone=True)) for part in parts]
            parts = [part for pair in pairs for part in pair if part.parameters]
        return parts

    @property
    def weight_parameter(self) -> Tensor | None:
        """The weight, selected or not; None if it is computed from other parameters."""
        if isinstance(self.module, AttentionProjection):
            return self.module.parameter
        return self.module._parameters.get("weight")

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, of the own group."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.shape[0] // self.groups, *weight.shape[1:]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(o, d)`` of the homogeneous weight."""
        outputs, inputs, *kernel = self._weight_shape
        if self.is_transposed:
            outputs, inputs = inputs, outputs
        return outputs, (inputs * prod(kernel) if self.weight else 0) + bool(self.bias)

    @property
    def factor_shape(self) -> tuple[int, ...]:
        """Shape of the factor ``A``, which is stored as its diagonal if it is diagonal."""
        columns = self.shape[1]
        return (columns,) if self.is_embedding else (columns, columns)

    def own(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the part of a parameter's tensor, along the first dimension of the parameter, of the own group."""
        return tensor if self.groups == 1 else tensor.unflatten(dim, (self.groups, -1)).select(dim, self.group)

    def to_homogeneous(self, weights: Tensor) -> Tensor:
        """Return weights ``(n, ...)`` of the own group, flat or not, as homogeneous weights ``(n, o, columns)``."""
        shaped = weights.reshape(len(weights), *self._weight_shape)
        return (shaped.transpose(1, 2) if self.is_transposed else shaped).flatten(2)

    def from_homogeneous(self, weights: Tensor) -> Tensor:
        """Return homogeneous weights ``(n, o, columns)`` in the order of the parameter."""
        kernel = prod(self._weight_shape[2:])
        return weights.unflatten(2, (-1, kernel)).transpose(1, 2) if self.is_transposed else weights


def make_layer(space: ParameterSpace, name: str, module: nn.Module) -> Layer:
    """Return a module as a layer with its parameters that are in the space."""
    weight, bias = (
        full if (full := f"{name}.{key}".removeprefix(".")) in space.names and key in module._parameters else None
        for key in ("weight", "bias")
    )
    return Layer(name, module, weight, bias)


def make_layers(space: ParameterSpace, name: str, module: nn.Module) -> list[Layer]:
    """Return the layers of a module that have a parameter in the space: one, or the projections of an attention."""
    if type(module) is nn.MultiheadAttention:
        layers = [] if "forward" in vars(module) else _projections(space, name, module)
    else:
        layers = [make_layer(space, name, module)]
    return [layer for layer in layers if layer.parameters]


def _projections(space: ParameterSpace, name: str, attention: nn.MultiheadAttention) -> list[Layer]:
    """Return the projections of an attention as layers: a group of the packed weight for each of q, k and v.

    With other sizes of keys and values, the weights are parameters of their own, but the bias is packed.
    """
    prefix = f"{name}.".removeprefix(".")
    has = {key: parameter for key, parameter in attention._parameters.items() if parameter is not None}
    selected = {key: f"{prefix}{key}" if f"{prefix}{key}" in space.names else None for key in has}
    layers = []
    for group, kind in enumerate("qkv"):
        if (packed := has.get("in_proj_weight")) is not None:
            module = AttentionProjection(attention, kind, packed.shape, packed)
            weight, bias = selected["in_proj_weight"], selected.get("in_proj_bias")
            layers.append(Layer(f"{prefix}in_proj", module, weight, bias, group=group, groups=3))
        elif (own := has.get(f"{kind}_proj_weight")) is not None:
            module = AttentionProjection(attention, kind, own.shape, own)
            layers.append(Layer(f"{prefix}{kind}_proj", module, selected[f"{kind}_proj_weight"], None, alone=True))
            module = AttentionProjection(attention, kind, (3 * len(own), 1))
            bias = selected.get("in_proj_bias")
            layers.append(Layer(f"{prefix}in_proj", module, None, bias, alone=True, group=group, groups=3))
    out = make_layer(space, f"{prefix}out_proj", attention.out_proj)
    if (own := attention.out_proj._parameters.get("weight")) is not None:
        layers.append(replace(out, module=AttentionProjection(attention, "out", own.shape, own)))
    return layers


def check_scale(layer: Layer, given: float, wanted: float, dtype: torch.dtype) -> None:
    """Raise an error if scaling a layer's factors from the trace ``given`` to ``wanted`` would amplify rounding errors.

    With ``sharing=reduce``, the inputs or the gradients can cancel over the positions while the gradient of the weight
    does not. The factor then consists of rounding errors.

    Raises:
        CurvlabError: The given trace is only rounding error relative to the wanted one.
    """
    if given <= torch.finfo(dtype).eps * wanted and wanted:
        raise CurvlabError(
            f"{layer.name or 'the model'} ({layer.kind}) has no tkfac with sharing=reduce: its inputs "
            "or gradients cancel over the positions; use sharing=expand, which does not sum over positions"
        )


def find_layers(model: nn.Module, space: ParameterSpace) -> dict[str, Layer]:
    """Return the modules that have a parameter in the space, by name."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in space.names)
    return {name: make_layer(space, name, model.get_submodule(name)) for name in names}


def has_factors(module: nn.Module) -> bool:
    """Return whether modules of this kind have factors: also those of a subclass with the same forward."""
    known = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in KRONECKER_MODULES)
    return known or is_linear_transposed(module)


def is_transposed_convolution(module: nn.Module) -> bool:
    """Return whether a module is a transposed convolution."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


def is_linear_transposed(module: nn.Module) -> bool:
    """Return whether a module is a linear layer with a weight ``(inputs, outputs)``: GPT-2's ``Conv1D``.

    It is recognised by its name and its shapes, without an import of the library. The verification decides whether it
    computes what its name says.
    """
    weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
    if type(module).__name__ != "Conv1D" or weight is None or weight.ndim != 2:
        return False
    return bias is None or bias.shape == weight.shape[1:]


def has_last_channels(module: nn.Module) -> bool:
    """Return whether the outputs of a layer with factors are ``(N, ..., o)``, not ``(N, o, ...)``."""
    return not isinstance(module, nn.modules.conv._ConvNd)


def count_entries(structure: Structure, space: ParameterSpace, layers: Mapping[str, Layer]) -> int:
    """Return the number of entries that a matrix stores.

    Args:
        structure: Its structure.
        space: Its parameters.
        layers: The layers with Kronecker factors; for other structures they are not used.
    """
    size_of, entries = dict(zip(space.names, space.sizes, strict=True)), 0
    if isinstance(structure, Kronecker):
        for layer in layers.values():
            entries += structure.factor_entries(*layer.shape, diagonal=layer.is_embedding)
            for name in layer.parameters:
                size_of.pop(name, None)  # several layers can have parts of one parameter
    return entries + structure.entries(list(size_of.values()))
