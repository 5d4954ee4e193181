"""Products of a curvature matrix with vectors by automatic differentiation: the implicit structure, for any model.

The Hessian is multiplied by differentiating the gradient along a vector (Pearlmutter 1994); the Fishers and the GGN as
``J' s s' J v`` with the covectors ``s`` of ``curvlab.estimators.covectors`` (Schraudolph 2002); the Matrix of Squares
from the gradients of its mini-batches. Nothing is vectorised over samples, so that no module needs a batching rule.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import chain, islice
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.weight_norm import WeightNorm

from curvlab.batches import Inputs
from curvlab.errors import UnsupportedError, first_line
from curvlab.estimators.covectors import label_stream, output_product
from curvlab.estimators.memory import at_most
from curvlab.estimators.rows import row_batches
from curvlab.estimators.snapshots import (
    SnapshotGuard,
    SnapshotProblem,
    enable_all_derivatives,
    explain_torch_errors,
    snapshot,
)
from curvlab.graph import walk
from curvlab.interface import Pair
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import Hessian, MaSQ, Quantity

_KEPT_BYTES = 1e9  # usual limit of the graphs that a matrix keeps from product to product

Leaves = Mapping[str, Tensor]
#: Maps vectors ``(K, P)`` to their products ``(K, P)``, summed over the samples of a batch.
Term = Callable[[Tensor], Tensor]
#: Maps a vector, given by parameter, to ``J v`` ``(N, C)``.
Push = Callable[[Leaves], Tensor]
#: Maps a batch and the stream of labels to the term of the batch and the tensors whose graphs the term uses.
Build = Callable[[Pair, np.random.Generator], tuple[Term, Sequence[Tensor]]]
#: Makes a ``Push`` from a forward pass; also returns the tensors whose graphs it keeps.
Pushing = Callable[[Problem, Leaves, Inputs, Tensor], tuple[Push, Sequence[Tensor]]]


def kept_bytes() -> float:
    """Return the limit in bytes of the graphs that a matrix keeps from product to product."""
    return at_most(_KEPT_BYTES, share=1 / 4)


def product(
    problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None
) -> Callable[[Tensor], Tensor]:
    """See ``curvlab.estimators.backend.Product``.

    The matrix does not change when the model is trained further (see ``curvlab.estimators.snapshots``). Monte Carlo
    labels are the same in every product. Torch's derivatives are checked on a few samples before they are used. Vectors
    and sums are in at least float32.

    Raises:
        UnsupportedError: A derivative of the model is missing in torch, or wrong.
    """
    with enable_all_derivatives(problem), explain_torch_errors(problem.model):
        at = snapshot(problem, space)
        passes = _passes(at, quantity, space, batch_size)
    num_samples = at.num_samples

    def multiply(vectors: Tensor) -> Tensor:
        with enable_all_derivatives(at), explain_torch_errors(at.model):
            columns = vectors.detach().mT.contiguous()
            total: Tensor | None = None
            for term in passes():
                # In float64, so that a sum over many batches is as accurate as one batch.
                total = term(columns) if total is None else total.double().add_(term(columns))
        assert total is not None
        return total.div_(num_samples).to(vectors.dtype).mT

    return multiply


def _passes(
    problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None
) -> Callable[[], Iterable[Term]]:
    watch = SnapshotGuard(problem, space)
    if isinstance(quantity, MaSQ):
        return partial(_square_terms, problem, quantity, space, watch)
    if isinstance(quantity, Hessian):
        for few in problem.probe():
            _check_symmetry(problem, space, few)
        build = keep = partial(_hessian_term, problem, space)
    else:
        _multiply_outputs(problem, quantity)
        keep, build = (
            partial(_gram_term, problem, quantity, space, way) for way in _select_pushforwards(problem, space)
        )
    return _Passes(problem, quantity, batch_size, keep, build, watch).__call__


def _multiply_outputs(problem: Problem, quantity: Quantity) -> None:
    """Multiply with the matrix of the outputs of a few samples, so that a likelihood without it is refused at once."""
    inputs, targets = problem.probe()[0]
    outputs = problem.forward({}, inputs).detach()  # some models need gradients in their forward pass
    output_product(problem.loss, quantity, outputs, targets, label_stream(quantity))(torch.zeros_like(outputs))


class _Passes:
    """Passes over the data that yield one term per batch and keep graphs from pass to pass as long as they fit.

    With a kept graph, a Hessian-vector product takes as long as 1.6 gradients; with a new graph, as 2.7.
    """

    def __init__(
        self,
        problem: Problem,
        quantity: Quantity,
        batch_size: int | None,
        keep: Build,
        build: Build,
        watch: SnapshotGuard,
    ) -> None:
        self._batches = partial(problem.batches, batch_size)
        self._keep, self._build, self._watch = keep, build, watch
        # A backward pass that recomputes something, such as a checkpoint, uses the model's state at that time.
        self._copied = not isinstance(problem, SnapshotProblem)
        tensors = chain(problem.model.parameters(), problem.parameters().values())
        self._parameters = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._kept: list[Term] = []
        self._rng = label_stream(quantity)
        self._room = kept_bytes()
        self._whole = False

    def __call__(self) -> Iterator[Term]:
        if not (self._whole and self._copied):
            self._watch.check()
        yield from self._kept
        if self._whole:
            return
        rng = deepcopy(self._rng)  # the state at the first batch that is not kept
        for batch in islice(self._batches(), len(self._kept), None):
            term, outputs = (self._keep if self._room > 0 else self._build)(batch, rng)
            if self._room > 0:
                self._room -= _graph_bytes(outputs, self._parameters)
                if self._room > 0:
                    self._kept.append(term)
                    self._rng = deepcopy(rng)
            yield term
        self._whole = self._room > 0


def _square_terms(problem: Problem, quantity: MaSQ, space: ParameterSpace, watch: SnapshotGuard) -> Iterator[Term]:
    watch.check()
    for gradients in row_batches(problem, quantity, space.names):
        yield partial(_square_term, gradients)


def _square_term(gradients: Tensor, vectors: Tensor) -> Tensor:
    return (vectors @ gradients.mT) @ gradients


# The Hessian ---------------------------------------------------------------------------------------------------------


def _hessian_term(
    problem: Problem, space: ParameterSpace, batch: Pair, _: np.random.Generator | None = None
) -> tuple[Term, Sequence[Tensor]]:
    inputs, targets = batch
    leaves = _leaves(problem, space)
    value = problem.loss.values(problem.forward(leaves, inputs), targets).sum()
    slope = _pull([value], leaves.values(), [torch.ones_like(value)], create_graph=True)

    def term(vectors: Tensor) -> Tensor:
        along = (_by_parameter(space, vector).values() for vector in vectors.to(problem.dtype))
        return _rows(_pull(slope, leaves.values(), one) for one in along).to(vectors.dtype)

    return term, slope


def _check_symmetry(problem: Problem, space: ParameterSpace, few: Pair) -> None:
    name = type(problem.model).__name__
    vectors = _random(problem, (2, space.total))
    try:
        products = _hessian_term(problem, space, few)[0](vectors)
    except Exception as error:
        raise UnsupportedError(
            f"torch has no second derivative of {name}: {first_line(error)}; the GGN does not need one"
        ) from error
    if not bool(products.isfinite().all()):
        raise UnsupportedError(f"the second derivative of {name} is not finite at these parameters")
    eps = problem.eps()
    bound = 10 * sqrt(eps) * vectors.norm(dim=1) @ products.norm(dim=1).flip(0)
    # A block can be zero, such as that of a bias before a normalisation; it then contains only rounding errors.
    loss = problem.loss.values(problem.forward({}, few[0]).detach(), few[1]).abs().sum()
    bound = bound + 100 * eps * loss * vectors.norm(dim=1).prod()
    if not bool((vectors[0] @ products[1] - vectors[1] @ products[0]).abs() <= bound):
        suspects = ", ".join(_find_weight_norms(problem.model))
        hint = f"; weight_norm's fused kernel, in {suspects}, is known to cause this" if suspects else ""
        raise UnsupportedError(
            f"the second derivative of {name} that torch computes is not symmetric{hint}: it is wrong, or rounding in "
            f"{str(problem.dtype).removeprefix('torch.')} is too coarse at these weights; try the model in float64, "
            "replace the module or leave its parameters out with params=[...]; the GGN needs no second derivative"
        )


def _find_weight_norms(model: nn.Module) -> list[str]:
    """Return the names of the modules with ``weight_norm``, in torch's newer or older form."""
    newer = [
        n.rpartition("parametrizations.")[0] for n, m in model.named_modules() if type(m).__name__ == "_WeightNorm"
    ]
    older = [
        n for n, m in model.named_modules() if any(isinstance(h, WeightNorm) for h in m._forward_pre_hooks.values())
    ]
    return [name.removesuffix(".") or "the model" for name in newer + older]


# Gram matrices --------------------------------------------------------------------------------------------------------


def _gram_term(
    problem: Problem,
    quantity: Quantity,
    space: ParameterSpace,
    pushing: Pushing,
    batch: Pair,
    rng: np.random.Generator,
) -> tuple[Term, Sequence[Tensor]]:
    inputs, targets = batch
    leaves = _leaves(problem, space)
    outputs = problem.forward(leaves, inputs)
    fisher = output_product(problem.loss, quantity, outputs.detach(), targets, rng)
    push, pushed_from = pushing(problem, leaves, inputs, outputs)

    def term(vectors: Tensor) -> Tensor:
        # Contiguous, because rows of an output that all samples share are one row in memory.
        covectors = [fisher(push(_by_parameter(space, vector)).contiguous()) for vector in vectors.to(problem.dtype)]
        return _rows(_pull([outputs], leaves.values(), [covector]) for covector in covectors).to(vectors.dtype)

    return term, [outputs, *pushed_from]


# The Jacobian --------------------------------------------------------------------------------------------------------


def _forward_mode(problem: Problem, leaves: Leaves, inputs: Inputs, outputs: Tensor) -> tuple[Push, Sequence[Tensor]]:
    """Return ``J v`` by a forward pass with dual numbers."""

    def push(vector: Leaves) -> Tensor:
        with forward_ad.dual_level():  # with gradients on, for a derivative in the forward pass
            duals = {name: forward_ad.make_dual(leaf.detach(), vector[name]) for name, leaf in leaves.items()}
            tangent: Tensor | None = forward_ad.unpack_dual(problem.forward(duals, inputs)).tangent
        return torch.zeros_like(outputs) if tangent is None else tangent

    return push, ()


