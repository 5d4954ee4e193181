"""Rows of a Gram-type curvature, many samples at a time: the vectors ``v`` with ``F = 1/N sum v v'``.

Two forms. Any parameter has its rows themselves, by vectorised automatic differentiation. The weight of a Linear
layer that is called once, on ``(N, d)``, has rank-one rows ``g x'``: its inputs and the gradients of its outputs,
a fraction of the memory, are all that is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.errors import UnsupportedError
from curvlab.estimators.capture import backward, few_inputs, forward, unfaithful_modules
from curvlab.estimators.seeds import label_stream, output_rows
from curvlab.problem import Problem
from curvlab.progress import Advance, silent
from curvlab.quantities import MaSQ, Quantity


@dataclass(frozen=True)
class LinearFactors:
    """Rank-one rows of a Linear layer: row ``(n, r)`` of its weight is ``gradients[n, r] inputs[n]'``.

    Attributes:
        inputs: ``(N, d)``.
        gradients: ``(N, R, O)``.
    """

    inputs: Tensor
    gradients: Tensor


def linear_layers(problem: Problem) -> dict[str, nn.Linear]:
    """Return the Linear layers whose rows are rank-one, by module name, as a few samples show them to be.

    A layer qualifies if it is called once, on ``(N, d)``, and has its parameters to itself (see
    ``curvlab.estimators.capture.unfaithful_modules``).
    """
    candidates = {name: module for name, module in problem.model.named_modules() if type(module) is nn.Linear}
    calls = forward(problem, candidates, few_inputs(problem))[1]
    flat = {name: candidates[name] for name, seen in calls.items() if all(call.inputs.ndim == 2 for call in seen)}
    unfaithful = unfaithful_modules(problem, flat)
    return {name: layer for name, layer in flat.items() if name not in unfaithful}


def linear_factors(problem: Problem, quantity: Quantity, name: str, layer: nn.Linear) -> LinearFactors:
    """Return the inputs and output gradients of one of ``linear_layers`` over all the data."""
    rng = label_stream(quantity)
    collected: list[LinearFactors] = []
    for inputs, targets in problem.batches():
        outputs, calls = forward(problem, {name: layer}, inputs)
        if len(calls[name]) != 1 or calls[name][0].inputs.ndim != 2:
            raise UnsupportedError(f"{name} was not called once on (N, d) for every batch of the data")
        rows = output_rows(problem.loss, quantity, outputs.detach(), targets, rng)
        gradients = [backward(outputs, calls[name], row, keep=True)[0] for row in rows]
        collected.append(LinearFactors(calls[name][0].inputs, torch.stack(gradients, dim=1)))
    return LinearFactors(torch.cat([f.inputs for f in collected]), torch.cat([f.gradients for f in collected]))


def row_batches(
    problem: Problem,
    quantity: Quantity,
    names: Sequence[str],
    max_bytes: float = 6.4e7,
    advance: Advance = silent,
) -> Iterator[Tensor]:
    """Yield the rows of the named parameters, concatenated and flattened, ``(rows, P)``, in the samples' order.

    For MaSQ a row is the scaled gradient of a mini-batch; else there are ``R`` rows a sample.

    Args:
        problem: Model, loss and data.
        quantity: Any but the Hessian.
        names: Of parameters.
        max_bytes: About how much memory a yielded tensor may take.
        advance: Called with the samples done.
    """
    values = problem.parameters()
    parameters = {name: values[name] for name in names}
    size = sum(p.numel() for p in parameters.values()) * problem.dtype.itemsize
    if isinstance(quantity, MaSQ):
        yield from _masq_rows(problem, quantity, parameters, advance)
        return
    rng = label_stream(quantity)
    rows_of = _vectorised_rows
    for inputs, targets in problem.batches():
        with torch.no_grad():
            seeds = output_rows(problem.loss, quantity, problem.forward({}, inputs), targets, rng)
        step = max(1, int(max_bytes / (size * len(seeds))))
        for start in range(0, len(inputs), step):
            some = slice(start, start + step)
            x, s = inputs[some], seeds.of(some)[:]
            try:
                rows = rows_of(problem, parameters, x, s)
            except RuntimeError:
                if rows_of is _looped_rows:
                    raise
                # Some modules (recurrent ones, a few fused kernels) have no batching rule: go one by one.
                rows_of = _looped_rows
                rows = rows_of(problem, parameters, x, s)
            yield rows
            advance(len(x))


def _vectorised_rows(problem: Problem, parameters: dict[str, Tensor], inputs: Tensor, seeds: Tensor) -> Tensor:
    def of_sample(x: Tensor, seed: Tensor) -> Tensor:
        pull = vjp(lambda p: problem.forward(p, x.unsqueeze(0))[0], parameters)[1]
        (rows,) = vmap(pull)(seed)
        # To its known size: a batching rule may be wrong (PReLU's gives too many entries), which then raises.
        return torch.cat([rows[name].reshape(len(seed), p.numel()) for name, p in parameters.items()], dim=1)

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no batching rule
        rows: Tensor = vmap(of_sample)(inputs, seeds)
    return rows.flatten(0, 1).contiguous()  # those of a parameter that is not used are one zero, spread out


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


def _masq_rows(problem: Problem, quantity: MaSQ, parameters: dict[str, Tensor], advance: Advance) -> Iterator[Tensor]:
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
        advance(len(inputs))
