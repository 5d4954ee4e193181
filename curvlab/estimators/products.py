"""Products of a curvature with vectors by automatic differentiation: the implicit structure, of any model.

The Hessian by differentiating the gradient along a vector (Pearlmutter 1994); the Fishers and the GGN as
``J' s s' J v`` with the output rows ``s`` of ``curvlab.estimators.seeds`` (Schraudolph 2002); the Matrix of Squares
from the gradients of its mini-batches. Nothing is vectorised over samples, so that no module needs a rule for that.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from math import sqrt

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.weight_norm import WeightNorm

from curvlab.errors import UnsupportedError
from curvlab.estimators.rows import row_batches
from curvlab.estimators.seeds import label_stream, output_rows
from curvlab.parameters import ParameterSpace
from curvlab.problem import Batch, Problem
from curvlab.quantities import Hessian, MaSQ, Quantity

_PROBE_SAMPLES = 3

Leaves = Mapping[str, Tensor]
#: From vectors ``(K, P)`` to their products, a term for every batch.
Terms = Callable[[Tensor], Iterator[Tensor]]
#: From a vector, by parameter, to ``J v`` ``(N, C)``.
Push = Callable[[Leaves], Tensor]


def product(
    problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None
) -> Callable[[Tensor], Tensor]:
    """See ``curvlab.estimators.backend.Product``.

    The model is copied: the matrix stays what it is while the model trains on. Monte Carlo labels are the same at every
    product. What torch's derivatives give is tried on a few samples before it is believed.

    Raises:
        UnsupportedError: A derivative of the model is missing in torch, or wrong.
    """
    with differentiable(problem.model):
        at = snapshot(problem)
        terms = _terms(at, quantity, space, batch_size)
    num_samples = at.num_samples

    def multiply(vectors: Tensor) -> Tensor:
        with differentiable(at.model):
            columns = vectors.detach().mT.clone()
            total = torch.zeros_like(columns)
            for term in terms(columns):
                total += term
        return total.mT / num_samples

    return multiply


def snapshot(problem: Problem) -> Problem:
    """Return the problem with a copy of its model, which nothing that is done to either then shares."""
    # Torch copies leaves only; a module may hold a tensor that it computed, such as the older weight_norm's weight.
    held = (tensor for module in problem.model.modules() for tensor in vars(module).values())
    computed = [tensor for tensor in held if isinstance(tensor, Tensor) and not tensor.is_leaf]
    copied = copy(problem)  # with what it knows of the data
    copied.model = deepcopy(problem.model, {id(t): t.detach().clone() for t in computed})
    return copied


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Have torch take kernels with all their derivatives, and gradients where the caller has them off."""
    with ExitStack() as settings:
        # It is torch's own, the first time that numbers with a dual part are used.
        settings.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        settings.enter_context(torch.inference_mode(False))  # also within no_grad
        settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            for fused in (torch.backends.mkldnn, torch.backends.cudnn):
                settings.callback(setattr, fused, "enabled", fused.enabled)
                fused.enabled = False  # type: ignore[attr-defined]
        yield


def _terms(problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None) -> Terms:
    if isinstance(quantity, MaSQ):
        return lambda vectors: ((vectors @ g.mT) @ g for g in row_batches(problem, quantity, space.names))
    few = next(problem.batches(_PROBE_SAMPLES))
    if isinstance(quantity, Hessian):
        _check_symmetry(problem, space, few)
        return lambda vectors: (_hessian(problem, space, batch, vectors) for batch in problem.batches(batch_size))
    pushing = _right_pushing(problem, space, few[0])

    def terms(vectors: Tensor) -> Iterator[Tensor]:
        rng = label_stream(quantity)
        for inputs, targets in problem.batches(batch_size):
            leaves = _leaves(problem, space)
            outputs = problem.forward(leaves, inputs)
            rows = output_rows(problem.loss, quantity, outputs.detach(), targets, rng).to(outputs.dtype)
            push = pushing(problem, leaves, inputs, outputs)
            products = []
            for vector in vectors:
                along = torch.einsum("nrc,nc->nr", rows, push(space.unflatten(vector)))
                seed = torch.einsum("nrc,nr->nc", rows, along)
                products.append(_flat(_pull([outputs], leaves.values(), [seed])))
            yield torch.stack(products)

    return terms


# The Hessian ---------------------------------------------------------------------------------------------------------


def _hessian(problem: Problem, space: ParameterSpace, batch: Batch, vectors: Tensor) -> Tensor:
    inputs, targets = batch
    leaves = _leaves(problem, space)
    value = problem.loss.values(problem.forward(leaves, inputs), targets).sum()
    slope = _pull([value], leaves.values(), [torch.ones_like(value)], create_graph=True)
    return torch.stack([_flat(_pull(slope, leaves.values(), space.unflatten(v).values())) for v in vectors])


