"""Models called at other parameters, with nothing of the call left on them."""

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


_TORCHS_OWN = frozenset(vars(nn.Module()))  # attributes that every module has


def check_module(model: object) -> None:
    """Refuse what cannot be called at other parameters, or has none.

    Raises:
        CurvlabError: It is no module, or a scripted, parallel or lazy one, or one without values.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise CurvlabError(f"the model must be a torch.nn.Module, not {given}")
    for name, module in model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{what} is a scripted or traced module, which takes no other parameters: give the module that it was "
                "made from"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UnsupportedError(
                f"{what} splits a batch over devices or processes: give the module inside it, its .module"
            )
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise CurvlabError(f"{kind} {name} of a lazy module has no shape yet: call the model once on a batch")
            if tensor.is_meta:
                raise CurvlabError(
                    f"{kind} {name} is on the meta device, where tensors have no values: model.to_empty(device=...) "
                    "and a state dict give it some"
                )
            if tensor.is_inference():
                raise CurvlabError(
                    f"{kind} {name} was made under torch.inference_mode, which has no gradients: make the model outside"
                )


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse parameters of a dtype that has no curvature.

    Raises:
        CurvlabError: It is not one of float64, float32, bfloat16 and float16.
    """
    if dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise CurvlabError(f"the trainable parameters are {dtype}; curvature needs a real floating dtype: {names}")


def call(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor) -> Any:
    """Return what the model returns at the given parameters; those not given are its own, as constants.

    Buffers may be given, too. Those of its own that it writes are written on copies, and so are inputs that it changes
    in place. What it sets on its modules, such as a weight that a hook computes of others, is afterwards what it was.
    Of what is compiled, the original is run.

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
                    given = parameters.get(slot)  # its first name is the one that it goes by
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
    with attributes_restored([module for _, module in modules]), parametrizations_computed():
        for _, module in modules:
            if "_orig_mod" in module._modules:  # made by torch.compile
                vars(module)["forward"] = module._modules["_orig_mod"]
            elif module._compiled_call_impl is not None:
                module._compiled_call_impl = None
        # Ties are resolved above: torch would replace a module's parameters for good where it has two names.
        outputs = functional_call(model, slots, (inputs.clone(),), tie_weights=False)
    for slot, version in versions.items():
        if slots[slot]._version != version:
            raise UnsupportedError(writes(model, slot))
    return outputs


def writes(model: nn.Module, name: str) -> str:
    """Return a sentence about a model that writes into a parameter."""
    module = model.get_submodule(name.rpartition(".")[0])
    way_out = "write it once, before the curvature is computed, and not in the forward pass"
    if getattr(module, "max_norm", None) is not None:
        way_out = "renormalise the weight once and set max_norm to None"
    return (
        f"the forward pass of {type(model).__name__} writes into its parameter {name} ({type(module).__name__}), "
        f"so that there is no one point at which to differentiate: {way_out}"
    )


def leaves(outputs: Tensor) -> dict[int, Tensor]:
    """Return the tensors on which outputs depend by their graph, those that have gradients, by their ``id``."""
    variables = (getattr(node, "variable", None) for node, _ in walk([outputs]))
    return {id(variable): variable for variable in variables if variable is not None}


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model whose modules hold tensors that they have computed.

    Torch copies leaves only, and no sparse rows. Pruning and the older ``weight_norm`` leave a weight that is no leaf.

    Raises:
        UnsupportedError: A module holds something else that cannot be copied.
    """
    held = (tensor for module in model.modules() for tensor in vars(module).values())
    apart = [tensor for tensor in held if isinstance(tensor, Tensor) and not tensor.is_leaf]
    apart += [buffer for buffer in model.buffers() if buffer.layout != torch.strided]
    try:
        return deepcopy(model, {id(t): t.detach().clone() for t in apart})
    except Exception as error:  # a module may hold anything
        reason = first_line(error)
        raise UnsupportedError(f"{type(model).__name__} cannot be copied ({reason})") from error


def refuse_memory(end: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a leaf that ends a graph and has the values of a parameter, but is not the one that was given.

    It is that of an earlier forward pass: the model keeps what it has computed of it, in a cache.

    Args:
        end: The leaf.
        parameters: Those that were given, by name.

    Raises:
        UnsupportedError: It is one of an earlier pass.
    """
    for name, given in parameters.items():
        alike = end is not given and end.shape == given.shape and end.dtype == given.dtype
        if alike and end.device == given.device and torch.equal(end.detach(), given.detach()):
            raise UnsupportedError(
                f"the model keeps a tensor that an earlier forward pass has computed from its parameter {name}, as by "
                "lru_cache or in a global dictionary, so that the parameter cannot be moved: compute it at every call"
            )


def _containers(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the containers that modules hold as attributes of their own, those within others too, each once."""
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
def gradients_restored(model: nn.Module) -> Iterator[None]:
    """Set the gradients aside, and put the same tensors back, whatever a backward pass within has added."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def attributes_copied(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give modules copies of the tensors that they hold as plain attributes, and yield what refuses writing into these.

    Raises:
        UnsupportedError: By what is yielded: one has been written.
    """
    copies: list[tuple[str, Tensor, int]] = []
    with attributes_restored(list(model.modules())):
        for prefix, module in model.named_modules():
            for key, tensor in vars(module).items():
                if isinstance(tensor, Tensor) and not tensor.is_inference():
                    module.__dict__[key] = own = tensor.clone()
                    copies.append((f"{prefix}.{key}".removeprefix("."), own, own._version))

        def check() -> None:
            for name, tensor, version in copies:
                if tensor._version != version:
                    raise UnsupportedError(
                        f"the forward pass of {type(model).__name__} writes into its attribute {name}, which is no "
                        "buffer: make it one with register_buffer, of which a copy is written"
                    )

        yield check


@contextmanager
def attributes_restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo, at the end of the block, what was set on modules: attributes, parameters, buffers and submodules.

    Also what was put into dictionaries, lists and the like that are attributes.
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
def parametrizations_computed() -> Iterator[None]:
    """Have weights of ``parametrize`` computed, also where the caller caches those of other parameters."""
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache
