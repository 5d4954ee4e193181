"""Our own fast path: one forward pass, one backward pass a row to the outputs of the layers, and algebra.

No gradient of a parameter is computed by automatic differentiation where a layer has a closed form. The squares of the
per-sample gradients of a Linear layer on ``(N, d)`` are one product of squares, those of a convolution come from a
convolution in as many groups as samples; other modules that are called once are differentiated by themselves,
vectorised over samples; and what is left (tied weights, bare parameters, recurrent and attention modules) by the whole
network.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from curvlab.errors import UnsupportedError
from curvlab.estimators.backend import Backend
from curvlab.estimators.capture import backward, forward, unfaithful_modules
from curvlab.estimators.layers import Layer, has_factors, kronecker_layers, layer_in
from curvlab.estimators.positions import Positions, ReducedPositions, add_gram_, mirror_, positions
from curvlab.estimators.rows import row_batches
from curvlab.estimators.seeds import Seeds, label_stream, output_rows
from curvlab.matrices.base import symmetric_eigh
from curvlab.parameters import ParameterSpace
from curvlab.problem import Batch, Problem
from curvlab.progress import Advance, silent
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, MaSQ, Quantity
from curvlab.structures import TKFAC, Kronecker, Structure

#: Modules that scale and shift what they have normalised.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
#: Modules of one input and one output whose per-sample gradients are had by differentiating them alone.
_ALONE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm, nn.Embedding, nn.PReLU),
)
_PIECE = 500  # samples of a batch that are taken at once unless asked otherwise: more take memory and little less time
_BYTES = 6.4e7  # about what the per-sample gradients of a module that are held at once may take

_Batch = tuple[dict[str, Tensor], Iterator[Sequence[Tensor]]]  # inputs by module; a row, the gradients of the outputs
_Passes = Callable[[], Iterator[_Batch]]


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> Mapping[str, Tensor]:
    """See ``curvlab.estimators.backend.Compute``."""
    if isinstance(structure, Kronecker):
        layers = kronecker_layers(problem, space)[0]
        modules = {name: layer.module for name, layer in layers.items()}

        def batches() -> Iterator[_Batch]:
            for inputs, gradients in _batches(problem, quantity, modules, batch_size):
                yield inputs, gradients
                advance(len(next(iter(inputs.values()))) / (2 if structure.name == "ekfac" else 1))

        if isinstance(structure, TKFAC):
            return _tkfac(batches, layers, structure, problem.num_samples)
        factors = _kfac(batches, layers, structure, problem.num_samples)
        if structure.name == "kfac":
            return factors
        return _ekfac(batches, layers, problem.num_samples, factors)
    if structure.name == "diag" and not isinstance(quantity, MaSQ):
        return {"entries": _diagonal(problem, quantity, space, batch_size, advance)}
    return _from_rows(problem, quantity, structure, space, advance)


# Any structure, from rows --------------------------------------------------------------------------------------------


def _from_rows(
    problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace, advance: Advance
) -> Mapping[str, Tensor]:
    parts = {"matrix": slice(0, space.total)} if structure.name == "dense" else space.slices
    zeros = partial(torch.zeros, dtype=problem.dtype, device=problem.device)
    if structure.name == "diag":
        return {"entries": _squared_rows(problem, quantity, space, advance) / problem.num_samples}
    total = {name: zeros(part.stop - part.start, part.stop - part.start) for name, part in parts.items()}
    for rows in row_batches(problem, quantity, space.names, advance=advance):
        for name, part in parts.items():
            add_gram_(total[name], rows[:, part])
    return {name: mirror_(matrix).div_(problem.num_samples) for name, matrix in total.items()}


def _squared_rows(problem: Problem, quantity: Quantity, space: ParameterSpace, advance: Advance) -> Tensor:
    total = torch.zeros(space.total, dtype=problem.dtype, device=problem.device)
    for rows in row_batches(problem, quantity, space.names, advance=advance):
        total += rows.square_().sum(dim=0)
    return total


# The diagonal --------------------------------------------------------------------------------------------------------


class _Squares(Protocol):
    """The squared per-sample gradients of one call of a module, summed over its samples and rows."""

    def add(self, gradient: Tensor) -> None:
        """Take the gradient of the output, of one row."""

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        """Add the sums to those of the parameters, each of the parameter's shape."""


