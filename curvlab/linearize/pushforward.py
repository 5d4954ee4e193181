"""The Jacobian of any model times the displacement of its parameters, by torch's forward-mode differentiation."""

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.errors import UnsupportedError
from curvlab.linearize.point import buffers_of, parameters_of, value_at
from curvlab.randomness import preserved_random_state

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


def push(model: nn.Module, inputs: Arguments, keywords: Keywords) -> tuple[Tensor, Tensor]:
    """Return the outputs at the point of linearization and their change along the displacement of the parameters.

    Raises:
        UnsupportedError: Torch has no forward derivative of an operation of the model.
    """
    function, at, displacement = _function(model, inputs, keywords)
    return _jvp(model, function, at, displacement)


def outputs(model: nn.Module, inputs: Arguments, keywords: Keywords) -> Tensor:
    """Return the outputs at the point of linearization."""
    function, at, _ = _function(model, inputs, keywords)
    return function(at)


def check_adjoint(model: nn.Module, inputs: Arguments, keywords: Keywords) -> None:
    """Make sure that the forward derivative of a model is that of its backward passes.

    They differ where a model switches gradients off for a part of itself, of which forward derivatives do not know, or
    has hooks that change gradients.

    Raises:
        UnsupportedError: They do differ, or there is none.
    """
    function, at, _ = _function(model, inputs, keywords)
    # NumPy's: a draw of torch's in a forward pass is taken for one of the model.
    generator = np.random.default_rng(0)
    along = {name: torch.from_numpy(generator.standard_normal(value.shape)).to(value) for name, value in at.items()}
    with warnings.catch_warnings():
        # It is torch's own, the first time that numbers with a dual part are used.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        with preserved_random_state():
            pushed = _jvp(model, function, at, along)[1].detach()
    with preserved_random_state(), _differentiable_kernels(model):
        (pulled,) = vjp(function, at)[1](pushed)
    forward, backward = pushed.square().sum(), sum((pulled[name] * along[name]).sum() for name in at)
    if bool((forward - backward).abs() > 10 * torch.finfo(pushed.dtype).eps ** 0.5 * forward):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be linearized: its forward derivative is not that of its backward passes, "
            "as where a part of it runs under torch.no_grad(); use detach() there"
        )


def _function(
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

    def function(parameters: dict[str, Tensor]) -> Tensor:
        # Torch lets a model change in place only what comes from within, so these are copies; nor is the caller's
        # changed so.
        buffers = {name: buffer.clone() for name, buffer in buffers_of(model)}
        given = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
        # Ties are resolved: torch would replace a module's parameters for good where it has two names.
        slots = {**parameters, **constants, **buffers}
        outputs: Tensor = functional_call(model, slots, given, dict(keywords), tie_weights=False)
        return outputs

    return function, at, displacement


def _jvp(
    model: nn.Module,
    function: Callable[[dict[str, Tensor]], Tensor],
    at: dict[str, Tensor],
    along: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    try:
        with _differentiable_kernels(model):
            outputs, change = jvp(function, (at,), (along,))[:2]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # also NotImplementedError
        if "Nested forward mode" in str(error):  # is what the caller does, with dual numbers
            raise
        with torch.no_grad():
            function(at)  # what fails without derivatives, too, is not theirs
        raise UnsupportedError(
            f"{_culprit(error, model)} cannot be linearized: torch has no forward derivative of it "
            f"({str(error).partition(chr(10))[0]}); replace that module or operation"
        ) from error
    if not isinstance(outputs, Tensor):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be linearized: it must return one tensor, not a {type(outputs).__name__}"
        )
    return outputs, change


def _culprit(error: BaseException, model: nn.Module) -> str:
    """Return the innermost module of a model in which an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = [model, *(module for module in modules if id(module) in names)][-1]
    return f"{names[id(inner)] or 'the model'} ({type(inner).__name__})"


@contextmanager
def _differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Have torch take kernels that have a forward derivative."""
    with ExitStack() as settings:
        settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        attention = torch.backends.mha
        settings.callback(attention.set_fastpath_enabled, attention.get_fastpath_enabled())
        attention.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            for fused in (torch.backends.mkldnn, torch.backends.cudnn):
                settings.callback(setattr, fused, "enabled", fused.enabled)
                fused.enabled = False  # type: ignore[attr-defined]
        yield
