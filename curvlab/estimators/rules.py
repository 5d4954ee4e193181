"""Per-sample gradients of a module's parameters in closed form, from its inputs and the gradient of its output.

A rule is made for the calls of a module in one forward pass and receives the gradients of its output, row by row. The
gradient of a sample is the sum over the calls. A rule is used only where ``curvlab.estimators.verification`` finds it
correct.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from curvlab.estimators.capture import Call, ignore_torch_warnings, split_calls, to_working_dtype
from curvlab.estimators.layers import Layer, has_factors, has_last_channels, is_transposed_convolution
from curvlab.estimators.memory import at_most
from curvlab.estimators.positions import EmbeddingPositions, call_positions

#: Modules that normalise, scale and shift.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
#: Modules with one input and one output whose per-sample gradients are computed from the module alone.
_VECTORISED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm, nn.Embedding, nn.PReLU),
)
_BYTES = 6.4e7  # approximate limit of the per-sample gradients of a module that are held at once
_BLOCK = 1 << 17  # entries of a weight that are compared at once

Gradients = dict[str, Tensor]


class Rule(ABC):
    """Per-sample gradients of the calls of a module, and their squares, summed over samples and rows.

    Args:
        layer: The module, with the names of its selected parameters.
        inputs: Inputs of the call, of the first one if there are several.
    """

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs
        self.dtype = inputs.dtype if inputs.is_floating_point() else torch.float64  # of the computation
        self.squares: Gradients = {}

    @abstractmethod
    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        """Yield per-sample gradients ``(n, ...)`` by parameter, some samples or parameters at a time.

        Args:
            gradient: One row of the gradient of the output, in at least float32; joined if there are several calls
                (see ``curvlab.estimators.capture.join_calls``).
        """

    def distances(self, gradient: Tensor, right: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the distance of the gradients, summed over samples, from the right ones, by parameter."""
        sums: Gradients = {}
        for some in self.gradients(gradient):
            for name, rows in some.items():
                summed = rows.sum(dim=0).reshape(-1)
                sums[name] = sums[name] + summed if name in sums else summed
        own = {name: self.layer.own(right[name]).detach().reshape(-1) for name in sums}
        return {name: float(torch.dist(total.detach(), own[name])) for name, total in sums.items()}

    def add(self, gradient: Tensor) -> None:
        """Add the squares for one row of the gradient of the output."""
        for some in self.gradients(gradient):
            for name, rows in some.items():
                squares = rows.square_().sum(dim=0)
                self.squares[name] = self.squares[name].add_(squares) if name in self.squares else squares

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        """Add the sums of squares to tensors of the parameters' shapes."""
        for name, squares in self.squares.items():
            own = self.layer.own(total[name])
            own.add_(squares.reshape(own.shape))


class _FlatLinear(Rule):
    """Rule of a Linear layer on ``(N, d)``: the square of ``g x'`` is the outer product of the squares."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        super().__init__(layer, inputs)
        self.squared: Tensor | None = None  # of the output's gradients, summed over rows, so that one product is enough

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        if self.layer.weight:
            yield {self.layer.weight: gradient.unsqueeze(2) * self.inputs.unsqueeze(1)}
        if self.layer.bias:
            yield {self.layer.bias: gradient.clone()}

    def distances(self, gradient: Tensor, right: Mapping[str, Tensor]) -> dict[str, float]:
        found = {}
        if self.layer.weight:
            # Some rows of the weight at a time: to allocate a tensor of its size takes longer than the verification.
            step = max(1, _BLOCK // max(1, self.inputs.shape[1]))
            blocks = zip(right[self.layer.weight].detach().split(step), gradient.mT.split(step), strict=True)
            parts = [torch.addmm(block, slopes, self.inputs, alpha=-1).norm() for block, slopes in blocks]
            found[self.layer.weight] = float(torch.stack(parts).norm())
        if self.layer.bias:
            found[self.layer.bias] = float(torch.dist(gradient.sum(dim=0), right[self.layer.bias].detach()))
        return found

    def add(self, gradient: Tensor) -> None:
        if self.squared is None:
            self.squared = gradient.square()
        else:
            self.squared.addcmul_(gradient, gradient)

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        assert self.squared is not None
        if self.layer.weight:
            total[self.layer.weight].addmm_(self.squared.mT, self.inputs.square())
        if self.layer.bias:
            total[self.layer.bias] += self.squared.sum(dim=0)


class _Positional(Rule):
    """Rule of a convolution, or of a Linear layer on tokens."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        super().__init__(layer, inputs)
        self.without_bias = replace(layer, bias=None)
        self.positions = call_positions(self.without_bias, inputs) if layer.weight else None

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        if self.layer.bias:
            yield {self.layer.bias: self._of_bias(gradient)}
        if self.positions is not None and self.layer.weight:
            for rows in self.positions.sample_gradients(gradient):
                yield {self.layer.weight: self.layer.from_homogeneous(rows)}

    def _of_bias(self, gradient: Tensor) -> Tensor:
        last = has_last_channels(self.layer.module)
        return (gradient.unsqueeze(1).flatten(1, -2) if last else gradient.flatten(2).mT).sum(dim=1)

    def add(self, gradient: Tensor) -> None:
        shape = self.without_bias.shape
        if not self.squares:
            sizes = {self.layer.weight: shape, self.layer.bias: shape[:1]}
            self.squares = {name: gradient.new_zeros(size) for name, size in sizes.items() if name}
        if self.layer.bias:
            self.squares[self.layer.bias] += self._of_bias(gradient).square_().sum(dim=0)
        if self.positions is not None and self.layer.weight:
            self.positions.add_squares_(self.squares[self.layer.weight], gradient)

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        if self.layer.weight:
            rows = self.squares[self.layer.weight].unsqueeze(0)
            self.squares[self.layer.weight] = self.layer.from_homogeneous(rows)
        super().add_to_(total)


