"""The layers of a model: modules with the names of those of their parameters that are asked for."""

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
        name: Of the module; empty for the model itself.
        module: The module.
        weight: Name of its weight, if that is among the parameters asked for.
        bias: Name of its bias, likewise; with the weight it is the last column of the homogeneous weight.
    """

    name: str
    module: nn.Module
    weight: str | None
    bias: str | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of those there are."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


def layer_in(space: ParameterSpace, name: str, module: nn.Module) -> Layer:
    """Return a module as a layer with those of its parameters that the space has."""
    weight, bias = (
        full if (full := f"{name}.{key}".removeprefix(".")) in space.names and key in module._parameters else None
        for key in ("weight", "bias")
    )
    return Layer(name, module, weight, bias)


def check_scale(layer: Layer, given: float, wanted: float, dtype: torch.dtype) -> None:
    """Refuse to scale a layer's factors from a trace that is given to one that is wanted, where that scales rounding.

    With ``sharing=reduce``, the inputs or the gradients may cancel over the positions, where the gradient of the weight
    does not: what is left of a factor then has no digit that is right.

    Raises:
        CurvlabError: It is so.
    """
    if given <= torch.finfo(dtype).eps * wanted and wanted:
        raise CurvlabError(
            f"{layer.name or 'the model'} ({type(layer.module).__name__}) has no tkfac with sharing=reduce: its inputs "
            "or gradients cancel over the positions, and leave nothing to scale; sharing=expand does not add them up"
        )


def layers_of(model: nn.Module, space: ParameterSpace) -> dict[str, Layer]:
    """Return the modules that have a parameter in the space, by name."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in space.names)
    return {name: layer_in(space, name, model.get_submodule(name)) for name in names}


def has_factors(module: nn.Module) -> bool:
    """Return whether a module of this kind has Kronecker factors: a Linear layer, a convolution without groups."""
    return type(module) in KRONECKER_MODULES and getattr(module, "groups", 1) == 1
