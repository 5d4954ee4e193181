"""Call models with other parameters, and restore everything that the call changes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from curvlab.errors import CurvlabError, UnsupportedError, first_line
from curvlab.graph import walk

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_TORCHS_OWN = frozenset(vars(nn.Module()))  # attributes of every module


def check_module(model: object) -> None:
    """Check that a model can be called with other parameters.

    Raises:
        CurvlabError: It is not a module, or it is scripted, parallel, lazy, or on the meta device.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        hint = (
            ": for a function f(parameters, inputs) give curvlab.as_module(f, parameters)"
            if given == "function"
            else ""
        )
        raise CurvlabError(f"the model must be a torch.nn.Module, not {given}{hint}")
    for name, module in model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{what} is a scripted or traced module, which cannot be called with other parameters: give the module "
                "from which it was made"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UnsupportedError(
                f"{what} splits a batch over devices or processes: give the module inside it, .module"
            )
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise CurvlabError(f"{kind} {name} of a lazy module has no shape yet: call the model on a batch first")
            if tensor.is_meta:
                raise CurvlabError(
                    f"{kind} {name} is on the meta device, where tensors have no values: use "
                    "model.to_empty(device=...) and load a state dict"
                )
            if tensor.is_inference():
                raise CurvlabError(
                    f"{kind} {name} was made under torch.inference_mode, without gradients: create the model outside"
                )


def check_dtype(dtype: torch.dtype) -> None:
    """Check the dtype of trainable parameters.

    Raises:
        CurvlabError: The dtype is not float64, float32, bfloat16 or float16.
    """
    if dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise CurvlabError(f"the trainable parameters are {dtype}; curvature needs a real floating dtype: {names}")


class _Caller(nn.Module):
    """A function of a model, in which the model is a submodule."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, inputs: Any) -> Any:
        return self.function(self.model, inputs)


def call(
    model: nn.Module, parameters: Mapping[str, Tensor], inputs: Any, function: Callable[[nn.Module, Any], Any]
) -> Any:
    """Return ``function(model, inputs)`` at the given parameters; parameters that are not given are constants.

    The dict may also contain buffers. The model writes into copies of its other buffers and of its inputs. Attributes
    that it sets on its modules, such as a weight computed by a hook, are restored. A compiled model runs uncompiled.

    Raises:
        UnsupportedError: The model writes into a parameter.
    """
    modules = list(model.named_modules())
    used: dict[int, Tensor] = {}
    slots: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    for prefix, module in modules:
        for key, tensor in module._parameters.items():
            if tensor is not None:
                slot = f"{prefix}.{key}" if prefix else key
                if id(tensor) not in used:
                    given = parameters.get(slot)  # a tied parameter is given under its first name
                    used[id(tensor)] = own = tensor.detach() if given is None else given
                    versions[slot] = own._version
                slots[slot] = used[id(tensor)]
    for prefix, module in modules:
        for key, tensor in module._buffers.items():
            if tensor is not None:
                slot = f"{prefix}.{key}" if prefix else key
                if id(tensor) not in used:
                    given = parameters.get(slot)
                    used[id(tensor)] = tensor.clone() if given is None else given
                slots[slot] = used[id(tensor)]
    with restore_attributes([module for _, module in modules]), disable_parametrization_cache():
        for _, module in modules:
            if "_orig_mod" in module._modules:  # made by torch.compile
                vars(module)["forward"] = module._modules["_orig_mod"]
            elif module._compiled_call_impl is not None:
                module._compiled_call_impl = None
        # Ties are resolved above; tie_weights would permanently replace the parameters of a module with two names.
        own = {f"model.{slot}": tensor for slot, tensor in slots.items()}
        outputs = functional_call(_Caller(model, function), own, (inputs.clone(),), tie_weights=False)
    for slot, version in versions.items():
        if slots[slot]._version != version:
            raise UnsupportedError(parameter_write_message(model, slot))
    return outputs


def parameter_write_message(model: nn.Module, name: str) -> str:
    """Return the error message for a model that writes into a parameter."""
    module = model.get_submodule(name.rpartition(".")[0])
    way_out = "write it once, before the curvature is computed, and not in the forward pass"
    if getattr(module, "max_norm", None) is not None:
        way_out = "renormalise the weight once and set max_norm to None"
    return (
        f"the forward pass of {type(model).__name__} writes into its parameter {name} ({type(module).__name__}), "
        f"so that the point of differentiation changes: {way_out}"
    )


def graph_leaves(outputs: Tensor) -> dict[int, Tensor]:
    """Return the leaf tensors with gradients in the graph of the outputs, by their ``id``."""
    variables = (getattr(node, "variable", None) for node, _ in walk([outputs]))
    return {id(variable): variable for variable in variables if variable is not None}


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, including tensors that its modules have computed.

    ``deepcopy`` fails for sparse rows and for tensors that are not leaves, which pruning and the older ``weight_norm``
    leave on modules; these are copied here.

    Raises:
        UnsupportedError: A module holds another object that cannot be copied.
    """
    held = (tensor for module in model.modules() for tensor in vars(module).values())
    apart = [tensor for tensor in held if isinstance(tensor, Tensor) and not tensor.is_leaf]
    apart += [buffer for buffer in model.buffers() if buffer.layout != torch.strided]
    try:
        return deepcopy(model, {id(t): t.detach().clone() for t in apart})
    except Exception as error:  # a module may hold any object
        reason = first_line(error)
        raise UnsupportedError(f"{type(model).__name__} cannot be copied ({reason})") from error