class _Embedding(Rule):
    """Rule of an embedding: the gradient of a sample has one row for each of its indices."""

    def __init__(self, layer: Layer, inputs: Sequence[Tensor]) -> None:
        super().__init__(layer, inputs[0])
        self.positions = EmbeddingPositions(layer, inputs)
        self.name = layer.parameters[0]
        self.dtype = layer.module.weight.dtype  # type: ignore[assignment]

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        n, v = self.positions.indices.shape[0], self.positions.vocabulary
        rows = self.positions.gradient_rows(gradient) * self.positions.used.unsqueeze(2)
        numbers = torch.arange(n, device=gradient.device).unsqueeze(1) * v + self.positions.indices
        dense = rows.new_zeros(n * v, rows.shape[2]).index_add_(0, numbers.flatten(), rows.flatten(0, 1))
        yield {self.name: dense.view(n, -1)}

    def distances(self, gradient: Tensor, right: Mapping[str, Tensor]) -> dict[str, float]:
        sums, indices = self.positions.index_sums(gradient)
        total = torch.zeros_like(right[self.name], dtype=sums.dtype).index_add_(0, indices, sums)
        return {self.name: float(torch.dist(total, right[self.name].detach()))}

    def add(self, gradient: Tensor) -> None:
        sums, indices = self.positions.index_sums(gradient)
        if self.name not in self.squares:
            self.squares[self.name] = sums.new_zeros(self.positions.vocabulary, sums.shape[1])
        self.squares[self.name].index_add_(0, indices, sums.square_())


