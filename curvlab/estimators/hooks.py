"""curvlab's own fast backend: one forward pass, one backward pass to the layers' outputs for each row, and algebra.

Where a layer has a closed form, no gradient of a parameter is computed by automatic differentiation. The squared
per-sample gradients of a Linear layer on ``(N, d)`` are one product of squares; those of a convolution come from its
patches, or from a convolution with as many groups as samples. Other modules are differentiated alone, vectorised over
samples. The gradient of a module that is called several times is the sum over its calls. The remaining parameters (tied
weights, bare parameters, recurrent and attention modules) are differentiated through the whole network.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from math import prod

import torch
from torch import Tensor

from curvlab.estimators.backend import Backend, BackendResult
from curvlab.estimators.capture import Call, backward, group_by_layer, working_dtype
from curvlab.estimators.covectors import Covectors, label_stream, output_covectors
from curvlab.estimators.grams import add_gram_, add_squares_, mirror_
from curvlab.estimators.layers import Layer, check_scale
from curvlab.estimators.phases import phase
from curvlab.estimators.positions import (
    EmbeddingPositions,
    Positions,
    ReducedPositions,
    positions,
)
from curvlab.estimators.rows import row_batches
from curvlab.estimators.rules import WrongRuleError, rule
from curvlab.estimators.sums import Sums
from curvlab.estimators.verification import ChangedUseError, Verification, verify_factors, verify_rules
from curvlab.interface import Pair
from curvlab.matrices.eigen import symmetric_eigh
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance, no_progress
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, MaSQ, Quantity
from curvlab.structures import Kronecker, Structure, TKFACStructure, is_forward_only

# Bounds of the default number of samples processed at once: see ``_chunk_size``.
_FEWEST, _MOST = 8, 1000
_CACHE = 1.6e7  # approximate limit, in bytes, of the input and output of a layer

# Calls by layer; a function that yields the joined gradients of their outputs, row by row. If its argument is true, it
# can be called again.
_Batch = tuple[Mapping[str, Sequence[Call]], Callable[[bool], Iterator[Sequence[Tensor]]]]
_Passes = Callable[[], Iterator[_Batch]]


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> BackendResult:
    """See ``curvlab.estimators.backend.Compute``."""
    if isinstance(structure, Kronecker):
        verified = verify_factors(problem, space, structure)
        entries = sum(prod(layer.factor_shape) + layer.shape[0] ** 2 for layer in verified.layers.values())

        def batches() -> Iterator[_Batch]:
            for calls, pull in _batches(problem, quantity, verified, batch_size, entries):
                yield calls, pull
                advance(_count_samples(calls) / (2 if structure.name == "ekfac" else 1))

        if isinstance(structure, TKFACStructure):
            return BackendResult(_tkfac(batches, verified.layers, structure, problem))
        factors = _kfac(batches, verified.layers, structure, problem)
        if structure.name == "kfac":
            return BackendResult(factors)
        return BackendResult(_ekfac(batches, verified.layers, problem, factors))
    if structure.name == "diag" and not isinstance(quantity, MaSQ):
        return _diagonal(problem, quantity, space, batch_size, advance)
    return BackendResult(_from_rows(problem, quantity, structure, space, advance))


# Structures computed from rows ---------------------------------------------------------------------------------------


def _from_rows(
    problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace, advance: Advance
) -> dict[str, Tensor]:
    if structure.name == "diag":
        return {"entries": _squared_rows(problem, quantity, space, advance)}
    parts = {"matrix": slice(0, space.total)} if structure.name == "dense" else space.slices
    sizes = {name: part.stop - part.start for name, part in parts.items()}
    sums = Sums({name: (size, size) for name, size in sizes.items()}, problem)
    for rows in row_batches(problem, quantity, space.names, advance=advance):
        for name, part in parts.items():
            add_gram_(sums.running[name], rows[:, part])
        sums.next()
    return {name: mirror_(matrix) for name, matrix in sums.means().items()}


def _squared_rows(problem: Problem, quantity: Quantity, space: ParameterSpace, advance: Advance) -> Tensor:
    """Return the mean square of the rows, ``(P,)``."""
    sums = Sums({"entries": (space.total,)}, problem)
    for rows in row_batches(problem, quantity, space.names, advance=advance):
        sums.running["entries"] += rows.square_().sum(dim=0)
        sums.next()
    return sums.means()["entries"]


# The diagonal --------------------------------------------------------------------------------------------------------


def _diagonal(
    problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None, advance: Advance
) -> BackendResult:
    verified = verify_rules(problem, space)
    while True:
        rest = space.restrict(verified.reasons)
        try:
            entries = _by_rules(problem, quantity, space, verified, batch_size, advance)
            break
        except ChangedUseError as error:  # not visible on the samples of the verification
            verified = verified.exclude(error.reasons)
        except WrongRuleError as error:
            reason = f"has no rule that is right for every batch: {error}"
            wrong = [layer for layer in verified.layers.values() if type(layer.module).__name__ == error.kind]
            verified = verified.exclude({parameter: reason for layer in wrong for parameter in layer.parameters})
    by_rule = dict.fromkeys(parameter for layer in verified.layers.values() for parameter in layer.parameters)
    assert sorted([*by_rule, *rest.names]) == sorted(space.names), "every parameter is computed once"
    if rest.names:
        rows = _squared_rows(problem, quantity, rest, no_progress if by_rule else advance)
        for name, part in rest.slices.items():
            entries[space.slices[name]] = rows[part]
    return BackendResult({"entries": entries}, verified.reasons)


def _by_rules(
    problem: Problem,
    quantity: Quantity,
    space: ParameterSpace,
    verified: Verification,
    batch_size: int | None,
    advance: Advance,
) -> Tensor:
    """Return the diagonal, ``(P,)``, with zeros for the parameters without a rule."""
    sums = Sums({"entries": (space.total,)}, problem)
    total = space.unflatten(sums.running["entries"])  # views
    batches = _batches(problem, quantity, verified, batch_size, space.total) if verified.layers else ()
    for calls, pull in batches:
        rules = [rule(verified.layers[name], seen) for name, seen in calls.items()]
        for row in pull(False):
            for one, gradient in zip(rules, row, strict=True):
                one.add(gradient)
        for one in rules:
            one.add_to_(total)
        sums.next()
        advance(_count_samples(calls))
    return sums.means()["entries"]


def _batches(
    problem: Problem, quantity: Quantity, verified: Verification, batch_size: int | None, entries: int
) -> Iterator[_Batch]:
    """Yield, for each batch, the calls of each layer, and an iterator over rows of the gradients of their outputs.

    Args:
        problem: Model, loss and data.
        quantity: The quantity, which has rows.
        verified: The verified layers.
        batch_size: Samples processed at once; None for a fast choice.
        entries: Number of entries of the sums to which a batch is added.
    """
    rng = label_stream(quantity)
    size = _chunk_size(problem, verified, entries) if batch_size is None else batch_size
    for inputs, targets in _split_batches(problem.batches(batch_size), size):
        with phase("forward"):
            outputs, calls = verified.run(problem, inputs)
        covectors = output_covectors(problem.loss, quantity, outputs.detach(), targets, rng)
        yield calls, partial(_pull_back, outputs, list(calls.values()), covectors)


def _count_samples(calls: Mapping[str, Sequence[Call]]) -> int:
    first: Call = next(iter(calls.values()))[0]
    return first.shape[0]


def _chunk_size(problem: Problem, verified: Verification, entries: int) -> int:
    """Return how many samples are processed at once.

    The output of a layer should still be in the cache when the next layer reads it: with more samples, a convolution
    takes longer per sample, and more memory. On the other hand, each batch is added to the sums, which should not take
    longer than the activations do. On an accelerator, many samples are faster.
    """
    if problem.device.type != "cpu":
        return _MOST
    sizes = [verified.sizes[name] for name in verified.layers]
    fitting = int(_CACHE / max(1, *sizes))
    worth_it = entries * working_dtype(problem.dtype).itemsize // max(1, sum(sizes))
    return min(_MOST, max(_FEWEST, fitting, worth_it))


def _split_batches(batches: Iterable[Pair], size: int) -> Iterator[Pair]:
    """Yield batches in equal parts of at most ``size`` samples."""
    for inputs, targets in batches:
        step = -(-len(inputs) // -(-len(inputs) // size))
        yield from zip(inputs.split(step), targets.split(step), strict=True)


def _pull_back(
    outputs: Tensor, calls: Sequence[Sequence[Call]], covectors: Covectors, again: bool
) -> Iterator[Sequence[Tensor]]:
    last, every = len(covectors) - 1, [*chain(*calls)]
    for index, row in enumerate(covectors):
        # The list is emptied, so that no reference keeps these gradients while the next row is computed.
        with phase("backward"):
            gradients = group_by_layer(backward(outputs, every, row, keep=again or index < last), calls)
        yield gradients
        gradients.clear()


# Kronecker factors ---------------------------------------------------------------------------------------------------


def _kfac(batches: _Passes, layers: Mapping[str, Layer], structure: Kronecker, problem: Problem) -> dict[str, Tensor]:
    sums = _sums(layers, problem)
    for calls, pull in batches():
        at = {name: _positions(layer, calls[name], structure) for name, layer in layers.items()}
        needed = not is_forward_only(structure) or any(here.has_padding for here in at.values())
        for row in pull(False) if needed else ():
            for (name, here), gradient in zip(at.items(), row, strict=True):
                here.note(gradient)
                here.add_gradient_moment_(sums.running[f"{name}|S"], gradient)
        for name, here in at.items():
            here.add_moment_(sums.running[f"{name}|A"])
        sums.next()
    means = {key: mirror_(factor) for key, factor in sums.means().items()}
    if is_forward_only(structure):
        means |= {f"{name}|S": torch.eye(layer.shape[0]).to(means[f"{name}|S"]) for name, layer in layers.items()}
    return means


def _tkfac(
    batches: _Passes, layers: Mapping[str, Layer], structure: TKFACStructure, problem: Problem
) -> dict[str, Tensor]:
    weighted = structure.variant == "gao"
    sums = _sums(layers, problem)
    trace = dict.fromkeys(layers, 0.0)
    for calls, pull in batches():
        at = {name: _positions(layer, calls[name], structure) for name, layer in layers.items()}
        if any(here.has_padding for here in at.values()):
            for row in pull(True):
                for here, gradient in zip(at.values(), row, strict=True):
                    here.note(gradient)
        norms = {name: here.squared_norms() for name, here in at.items()}
        slopes = {name: torch.zeros_like(norm) for name, norm in norms.items()}
        for row in pull(False):
            for (name, here), gradient in zip(at.items(), row, strict=True):
                here.add_gradient_moment_(sums.running[f"{name}|S"], gradient, norms[name] if weighted else None)
                slopes[name] += here.gradient_norms(gradient)
                trace[name] += here.squared_gradients(gradient)
        for name, here in at.items():
            here.add_moment_(sums.running[f"{name}|A"], slopes[name] if weighted else None)
        sums.next()
    means = {key: mirror_(factor) for key, factor in sums.means().items()}
    for name, layer in layers.items():
        left, right = means[f"{name}|A"], means[f"{name}|S"]
        # S has the whole scale: for gao, A has trace one; for rescaled, it is K-FAC's A.
        if weighted and (share := _trace(left)):
            left /= share
        now, wanted = _trace(left) * _trace(right), trace[name] / problem.num_samples
        check_scale(layer, now, wanted, problem.dtype)
        if now:
            right *= wanted / now
    return means


def _ekfac(
    batches: _Passes, layers: Mapping[str, Layer], problem: Problem, factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    with phase("eigenvectors"):
        bases = {name: _basis(factor) for name, factor in factors.items()}
    sums = Sums({name: layer.shape for name, layer in layers.items()}, problem)
    for calls, pull in batches():
        moments: dict[str, _RotatedSquares | _RotatedIndexSquares] = {}
        for name, layer in layers.items():
            left, right = bases[f"{name}|A"], bases[f"{name}|S"]
            if layer.is_embedding:
                moments[name] = _RotatedIndexSquares(layer, calls[name], right)
            else:
                moments[name] = _RotatedSquares(layer, calls[name], left, right)
        for row in pull(False):
            for moment, gradient in zip(moments.values(), row, strict=True):
                moment.add(gradient)
        for name, moment in moments.items():
            sums.running[name] += moment.total()
        sums.next()
    return {
        **{f"{name}|U_{factor}": bases[f"{name}|{factor}"] for name in layers for factor in "AS"},
        **{f"{name}|values": mean for name, mean in sums.means().items()},
    }


def _trace(factor: Tensor) -> float:
    return float(factor.sum() if factor.ndim == 1 else factor.trace())


def _basis(factor: Tensor) -> Tensor:
    if factor.ndim == 1:  # a diagonal matrix
        return torch.ones_like(factor)
    # Working precision is enough for a basis, and float64 takes twice as long. In float32 LAPACK may fail on factors
    # of low rank.
    try:
        basis: Tensor = torch.linalg.eigh(factor)[1]
    except RuntimeError:  # LinAlgError
        basis = symmetric_eigh(factor)[1]
    return basis


class _RotatedSquares:
    """Squared per-sample gradients of a layer in a Kronecker basis, summed over the samples and rows of a batch."""

    def __init__(self, layer: Layer, calls: Sequence[Call], left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.positions = positions(layer, calls)
        self.squares: Tensor | None = (
            None  # squares of g U_S (N, o) for one position, else of the rotated gradient (o, d)
        )
        # With few positions the inputs are rotated once; with many, the gradients are rotated for every row.
        self.rows = self.positions.input_rows() @ left if 1 < self.positions.count <= 2 * len(right) else None

    def add(self, gradient: Tensor) -> None:
        if self.positions.count == 1:
            rotated = self.positions.gradient_sums(gradient) @ self.right
            self._take(rotated.square_())
        elif self.rows is not None:
            if self.squares is None:
                self.squares = self.rows.new_zeros(len(self.right), len(self.left))
            add_squares_(self.squares, self.positions.gradient_rows(gradient) @ self.right, self.rows)
        else:
            for rows in self.positions.sample_gradients(gradient):
                self._take((self.right.mT @ (rows @ self.left)).square_().sum(dim=0))

    def _take(self, squares: Tensor) -> None:
        self.squares = squares if self.squares is None else self.squares.add_(squares)

    def total(self) -> Tensor:
        assert self.squares is not None
        if self.positions.count == 1:
            return self.squares.mT @ (self.positions.means() @ self.left).square_()
        return self.squares


class _RotatedIndexSquares:
    """As ``_RotatedSquares``, of an embedding: only the gradients of its outputs are rotated."""

    def __init__(self, layer: Layer, calls: Sequence[Call], right: Tensor) -> None:
        self.right, self.squares = right, right.new_zeros(layer.shape)
        self.positions = EmbeddingPositions(layer, [call.inputs for call in calls if call.inputs is not None])

    def add(self, gradient: Tensor) -> None:
        sums, indices = self.positions.index_sums(gradient)
        self.squares.index_add_(1, indices, (sums @ self.right).square_().mT)

    def total(self) -> Tensor:
        return self.squares


def _positions(layer: Layer, calls: Sequence[Call], structure: Kronecker) -> Positions:
    here = positions(layer, calls, leave_out=True)
    return ReducedPositions(here) if structure.sharing == "reduce" else here


def _sums(layers: Mapping[str, Layer], problem: Problem) -> Sums:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        outputs = layer.shape[0]
        shapes[f"{name}|A"], shapes[f"{name}|S"] = layer.factor_shape, (outputs, outputs)
    return Sums(shapes, problem)


_ROWS = ("diag", "block_diag", "dense")
_KRONECKER = ("kfac", "ekfac", "tkfac")
BACKEND = Backend(
    "hooks",
    {**dict.fromkeys((Fisher, EmpiricalFisher, GGN), (*_ROWS, *_KRONECKER)), MaSQ: _ROWS},
    compute,
)
