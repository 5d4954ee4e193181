"""One forward pass that keeps what layers were given, and backward passes to their outputs alone.

A layer whose parameters act on its own input only has per-sample gradients that follow from two tensors: its inputs
and the gradients of its outputs. No gradient of a parameter is computed to have them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvlab.problem import Problem

_PROBE_SAMPLES = 4
_EARLY_BATCHES = 8


@dataclass(frozen=True)
class Call:
    """A call of a module: its input, and where the gradient of its output is found, whatever is done to that after."""

    inputs: Tensor
    output: GradientEdge
    shape: torch.Size  # of the output


def forward(
    problem: Problem, modules: Mapping[str, nn.Module], inputs: Tensor, parameters: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, list[Call]]]:
    """Run a batch; return the outputs, with their graph, and the calls of each of the modules.

    Args:
        problem: Model, loss and data.
        modules: Of the model, by name.
        inputs: ``(N, ...)``.
        parameters: Leaves to use for the trainable parameters, where their gradients are wanted.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
            if output.requires_grad:
                given = next(chain(arguments, keywords.values()))
                calls[name].append(Call(given.detach(), get_gradient_edge(output), output.shape))

        return hook

    # Parameters that ask for gradients give the outputs of the first layers a graph; none of theirs is computed.
    parameters = parameters or _leaves(problem)
    with ExitStack() as hooks, torch.enable_grad():
        for name, module in modules.items():
            # First of all: a later hook may change the output in place.
            handle = module.register_forward_hook(recorder(name), with_kwargs=True, prepend=True)
            hooks.callback(handle.remove)
        outputs = problem.forward(parameters, inputs)
    return outputs, calls


def backward(outputs: Tensor, calls: list[Call], seed: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Return the gradients of ``sum(seed * outputs)`` with respect to the output of each call.

    Args:
        outputs: ``(N, C)``, of ``forward``.
        calls: Of modules.
        seed: ``(N, C)``.
        keep: Whether the graph is needed again.
    """
    found: Sequence[Tensor | None] = [None] * len(calls)
    if calls and outputs.requires_grad:
        edges = [call.output for call in calls]
        found = torch.autograd.grad(outputs, edges, seed, retain_graph=keep, allow_unused=True)
    # Zeros, of a shape that torch does not know, where the outputs do not depend on a call.
    return tuple(seed.new_zeros(call.shape) if g is None else g for g, call in zip(found, calls, strict=True))


def few_inputs(problem: Problem) -> Tensor:
    """Return some samples of one batch: more than one where an early batch has them, which shows mixed samples."""
    early = [inputs[:_PROBE_SAMPLES] for inputs, _ in islice(problem.batches(), 1)]
    if len(early[0]) == 1:
        early += [inputs[:_PROBE_SAMPLES] for inputs, _ in islice(problem.batches(), 1, _EARLY_BATCHES)]
    return max(early, key=len)


def unfaithful_modules(problem: Problem, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return, of some modules, those whose per-sample gradients do not follow from their calls, and why.

    The reason is a phrase that follows a parameter's name. A few samples go through the model once. A module is
    faithful if it is called once, on a row a sample; if none of its parameters belongs to another module too, or is
    used outside it, as the graph of the outputs shows; and if a row sees the outputs of its own sample alone (it does
    not where the module makes weights for all samples from constants).
    """
    owners: dict[int, list[str]] = {}
    for name, module in problem.model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    reasons = {}
    for name, module in modules.items():
        sharing = {o for p in module.parameters(recurse=False) for o in owners[id(p)] if o != name}
        if sharing:
            reasons[name] = f"is shared with {', '.join(sorted(o or 'the model' for o in sharing))} (a tied weight)"
    inputs = few_inputs(problem)
    candidates = {name: module for name, module in modules.items() if name not in reasons}
    leaves = _leaves(problem)
    outputs, calls = forward(problem, candidates, inputs, leaves)
    for name, seen in calls.items():
        label = _label(name, candidates[name])
        if len(seen) != 1:
            reasons[name] = f"is of {label}, which is called {len(seen)} times"
        elif not seen[0].inputs.ndim or len(seen[0].inputs) != len(inputs):
            reasons[name] = f"is of {label}, whose input has no row a sample: {tuple(seen[0].inputs.shape)}"
    once = {name: seen[0] for name, seen in calls.items() if name not in reasons}
    if not once:
        return reasons
    # Random ones, not the loss's own gradients: those vanish at a perfect fit and would show nothing.
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(tuple(outputs.shape), dtype=torch.float64, generator=generator).to(outputs)
    seed[1::2] = 0  # of every second sample: no other row may see them
    uses = _uses(outputs, leaves)
    gradients = backward(outputs, list(once.values()), seed, keep=False)
    for name, slopes in zip(once, gradients, strict=True):
        module = candidates[name]
        if bool(slopes[1::2].any()):
            reasons[name] = f"is of {_label(name, module)}, which the outputs of other samples depend on"
        elif any(uses.get(f"{name}.{key}".removeprefix("."), 0) > 1 for key in module._parameters):
            reasons[name] = f"is of {_label(name, module)}, which does not have it to itself: it acts elsewhere, too"
    return reasons


def _uses(outputs: Tensor, leaves: Mapping[str, Tensor]) -> Counter[str]:
    """Count the operations that take each leaf itself, in the graph of the outputs."""
    names = {get_gradient_edge(leaf).node: name for name, leaf in leaves.items()}
    uses: Counter[str] = Counter()
    seen, todo = set(), [outputs.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following in names:
                uses[names[following]] += 1
            else:
                todo.append(following)
    return uses


def _label(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} {name}".strip()


def _leaves(problem: Problem) -> dict[str, Tensor]:
    return {name: p.requires_grad_() for name, p in problem.parameters().items()}