def _double_backward(_: Problem, leaves: Leaves, __: Inputs, outputs: Tensor) -> tuple[Push, Sequence[Tensor]]:
    """Return ``J v`` by differentiating ``J' u``, which is linear in ``u``: one graph serves any number of vectors."""
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = _pull([outputs], leaves.values(), [u], create_graph=True)
    return lambda vector: _pull(pulled, [u], vector.values())[0], pulled


def _select_pushforwards(problem: Problem, space: ParameterSpace) -> tuple[Pushing, Pushing]:
    """Return the faster correct methods for ``J v``: one for a graph that is kept, one for a graph that is not.

    A method is correct if its ``J`` is the adjoint of the ``J'`` of backward passes.

    Raises:
        UnsupportedError: No method is correct.
    """
    methods: tuple[Pushing, ...] = (_double_backward, _forward_mode)
    eps = problem.eps()
    obstacles = {method: _pushing_obstacle(problem, space, method, eps) for method in methods}
    right = [method for method in methods if obstacles[method] is None]
    if not right:
        raise UnsupportedError(
            f"torch cannot multiply with the Jacobian of {type(problem.model).__name__}: {obstacles[_double_backward]}"
        )
    return right[0], right[-1]


def _pushing_obstacle(problem: Problem, space: ParameterSpace, pushing: Pushing, eps: float) -> str | None:
    for inputs, _ in problem.probe():
        leaves = _leaves(problem, space)
        outputs = problem.forward(leaves, inputs)
        v, u = _random(problem, (space.total,)), _random(problem, tuple(outputs.shape), seed=1)
        pulled = _flat(_pull([outputs], leaves.values(), [u]))
        try:
            pushed = pushing(problem, leaves, inputs, outputs)[0](_by_parameter(space, v))
        except Exception as error:  # from torch, or from the model on dual numbers
            return first_line(error)
        if not bool(pushed.isfinite().all() and pulled.isfinite().all()):
            return "it is not finite at these parameters"
        bound = 10 * sqrt(eps) * (u.norm() * pushed.norm() + v.norm() * pulled.norm())
        # If the outputs do not depend on the parameters, only rounding errors remain.
        bound = bound + 100 * eps * u.norm() * v.norm() * outputs.detach().norm()
        if not bool(((u * pushed).sum() - v @ pulled).abs() <= bound):
            return "its forward and backward derivatives are not adjoint, so one is wrong"
    return None


