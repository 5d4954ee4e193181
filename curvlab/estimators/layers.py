"""The layers of a model that have Kronecker factors, and why the other parameters have none."""

from dataclasses import dataclass

from torch import nn

from curvlab.estimators.capture import unfaithful_modules
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem

#: Modules whose output is linear in the weight, position by position, and whose weight is ``(outputs, ...)``.
KRONECKER_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A layer with a pair of Kronecker factors.

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
    weight, bias = (f"{name}.{key}".removeprefix(".") for key in ("weight", "bias"))
    return Layer(name, module, weight if weight in space.names else None, bias if bias in space.names else None)


def layers_of(model: nn.Module, space: ParameterSpace) -> dict[str, Layer]:
    """Return the modules that have a parameter in the space, by name."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in space.names)
    return {name: layer_in(space, name, model.get_submodule(name)) for name in names}


def has_factors(module: nn.Module) -> bool:
    """Return whether a module of this kind has Kronecker factors: a Linear layer, a convolution without groups."""
    return type(module) in KRONECKER_MODULES and getattr(module, "groups", 1) == 1


def kronecker_layers(problem: Problem, space: ParameterSpace) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers with Kronecker factors by module name, and for every other parameter why it has none.

    Every parameter of the space is either in one of the layers or among the reasons. The second is a phrase that
    follows the parameter's name: ``is of a LayerNorm (norm1)``.
    """
    owners = {f"{name}.{key}".removeprefix("."): (name, key) for name, key in _parameters(problem.model)}
    modules = dict(problem.model.named_modules())
    candidates = {name: module for name, module in modules.items() if has_factors(module)}
    unfaithful = unfaithful_modules(problem, candidates)
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    for parameter in space.names:
        name, key = owners[parameter]
        module = modules[name]
        if name in unfaithful:
            reasons[parameter] = unfaithful[name]
        elif name not in candidates or key not in ("weight", "bias"):
            kind = "grouped " if getattr(module, "groups", 1) > 1 else ""
            reasons[parameter] = f"is of a {kind}{type(module).__name__} ({name or 'the model'})"
        else:
            layers[name] = layer_in(space, name, module)
    return layers, reasons


def _parameters(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, key) for name, module in model.named_modules() for key, _ in module.named_parameters(recurse=False)]
