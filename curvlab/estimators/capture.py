"""A forward pass that records the inputs of layers, and backward passes that stop at the layers' outputs.

If the parameters of a layer act on its own input only, its per-sample gradients follow from two tensors: the inputs of
the layer and the gradients of its outputs. No gradient of a parameter has to be computed for this.
``curvlab.estimators.verification`` checks which layers of a model have this property.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlab.batches import Inputs
from curvlab.estimators.layers import Layer
from curvlab.estimators.padding import find_padding, padding_of
from curvlab.estimators.uses import watch
from curvlab.graph import walk
from curvlab.problem import Problem
from curvlab.stateless import check_not_cached

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A call of a module: its input, and the graph edge that gives the gradient of its output.

    The edge stays valid when the output is changed in place later.

    Attributes:
        inputs: The first argument, in at least float32; None if it is not a tensor.
        output: Graph edge of the output; None if the output is not a tensor.
        shape: Shape of the output.
        dtype: Dtype of the output, which within autocast is lower than that of the weights.
        padding: Positions that are padding, booleans ``(N, positions)`` (see ``curvlab.estimators.padding``).
    """

    inputs: Tensor | None
    output: GradientEdge | None
    shape: torch.Size
    dtype: torch.dtype = torch.float32
    padding: Tensor | None = None


@dataclass(frozen=True)
class Graph:
    """The autograd graph of some outputs.

    Attributes:
        uses: Number of operations that use each parameter, directly or through a view or copy, by name.
        nodes: All nodes of the graph.
    """

    uses: Mapping[str, int]
    nodes: Collection[object]


@contextmanager
def ignore_torch_warnings() -> Iterator[None]:
    """Suppress torch's warnings on partial backward passes and on operations that vmap runs in a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


def make_leaves(problem: Problem) -> dict[str, Tensor]:
    """Return the trainable parameters as leaves that require gradients; the model's own ``grad`` stays unchanged."""
    return {name: p.requires_grad_() for name, p in problem.parameters().items()}


def forward(
    problem: Problem,
    layers: Mapping[str, Layer],
    inputs: Inputs,
    leaves: Leaves | None = None,
    cloned: Collection[str] = (),
) -> tuple[Tensor, dict[str, list[Call]]]:
    """Run a batch; return the outputs, with their graph, and the calls of each of the layers.

    Args:
        problem: Model, loss and data.
        layers: Layers of the model, by key.
        inputs: Inputs of the batch.
        leaves: Tensors used in place of the trainable parameters, if their gradients or the graph are needed.
        cloned: Keys of layers whose output is replaced by a copy. Without it, an in-place operation on an output that
            is a view would remove that output from the graph.
    """
    calls: dict[str, list[Call]] = {key: [] for key in layers}
    masks = find_padding(inputs)

    def record(key: str, first: Any, output: Any) -> Any:
        given = to_working_dtype(first.detach()) if isinstance(first, Tensor) else None
        if not isinstance(output, Tensor):
            calls[key].append(Call(given, None, torch.Size()))
            return output
        if not output.requires_grad:
            return output
        passed_on = output.clone() if key in cloned else output
        padding = padding_of(masks, layers[key], output)
        calls[key].append(Call(given, get_gradient_edge(passed_on), output.shape, output.dtype, padding))
        return passed_on

    # The parameters require gradients so that the outputs of the first layers have a graph; none is computed here.
    parameters = dict(make_leaves(problem) if leaves is None else leaves)
    with watch(layers, record), torch.enable_grad():
        outputs = problem.forward(parameters, inputs)
    return outputs, calls


