"""Rows of a Gram-type curvature, many samples at a time: the vectors ``v`` with ``F = 1/N sum v v'``.

Two forms. Any parameter has its rows themselves, by vectorised automatic differentiation. The weight of a Linear
layer that is called once, on ``(N, d)``, has rank-one rows ``g x'``: its inputs and the gradients of its outputs,
a fraction of the memory, are all that is kept.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.errors import UnsupportedError
from curvlab.estimators.capture import Call, backward, forward, graph_of, leaves_of, quiet, working, working_dtype
from curvlab.estimators.layers import layer_in
from curvlab.estimators.rules import agree, random_like
from curvlab.estimators.seeds import label_stream, output_rows
from curvlab.estimators.verification import verify_factors
from curvlab.problem import Problem
from curvlab.progress import Advance, no_progress
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

    A layer qualifies if it is called on ``(N, d)``, and if its weight and bias are verified (see
    ``curvlab.estimators.verification``). One whose forward is the user's own does not: what that does after the
    operation can change the gradients of some samples only.
    """
    verified = verify_factors(problem, problem.space)
    candidates: dict[str, nn.Linear] = {}
    for name, layer in verified.layers.items():
        whole = layer_in(problem.space, name, layer.module)
        if isinstance(layer.module, nn.Linear) and layer == whole and "forward" not in vars(layer.module):
            candidates[name] = layer.module
    calls = forward(problem, candidates, problem.probe()[0][0])[1]
    return {name: module for name, module in candidates.items() if _is_flat(calls[name])}


def linear_factors(problem: Problem, quantity: Quantity, name: str, layer: nn.Linear) -> LinearFactors:
    """Return the inputs and output gradients of one of ``linear_layers`` over all the data, in at least float32.

    Raises:
        UnsupportedError: On some batch the layer is not used as it was on the samples of the verification.
    """
    rng = label_stream(quantity)
    collected: list[LinearFactors] = []
    parameters = layer_in(problem.space, name, layer).parameters
    for inputs, targets in problem.batches():
        leaves = leaves_of(problem)
        outputs, calls = forward(problem, {name: layer}, inputs, leaves, apart=(name,))
        uses = graph_of(outputs, leaves).uses
        if not _is_flat(calls[name]) or any(uses[parameter] > 1 for parameter in parameters):
            raise UnsupportedError(
                f"{name} was not called once on (N, d) for every batch of the data, or acts elsewhere: leave its "
                "parameters out with params=[...], or take estimate(problem, quantity, 'dense') of a small network"
            )
        seeds = output_rows(problem.loss, quantity, outputs.detach(), targets, rng)
        gradients = [backward(outputs, calls[name], row, keep=True)[0] for row in seeds]
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
    """Yield the rows of the named parameters, concatenated and flattened, ``(rows, P)``, in the samples' order.

    For MaSQ a row is the scaled gradient of a mini-batch; else there are ``R`` rows a sample, which come together
    unless they take more than the memory. They are in at least float32.

    Args:
        problem: Model, loss and data.
        quantity: Any but the Hessian.
        names: Of parameters.
        max_bytes: About how much memory a yielded tensor may take.
        advance: Called with the samples done.
    """
    values = problem.parameters()
    parameters = {name: values[name] for name in names}
    entries = sum(p.numel() for p in parameters.values())
    if isinstance(quantity, MaSQ):
        yield from _masq_rows(problem, quantity, parameters, advance)
        return
    rng = label_stream(quantity)
    rows_of = _Rows(problem, parameters)
    for inputs, targets in problem.batches():
        with torch.enable_grad():  # which a derivative inside the forward needs, and a forward may look at
            outputs = problem.forward({}, inputs).detach()
        seeds = output_rows(problem.loss, quantity, outputs, targets, rng)
        size = (entries + outputs.shape[1]) * working_dtype(problem.dtype).itemsize
        fitting = max(1, int(max_bytes / size))  # rows
        step = max(1, fitting // max(len(seeds), 1))
        for start in range(0, len(inputs), step):
            some = slice(start, start + step)
            of_some = seeds.of(some)
            # As many rows of one sample as fit, or all rows of as many samples.
            for first in range(0, len(seeds), fitting):
                yield rows_of(inputs[some], of_some[first : first + fitting])
            advance(len(inputs[some]))


class _Rows:
    """The rows of parameters at seeds: vectorised over samples and seeds wherever torch does that right."""

    def __init__(self, problem: Problem, parameters: dict[str, Tensor]) -> None:
        self.problem, self.parameters = problem, parameters
        self.vectorised: dict[tuple[int, ...], bool] = {}  # by the shapes that a rule of torch may depend on

    def __call__(self, inputs: Tensor, seeds: Tensor) -> Tensor:
        """Return rows ``(n R, P)`` of inputs ``(n, ...)`` and seeds ``(n, R, C)``, in at least float32."""
        shapes = (*inputs.shape, *seeds.shape)
        if self.vectorised.get(shapes, True):
            try:
                rows = working(_vectorised_rows(self.problem, self.parameters, inputs, seeds))
            except Exception:  # some modules (recurrent ones, a few fused kernels) have no batching rule
                self.vectorised = defaultdict(bool)  # and so for all shapes
            else:
                if shapes not in self.vectorised:
                    self.vectorised[shapes] = self._are_right(rows, inputs, seeds)
                if self.vectorised[shapes]:
                    return rows
        return working(_looped_rows(self.problem, self.parameters, inputs, seeds))

    def _are_right(self, rows: Tensor, inputs: Tensor, seeds: Tensor) -> bool:
        """Compare with one plain pass for all samples: torch's rules for vectorising are wrong for some shapes."""
        weights = random_like(rows, (len(rows),))
        seed = torch.einsum("nr,nrc->nc", weights.view(seeds.shape[:2]).to(seeds), seeds)
        outputs, leaves = _run(self.problem, self.parameters, inputs)
        plain = working(_pulled_back(outputs, leaves, seed))
        start = 0
        for p in leaves:
            part = slice(start, start := start + p.numel())
            scale = float(weights.abs() @ rows[:, part].norm(dim=1))
            if not agree(weights @ rows[:, part], plain[part], scale, self.problem.dtype):
                return False
        return True


def _vectorised_rows(problem: Problem, parameters: dict[str, Tensor], inputs: Tensor, seeds: Tensor) -> Tensor:
    constants = problem.parameters()  # a graph of those that are not asked for would only cost

    def of_sample(x: Tensor, seed: Tensor) -> Tensor:
        pull = vjp(lambda p: problem.forward(constants | p, x.unsqueeze(0))[0], parameters)[1]
        (rows,) = vmap(pull)(seed)
        return torch.cat([rows[name].reshape(len(seed), p.numel()) for name, p in parameters.items()], dim=1)

    with sdpa_kernel(SDPBackend.MATH), quiet():  # the fused attention kernels have no batching rule
        rows: Tensor = vmap(of_sample)(inputs, seeds)
    return rows.flatten(0, 1).contiguous()  # those of a parameter that is not used are one zero, spread out


def _looped_rows(problem: Problem, parameters: dict[str, Tensor], inputs: Tensor, seeds: Tensor) -> Tensor:
    rows = []
    for x, seed in zip(inputs.split(1), seeds, strict=True):
        outputs, leaves = _run(problem, parameters, x)
        rows += [_pulled_back(outputs, leaves, s.unsqueeze(0)) for s in seed]
    return torch.stack(rows)


def _run(problem: Problem, parameters: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs of a batch with their graph, and leaves for the parameters.

    All that can be trained are leaves, not only those whose gradients are wanted: what a checkpoint recomputes in a
    backward pass takes them from the model, and must have the graph that it had.
    """
    leaves = {name: p.clone().requires_grad_() for name, p in (problem.parameters() | parameters).items()}
    with torch.enable_grad(), quiet():
        return problem.forward(leaves, inputs), [leaves[name] for name in parameters]


def _pulled_back(outputs: Tensor, leaves: list[Tensor], seed: Tensor) -> Tensor:
    """Return ``seed' J``, flattened; zeros where the outputs depend on none of the leaves."""
    if not outputs.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    with quiet():
        gradients = torch.autograd.grad(
            outputs, leaves, seed, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in gradients])


def _masq_rows(problem: Problem, quantity: MaSQ, parameters: dict[str, Tensor], advance: Advance) -> Iterator[Tensor]:
    n = problem.num_samples
    for inputs, targets in problem.batches(quantity.batch_size):
        scale = {
            "sumsq": 1.0,
            "mean": sqrt(n / -(-n // quantity.batch_size)) / len(inputs),
            "scaled": 1 / len(inputs),
        }[quantity.norm]
        outputs, leaves = _run(problem, parameters, inputs)
        seeds = scale * problem.loss.gradients(outputs.detach(), targets)
        yield working(_pulled_back(outputs, leaves, seeds.to(outputs.dtype))).unsqueeze(0)
        advance(len(inputs))
