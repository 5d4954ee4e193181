"""Four ways to compute the diagonal of MaSQ or the empirical Fisher, with their seconds and peak memory."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from curvlab.analyze.frame.memory import Peak
from curvlab.estimators import estimate
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import MaSQ

_FEW = 2  # batches of the warm-up call


def measure_cost(method: str, problem: Problem, batch_size: int, masq_batch_size: int) -> tuple[float, float | None]:
    """Return the seconds of a method, and the bytes by which it raises the peak memory (None if unknown).

    Args:
        method: One of ``METHODS``, or ``masq``.
        problem: Network and samples.
        batch_size: Samples per forward pass of the methods that compute the FIM.
        masq_batch_size: Batch size of MaSQ.
    """
    x, y = problem.data
    few = problem.with_data((x[: _FEW * batch_size], y[: _FEW * batch_size]))
    compute(method, few, batch_size, masq_batch_size)
    peak = Peak(problem.device)
    started = time.perf_counter()
    compute(method, problem, batch_size, masq_batch_size)
    if problem.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, peak.bytes()


def compute(method: str, problem: Problem, batch_size: int, masq_batch_size: int) -> Tensor:
    """Return the diagonal of the empirical Fisher or of MaSQ, ``(P,)``."""
    if method == "masq":
        return estimate(problem, MaSQ(masq_batch_size), "diag").diagonal()
    return METHODS[method](problem, batch_size)


def by_estimate(problem: Problem, batch_size: int) -> Tensor:
    """Return the diagonal from ``curvlab.estimate``; a dense layer needs only squared inputs and output gradients."""
    return estimate(problem, "empirical_fisher", "diag", batch_size=batch_size).diagonal()


def by_sample_gradients(problem: Problem, batch_size: int) -> Tensor:
    """Return the diagonal from per-sample gradients (``torch.func``), one batch at a time."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(problem.model, values, (x[None],)), y[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    return _mean_square(problem, batch_size, lambda x, y: gradients(parameters, x, y))


def by_duplicated_weights(problem: Problem, batch_size: int) -> Tensor:
    """Return the diagonal from one copy of all weights per sample of a batch (section 2.5 of the paper)."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        copies = {name: p.repeat(len(x), *[1] * p.ndim).requires_grad_() for name, p in parameters.items()}
        outputs = vmap(lambda own, one: functional_call(problem.model, own, (one[None],)))(copies, x)
        loss = F.cross_entropy(outputs.flatten(0, 1), y, reduction="sum")
        return dict(zip(copies, torch.autograd.grad(loss, list(copies.values())), strict=True))

    return _mean_square(problem, batch_size, gradients)


def _mean_square(problem: Problem, batch_size: int, gradients: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> Tensor:
    x, y = problem.data
    space = ParameterSpace.of(problem.model)
    total = torch.zeros(space.total, dtype=x.dtype, device=x.device)
    for start in range(0, len(x), batch_size):
        found = gradients(x[start : start + batch_size], y[start : start + batch_size])
        total += space.flatten({name: found[name].square_().sum(dim=0) for name in space.names})
    return total / len(x)


#: Methods that compute the FIM, by name.
METHODS: dict[str, Callable[[Problem, int], Tensor]] = {
    "fim": by_estimate,
    "sample_gradients": by_sample_gradients,
    "duplicated_weights": by_duplicated_weights,
}
