"""The product of the Jacobian with the displacement of the parameters, by forward-mode differentiation."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.errors import UnsupportedError, first_line
from curvlab.linearize.point import iterate_buffers, iterate_parameters, point_value
from curvlab.stateless import disable_parametrization_cache, restore_attributes

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


def push(model: nn.Module, inputs: Arguments, keywords: Keywords) -> tuple[Tensor, Tensor]:
    """Return the outputs at the point of linearization, and their change along the parameter displacement.

    Raises:
        UnsupportedError: Torch has no forward derivative of an operation of the model.
    """
    call, at, displacement = function(model, inputs, keywords)
    return _jvp(model, call, at, displacement)


def outputs(model: nn.Module, inputs: Arguments, keywords: Keywords) -> Tensor:
    """Return the outputs at the point of linearization."""
    call, at, _ = function(model, inputs, keywords)
    return call(at)


def function(
    model: nn.Module, inputs: Arguments, keywords: Keywords
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the outputs as a function of the parameters, the point of linearization, and the displacement."""
    constants: dict[str, Tensor] = {}
    at: dict[str, Tensor] = {}
    displacement: dict[str, Tensor] = {}
    for name, module, key, parameter in iterate_parameters(model):
        value = point_value(module, key)
        if value is None:
            constants[name] = parameter
        else:
            at[name], displacement[name] = value, parameter - value

    def call(parameters: dict[str, Tensor]) -> Tensor:
        # Copies, because under torch.func a model must not change outer tensors in place; this also protects the
        # caller's tensors.
        buffers = {name: buffer.clone() for name, buffer in iterate_buffers(model)}
        given = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
        # Ties are resolved; tie_weights would permanently replace the parameters of a module with two names.
        slots = {**parameters, **constants, **buffers}
        with restore_attributes(list(model.modules())), disable_parametrization_cache():
            outputs: Tensor = functional_call(model, slots, given, dict(keywords), tie_weights=False)
        return outputs

    return call, at, displacement


def _jvp(
    model: nn.Module,
    call: Callable[[dict[str, Tensor]], Tensor],
    at: dict[str, Tensor],
    along: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    try:
        with _use_differentiable_kernels(model):
            outputs, change = jvp(call, (at,), (along,))[:2]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from torch, or from a model that does not support dual numbers
        if "Nested forward mode" in str(error):  # the caller uses dual numbers
            raise
        with torch.no_grad():
            call(at)  # an error without derivatives has another cause
        raise UnsupportedError(
            f"{_culprit(error, model)} cannot be linearized: torch has no forward derivative of it "
            f"({first_line(error)}); replace that module or operation"
        ) from error
    require_tensor(model, outputs)
    return outputs, change


def require_tensor(model: nn.Module, outputs: object) -> None:
    """Check that the output of a model is one tensor.

    Raises:
        UnsupportedError: It is not.
    """
    if not isinstance(outputs, Tensor):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be linearized: it must return one tensor, not a {type(outputs).__name__}"
        )


def _culprit(error: BaseException, model: nn.Module) -> str:
    """Return the name of the innermost module in which an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = [model, *(module for module in modules if id(module) in names)][-1]
    return f"{names[id(inner)] or 'the model'} ({type(inner).__name__})"


@contextmanager
def _use_differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Make torch use kernels that have a forward derivative."""
    with use_forward_mode_kernels(model), ExitStack() as settings:
        attention = torch.backends.mha
        settings.callback(attention.set_fastpath_enabled, attention.get_fastpath_enabled())
        attention.set_fastpath_enabled(False)
        yield


@contextmanager
def use_forward_mode_kernels(model: nn.Module) -> Iterator[None]:
    """Make torch use kernels with the same random draws and rounding as those with a forward derivative."""
    with ExitStack() as settings:
        settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            for fused in (torch.backends.mkldnn, torch.backends.cudnn):
                settings.callback(setattr, fused, "enabled", fused.enabled)
                fused.enabled = False  # type: ignore[attr-defined]
        yield


def rounds(x: Tensor) -> bool:
    """Return whether products of ``x`` with weights are rounded so coarsely that a difference loses a small change.

    This is the case in half precision, under autocast, and if float32 is multiplied as TF32 or bfloat16.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return True
    if x.dtype != torch.float32:  # autocast and TF32 do not apply to float64
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch raises an error if its newer settings were used, too
        return True