class _FlatSquares:
    """Of a Linear layer on ``(N, d)``: the square of ``g x'`` is the outer product of the squares."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs
        self.squares: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        if self.squares is None:
            self.squares = gradient.square()
        else:
            self.squares.addcmul_(gradient, gradient)  # one product for all rows, not one each

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        assert self.squares is not None
        if self.layer.weight:
            total[self.layer.weight].addmm_(self.squares.mT, self.inputs.square())
        if self.layer.bias:
            total[self.layer.bias] += self.squares.sum(dim=0)


class _PositionSquares:
    """Of a convolution, or a Linear layer on tokens."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        self.layer = layer
        self.positions = positions(layer, inputs)
        self.squares: Tensor | None = None  # (o, d), with the bias's column

    def add(self, gradient: Tensor) -> None:
        for rows in self.positions.sample_gradients(gradient):
            squares = rows.square_().sum(dim=0)
            self.squares = squares if self.squares is None else self.squares.add_(squares)

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        assert self.squares is not None
        if self.layer.weight:
            weight = total[self.layer.weight]
            weight += self.squares[:, : weight[0].numel()].view_as(weight)
        if self.layer.bias:
            total[self.layer.bias] += self.squares[:, -1]


class _NormSquares:
    """Of a normalisation: its gradients are sums over positions, of the output's times the normalised input's."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs
        self.trailing = len(layer.module.normalized_shape) if isinstance(layer.module, nn.LayerNorm) else 0
        self.squares: dict[str, Tensor] = {}

    def _normal(self) -> Tensor:
        # For every row again: those of all layers together would take as much memory as the activations.
        module: Any = self.layer.module
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(self.inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(self.inputs, module.num_groups, eps=module.eps)
        return F.batch_norm(self.inputs, module.running_mean, module.running_var, eps=module.eps)

    def add(self, gradient: Tensor) -> None:
        if self.layer.weight:
            self._take(self.layer.weight, self._normal().mul_(gradient))
        if self.layer.bias:
            self._take(self.layer.bias, gradient)

    def _take(self, name: str, products: Tensor) -> None:
        if self.trailing:  # (N, ..., *shape)
            rows = products.flatten(1, -self.trailing - 1).sum(dim=1) if products.ndim > self.trailing + 1 else products
        else:  # (N, C, ...)
            rows = products.flatten(2).sum(dim=2) if products.ndim > 2 else products
        squares = rows.square().sum(dim=0)
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        for name, squares in self.squares.items():
            total[name] += squares


class _AloneSquares:
    """Of a module that is differentiated by itself, vectorised over samples."""

    def __init__(self, name: str, module: nn.Module, space: ParameterSpace, inputs: Tensor) -> None:
        self.module, self.inputs = module, inputs
        names = {key: f"{name}.{key}".removeprefix(".") for key, _ in module.named_parameters(recurse=False)}
        self.names = {key: full for key, full in names.items() if full in space.names}
        self.parameters = {key: getattr(module, key).detach() for key in self.names}
        self.squares: dict[str, Tensor] = {}

    def add(self, gradient: Tensor) -> None:
        def of_sample(x: Tensor, g: Tensor) -> dict[str, Tensor]:
            pull = vjp(lambda p: functional_call(self.module, p, (x.unsqueeze(0),)), self.parameters)[1]
            rows: dict[str, Tensor] = pull(g.unsqueeze(0))[0]
            return rows

        size = sum(p.numel() * p.element_size() for p in self.parameters.values())
        step = max(1, int(_BYTES / size))
        for x, g in zip(self.inputs.split(step), gradient.split(step), strict=True):
            for key, rows in vmap(of_sample)(x, g).items():
                squares = rows.square_().sum(dim=0)
                self.squares[key] = self.squares[key] + squares if key in self.squares else squares

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        for key, full in self.names.items():
            total[full] += self.squares[key].view_as(total[full])


def _diagonal(
    problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None, advance: Advance
) -> Tensor:
    modules = {
        name: module
        for name, module in problem.model.named_modules()
        if (has_factors(module) or type(module) in (*_NORMS, *_ALONE))
        and any(f"{name}.{key}".removeprefix(".") in space.names for key, _ in module.named_parameters(recurse=False))
    }
    if modules:
        unfaithful = unfaithful_modules(problem, modules)
        modules = {name: module for name, module in modules.items() if name not in unfaithful}
    entries = torch.zeros(space.total, dtype=problem.dtype, device=problem.device)
    total = space.unflatten(entries)  # views
    for calls, gradients in _batches(problem, quantity, modules, batch_size) if modules else ():
        squares = [_squares(name, modules[name], space, inputs) for name, inputs in calls.items()]
        for row in gradients:
            for one, gradient in zip(squares, row, strict=True):
                one.add(gradient)
        for one in squares:
            one.add_to_(total)
        advance(len(next(iter(calls.values()))))
    owned = {f"{name}.{key}".removeprefix(".") for name, m in modules.items() for key, _ in m.named_parameters()}
    rest = space.restrict(set(space.names) - owned)
    if rest.names:
        rows = _squared_rows(problem, quantity, rest, silent if modules else advance)
        for name, value in rest.unflatten(rows).items():
            total[name].copy_(value)
    return entries.div_(problem.num_samples)


def _squares(name: str, module: nn.Module, space: ParameterSpace, inputs: Tensor) -> _Squares:
    layer = layer_in(space, name, module)
    if type(module) in _NORMS:
        return _NormSquares(layer, inputs)
    if not has_factors(module):
        return _AloneSquares(name, module, space, inputs)
    flat = isinstance(module, nn.Linear) and inputs.ndim == 2
    return _FlatSquares(layer, inputs) if flat else _PositionSquares(layer, inputs)


def _batches(
    problem: Problem, quantity: Quantity, modules: Mapping[str, nn.Module], batch_size: int | None
) -> Iterator[_Batch]:
    """Yield, a batch, the inputs of each module, and then for every row the gradients of their outputs."""
    rng = label_stream(quantity)
    for inputs, targets in _pieces(problem.batches(batch_size), _PIECE if batch_size is None else batch_size):
        outputs, calls = forward(problem, modules, inputs)
        for name, seen in calls.items():
            if len(seen) != 1 or len(seen[0].inputs) != len(inputs):
                raise UnsupportedError(
                    f"{name} was called {len(seen)} times on some batch, and once on the first samples: "
                    "what a model calls must not depend on its data; backend torch does such models"
                )
        rows = output_rows(problem.loss, quantity, outputs.detach(), targets, rng)
        yield {name: seen[0].inputs for name, seen in calls.items()}, _pulled_back(outputs, calls, rows)


def _pieces(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    for inputs, targets in batches:
        yield from zip(inputs.split(size), targets.split(size), strict=True)


def _pulled_back(outputs: Tensor, calls: Mapping[str, list[Any]], rows: Seeds) -> Iterator[Sequence[Tensor]]:
    once = [seen[0] for seen in calls.values()]
    last = len(rows) - 1
    for index, row in enumerate(rows):
        # A list that is emptied: whoever still holds it when the next row is computed holds no gradients.
        gradients = list(backward(outputs, once, row, keep=index < last))
        yield gradients
        gradients.clear()


# Kronecker factors ---------------------------------------------------------------------------------------------------


def _kfac(batches: _Passes, layers: Mapping[str, Layer], structure: Kronecker, n: int) -> dict[str, Tensor]:
    A, S = _zeros(layers)
    for inputs, gradients in batches():
        at = {name: _positions(layer, inputs[name], structure) for name, layer in layers.items()}
        for name, here in at.items():
            here.add_moment_(A[name])
        for row in gradients:
            for (name, here), gradient in zip(at.items(), row, strict=True):
                here.add_gradient_moment_(S[name], gradient)
    return _tensors({name: (mirror_(A[name]).div_(n), mirror_(S[name]).div_(n)) for name in layers})


def _tkfac(batches: _Passes, layers: Mapping[str, Layer], structure: TKFAC, n: int) -> dict[str, Tensor]:
    weighted = structure.variant == "gao"
    A, S = _zeros(layers)
    trace = dict.fromkeys(layers, 0.0)
    for inputs, gradients in batches():
        at = {name: _positions(layer, inputs[name], structure) for name, layer in layers.items()}
        norms = {name: here.squared_norms() for name, here in at.items()}
        slopes = {name: torch.zeros_like(norm) for name, norm in norms.items()}
        for row in gradients:
            for (name, here), gradient in zip(at.items(), row, strict=True):
                here.add_gradient_moment_(S[name], gradient, norms[name] if weighted else None)
                slopes[name] += here.gradient_norms(gradient)
                trace[name] += here.squared_gradients(gradient)
        for name, here in at.items():
            here.add_moment_(A[name], slopes[name] if weighted else None)
    pairs = {}
    for name in layers:
        left, right = mirror_(A[name]), mirror_(S[name])
        product = float(left.trace()) * float(right.trace())
        # The whole scale is on S: gao's A has trace one, the other's is K-FAC's own.
        share = float(left.trace()) if weighted else float(n)
        pairs[name] = (left / share, right * (trace[name] * share / (n * product))) if product else (left, right)
    return _tensors(pairs)


def _ekfac(batches: _Passes, layers: Mapping[str, Layer], n: int, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bases = {name: _basis(factor) for name, factor in factors.items()}
    values = {name: factors[f"{name}|S"].new_zeros(_shape(layer)) for name, layer in layers.items()}
    for inputs, gradients in batches():
        moments = {
            name: _RotatedSquares(layer, inputs[name], bases[f"{name}|A"], bases[f"{name}|S"])
            for name, layer in layers.items()
        }
        for row in gradients:
            for moment, gradient in zip(moments.values(), row, strict=True):
                moment.add(gradient)
        for name, moment in moments.items():
            values[name] += moment.total()
    return {
        **{f"{name}|U_{factor}": bases[f"{name}|{factor}"] for name in layers for factor in "AS"},
        **{f"{name}|values": value / n for name, value in values.items()},
    }


def _basis(factor: Tensor) -> Tensor:
    # A basis to working precision will do, and float64 takes twice as long. In float32 LAPACK may fail on factors of
    # low rank.
    try:
        basis: Tensor = torch.linalg.eigh(factor)[1]
    except RuntimeError:  # LinAlgError
        basis = symmetric_eigh(factor)[1]
    return basis


class _RotatedSquares:
    """The squared per-sample gradients of a layer in a Kronecker basis, summed over the samples and rows of a call."""

    def __init__(self, layer: Layer, inputs: Tensor, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.positions = positions(layer, inputs)
        self.squares: Tensor | None = None  # of g U_S (N, o) for one position, else of the rotated gradient (o, d)
        # The inputs at few positions are rotated once; at many positions it is the gradients, for every row.
        self.rows = self.positions.input_rows() @ left if 1 < self.positions.count <= 2 * len(right) else None

    def add(self, gradient: Tensor) -> None:
        if self.positions.count == 1:
            rotated = self.positions.gradient_sums(gradient) @ self.right
            self._take(rotated.square_())
        elif self.rows is not None:
            slopes = self.positions.gradient_rows(gradient) @ self.right
            step = max(1, int(_BYTES / (slopes.shape[2] * self.rows.shape[2] * self.rows.element_size())))
            for g, a in zip(slopes.split(step), self.rows.split(step), strict=True):
                self._take((g.mT @ a).square_().sum(dim=0))
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


def _positions(layer: Layer, inputs: Tensor, structure: Kronecker) -> Positions:
    here = positions(layer, inputs)
    return ReducedPositions(here) if structure.sharing == "reduce" else here


def _shape(layer: Layer) -> tuple[int, int]:
    """Return ``(o, d)`` of the homogeneous weight."""
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    return len(weight), (weight[0].numel() if layer.weight else 0) + bool(layer.bias)


def _zeros(layers: Mapping[str, Layer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    A, S = {}, {}
    for name, layer in layers.items():
        weight: Tensor = layer.module.weight.detach()  # type: ignore[operator]
        outputs, features = _shape(layer)
        A[name], S[name] = weight.new_zeros(features, features), weight.new_zeros(outputs, outputs)
    return A, S


def _tensors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}|{key}": factor for name, pair in pairs.items() for key, factor in zip("AS", pair, strict=True)}


_ROWS = ("diag", "block_diag", "dense")
_KRONECKER = ("kfac", "ekfac", "tkfac")
BACKEND = Backend(
    "hooks",
    {**dict.fromkeys((Fisher, EmpiricalFisher, GGN), (*_ROWS, *_KRONECKER)), MaSQ: _ROWS},
    compute,
)