def check_not_cached(end: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Check that a leaf of the graph is not a parameter of an earlier forward pass.

    A leaf that equals a given parameter but is another tensor comes from an earlier pass: the model caches a result.

    Args:
        end: The leaf.
        parameters: The given parameters by name.

    Raises:
        UnsupportedError: The leaf is a parameter of an earlier pass.
    """
    for name, given in parameters.items():
        alike = end is not given and end.shape == given.shape and end.dtype == given.dtype
        if alike and end.device == given.device and torch.equal(end.detach(), given.detach()):
            raise UnsupportedError(
                f"the model caches a tensor that an earlier forward pass computed from its parameter {name}, such "
                "as with lru_cache or in a global dictionary, so that the parameter cannot be replaced: compute the "
                "tensor at every call"
            )


def _containers(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the containers that modules hold as attributes, including nested ones, each once."""
    waiting: list[Any] = [value for m in modules for key, value in vars(m).items() if key not in _TORCHS_OWN]
    found: dict[int, Any] = {}
    while waiting:
        one = waiting.pop()
        if id(one) in found or not isinstance(one, dict | list | set | deque | SimpleNamespace):
            continue
        found[id(one)] = one
        inside = vars(one) if isinstance(one, SimpleNamespace) else one
        waiting += inside.values() if isinstance(inside, dict) else inside
    return list(found.values())


def _restore(container: Any, before: Any) -> None:
    if isinstance(container, SimpleNamespace):
        container = vars(container)
    if isinstance(container, dict | set):
        container.clear()
        container.update(before)
    else:
        container.clear()
        container.extend(before)


@contextmanager
def restore_gradients(model: nn.Module) -> Iterator[None]:
    """Remove the gradients of a model inside the block, and restore the same tensors on exit."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def copy_attributes(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Replace tensors that modules hold as plain attributes by copies; yield a function that checks these copies.

    Raises:
        UnsupportedError: Raised by the yielded function if the model has written into a copy.
    """
    copies: list[tuple[str, Tensor, int]] = []
    with restore_attributes(list(model.modules())):
        for prefix, module in model.named_modules():
            for key, tensor in vars(module).items():
                if isinstance(tensor, Tensor) and not tensor.is_inference():
                    module.__dict__[key] = own = tensor.clone()
                    copies.append((f"{prefix}.{key}".removeprefix("."), own, own._version))

        def check() -> None:
            for name, tensor, version in copies:
                if tensor._version != version:
                    raise UnsupportedError(
                        f"the forward pass of {type(model).__name__} writes into its attribute {name}, which is not "
                        "a buffer: make it a buffer with register_buffer"
                    )

        yield check


@contextmanager
def restore_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the attributes, parameters, buffers and submodules of modules on exit.

    This includes the contents of dicts, lists and similar containers that are attributes.
    """
    modules = list(modules)
    held: list[Any] = [one for m in modules for one in (m.__dict__, m._parameters, m._buffers, m._modules)]
    held += _containers(modules)
    kept = [(one, copy(vars(one) if isinstance(one, SimpleNamespace) else one)) for one in held]
    try:
        yield
    finally:
        for one, before in kept:
            _restore(one, before)


@contextmanager
def disable_parametrization_cache() -> Iterator[None]:
    """Turn off the cache of ``torch.nn.utils.parametrize``, which may hold weights of other parameters."""
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


@contextmanager
def restore_modes(model: nn.Module) -> Iterator[None]:
    """Context that restores the train or eval mode of every submodule on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
