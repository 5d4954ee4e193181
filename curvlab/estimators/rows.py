"""Rows of a Gram-type curvature, many samples at a time: the vectors ``v`` with ``F = 1/N sum v v'``.

Two forms. Any parameter has its rows themselves, by vectorised automatic differentiation. The weight of a Linear
layer that is called once, on ``(N, d)``, has rank-one rows ``g x'``: its inputs and the gradients of its outputs,
a fraction of the memory, are all that is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from curvlab.errors import UnsupportedError
from curvlab.losses import Loss
from curvlab.problem import Problem
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, MaSQ, Quantity


@dataclass(frozen=True)
class LinearFactors:
    """Rank-one rows of a Linear layer: row ``(n, r)`` of its weight is ``gradients[n, r] inputs[n]'``.

    Attributes:
        inputs: ``(N, d)``.
        gradients: ``(N, R, O)``.
    """

    inputs: Tensor
    gradients: Tensor


def output_rows(loss: Loss, quantity: Quantity, outputs: Tensor, targets: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the rows in output space, ``(N, R, C)``: what is pulled back through the network.

    Raises:
        UnsupportedError: The quantity has no rows (the Hessian is not a Gram matrix).
    """
    if isinstance(quantity, (EmpiricalFisher, MaSQ)):
        return loss.gradients(outputs, targets).unsqueeze(1)
    if isinstance(quantity, Fisher) and quantity.samples is not None:
        drawn = loss.sample(outputs, quantity.samples, rng)
        rows = [loss.gradients(outputs, drawn[:, k]) for k in range(quantity.samples)]
        return torch.stack(rows, dim=1) / sqrt(quantity.samples)
    if isinstance(quantity, (Fisher, GGN)):
        return loss.output_factors(outputs)
    raise UnsupportedError(f"{quantity.name} is not a sum of outer products of gradients")


def label_stream(quantity: Quantity) -> np.random.Generator:
    """Return the stream of a Monte Carlo Fisher's labels: the same for every pass over the data."""
    return np.random.default_rng(quantity.seed if isinstance(quantity, Fisher) else 0)


def linear_layers(problem: Problem) -> dict[str, nn.Linear]:
    """Return the Linear layers whose rows are rank-one, by module name, as one batch shows them to be.

    A layer qualifies if it is called once, on ``(N, d)``, if no other module shares its parameters, if its
    inputs and output gradients give the gradient that automatic differentiation gives (they do not where a
    parameter is also used outside its layer), and if the outputs of a sample depend on its own row alone (they do
    not where the layer makes weights for others from constants).
    """
    uses: dict[int, int] = {}
    for _, parameter in problem.model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    candidates = {
        name: module
        for name, module in problem.model.named_modules()
        if type(module) is nn.Linear and all(uses[id(p)] == 1 for p in module.parameters())
    }
    inputs = next(problem.batches())[0][:32]
    parameters = {n: p.requires_grad_() for n, p in problem.parameters().items()}
    with torch.enable_grad():
        outputs = problem.forward(parameters, inputs)
    if not outputs.requires_grad:
        return {}
    # Random ones, not the loss's own gradients: those vanish at a perfect fit and would show nothing.
    seeds = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(outputs.shape))).to(outputs)
    seeds[1::2] = 0  # of every second sample: no other row may see them
    captured = _capture(problem, candidates, inputs, lambda _: seeds.unsqueeze(1))
    gradients = torch.autograd.grad(
        outputs, list(parameters.values()), seeds, allow_unused=True, materialize_grads=True
    )
    reference = dict(zip(parameters, gradients, strict=True))
    tolerance = 10 * torch.finfo(problem.dtype).eps ** 0.5
    right = {}
    for name, factors in captured.items():
        prefix = f"{name}." if name else ""
        sums = {"weight": factors.gradients[:, 0].mT @ factors.inputs, "bias": factors.gradients[:, 0].sum(dim=0)}
        errors = [
            float((sums[key] - reference[prefix + key]).abs().max())
            <= tolerance * float(reference[prefix + key].abs().max()) + torch.finfo(problem.dtype).tiny
            for key in sums
            if prefix + key in reference
        ]
        if all(errors) and not bool(factors.gradients[1::2].any()):
            right[name] = candidates[name]
    return right


def linear_factors(problem: Problem, quantity: Quantity, name: str, layer: nn.Linear) -> LinearFactors:
    """Return the inputs and output gradients of one of ``linear_layers`` over all the data."""
    rng = label_stream(quantity)
    collected: list[LinearFactors] = []
    for inputs, targets in problem.batches():

        def seeds(outputs: Tensor, targets: Tensor = targets) -> Tensor:
            return output_rows(problem.loss, quantity, outputs, targets, rng)

        captured = _capture(problem, {name: layer}, inputs, seeds)
        if name not in captured:
            raise UnsupportedError(f"{name} was not called once on (N, d) for every batch of the data")
        collected.append(captured[name])
    return LinearFactors(torch.cat([f.inputs for f in collected]), torch.cat([f.gradients for f in collected]))


