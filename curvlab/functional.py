"""Modules made of functions of parameters and inputs."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError

Function = Callable[[Mapping[str, Tensor], Any], Any]


class FunctionModule(nn.Module):
    """A module with the parameters of a function; create it with ``as_module``."""

    def __init__(self, function: Function, names: tuple[str, ...]) -> None:
        super().__init__()
        self._function, self._names = function, names

    def forward(self, inputs: Any) -> Any:
        """Return the function of the parameters and the inputs."""
        paths = [(name, *name.rpartition(".")[::2]) for name in self._names]
        return self._function({name: getattr(self.get_submodule(path), last) for name, path, last in paths}, inputs)


def as_module(function: Function, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a module for a function ``f(parameters, inputs)``, as the model of a ``Problem``.

    Args:
        function: Function of a dict of parameters and of inputs that returns outputs. It must use the parameters that
            it is given, and no others.
        parameters: Parameters by name; a dot in a name makes a submodule. They are copied. A tensor that is not
            floating-point is not trainable.

    Raises:
        CurvlabError: The function is not one, or the parameters are not tensors by name.

    Examples:
        >>> import torch
        >>> from curvlab import Problem, estimate
        >>> linear = lambda p, x: x @ p["layer.w"] + p["b"]
        >>> model = as_module(linear, {"layer.w": torch.zeros(2, 3), "b": torch.zeros(3)})
        >>> problem = Problem(model, "cross_entropy", (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> estimate(problem, "fisher", "diag").shape
        (9, 9)
    """
    if not callable(function) or isinstance(function, (nn.Module, type)):
        raise CurvlabError(f"as_module needs a function of parameters and inputs, not {describe_value(function)}")
    if not isinstance(parameters, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in parameters.items()
    ):
        raise CurvlabError(f"as_module needs parameters as tensors by name, not {describe_value(parameters)}")
    module = FunctionModule(function, tuple(parameters))
    for name, value in parameters.items():
        *path, last = name.split(".")
        at: nn.Module = module
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        parameter = nn.Parameter(value.detach().clone(), requires_grad=value.is_floating_point())
        try:
            at.register_parameter(last, parameter)
        except KeyError as error:
            raise CurvlabError(f"{name!r} cannot be the name of a parameter: {error.args[0]}") from error
    return module
