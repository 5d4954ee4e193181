"""The layers of a model: modules with the names of their selected parameters."""

from dataclasses import dataclass

import torch
from torch import nn

from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace

#: Modules whose output is linear in the weight, position by position, and whose weight is ``(outputs, ...)``.
KRONECKER_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A module with its weight and bias.

    Attributes:
        name: Name of the module; empty for the model itself.
        module: The module.
        weight: Name of its weight; None if it is not selected.
        bias: Name of its bias; None if it is not selected. It is the last column of the homogeneous weight.
    """

    name: str
    module: nn.Module
    weight: str | None
    bias: str | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the selected parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


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
    """Return whether a module of this kind has Kronecker factors: a Linear layer, a convolution without groups."""
    return type(module) in KRONECKER_MODULES and getattr(module, "groups", 1) == 1