def _capture(
    problem: Problem, layers: dict[str, nn.Linear], inputs: Tensor, seeds: Callable[[Tensor], Tensor]
) -> dict[str, LinearFactors]:
    """Run a batch forward and, for every row of ``seeds(outputs)``, backward; return the factors of each layer."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor:
            # The gradient of this added zero is the output's, whatever is done in place to the output after.
            offset = torch.zeros_like(output, requires_grad=True)
            seen[name].append((next(chain(arguments, keywords.values())).detach(), offset))
            return output + offset

        return hook

    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers.items():
            handle = layer.register_forward_hook(recorder(name), with_kwargs=True)
            hooks.callback(handle.remove)
        outputs = problem.forward({}, inputs)
    # A row a sample: tokens that are folded into the first dimension, (N T, d), are not.
    once = {
        name: calls[0]
        for name, calls in seen.items()
        if len(calls) == 1 and calls[0][0].ndim == 2 and len(calls[0][0]) == len(inputs)
    }
    if not once:
        return {}
    rows = seeds(outputs.detach()).to(outputs.dtype)
    gradients = [
        torch.autograd.grad(
            outputs,
            [offset for _, offset in once.values()],
            row,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for row in rows.unbind(dim=1)
    ]
    return {
        name: LinearFactors(x, torch.stack([g[i] for g in gradients], dim=1))
        for i, (name, (x, _)) in enumerate(once.items())
    }


def row_batches(
    problem: Problem, quantity: Quantity, names: Sequence[str], max_bytes: float = 6.4e7
) -> Iterator[Tensor]:
    """Yield the rows of the named parameters, concatenated and flattened, ``(rows, P)``, in the samples' order.

    For MaSQ a row is the scaled gradient of a mini-batch; else there are ``R`` rows a sample.

    Args:
        problem: Model, loss and data.
        quantity: Any but the Hessian.
        names: Of parameters.
        max_bytes: About how much memory a yielded tensor may take.
    """
    values = problem.parameters()
    parameters = {name: values[name] for name in names}
    size = sum(p.numel() for p in parameters.values()) * problem.dtype.itemsize
    if isinstance(quantity, MaSQ):
        yield from _masq_rows(problem, quantity, parameters)
        return
    rng = label_stream(quantity)
    rows_of = _vectorised_rows
    for inputs, targets in problem.batches():
        with torch.no_grad():
            seeds = output_rows(problem.loss, quantity, problem.forward({}, inputs), targets, rng).to(problem.dtype)
        step = max(1, int(max_bytes / (size * seeds.shape[1])))
        for x, s in zip(inputs.split(step), seeds.split(step), strict=True):
            try:
                rows = rows_of(problem, parameters, x, s)
            except RuntimeError:
                if rows_of is _looped_rows:
                    raise
                # Some modules (recurrent ones, a few fused kernels) have no batching rule: go one by one.
                rows_of = _looped_rows
                rows = rows_of(problem, parameters, x, s)
            yield rows


def _vectorised_rows(problem: Problem, parameters: dict[str, Tensor], inputs: Tensor, seeds: Tensor) -> Tensor:
    def of_sample(x: Tensor, seed: Tensor) -> Tensor:
        pull = vjp(lambda p: problem.forward(p, x.unsqueeze(0))[0], parameters)[1]
        (rows,) = vmap(pull)(seed)
        return torch.cat([rows[name].reshape(len(seed), -1) for name in parameters], dim=1)

    rows: Tensor = vmap(of_sample)(inputs, seeds)
    return rows.flatten(0, 1)


def _looped_rows(problem: Problem, parameters: dict[str, Tensor], inputs: Tensor, seeds: Tensor) -> Tensor:
    rows = []
    for x, seed in zip(inputs.split(1), seeds, strict=True):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            outputs = problem.forward(leaves, x)[0]
        for s in seed:
            rows.append(_pulled_back(outputs, list(leaves.values()), s))
    return torch.stack(rows)


def _pulled_back(outputs: Tensor, leaves: list[Tensor], seed: Tensor) -> Tensor:
    """Return ``seed' J``, flattened; zeros where the outputs depend on none of the leaves."""
    if not outputs.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    gradients = torch.autograd.grad(outputs, leaves, seed, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in gradients])


def _masq_rows(problem: Problem, quantity: MaSQ, parameters: dict[str, Tensor]) -> Iterator[Tensor]:
    n = problem.num_samples
    for inputs, targets in problem.batches(quantity.batch_size):
        scale = {
            "sumsq": 1.0,
            "mean": sqrt(n / -(-n // quantity.batch_size)) / len(inputs),
            "scaled": 1 / len(inputs),
        }[quantity.norm]
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            outputs = problem.forward(leaves, inputs)
        seeds = scale * problem.loss.gradients(outputs.detach(), targets)
        yield _pulled_back(outputs, list(leaves.values()), seeds.to(outputs.dtype)).unsqueeze(0)
