"""A layer's weight and bias as one matrix, the homogeneous weight: what Kronecker factors multiply."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace


@dataclass(frozen=True)
class HomogeneousWeight:
    """The homogeneous weight ``(o, d)`` of a layer: the flattened weight, then the bias as last column.

    Attributes:
        weight: Name of the weight, if it is among the parameters.
        bias: Name of the bias, likewise.
        shape: ``(o, d)``.
    """

    weight: str | None
    bias: str | None
    shape: tuple[int, int]

    @property
    def inputs(self) -> int:
        """Number of columns that are the weight's."""
        return self.shape[1] - (self.bias is not None)

    def join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return the homogeneous weights ``(K, o, d)`` of ``(p, K)`` by parameter name."""
        outputs = self.shape[0]
        parts = [vectors[name].mT.unflatten(1, (outputs, -1)) for name in (self.weight, self.bias) if name is not None]
        return torch.cat(parts, dim=2)

    def split(self, homogeneous: Tensor) -> dict[str, Tensor]:
        """Return ``(p, K)`` by parameter name of ``(K, o, d)``."""
        parts = {self.weight: homogeneous[:, :, : self.inputs], self.bias: homogeneous[:, :, self.inputs :]}
        return {name: part.flatten(1).mT for name, part in parts.items() if name is not None}


def layers_of(space: ParameterSpace) -> dict[str, HomogeneousWeight]:
    """Return the layers that a space's parameters are the weights and biases of, by module name.

    Raises:
        CurvlabError: A parameter is not the weight, with at least two dimensions, or the bias of a layer.

    Examples:
        >>> layers_of(ParameterSpace(("weight", "fc.weight", "fc.bias"), ((4, 3), (2, 4), (2,))))["fc"]
        HomogeneousWeight(weight='fc.weight', bias='fc.bias', shape=(2, 5))
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in zip(space.names, space.shapes, strict=True):
        layer, _, key = name.rpartition(".")
        if not ((key == "weight" and len(shape) >= 2) or (key == "bias" and len(shape) == 1)):
            raise CurvlabError(
                f"Kronecker factors are of a layer's weight, with two dimensions or more, and bias; {name} of shape "
                f"{shape} is neither: give it a matrix of its own in a Composite"
            )
        shapes.setdefault(layer, {})[key] = shape
    return {name: _layer(name, of_layer) for name, of_layer in shapes.items()}


def _layer(name: str, shapes: Mapping[str, tuple[int, ...]]) -> HomogeneousWeight:
    outputs = {shape[0] for shape in shapes.values()}
    if len(outputs) > 1:
        raise CurvlabError(f"the weight and the bias of {name or 'the model'} have {outputs} outputs")
    names = {key: f"{name}.{key}".removeprefix(".") for key in shapes}
    columns = sum(prod(shape[1:]) for shape in shapes.values())
    return HomogeneousWeight(names.get("weight"), names.get("bias"), (outputs.pop(), columns))
