"""Rows of a Gram-type curvature, many samples at a time: the vectors ``v`` with ``F = 1/N sum v v'``.

There are two forms. For any parameter, the rows are computed by vectorised automatic differentiation. The weight of a
Linear layer that is called once, on ``(N, d)``, has rank-one rows ``g x'``: only its inputs and the gradients of its
outputs are kept, which take a fraction of the memory.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.batches import Inputs, tensors_of, with_tensors
from curvlab.errors import UnsupportedError
from curvlab.estimators.capture import (
    Call,
    backward,
    forward,
    ignore_torch_warnings,
    inspect_graph,
    make_leaves,
    to_working_dtype,
    working_dtype,
)
from curvlab.estimators.covectors import label_stream, output_covectors
from curvlab.estimators.layers import make_layer
from curvlab.estimators.memory import at_most
from curvlab.estimators.rules import agree, random_like
from curvlab.estimators.verification import verify_factors
from curvlab.interface import Pair
from curvlab.problem import Problem
from curvlab.progress import Advance, no_progress
from curvlab.quantities import MaSQ, Quantity


@dataclass(frozen=True)
class LinearFactors:
    """Rank-one rows of a Linear layer: row ``(n, r)`` of the weight is ``gradients[n, r] inputs[n]'``.

    Attributes:
        inputs: ``(N, d)``.
        gradients: ``(N, R, O)``.
    """

    inputs: Tensor
    gradients: Tensor


def linear_layers(problem: Problem) -> dict[str, nn.Linear]:
    """Return the Linear layers with rank-one rows, by module name, as determined on a few samples.

    A layer qualifies if it is called on ``(N, d)`` and its weight and bias are verified (see
    ``curvlab.estimators.verification``). A layer with a replaced forward does not qualify, because such a forward can
    change the gradients of some samples only.
    """
    verified = verify_factors(problem, problem.space)
    candidates: dict[str, nn.Linear] = {}
    for name, layer in verified.layers.items():
        whole = make_layer(problem.space, name, layer.module)
        if isinstance(layer.module, nn.Linear) and layer == whole and "forward" not in vars(layer.module):
            candidates[name] = layer.module
    layers = {name: make_layer(problem.space, name, module) for name, module in candidates.items()}
    calls = forward(problem, layers, problem.probe()[0][0])[1]
    return {name: module for name, module in candidates.items() if _is_flat(calls[name])}


def linear_factors(problem: Problem, quantity: Quantity, name: str, layer: nn.Linear) -> LinearFactors:
    """Return the inputs and output gradients of one of ``linear_layers`` over all data, in at least float32.

    Raises:
        UnsupportedError: Some batch uses the layer differently than the samples of the verification.
    """
    rng = label_stream(quantity)
    collected: list[LinearFactors] = []
    whole = make_layer(problem.space, name, layer)
    for inputs, targets in problem.batches():
        leaves = make_leaves(problem)
        outputs, calls = forward(problem, {name: whole}, inputs, leaves, cloned=(name,))
        uses = inspect_graph(outputs, leaves).uses
        if not _is_flat(calls[name]) or any(uses[parameter] > 1 for parameter in whole.parameters):
            raise UnsupportedError(
                f"{name} is not called exactly once on (N, d) in every batch, or its parameters are used elsewhere: "
                "leave its parameters out with params=[...], or use estimate(problem, quantity, 'dense') if the "
                "network is small"
            )
        covectors = output_covectors(problem.loss, quantity, outputs.detach(), targets, rng)
        gradients = [backward(outputs, calls[name], row, keep=True)[0] for row in covectors]
        (call,) = calls[name]
        assert call.inputs is not None
        collected.append(LinearFactors(call.inputs, torch.stack(gradients, dim=1)))
    return LinearFactors(torch.cat([f.inputs for f in collected]), torch.cat([f.gradients for f in collected]))


def _is_flat(seen: Sequence[Call]) -> bool:
    return len(seen) == 1 and seen[0].inputs is not None and seen[0].inputs.ndim == 2


def row_batches(
    problem: Problem,
    quantity: Quantity,
    names: Sequence[str],
    max_bytes: float = 6.4e7,
    advance: Advance = no_progress,
) -> Iterator[Tensor]:
    """Yield the rows of the named parameters, flattened and concatenated, ``(rows, P)``, in the order of the samples.

    For MaSQ, a row is the scaled gradient of a mini-batch. For the other quantities there are ``R`` rows per sample,
    which are yielded together unless they exceed ``max_bytes``. Rows are in at least float32.

    Args:
        problem: Model, loss and data.
        quantity: Any quantity except the Hessian.
        names: Names of parameters.
        max_bytes: Approximate limit of the memory of a yielded tensor.
        advance: Called with the number of samples done.
    """
    values = problem.parameters()
    parameters = {name: values[name] for name in names}
    entries = sum(p.numel() for p in parameters.values())
    if isinstance(quantity, MaSQ):
        yield from _masq_rows(problem, quantity, parameters, advance)
        return
    rng = label_stream(quantity)
    compute_rows = RowFunction(problem, parameters)
    for inputs, targets in problem.batches():
        with torch.enable_grad():  # for models with a derivative in the forward pass, or that check the grad mode
            outputs = problem.forward({}, inputs).detach()
        covectors = output_covectors(problem.loss, quantity, outputs, targets, rng)
        size = (entries + outputs.shape[1]) * working_dtype(problem.dtype).itemsize
        fitting = max(1, int(at_most(max_bytes, share=1 / 16) / size))  # rows
        step = max(1, fitting // max(len(covectors), 1))
        for start in range(0, len(inputs), step):
            some = slice(start, start + step)
            part = covectors.select(some)
            # As many rows of one sample as fit, or all rows of several samples.
            for first in range(0, len(covectors), fitting):
                yield compute_rows(inputs[some], part[first : first + fitting])
            advance(len(inputs[some]))


class RowFunction:
    """Function from covectors to rows, vectorised over samples and covectors wherever torch does this correctly."""

    def __init__(self, problem: Problem, parameters: dict[str, Tensor]) -> None:
        self.problem, self.parameters = problem, parameters
        self.vectorised: dict[tuple[int, ...], bool] = {}  # whether vectorising is correct, by shapes

    def __call__(self, inputs: Inputs, covectors: Tensor) -> Tensor:
        """Return rows ``(n R, P)`` of inputs ``(n, ...)`` and covectors ``(n, R, C)``, in at least float32."""
        shapes = (*inputs.shape, *covectors.shape)
        if self.vectorised.get(shapes, True):
            try:
                rows = to_working_dtype(_vectorised_rows(self.problem, self.parameters, inputs, covectors))
            except Exception:  # some modules (recurrent ones, some fused kernels) have no batching rule
                self.vectorised = defaultdict(bool)  # False for all shapes
            else:
                if shapes not in self.vectorised:
                    self.vectorised[shapes] = self._are_right(rows, inputs, covectors)
                if self.vectorised[shapes]:
                    return rows
        return to_working_dtype(_looped_rows(self.problem, self.parameters, inputs, covectors))

    def _are_right(self, rows: Tensor, inputs: Inputs, covectors: Tensor) -> bool:
        """Compare with one plain pass for all samples: torch's batching rules are wrong for some shapes."""
        weights = random_like(rows, (len(rows),))
        covector = torch.einsum("nr,nrc->nc", weights.view(covectors.shape[:2]).to(covectors), covectors)
        outputs, leaves = _run(self.problem, self.parameters, inputs)
        plain = to_working_dtype(_pull_back(outputs, leaves, covector))
        start = 0
        for p in leaves:
            part = slice(start, start := start + p.numel())
            scale = float(weights.abs() @ rows[:, part].norm(dim=1))
            if not agree(weights @ rows[:, part], plain[part], scale, self.problem.dtype):
                return False
        return True


def _vectorised_rows(problem: Problem, parameters: dict[str, Tensor], inputs: Inputs, covectors: Tensor) -> Tensor:
    constants = problem.parameters()  # without a graph for the parameters that are not selected

    def of_sample(tensors: tuple[Tensor, ...], covector: Tensor) -> Tensor:
        one = with_tensors(inputs, [tensor.unsqueeze(0) for tensor in tensors])
        pull = vjp(lambda p: problem.forward(constants | p, one)[0], parameters)[1]
        (rows,) = vmap(pull)(covector)
        return torch.cat([rows[name].reshape(len(covector), p.numel()) for name, p in parameters.items()], dim=1)

    with sdpa_kernel(SDPBackend.MATH), ignore_torch_warnings():  # the fused attention kernels have no batching rule
        rows: Tensor = vmap(of_sample)(tensors_of(inputs), covectors)
    return rows.flatten(0, 1).contiguous()  # the rows of an unused parameter are an expanded zero


def _looped_rows(problem: Problem, parameters: dict[str, Tensor], inputs: Inputs, covectors: Tensor) -> Tensor:
    rows = []
    for x, covector in zip(inputs.split(1), covectors, strict=True):
        outputs, leaves = _run(problem, parameters, x)
        rows += [_pull_back(outputs, leaves, s.unsqueeze(0)) for s in covector]
    return torch.stack(rows)


def _run(problem: Problem, parameters: dict[str, Tensor], inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs of a batch with their graph, and leaves for the parameters.

    All trainable parameters are leaves, not only the selected ones: a checkpoint that recomputes a part of the forward
    pass in the backward pass must build the same graph.
    """
    leaves = {name: p.clone().requires_grad_() for name, p in (problem.parameters() | parameters).items()}
    with torch.enable_grad(), ignore_torch_warnings():
        return problem.forward(leaves, inputs), [leaves[name] for name in parameters]


def _pull_back(outputs: Tensor, leaves: list[Tensor], covector: Tensor) -> Tensor:
    """Return ``covector' J``, flattened; zeros if the outputs depend on none of the leaves."""
    if not outputs.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    with ignore_torch_warnings():
        gradients = torch.autograd.grad(
            outputs, leaves, covector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in gradients])


def full_batches(problem: Problem, quantity: MaSQ) -> Iterator[Pair]:
    """Yield the mini-batches of MaSQ.

    Raises:
        UnsupportedError: Samples of different shapes, such as sequences of different lengths, do not fit into one
            batch.
    """
    left = problem.num_samples
    for inputs, targets in problem.batches(quantity.batch_size):
        if len(inputs) != min(left, quantity.batch_size):
            raise UnsupportedError(
                f"{quantity} needs mini-batches of {quantity.batch_size} samples, but the samples have different "
                "shapes: pad them to one shape"
            )
        left -= len(inputs)
        yield inputs, targets


def _masq_rows(problem: Problem, quantity: MaSQ, parameters: dict[str, Tensor], advance: Advance) -> Iterator[Tensor]:
    batches = -(-problem.num_samples // quantity.batch_size)
    for inputs, targets in full_batches(problem, quantity):
        units = problem.loss.count(targets)
        scale = {"sumsq": 1.0, "mean": sqrt(problem.num_units / batches) / units, "scaled": 1 / units}[quantity.norm]
        outputs, leaves = _run(problem, parameters, inputs)
        covectors = scale * problem.loss.gradients(outputs.detach(), targets)
        yield to_working_dtype(_pull_back(outputs, leaves, covectors.to(outputs.dtype))).unsqueeze(0)
        advance(len(inputs))
