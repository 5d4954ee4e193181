"""The layers of a model: modules with the names of their selected parameters."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.matrices.layers import make_key
from curvlab.parameters import ParameterSpace

#: Modules whose output is linear in the weight, position by position.
KRONECKER_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True)
class Layer:
    """A module with its weight and bias.

    Attributes:
        name: Name of the module; empty for the model itself.
        module: The module.
        weight: Name of its weight; None if it is not selected.
        bias: Name of its bias; None if it is not selected. It is the last column of the homogeneous weight.
        alone: Whether the one parameter is a block of its own, whose key is the name of the parameter.
    """

    name: str
    module: nn.Module
    weight: str | None
    bias: str | None
    alone: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the selected parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding: its inputs are unit vectors, given by their indices."""
        return isinstance(self.module, nn.Embedding)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is ``(inputs, outputs, ...)``."""
        return self.is_embedding or is_linear_transposed(self.module)

    @property
    def key(self) -> str:
        """Key of the layer in a matrix (see ``curvlab.matrices.layers``)."""
        name = self.parameters[0] if self.alone else self.name
        return make_key(name, "embedding" if self.is_embedding else "transposed" if self.is_transposed else "")

    def split(self) -> "list[Layer]":
        """Return the weight and the bias as layers of their own."""
        parts = replace(self, bias=None, alone=True), replace(self, weight=None, alone=True)
        return [part for part in parts if part.parameters]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(o, d)`` of the homogeneous weight."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        outputs, inputs = weight.shape[:2]
        if self.is_transposed:
            outputs, inputs = inputs, outputs
        columns = inputs * prod(weight.shape[2:])
        return outputs, (columns if self.weight else 0) + bool(self.bias)

    @property
    def factor_shape(self) -> tuple[int, ...]:
        """Shape of the factor ``A``, which is stored as its diagonal if it is diagonal."""
        columns = self.shape[1]
        return (columns,) if self.is_embedding else (columns, columns)

    def to_homogeneous(self, weights: Tensor) -> Tensor:
        """Return weights ``(n, ...)``, flat or not, in the shape ``(n, o, columns)`` of the homogeneous weight."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        shaped = weights.reshape(len(weights), *weight.shape)
        return (shaped.transpose(1, 2) if self.is_transposed else shaped).flatten(2)

    def from_homogeneous(self, weights: Tensor) -> Tensor:
        """Return homogeneous weights ``(n, o, columns)`` in the order of the parameter."""
        return weights.mT if self.is_transposed else weights


def make_layer(space: ParameterSpace, name: str, module: nn.Module) -> Layer:
    """Return a module as a layer with its parameters that are in the space."""
    weight, bias = (
        full if (full := f"{name}.{key}".removeprefix(".")) in space.names and key in module._parameters else None
        for key in ("weight", "bias")
    )
    return Layer(name, module, weight, bias)


def check_scale(layer: Layer, given: float, wanted: float, dtype: torch.dtype) -> None:
    """Raise an error if scaling a layer's factors from the trace ``given`` to ``wanted`` would amplify rounding errors.

    With ``sharing=reduce``, the inputs or the gradients can cancel over the positions while the gradient of the weight
    does not. The factor then consists of rounding errors.

    Raises:
        CurvlabError: The given trace is only rounding error relative to the wanted one.
    """
    if given <= torch.finfo(dtype).eps * wanted and wanted:
        raise CurvlabError(
            f"{layer.name or 'the model'} ({type(layer.module).__name__}) has no tkfac with sharing=reduce: its inputs "
            "or gradients cancel over the positions; use sharing=expand, which does not sum over positions"
        )


def find_layers(model: nn.Module, space: ParameterSpace) -> dict[str, Layer]:
    """Return the modules that have a parameter in the space, by name."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in space.names)
    return {name: make_layer(space, name, model.get_submodule(name)) for name in names}


def has_factors(module: nn.Module) -> bool:
    """Return whether modules of this kind have factors: linear layers, convolutions without groups, embeddings."""
    known = type(module) in KRONECKER_MODULES and getattr(module, "groups", 1) == 1
    return known or is_linear_transposed(module)


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