def find_changing_hook(problem: Problem, modules: Mapping[str, nn.Module]) -> str | None:
    """Return a clause that names the first of some modules whose output is changed by a hook of the user; else None.

    The hooks of another library run after the user's and see the changed output, for which the library's rules are
    wrong. Values are not compared, because they may differ on some samples only.
    """
    hooked = {name: module for name, module in modules.items() if module._forward_hooks}
    given: dict[str, tuple[Tensor, int]] = {}
    changed: list[str] = []

    def first(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            given[name] = output, output._version

    def last(name: str, _: nn.Module, __: Any, output: Any) -> None:
        before, version = given.pop(name, (output, 0))
        if output is not before or (isinstance(output, Tensor) and output._version != version):
            changed.append(name)

    with ExitStack() as hooks, torch.enable_grad():
        for name, module in hooked.items():
            hooks.callback(module.register_forward_hook(partial(first, name), prepend=True).remove)
            hooks.callback(module.register_forward_hook(partial(last, name)).remove)
        for inputs, _ in problem.batches() if hooked else ():
            problem.forward({}, inputs)
            if changed:
                return (
                    f"a hook of {type(modules[changed[0]]).__name__} ({changed[0] or 'the model'}) changes its output"
                )
    return None


def backward(outputs: Tensor, calls: Sequence[Call], covector: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Return the gradients of ``sum(covector * outputs)`` with respect to the output of each call, in at least float32.

    Args:
        outputs: ``(N, C)``, from ``forward``.
        calls: Calls of modules.
        covector: ``(N, C)``.
        keep: Whether to keep the graph for another backward pass.
    """
    return gradients(outputs, calls, (), covector, keep)[0]


def gradients(
    outputs: Tensor, calls: Sequence[Call], leaves: Sequence[Tensor], covector: Tensor, keep: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the gradients of ``backward`` and, from the same pass, those of some leaves."""
    found: Sequence[Tensor | None] = [None] * (len(calls) + len(leaves))
    if found and outputs.requires_grad:
        targets = [*(call.output for call in calls), *leaves]
        with ignore_torch_warnings():
            found = torch.autograd.grad(outputs, targets, covector, retain_graph=keep, allow_unused=True)  # type: ignore[arg-type]
    # Zeros where the outputs do not depend on a call; torch does not know the shape.
    shapes = [*(call.shape for call in calls), *(leaf.shape for leaf in leaves)]
    whole = [
        covector.new_zeros(shape) if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient
        for shape, gradient in zip(shapes, found, strict=True)
    ]
    return tuple(map(to_working_dtype, whole[: len(calls)])), tuple(map(to_working_dtype, whole[len(calls) :]))


def join_calls(slopes: Sequence[Tensor]) -> Tensor:
    """Return the gradients of the outputs of a module's calls as one tensor: ``(N, ...)``, for several calls flat."""
    return slopes[0] if len(slopes) == 1 else torch.cat([s.reshape(len(s), -1) for s in slopes], dim=1)


def split_calls(joined: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """Return the gradients of the outputs of a module's calls from the result of ``join_calls``."""
    if len(calls) == 1:
        return [joined]
    parts = joined.split([call.shape[1:].numel() for call in calls], dim=1)
    return [part.reshape(call.shape) for part, call in zip(parts, calls, strict=True)]


def group_by_layer(slopes: Sequence[Tensor], calls: Sequence[Sequence[Call]]) -> list[Tensor]:
    """Return the gradients of the outputs of all calls, joined by layer.

    Args:
        slopes: One per call, in the order of the layers.
        calls: Calls by layer.
    """
    if len(slopes) == len(calls):
        return list(slopes)
    left = iter(slopes)
    return [join_calls([next(left) for _ in seen]) for seen in calls]


def to_working_dtype(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in at least float32, for products and sums of half-precision numbers."""
    return tensor.to(working_dtype(tensor.dtype)) if tensor.is_floating_point() else tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the curvature of a model with a dtype is summed and returned: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def inspect_graph(outputs: Tensor, leaves: Leaves) -> Graph:
    """Return the graph of the outputs of a ``forward`` call with these leaves.

    Raises:
        UnsupportedError: The graph reaches into an earlier forward pass (see ``curvlab.stateless.check_not_cached``).
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    uses = dict.fromkeys(leaves, 0)
    following: dict[object, Sequence[Any]] = dict(walk([outputs]))
    # Names of the leaves at which the graph ends; None for other ends.
    ends: dict[object, str | None] = {}
    for node, inputs in following.items():
        if not inputs:
            end = getattr(node, "variable", None)
            ends[node] = names.get(id(end))
            if end is not None and ends[node] is None:
                check_not_cached(end, leaves)

    def origin(node: object) -> str | None:
        """Return the leaf that a node passes on, unchanged or as a view or copy; else None."""
        while node is not None and len(following[node]) == 1:
            node = following[node][0]
        return ends.get(node)

    # A node with one input passes it on; the nodes after it, and the outputs, use it.
    for node in (*chain.from_iterable(others for others in following.values() if len(others) != 1), outputs.grad_fn):
        if (name := origin(node)) is not None:
            uses[name] += 1
    return Graph(uses, following.keys())
