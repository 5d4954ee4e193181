"""The reference: every quantity by plain automatic differentiation, one sample (and class or output) at a time.

Slow, obvious and right in float64: what every other estimator is tested against. A positive semi-definite
quantity is given by *rows*, vectors ``v`` over the parameters with ``F = 1/N sum v v'``.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.errors import UnsupportedError
from curvlab.losses import BinaryCrossEntropy, CrossEntropy
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity

_ALL = ("dense", "block_diag", "diag")
CELLS: Mapping[type[Quantity], Sequence[str]] = dict.fromkeys((Fisher, EmpiricalFisher, MaSQ, GGN, Hessian), _ALL)


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: str,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> Mapping[str, Tensor]:
    """Return the tensors of the matrix; see ``curvlab.estimators.registry.Estimator``."""
    if isinstance(quantity, Hessian):
        return _of_dense(_hessian(problem, space, batch_size, advance), structure, space)
    n = problem.num_samples
    parts = {"": slice(None)} if structure == "dense" else space.slices
    total: dict[str, Tensor] = {}
    for rows in per_sample_rows(problem, quantity, space, advance):
        for name, part in parts.items():
            v = rows[:, part]
            term = v.square().sum(dim=0) if structure == "diag" else v.mT @ v
            total[name] = total[name] + term if name in total else term
    if structure == "dense":
        return {"matrix": total[""] / n}
    if structure == "diag":
        return {"entries": torch.cat([total[name] for name in space.names]) / n}
    return {name: block / n for name, block in total.items()}


def _of_dense(matrix: Tensor, structure: str, space: ParameterSpace) -> Mapping[str, Tensor]:
    if structure == "dense":
        return {"matrix": matrix}
    if structure == "diag":
        return {"entries": matrix.diagonal().clone()}
    return {name: matrix[part, part].clone() for name, part in space.slices.items()}


def per_sample_rows(
    problem: Problem, quantity: Quantity, space: ParameterSpace, advance: Advance = lambda *_, **__: None
) -> Iterator[Tensor]:
    """Yield rows ``(R, P)`` with ``F = 1/N sum v v'``: a sample at a time, for MaSQ a mini-batch at a time."""
    if isinstance(quantity, MaSQ):
        yield from _masq_rows(problem, quantity, space, advance)
        return
    rng = np.random.default_rng(quantity.seed) if isinstance(quantity, Fisher) else np.random.default_rng()
    for inputs, targets in problem.batches():
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            parameters = _leaves(problem, space)
            outputs = problem.forward(parameters, x)
            yield _sample_rows(problem, quantity, outputs, y, list(parameters.values()), rng)
            advance(1)


def _sample_rows(
    problem: Problem,
    quantity: Quantity,
    outputs: Tensor,
    target: Tensor,
    parameters: list[Tensor],
    rng: np.random.Generator,
) -> Tensor:
    loss = problem.loss
    if isinstance(quantity, EmpiricalFisher):
        return _gradient(loss.values(outputs, target), parameters).unsqueeze(0)
    if isinstance(quantity, Fisher) and quantity.samples is not None:
        drawn = loss.sample(outputs, quantity.samples, rng)[0]
        return torch.stack([_gradient(loss.values(outputs, y.unsqueeze(0)), parameters) for y in drawn]) / sqrt(
            quantity.samples
        )
    if isinstance(quantity, Fisher) and isinstance(loss, CrossEntropy):
        # E over y of the outer product: every class, weighted by its probability.
        weights = outputs.detach().softmax(dim=1)[0].sqrt()
        labels = torch.arange(outputs.shape[1], device=outputs.device).split(1)
        return torch.stack(
            [w * _gradient(loss.values(outputs, y), parameters) for w, y in zip(weights, labels, strict=True)]
        )
    jacobian = torch.stack([_gradient(f, parameters) for f in outputs[0]])
    if isinstance(quantity, Fisher) and isinstance(loss, BinaryCrossEntropy):
        # The outputs are independent: E (sigmoid - y)^2 = p (1 - p) along each.
        p = outputs.detach().sigmoid()[0]
        weighted: Tensor = (p * (1 - p)).sqrt().unsqueeze(1) * jacobian
        return weighted
    if isinstance(quantity, Fisher):
        return jacobian  # unit-variance Gaussian: E (f - y)(f - y)' is the identity
    at = outputs.detach().requires_grad_()
    slope = _gradient(loss.values(at, target), [at], create_graph=True)
    hessian = torch.stack([_gradient(s, [at]) for s in slope])
    values, vectors = torch.linalg.eigh(hessian)
    factor: Tensor = (vectors * values.clamp(min=0).sqrt()).mT
    return factor @ jacobian


def _masq_rows(problem: Problem, quantity: MaSQ, space: ParameterSpace, advance: Advance) -> Iterator[Tensor]:
    n = problem.num_samples
    per_batch = {"sumsq": 1.0, "scaled": 1.0, "mean": sqrt(n / -(-n // quantity.batch_size))}[quantity.norm]
    for inputs, targets in problem.batches(quantity.batch_size):
        parameters = _leaves(problem, space)
        values = problem.loss.values(problem.forward(parameters, inputs), targets)
        reduced = values.sum() if quantity.norm == "sumsq" else values.mean()
        yield per_batch * _gradient(reduced, list(parameters.values())).unsqueeze(0)
        advance(len(inputs))


def _hessian(problem: Problem, space: ParameterSpace, batch_size: int | None, advance: Advance) -> Tensor:
    total = torch.zeros(space.total, space.total, dtype=problem.dtype, device=problem.device)
    n = 0
    for inputs, targets in problem.batches(batch_size):
        parameters = list(_leaves(problem, space).values())
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            named = dict(zip(space.names, parameters, strict=True))
            value = problem.loss.values(problem.forward(named, inputs), targets).sum()
            gradient = _gradient(value, parameters, create_graph=True)
            for i in range(space.total):
                if gradient[i].requires_grad:
                    total[i] += _gradient(gradient[i], parameters)
        n += len(inputs)
        advance(len(inputs))
    if bool((total - total.mT).abs().max() > total.abs().max() * torch.finfo(total.dtype).eps ** 0.5):
        raise UnsupportedError(
            f"the second derivative of {type(problem.model).__name__} that torch computes is not symmetric, so it is "
            "wrong (a fused kernel such as weight_norm's is known to do this); replace that module"
        )
    return (total + total.mT) / (2 * n)


def _leaves(problem: Problem, space: ParameterSpace) -> dict[str, Tensor]:
    values = problem.parameters()
    return {name: values[name].clone().requires_grad_() for name in space.names}


def _gradient(value: Tensor, parameters: list[Tensor], create_graph: bool = False) -> Tensor:
    if not value.requires_grad:  # it depends on none of them
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])
    gradients = torch.autograd.grad(
        value, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in gradients])
