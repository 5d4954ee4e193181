"""The per-sample gradients of a module's parameters in closed form: from its inputs and the gradient of its output.

A rule is made for one call of a module and given the gradients of its output, a row after another. It is believed only
where ``curvlab.estimators.verification`` has found it right.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from curvlab.estimators.capture import quiet, working
from curvlab.estimators.layers import Layer, has_factors
from curvlab.estimators.positions import positions

#: Modules that scale and shift what they have normalised.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
#: Modules of one input and one output whose per-sample gradients are those of the module by itself.
_ALONE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm, nn.Embedding, nn.PReLU),
)
_BYTES = 6.4e7  # about what the per-sample gradients of a module that are held at once may take
_BLOCK = 1 << 17  # entries of a weight that are compared at once

Gradients = dict[str, Tensor]


class Rule(ABC):
    """The per-sample gradients of one call of a module, and their squares, summed over samples and rows.

    Args:
        layer: The module, with the names of those of its parameters that are wanted.
        inputs: Of the call.
    """

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs
        self.dtype = inputs.dtype if inputs.is_floating_point() else torch.float64  # in which it computes
        self.squares: Gradients = {}

    @abstractmethod
    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        """Yield per-sample gradients ``(n, ...)`` by parameter, some samples or parameters at a time.

        Args:
            gradient: Of the output, one row, in at least float32.
        """

    def distances(self, gradient: Tensor, right: Mapping[str, Tensor]) -> dict[str, float]:
        """Return how far the gradients of all samples together are from other ones, by parameter."""
        sums: Gradients = {}
        for some in self.gradients(gradient):
            for name, rows in some.items():
                summed = rows.sum(dim=0).reshape(-1)
                sums[name] = sums[name] + summed if name in sums else summed
        flat = {name: value.detach().reshape(-1) for name, value in right.items()}
        return {name: float(torch.dist(total.detach(), flat[name])) for name, total in sums.items()}

    def add(self, gradient: Tensor) -> None:
        """Take the gradient of the output, of one row."""
        for some in self.gradients(gradient):
            for name, rows in some.items():
                squares = rows.square_().sum(dim=0)
                self.squares[name] = self.squares[name].add_(squares) if name in self.squares else squares

    def add_to_(self, total: Mapping[str, Tensor]) -> None:
        """Add the sums of squares to tensors of the parameters' shapes."""
        for name, squares in self.squares.items():
            total[name].add_(squares.reshape(total[name].shape))


class _Flat(Rule):
    """The rule of a Linear layer on ``(N, d)``: the square of ``g x'`` is the outer product of the squares."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        super().__init__(layer, inputs)
        self.squared: Tensor | None = None  # gradients of the output, summed over rows: one product, not one a row

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        if self.layer.weight:
            yield {self.layer.weight: gradient.unsqueeze(2) * self.inputs.unsqueeze(1)}
        if self.layer.bias:
            yield {self.layer.bias: gradient.clone()}

    def distances(self, gradient: Tensor, right: Mapping[str, Tensor]) -> dict[str, float]:
        found = {}
        if self.layer.weight:
            # Some rows of the weight at a time: new memory of its size would take longer than all of the verification.
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
    """The rule of a convolution, or of a Linear layer on tokens."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        super().__init__(layer, inputs)
        self.positions = positions(replace(layer, bias=None), inputs) if layer.weight else None

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        if self.layer.bias:
            last = isinstance(self.layer.module, nn.Linear)
            yield {self.layer.bias: gradient.flatten(1, -2).sum(dim=1) if last else gradient.flatten(2).sum(dim=2)}
        if self.positions is not None and self.layer.weight:
            for rows in self.positions.sample_gradients(gradient):
                yield {self.layer.weight: rows}


