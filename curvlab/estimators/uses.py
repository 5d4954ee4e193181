"""Uses of the weights of layers in a forward pass: where a layer receives its input and returns its output.

A layer is usually a module, and a hook sees its calls. ``nn.MultiheadAttention`` has no modules for its projections:
torch's own code runs with functions that report them. The groups of a convolution are uses of a part of its channels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.estimators.layers import AttentionProjection, Layer

#: Receives the key of a layer, its input (the first argument) and its output; returns the output that is passed on.
See = Callable[[str, Any, Any], Any]


@contextmanager
def watch(layers: Mapping[str, Layer], see: See) -> Iterator[None]:
    """Report every use of some layers.

    Args:
        layers: Layers by key.
        see: Called for every use. The tensors have samples along their first dimension if those of the module have.
    """
    users: dict[nn.Module, dict[str, Layer]] = {}
    for key, layer in layers.items():
        module = layer.module
        user = module.attention if isinstance(module, AttentionProjection) else module
        users.setdefault(user, {})[key] = layer
    with ExitStack() as stack:
        for user, own in users.items():
            if isinstance(next(iter(own.values())).module, AttentionProjection):
                assert "forward" not in vars(user)
                vars(user)["forward"] = MethodType(_attention_forward(own, see), user)
                stack.callback(vars(user).pop, "forward")
            else:
                # Prepended, because a later hook may change the output.
                handle = user.register_forward_hook(_hook(own, see), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
        yield


def _hook(own: Mapping[str, Layer], see: See) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    groups = max(layer.groups for layer in own.values())

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        given = next(chain(arguments, keywords.values()), None)
        if groups == 1 or not isinstance(given, Tensor) or not isinstance(output, Tensor):
            for key in own:
                output = see(key, given, output)
            return output
        inputs, outputs = given.chunk(groups, dim=1), list(output.chunk(groups, dim=1))
        for key, layer in own.items():
            outputs[layer.group] = see(key, inputs[layer.group], outputs[layer.group])
        return torch.cat(outputs, dim=1)

    return hook


def _attention_forward(own: Mapping[str, Layer], see: See) -> FunctionType:
    """Return the forward of ``nn.MultiheadAttention`` with projections that are reported."""
    keys: dict[str, list[str]] = {kind: [] for kind in ("q", "k", "v", "out")}
    for key, layer in own.items():
        assert isinstance(layer.module, AttentionProjection)
        keys[layer.module.kind].append(key)
    samples = 1

    def report(kind: str, given: Tensor, output: Tensor) -> Tensor:
        first, last = given.transpose(0, 1), output.transpose(0, 1)  # (T, N, d) to (N, T, d)
        for key in keys[kind]:
            last = see(key, first, last)
        return last.transpose(0, 1)

    def reporting(project: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def projected(q: Tensor, k: Tensor, v: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
            nonlocal samples
            samples = q.shape[1]
            outputs = project(q, k, v, *parameters)
            return tuple(report(*use) for use in zip("qkv", (q, k, v), outputs, strict=True))

        return projected

    def linear(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output projection, which torch computes on ``(T N, d)``."""
        output = F.linear(given, weight, bias)
        return report("out", *(x.unflatten(0, (-1, samples)) for x in (given, output))).flatten(0, 1)

    projections = {name: reporting(getattr(F, name)) for name in ("_in_projection_packed", "_in_projection")}
    attend = _with_globals(F.multi_head_attention_forward, linear=linear, **projections)
    functions = SimpleNamespace(**{**vars(F), "multi_head_attention_forward": attend})
    return _with_globals(nn.MultiheadAttention.forward, F=functions)


def _with_globals(function: Any, **names: Any) -> FunctionType:
    """Return a copy of a function for which some global names have other values."""
    scope = {**function.__globals__, **names}
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
