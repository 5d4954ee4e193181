"""The homogeneous weight of a layer: its weight and bias as one matrix, for Kronecker factors."""

from collections.abc import Mapping
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
    """

    weight: str | None
    bias: str | None
    shape: tuple[int, int]

    @property
    def inputs(self) -> int:
        """Number of columns of the weight."""
        return self.shape[1] - (self.bias is not None)

    def join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Convert tensors ``(p, K)`` by parameter name to homogeneous weights ``(K, o, d)``."""
        outputs = self.shape[0]
        parts = [vectors[name].mT.unflatten(1, (outputs, -1)) for name in (self.weight, self.bias) if name is not None]
        return torch.cat(parts, dim=2)

    def split(self, homogeneous: Tensor) -> dict[str, Tensor]:
        """Convert homogeneous weights ``(K, o, d)`` to tensors ``(p, K)`` by parameter name."""
        parts = {self.weight: homogeneous[:, :, : self.inputs], self.bias: homogeneous[:, :, self.inputs :]}
        return {name: part.flatten(1).mT for name, part in parts.items() if name is not None}


def group_layers(space: ParameterSpace) -> dict[str, HomogeneousWeight]:
    """Group the parameters of a space into layers by module name.

    Raises:
        CurvlabError: A parameter is neither the weight of a layer (two or more dimensions) nor its bias.

    Examples:
        >>> group_layers(ParameterSpace(("weight", "fc.weight", "fc.bias"), ((4, 3), (2, 4), (2,))))["fc"]
        HomogeneousWeight(weight='fc.weight', bias='fc.bias', shape=(2, 5))
    """
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