class _Norm(Rule):
    """The rule of a normalisation: sums over positions of the output's gradient times the normalised input."""

    def _normal(self) -> Tensor:
        # For every row again: those of all layers together would take as much memory as the activations.
        module: Any = self.layer.module
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(self.inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(self.inputs, module.num_groups, eps=module.eps)
        return F.batch_norm(self.inputs, working(module.running_mean), working(module.running_var), eps=module.eps)

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        if self.layer.weight:
            yield {self.layer.weight: self._summed(self._normal().mul_(gradient))}
        if self.layer.bias:
            yield {self.layer.bias: self._summed(gradient)}

    def _summed(self, products: Tensor) -> Tensor:
        """Return the sums over positions; never the products themselves, which are squared in place."""
        module = self.layer.module
        if isinstance(module, nn.LayerNorm):  # (N, ..., *shape)
            return products.reshape(len(products), -1, *module.normalized_shape).sum(dim=1)
        return products.reshape(*products.shape[:2], -1).sum(dim=2)  # (N, C, ...)


class _Alone(Rule):
    """The rule of a module that is differentiated by itself, vectorised over samples."""

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        super().__init__(layer, inputs)
        names = {"weight": layer.weight, "bias": layer.bias}
        self.names = {key: name for key, name in names.items() if name is not None}
        self.parameters: Gradients = {key: getattr(layer.module, key).detach() for key in self.names}
        self.dtype = next(iter(self.parameters.values())).dtype
        self.right: set[int] = set()  # numbers of samples for which torch's vectorisation was found right

    def _pulled(self, inputs: Tensor) -> Callable[[Tensor], tuple[Gradients]]:
        # Its forward alone: the user's hooks have acted on the inputs, and will on the output.
        forward = _Forward(self.layer.module)
        inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs

        def outputs(parameters: Gradients) -> Tensor:
            placed = {f"module.{key}": value for key, value in parameters.items()}
            answer: Tensor = functional_call(forward, placed, (inputs,))
            return answer

        pull: Callable[[Tensor], tuple[Gradients]] = vjp(outputs, self.parameters)[1]
        return pull

    def gradients(self, gradient: Tensor) -> Iterator[Gradients]:
        def of_sample(x: Tensor, g: Tensor) -> Gradients:
            return self._pulled(x.unsqueeze(0))(g.unsqueeze(0))[0]

        gradient = gradient.to(self.dtype)
        step = max(1, int(_BYTES / sum(p.numel() * p.element_size() for p in self.parameters.values())))
        for x, g in zip(self.inputs.split(step), gradient.split(step), strict=True):
            with quiet():
                rows = vmap(of_sample)(x, g)
            if len(x) not in self.right:
                self._check(x, g, rows)
            yield {self.names[key]: working(row.reshape(len(x), -1)) for key, row in rows.items()}

    def _check(self, inputs: Tensor, gradient: Tensor, rows: Gradients) -> None:
        """Compare with all samples at once: a rule of torch for vectorising may be wrong for some numbers of them."""
        weights = random_like(gradient, (len(gradient),))
        whole = self._pulled(inputs)(gradient * weights.view(-1, *[1] * (gradient.ndim - 1)))[0]
        for key, row in rows.items():
            mixed = torch.einsum("n,np->p", weights, row.reshape(len(row), -1))
            scale = float(weights.abs() @ row.detach().flatten(1).norm(dim=1))
            if not agree(mixed, whole[key].reshape(-1), scale, self.dtype):
                raise WrongRuleError(type(self.layer.module).__name__, len(row))
        self.right.add(len(inputs))


class _Forward(nn.Module):
    """The forward of a module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.module.forward(inputs)
        return answer


class WrongRuleError(RuntimeError):
    """Torch's rule for vectorising a kind of module is wrong for a number of samples.

    Attributes:
        kind: Of the module.
    """

    def __init__(self, kind: str, samples: int) -> None:
        super().__init__(f"torch vectorises {kind} wrongly over {samples} samples")
        self.kind = kind


def has_rule(module: nn.Module) -> bool:
    """Return whether there is a rule for the weight and the bias of modules of this kind."""
    return has_factors(module) or type(module) in (*_NORMS, *_ALONE)


def rule(layer: Layer, inputs: Tensor) -> Rule:
    """Return the rule for a call of a module for which there is one."""
    if type(layer.module) in _NORMS:
        return _Norm(layer, inputs)
    if not has_factors(layer.module):
        return _Alone(layer, inputs)
    flat = isinstance(layer.module, nn.Linear) and inputs.ndim == 2
    return _Flat(layer, inputs) if flat else _Positional(layer, inputs)


def random_like(tensor: Tensor, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normal numbers of a shape, always the same, in a tensor's dtype and on its device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(tensor)


def agree(one: Tensor, other: Tensor, scale: float, dtype: torch.dtype) -> bool:
    """Return whether two ways to the same numbers, of any shape, agree but for rounding: see ``is_rounding``."""
    return is_rounding(float(torch.dist(one.detach(), other.detach())), float(other.detach().norm()), scale, dtype)


def is_rounding(error: float, size: float, scale: float, dtype: torch.dtype) -> bool:
    """Return whether two ways to the same numbers differ by no more than rounding may do.

    Args:
        error: The norm of their difference.
        size: The norm of the numbers.
        scale: Of the terms that they are sums of, whose rounding remains where these cancel.
        dtype: Of the network, in which they were rounded.
    """
    eps = torch.finfo(dtype).eps
    # Half precision has no digits to spare: there, not much more than its rounding.
    relative, of_terms = (3 * eps**0.5, 100 * eps) if eps < 1e-5 else (8 * eps, 2 * eps)
    return error <= relative * size + of_terms * scale