class _Norm(Rule):
    """Rule of a normalisation: sums over positions of the output's gradient times the normalised input."""

    def _normal(self) -> Tensor:
        # Recomputed for every row: to keep these for all layers would take as much memory as the activations.
        module: Any = self.layer.module
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(self.inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(self.inputs, module.num_groups, eps=module.eps)
        return F.batch_norm(
            self.inputs, to_working_dtype(module.running_mean), to_working_dtype(module.running_var), eps=module.eps
        )

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        if self.layer.weight:
            yield {self.layer.weight: self._summed(self._normal().mul_(gradient))}
        if self.layer.bias:
            yield {self.layer.bias: self._summed(gradient)}

    def _summed(self, products: Tensor) -> Tensor:
        """Return the sums over positions, always as a new tensor, because the caller squares the result in place."""
        module = self.layer.module
        if isinstance(module, nn.LayerNorm):  # (N, ..., *shape)
            return products.reshape(len(products), -1, *module.normalized_shape).sum(dim=1)
        return products.reshape(*products.shape[:2], -1).sum(dim=2)  # (N, C, ...)


class _Vectorised(Rule):
    """Rule of a module that is differentiated alone, vectorised over samples."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        super().__init__(layer, inputs)
        names = {"weight": layer.weight, "bias": layer.bias}
        self.names = {key: name for key, name in names.items() if name is not None}
        self.parameters: Gradients = {key: getattr(layer.module, key).detach() for key in self.names}
        self.dtype = next(iter(self.parameters.values())).dtype
        self.right: set[int] = set()  # numbers of samples for which torch's vectorisation is correct

    def _pullback(self, inputs: Tensor) -> Callable[[Tensor], tuple[Gradients]]:
        # Only its forward, without hooks: those have been applied to the inputs, and will be to the output.
        forward = _Forward(self.layer.module)
        inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs

        def outputs(parameters: Gradients) -> Tensor:
            placed = {f"module.{key}": value for key, value in parameters.items()}
            answer: Tensor = functional_call(forward, placed, (inputs,))
            return answer

        pull: Callable[[Tensor], tuple[Gradients]] = vjp(outputs, self.parameters)[1]
        return pull

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        def pull_sample(x: Tensor, g: Tensor) -> Gradients:
            return self._pullback(x.unsqueeze(0))(g.unsqueeze(0))[0]

        gradient = gradient.to(self.dtype)
        step = max(
            1, int(at_most(_BYTES, share=1 / 16) / sum(p.numel() * p.element_size() for p in self.parameters.values()))
        )
        for x, g in zip(self.inputs.split(step), gradient.split(step), strict=True):
            with ignore_torch_warnings():
                rows = vmap(pull_sample)(x, g)
            if len(x) not in self.right:
                self._check(x, g, rows)
            yield {self.names[key]: to_working_dtype(row.reshape(len(x), -1)) for key, row in rows.items()}

    def _check(self, inputs: Tensor, gradient: Tensor, rows: Gradients) -> None:
        """Compare with all samples at once: a batching rule of torch may be wrong for some numbers of samples."""
        weights = random_like(gradient, (len(gradient),))
        whole = self._pullback(inputs)(gradient * weights.view(-1, *[1] * (gradient.ndim - 1)))[0]
        for key, row in rows.items():
            mixed = torch.einsum("n,np->p", weights, row.reshape(len(row), -1))
            scale = float(weights.abs() @ row.detach().flatten(1).norm(dim=1))
            if not agree(mixed, whole[key].reshape(-1), scale, self.dtype):
                raise WrongRuleError(type(self.layer.module).__name__, len(row))
        self.right.add(len(inputs))


class _SeveralCalls(Rule):
    """Sum of the rules of the calls of a module."""

    def __init__(self, layer: Layer, calls: Sequence[Call], rules: Sequence[Rule]) -> None:
        super().__init__(layer, rules[0].inputs)
        self.calls, self.rules, self.dtype = calls, rules, rules[0].dtype

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        slopes = split_calls(gradient, self.calls)
        parts = [each.gradients(slope) for each, slope in zip(self.rules, slopes, strict=True)]
        for first, *others in zip(*parts, strict=True):  # the rules of one module yield the same samples and parameters
            for other in others:
                first = {name: rows + other[name] for name, rows in first.items()}
            yield first


class _Forward(nn.Module):
    """Forward of a module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.module.forward(inputs)
        return answer


class WrongRuleError(RuntimeError):
    """Torch's batching rule for a kind of module is wrong for a number of samples.

    Attributes:
        kind: Class name of the module.
    """

    def __init__(self, kind: str, samples: int) -> None:
        super().__init__(f"torch vectorises {kind} wrongly over {samples} samples")
        self.kind = kind


def has_rule(module: nn.Module) -> bool:
    """Return whether modules of this kind have a rule for the weight and the bias."""
    return has_factors(module) or type(module) in (*_NORMS, *_VECTORISED)


def rule(layer: Layer, calls: Sequence[Call]) -> Rule:
    """Return the rule for the calls of a module that has one (see ``has_rule``); all inputs are tensors."""
    inputs = [call.inputs for call in calls if call.inputs is not None]
    if layer.is_embedding and has_factors(layer.module):
        return _Embedding(layer, inputs)
    if type(layer.module) is nn.Linear and inputs[0].ndim == 2 and len(inputs) == 1:
        return _FlatLinear(layer, inputs[0])
    kind = _Norm if type(layer.module) in _NORMS else _Positional if _is_positional(layer) else _Vectorised
    rules = [kind(layer, x) for x in inputs]
    return rules[0] if len(rules) == 1 else _SeveralCalls(layer, calls, rules)


def _is_positional(layer: Layer) -> bool:
    """Return whether the gradients of a layer come from its positions, which a transposed convolution unfolds."""
    module: Any = layer.module
    if not has_factors(module):
        return False
    return layer.groups > 1 or not (getattr(module, "groups", 1) > 1 or is_transposed_convolution(module))


def random_like(tensor: Tensor, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normal random numbers of a shape, the same in every call, with a tensor's dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(tensor)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype with the largest rounding errors."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def agree(one: Tensor, other: Tensor, scale: float, dtype: torch.dtype) -> bool:
    """Return whether two results, of any shape, agree up to rounding: see ``is_rounding``."""
    return is_rounding(float(torch.dist(one.detach(), other.detach())), float(other.detach().norm()), scale, dtype)


def is_rounding(error: float, size: float, scale: float, dtype: torch.dtype) -> bool:
    """Return whether the difference of two results can be explained by rounding.

    Args:
        error: Norm of their difference.
        size: Norm of the result.
        scale: Sum of the sizes of the terms of the result, whose rounding errors remain when the terms cancel.
        dtype: Dtype of the network, in which they were rounded.
    """
    eps = torch.finfo(dtype).eps
    # In half precision the tolerance is only a few rounding errors, because a larger one would hide wrong gradients.
    relative, absolute = (3 * eps**0.5, 100 * eps) if eps < 1e-5 else (8 * eps, 2 * eps)
    return error <= relative * size + absolute * scale
