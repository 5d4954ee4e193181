"""The Jacobian of any model times the displacement of its parameters, by torch's forward-mode differentiation."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.errors import UnsupportedError, first_line
from curvlab.linearize.point import buffers_of, parameters_of, value_at
from curvlab.stateless import attributes_restored, parametrizations_computed

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


def push(model: nn.Module, inputs: Arguments, keywords: Keywords) -> tuple[Tensor, Tensor]:
    """Return the outputs at the point of linearization and their change along the displacement of the parameters.

    Raises:
        UnsupportedError: Torch has no forward derivative of an operation of the model.
    """
    of, at, displacement = function(model, inputs, keywords)
    return _jvp(model, of, at, displacement)


def outputs(model: nn.Module, inputs: Arguments, keywords: Keywords) -> Tensor:
    """Return the outputs at the point of linearization."""
    of, at, _ = function(model, inputs, keywords)
    return of(at)


def function(
    model: nn.Module, inputs: Arguments, keywords: Keywords
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the outputs as a function of the parameters, the point of linearization, and the way from there."""
    constants: dict[str, Tensor] = {}
    at: dict[str, Tensor] = {}
    displacement: dict[str, Tensor] = {}
    for name, module, key, parameter in parameters_of(model):
        value = value_at(module, key)
        if value is None:
            constants[name] = parameter
        else:
            at[name], displacement[name] = value, parameter - value

    def of(parameters: dict[str, Tensor]) -> Tensor:
        # Torch lets a model change in place only what comes from within, so these are copies; nor is the caller's
        # changed so.
        buffers = {name: buffer.clone() for name, buffer in buffers_of(model)}
        given = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
        # Ties are resolved: torch would replace a module's parameters for good where it has two names.
        slots = {**parameters, **constants, **buffers}
        with attributes_restored(list(model.modules())), parametrizations_computed():
            outputs: Tensor = functional_call(model, slots, given, dict(keywords), tie_weights=False)
        return outputs

    return of, at, displacement


def _jvp(
    model: nn.Module,
    of: Callable[[dict[str, Tensor]], Tensor],
    at: dict[str, Tensor],
    along: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    try:
        with _differentiable_kernels(model):
            outputs, change = jvp(of, (at,), (along,))[:2]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of torch's, or of the model's on what it has never seen
        if "Nested forward mode" in str(error):  # is what the caller does, with dual numbers
            raise
        with torch.no_grad():
            of(at)  # what fails without derivatives, too, is not theirs
        raise UnsupportedError(
            f"{_culprit(error, model)} cannot be linearized: torch has no forward derivative of it "
            f"({first_line(error)}); replace that module or operation"
        ) from error
    require_tensor(model, outputs)
    return outputs, change


def require_tensor(model: nn.Module, outputs: object) -> None:
    """Refuse outputs that are not one tensor.

    Raises:
        UnsupportedError: They are not.
    """
    if not isinstance(outputs, Tensor):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be linearized: it must return one tensor, not a {type(outputs).__name__}"
        )


def _culprit(error: BaseException, model: nn.Module) -> str:
    """Return the innermost module of a model in which an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = [model, *(module for module in modules if id(module) in names)][-1]
    return f"{names[id(inner)] or 'the model'} ({type(inner).__name__})"


@contextmanager
def _differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Have torch take kernels that have a forward derivative."""
    with random_as_in_forward_mode(model), ExitStack() as settings:
        attention = torch.backends.mha
        settings.callback(attention.set_fastpath_enabled, attention.get_fastpath_enabled())
        attention.set_fastpath_enabled(False)
        yield


@contextmanager
def random_as_in_forward_mode(model: nn.Module) -> Iterator[None]:
    """Have torch take kernels that draw what those with a forward derivative draw, and round as they do."""
    with ExitStack() as settings:
        settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            for fused in (torch.backends.mkldnn, torch.backends.cudnn):
                settings.callback(setattr, fused, "enabled", fused.enabled)
                fused.enabled = False  # type: ignore[attr-defined]
        yield


def rounds(x: Tensor) -> bool:
    """Return whether products of ``x`` with weights may be rounded so that a small change is lost in their difference.

    That is in half precision, under autocast, and where float32 is multiplied as TF32 or bfloat16.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return True
    if x.dtype != torch.float32:  # neither autocast nor TF32 is of float64
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch does not tell where its newer switches were used, too
        return True
