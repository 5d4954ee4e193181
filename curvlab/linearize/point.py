"""The point of linearization: a buffer next to every parameter, with its value at that point."""

from collections.abc import Iterator

from torch import Tensor, nn

_SUFFIX = "_at"


def store_point(module: nn.Module, key: str, value: Tensor) -> None:
    """Store the value of a parameter at the point of linearization.

    Raises:
        KeyError: The module already has another attribute with the name of the buffer.
    """
    module.register_buffer(key + _SUFFIX, value)


def point_value(module: nn.Module, key: str) -> Tensor | None:
    """Return the value of a parameter at the point of linearization, or None if the parameter is a constant."""
    return module._buffers.get(key + _SUFFIX)


def reset_to_point(model: nn.Module) -> None:
    """Set every parameter to its value at the point of linearization, and remove the stored point."""
    for _, module, key, parameter in iterate_parameters(model):
        at = module._buffers.pop(key + _SUFFIX, None)
        if at is not None:
            parameter.data = at.clone()


def iterate_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield full name, module, name in the module and tensor of every parameter; shared ones are repeated."""
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}".removeprefix("."), module, key, parameter


def iterate_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the full name and the tensor of every buffer that does not store the point of linearization."""
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key.removesuffix(_SUFFIX) not in module._parameters:
                yield f"{prefix}.{key}".removeprefix("."), buffer
