"""One forward pass that keeps what layers were given, and backward passes to their outputs alone.

A layer whose parameters act on its own input only has per-sample gradients that follow from two tensors: its inputs
and the gradients of its outputs. No gradient of a parameter is computed to have them. Whether a layer of a model is
like that, ``curvlab.estimators.verification`` finds out.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlab.graph import walk
from curvlab.problem import Problem
from curvlab.stateless import refuse_memory

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A call of a module: its input, and where the gradient of its output is found, whatever is done to that after.

    Attributes:
        inputs: The first argument, in at least float32; None where that is no tensor.
        output: Of the graph; None where the output is no tensor.
        shape: Of the output.
    """

    inputs: Tensor | None
    output: GradientEdge | None
    shape: torch.Size


@dataclass(frozen=True)
class Graph:
    """What the graph of some outputs shows.

    Attributes:
        uses: How many operations take each parameter, or a view or copy of it alone, by name.
        nodes: All of its nodes.
    """

    uses: Mapping[str, int]
    nodes: Collection[object]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch warns of where not all gradients are asked for, or where it vectorises by a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    """Return the trainable parameters as leaves that ask for gradients; none of theirs reach the model's."""
    return {name: p.requires_grad_() for name, p in problem.parameters().items()}


def forward(
    problem: Problem,
    modules: Mapping[str, nn.Module],
    inputs: Tensor,
    leaves: Leaves | None = None,
    apart: Collection[str] = (),
) -> tuple[Tensor, dict[str, list[Call]]]:
    """Run a batch; return the outputs, with their graph, and the calls of each of the modules.

    Args:
        problem: Model, loss and data.
        modules: Of the model, by name.
        inputs: ``(N, ...)``.
        leaves: To use for the trainable parameters, where their gradients or the graph are wanted.
        apart: Names of modules whose output goes on as a copy. Where the output is a view, what is done to it in place
            would else take it out of the graph.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            first = next(chain(arguments, keywords.values()), None)
            given = working(first.detach()) if isinstance(first, Tensor) else None
            if not isinstance(output, Tensor):
                calls[name].append(Call(given, None, torch.Size()))
                return None
            if not output.requires_grad:
                return None
            going_on = output.clone() if name in apart else output
            calls[name].append(Call(given, get_gradient_edge(going_on), output.shape))
            return going_on

        return hook

    # Parameters that ask for gradients give the outputs of the first layers a graph; none of theirs is computed.
    parameters = dict(leaves_of(problem) if leaves is None else leaves)
    with ExitStack() as hooks, torch.enable_grad():
        for name, module in modules.items():
            # First of all: a later hook may change the output.
            handle = module.register_forward_hook(recorder(name), with_kwargs=True, prepend=True)
            hooks.callback(handle.remove)
        outputs = problem.forward(parameters, inputs)
    return outputs, calls


def output_changed_by_hooks(problem: Problem, modules: Mapping[str, nn.Module]) -> str | None:
    """Return a clause that names the first of some modules of which a hook of the user's changes the output, if any.

    The hooks of another library come after it, and see another output than the one that its rules are of. Whether it
    is another cannot be told from the values, which may differ on some samples only.
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


def backward(outputs: Tensor, calls: Sequence[Call], seed: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Return the gradients of ``sum(seed * outputs)`` with respect to the output of each call, in at least float32.

    Args:
        outputs: ``(N, C)``, of ``forward``.
        calls: Of modules.
        seed: ``(N, C)``.
        keep: Whether the graph is needed again.
    """
    return gradients(outputs, calls, (), seed, keep)[0]


def gradients(
    outputs: Tensor, calls: Sequence[Call], leaves: Sequence[Tensor], seed: Tensor, keep: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return what ``backward`` returns, and from the same pass the gradients of some leaves."""
    found: Sequence[Tensor | None] = [None] * (len(calls) + len(leaves))
    if found and outputs.requires_grad:
        targets = [*(call.output for call in calls), *leaves]
        with quiet():
            found = torch.autograd.grad(outputs, targets, seed, retain_graph=keep, allow_unused=True)  # type: ignore[arg-type]
    # Zeros, of a shape that torch does not know, where the outputs do not depend on a call.
    shapes = [*(call.shape for call in calls), *(leaf.shape for leaf in leaves)]
    whole = [
        seed.new_zeros(shape) if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient
        for shape, gradient in zip(shapes, found, strict=True)
    ]
    return tuple(map(working, whole[: len(calls)])), tuple(map(working, whole[len(calls) :]))


def working(tensor: Tensor) -> Tensor:
    """Return a floating tensor in at least float32, in which half-precision numbers are multiplied and added up."""
    return tensor.to(working_dtype(tensor.dtype)) if tensor.is_floating_point() else tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which curvature is added up and returned for a model of a dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def graph_of(outputs: Tensor, leaves: Leaves) -> Graph:
    """Look through the graph of outputs of ``forward`` that was given these leaves.

    Raises:
        UnsupportedError: It ends at one of an earlier forward pass (see ``curvlab.stateless.refuse_memory``).
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    uses = dict.fromkeys(leaves, 0)
    following: dict[object, Sequence[Any]] = dict(walk([outputs]))
    # The leaves at which the graph ends; None for what is no leaf of these.
    ends: dict[object, str | None] = {}
    for node, inputs in following.items():
        if not inputs:
            end = getattr(node, "variable", None)
            ends[node] = names.get(id(end))
            if end is not None and ends[node] is None:
                refuse_memory(end, leaves)

    def origin(node: object) -> str | None:
        """Return the leaf that a node passes on, itself or as a view or copy of it and nothing else."""
        while node is not None and len(following[node]) == 1:
            node = following[node][0]
        return ends.get(node)

    # A node with one input passes it on; it is the nodes behind that use it, and the outputs themselves.
    for node in (*chain.from_iterable(others for others in following.values() if len(others) != 1), outputs.grad_fn):
        if (name := origin(node)) is not None:
            uses[name] += 1
    return Graph(uses, following.keys())