def _check_symmetry(problem: Problem, space: ParameterSpace, few: Batch) -> None:
    name = type(problem.model).__name__
    vectors = _random(problem, (2, space.total))
    try:
        products = _hessian(problem, space, few, vectors)
    except RuntimeError as error:
        raise UnsupportedError(
            f"torch has no second derivative of {name}: {_first_line(error)}; the GGN needs none"
        ) from error
    bound = _tolerance(problem) * vectors.norm(dim=1) @ products.norm(dim=1).flip(0)
    if bool((vectors[0] @ products[1] - vectors[1] @ products[0]).abs() > bound):
        suspects = ", ".join(_weight_normed(problem.model))
        of = f"; weight_norm's fused kernel, in {suspects}, is known for that" if suspects else ""
        raise UnsupportedError(
            f"the second derivative of {name} that torch computes is not symmetric, so it is wrong{of}: replace the "
            "module or leave its parameters out with params=[...]; the GGN needs no second derivative"
        )


def _weight_normed(model: nn.Module) -> list[str]:
    """Return the modules that hold ``weight_norm``, in torch's newer form or its older one."""
    newer = [
        n.rpartition("parametrizations.")[0] for n, m in model.named_modules() if type(m).__name__ == "_WeightNorm"
    ]
    older = [
        n for n, m in model.named_modules() if any(isinstance(h, WeightNorm) for h in m._forward_pre_hooks.values())
    ]
    return [name.removesuffix(".") or "the model" for name in newer + older]


# The Jacobian --------------------------------------------------------------------------------------------------------


def _forward_mode(problem: Problem, leaves: Leaves, inputs: Tensor, outputs: Tensor) -> Push:
    """Push by a forward pass with dual numbers."""

    def push(vector: Leaves) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf.detach(), vector[name]) for name, leaf in leaves.items()}
            tangent: Tensor | None = forward_ad.unpack_dual(problem.forward(duals, inputs)).tangent
        return torch.zeros_like(outputs) if tangent is None else tangent

    return push


def _double_backward(_: Problem, leaves: Leaves, __: Tensor, outputs: Tensor) -> Push:
    """Push by differentiating ``J' u``, which is linear in ``u``: for modules without a rule for dual numbers."""
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = _pull([outputs], leaves.values(), [u], create_graph=True)
    return lambda vector: _pull(pulled, [u], vector.values())[0]


def _right_pushing(
    problem: Problem, space: ParameterSpace, inputs: Tensor
) -> Callable[[Problem, Leaves, Tensor, Tensor], Push]:
    """Return the faster way whose ``J`` is the adjoint of the ``J'`` that backward passes give.

    Raises:
        UnsupportedError: Neither is.
    """
    leaves = _leaves(problem, space)
    outputs = problem.forward(leaves, inputs)
    v, u = _random(problem, (space.total,)), _random(problem, tuple(outputs.shape), seed=1)
    pulled = _flat(_pull([outputs], leaves.values(), [u]))
    reason = "its derivatives are not adjoint, so one is wrong"
    for pushing in (_forward_mode, _double_backward):
        try:
            pushed = pushing(problem, leaves, inputs, outputs)(space.unflatten(v))
        except RuntimeError as error:
            reason = _first_line(error)
            continue
        bound = _tolerance(problem) * (u.norm() * pushed.norm() + v.norm() * pulled.norm())
        if bool(((u * pushed).sum() - v @ pulled).abs() <= bound):
            return pushing
    raise UnsupportedError(f"torch cannot multiply with the Jacobian of {type(problem.model).__name__}: {reason}")


# Automatic differentiation -------------------------------------------------------------------------------------------


def _leaves(problem: Problem, space: ParameterSpace) -> dict[str, Tensor]:
    values = problem.parameters()
    return {name: values[name].requires_grad_() for name in space.names}


def _pull(
    outputs: Iterable[Tensor], leaves: Iterable[Tensor], seeds: Iterable[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradients of ``sum(outputs * seeds)``; zeros where it does not depend on a leaf."""
    leaves = list(leaves)
    dependent = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
    if not dependent:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    values, along = zip(*dependent, strict=True)
    return torch.autograd.grad(
        values, leaves, along, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _random(problem: Problem, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    # On the CPU and in float64: the same on every device.
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise.to(problem.device, problem.dtype)


def _tolerance(problem: Problem) -> float:
    return 10 * sqrt(torch.finfo(problem.dtype).eps)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