# Automatic differentiation -------------------------------------------------------------------------------------------


def _by_parameter(space: ParameterSpace, vector: Tensor) -> dict[str, Tensor]:
    """Return a vector by parameter, each with its own memory: torch views complex numbers at even offsets only."""
    return {name: part.clone() for name, part in space.unflatten(vector).items()}


def _leaves(problem: Problem, space: ParameterSpace) -> dict[str, Tensor]:
    values = problem.parameters()
    return {name: values[name].requires_grad_() for name in space.names}


def _pull(
    outputs: Iterable[Tensor], leaves: Iterable[Tensor], covectors: Iterable[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradients of ``sum(outputs * covectors)``; zeros for a leaf on which it does not depend."""
    leaves = list(leaves)
    dependent = [
        (output, covector) for output, covector in zip(outputs, covectors, strict=True) if output.requires_grad
    ]
    if not dependent:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    values, along = zip(*dependent, strict=True)
    found = torch.autograd.grad(
        values, leaves, along, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return tuple(gradient.to_dense() if gradient.is_sparse else gradient for gradient in found)


def _graph_bytes(outputs: Iterable[Tensor], excluded: Container[int]) -> int:
    """Return the bytes that tensors and their graphs keep in memory, without storages at the excluded addresses."""
    outputs = list(outputs)
    sizes = dict(map(_storage, outputs))
    for node, _ in walk(outputs):
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += getattr(node, "saved_tensors", ())  # saved by a torch.autograd.Function in Python
        for tensor in chain.from_iterable(item if isinstance(item, (tuple, list)) else [item] for item in saved):
            if isinstance(tensor, Tensor):
                sizes.update([_storage(tensor)])
    return sum(size for address, size in sizes.items() if address not in excluded)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's memory, or another unique number, and its size in bytes."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # for a sparse tensor, or one within torch.func
        return -id(tensor), tensor.numel() * tensor.element_size()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _rows(vectors: Iterable[Iterable[Tensor]]) -> Tensor:
    flat = [list(tensors) for tensors in vectors]
    return _flat(chain.from_iterable(flat)).view(len(flat), -1)


def _random(problem: Problem, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    # Uniform, not the normal numbers of ``curvlab.estimators.rules.random_like``: for vectors over all parameters,
    # uniform numbers in float32 take a tenth of the time and half of the memory.
    noise = np.random.default_rng(seed).random(shape, dtype=np.float32) - np.float32(0.5)
    return torch.from_numpy(noise).to(problem.device, problem.dtype)
