"""Curvature by plain autograd on the peer's own loss, one sample at a time: it shares no code with curvlab.

With the Jacobian ``J_n`` of a sample's outputs, every second moment is ``sum_n J_n' R_n' R_n J_n``. The rows ``R_n``
are a root of the Hessian of the loss in the outputs (GGN, and the Fisher, which equals it for these losses), or the
gradients of the loss in the outputs (empirical Fisher). The scale is that of the loss: a mean for the reduction
``mean``, a sum over samples for ``sum``.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def map_batch(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch of tuples, lists and mappings with a function of every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        filled = deepcopy(batch)
        filled.update({key: map_batch(batch[key], function) for key in batch.keys()})  # noqa: SIM118 (UserDict)
        return filled
    return type(batch)(map_batch(part, function) for part in batch)


def length(batch: Any) -> int:
    """Return the number of samples of a batch."""
    sizes: list[int] = []
    map_batch(batch, lambda tensor: sizes.append(len(tensor)) or tensor)  # type: ignore[func-returns-value]
    return sizes[0]


def in_float64(tensor: Tensor) -> Tensor:
    """Return floating-point values in float64."""
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass
class Sample:
    """What one sample gives.

    Attributes:
        jacobian: ``(O, P)``, over the selected parameters.
        inputs: By layer, what its weight multiplies at each position of each call, ``(T, d)``, by group.
        slopes: By layer, the Jacobian of the outputs in the layer's outputs, ``(O, T, c)``.
        root: A root of the Hessian of the loss in the outputs, ``(O, O)``.
        gradients: Gradients of the loss in the outputs, ``(1, O)``, or one per term.
    """

    jacobian: Tensor
    inputs: dict[str, list[Tensor]]
    slopes: dict[str, Tensor]
    root: Tensor
    gradients: Tensor


@dataclass
class Block:
    """A block with Kronecker factors: a matrix of ``c`` outputs and ``d`` inputs of a layer.

    Attributes:
        layer: Name of the layer.
        group: Number of the group of a grouped convolution.
        outputs: The layer's outputs in the block.
        columns: The columns of the layer's inputs, of which the last is one.
        places: Places of the entries in the flat selected parameters, ``(c, d)``.
    """

    layer: str
    group: int
    outputs: slice
    columns: slice
    places: Tensor


class Reference:
    """The curvature of a case.

    Args:
        model: The model in float64.
        loss: The loss of ``torch.nn``.
        batches: The batches, in a list.
        names: Names of the selected parameters, in the order of the model.
        call: Model and batch to outputs and targets.
        unit: Whether an empirical gradient is that of a ``sample`` or of a ``term``.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, batches: list[Any], names: tuple[str, ...], call: Call, unit: str
    ) -> None:
        self.model, self.loss, self.call, self.unit = model, loss, call, unit
        self.batches = [map_batch(batch, in_float64) for batch in batches]
        own = dict(model.named_parameters())
        self.parameters = {name: own[name] for name in names}
        self.mean = loss.reduction == "mean"
        self.num_samples = sum(map(length, self.batches))
        with torch.no_grad():
            self.terms = sum(self._terms(*self._apply(batch)) for batch in self.batches)
        self.layers = self._find_layers()
        self.unique = True  # whether all eigenbases so far were: EK-FAC is not defined where one is not
        self.samples = [
            self._sample(map_batch(batch, lambda tensor, n=n: tensor[n : n + 1].clone()))
            for batch in self.batches
            for n in range(length(batch))
        ]

    def _apply(self, batch: Any) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return self.call(self.model, batch)

    # The loss ---------------------------------------------------------------------------------------------------------

    def _terms(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the number of terms that a mean is over."""
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return float((targets != self.loss.ignore_index).sum())
        return float(outputs[..., 0].numel() if outputs.ndim > 1 else outputs.numel())

    def _each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every term, ``(T,)``."""
        each = deepcopy(self.loss)
        each.reduction = "none"
        values = each(outputs, targets)
        if not isinstance(self.loss, nn.CrossEntropyLoss) and outputs.ndim > 1:
            values = values.mean(dim=-1) if self.mean else values.sum(dim=-1)
        return values.reshape(-1)

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the part of a batch in the loss of all data, by the loss itself."""
        terms = self._terms(outputs, targets)
        value = self.loss(outputs, targets).sum()
        return value * (terms / self.terms) if self.mean else value

    # One sample -------------------------------------------------------------------------------------------------------

    def _find_layers(self) -> dict[str, nn.Module]:
        """Return the layers of known kinds that are called and have selected parameters."""
        called: set[str] = set()
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if is_matrix(module):

                    def note(*_: Any, name: str = name) -> None:
                        called.add(name)

                    hooks.callback(module.register_forward_hook(note).remove)
            with torch.no_grad():
                self._apply(map_batch(self.batches[0], torch.clone))
        modules = dict(self.model.named_modules())
        return {name: modules[name] for name in sorted(called) if self.own(name)}

    def own(self, layer: str) -> list[str]:
        """Return the names of a layer's selected parameters."""
        prefix = f"{layer}." if layer else ""
        return [name for name in (f"{prefix}weight", f"{prefix}bias") if name in self.parameters]

    def blocks(self, layer: str, separate: bool) -> list[Block]:
        """Return the blocks of a layer; ``separate``: the bias has one of its own."""
        module, own = self.layers[layer], self.own(layer)
        places, start = {}, 0
        for name, parameter in self.parameters.items():
            places[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
            start += parameter.numel()
        groups = getattr(module, "groups", 1)
        weight = next((rows_of(module, places[name]) for name in own if name.endswith("weight")), None)
        bias = next((places[name] for name in own if name.endswith("bias")), None)
        found = []
        for group in range(groups):
            size = len(bias if bias is not None else weight) // groups  # type: ignore[arg-type]
            rows = slice(group * size, (group + 1) * size)
            if weight is not None and bias is not None and not separate:
                both = torch.cat([weight[rows], bias[rows, None]], dim=1)
                found.append(Block(layer, group, rows, slice(None), both))
                continue
            if weight is not None:
                found.append(Block(layer, group, rows, slice(None, -1), weight[rows]))
            if bias is not None:
                found.append(Block(layer, group, rows, slice(-1, None), bias[rows, None]))
        return found

    def _sample(self, batch: Any) -> Sample:
        inputs: dict[str, list[list[Tensor]]] = {name: [] for name in self.layers}  # by layer, of every call
        results: list[tuple[str, Tensor]] = []
        with ExitStack() as hooks:
            for name, module in self.layers.items():

                def keep(module: nn.Module, given: Any, result: Tensor, name: str = name) -> Tensor:
                    inputs[name].append(inputs_of(module, given[0].detach().clone()))
                    results.append((name, result))
                    return result.clone()  # which the next module may change in place

                hooks.callback(module.register_forward_hook(keep).remove)
            outputs, targets = self._apply(batch)
        wanted = [*self.parameters.values(), *(result for _, result in results)]
        flat, shape = outputs.reshape(-1), outputs.shape
        rows: list[list[Tensor]] = []
        for output in flat:
            found = torch.autograd.grad(output, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append([g.to_dense() if g.is_sparse else g for g in found])
        p = len(self.parameters)
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row[:p]]) for row in rows])
        slopes: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        for i, (name, _) in enumerate(results):
            slopes[name].append(torch.stack([_positions(self.layers[name], row[p + i]) for row in rows]))
        together = {name: [torch.cat(group) for group in zip(*calls, strict=True)] for name, calls in inputs.items()}
        whole = {name: torch.cat(calls, dim=1) for name, calls in slopes.items()}
        at = flat.detach().requires_grad_()
        hessian = torch.zeros(len(flat), len(flat), dtype=torch.float64)
        gradients = torch.zeros(1, len(flat), dtype=torch.float64)
        if self._terms(outputs, targets):
            (slope,) = torch.autograd.grad(self._total(at.view(shape), targets), at, create_graph=True)
            if slope.requires_grad:
                hessian = torch.stack([torch.autograd.grad(s, at, retain_graph=True)[0] for s in slope])
            if isinstance(self.loss, nn.CrossEntropyLoss):  # rows sum to zero; p - p^2 cancels for a confident model
                hessian.fill_diagonal_(0)
                hessian -= torch.diag(hessian.sum(dim=1))
            each = self._each(at.view(shape), targets)
            gradients = torch.stack([torch.autograd.grad(value, at, retain_graph=True)[0] for value in each])
            if self.unit == "sample":
                gradients = gradients.sum(dim=0, keepdim=True)
            if self.mean:
                gradients = gradients / self.terms**0.5
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        return Sample(jacobian, together, whole, (vectors * values.clamp(min=0).sqrt()).mT, gradients)

    # Matrices ---------------------------------------------------------------------------------------------------------

    def hessian(self, vectors: Tensor) -> Tensor:
        """Return the product of the Hessian of the loss of all data with vectors ``(P, K)``."""
        parameters = list(self.parameters.values())
        product = torch.zeros_like(vectors)
        for batch in self.batches:
            with sdpa_kernel(SDPBackend.MATH):
                value = self._total(*self._apply(map_batch(batch, torch.clone)))
                slope = _flat(torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True))
                for k in range(vectors.shape[1] if slope.requires_grad else 0):
                    found = torch.autograd.grad(
                        slope @ vectors[:, k], parameters, retain_graph=True, materialize_grads=True
                    )
                    product[:, k] += _flat(found)
        return product

    def rows(self, empirical: bool) -> list[Tensor]:
        """Return ``R_n``."""
        return [sample.gradients if empirical else sample.root for sample in self.samples]

    def second_moment(self, vectors: Tensor, empirical: bool) -> Tensor:
        """Return the product of the GGN, or the empirical Fisher, with vectors ``(P, K)``."""
        product = torch.zeros_like(vectors)
        for sample, rows in zip(self.samples, self.rows(empirical), strict=True):
            product += sample.jacobian.mT @ (rows.mT @ (rows @ (sample.jacobian @ vectors)))
        return product

    def spread(self) -> float:
        """Return the sum over terms of the variances of drawn labels: next to 0 for a model that is sure of all."""
        return sum(float(sample.root.square().sum()) for sample in self.samples) * (self.terms if self.mean else 1)

    def diagonal(self, empirical: bool) -> Tensor:
        """Return the diagonal of the GGN or the empirical Fisher, ``(P,)``."""
        parts = [
            (rows @ sample.jacobian).square().sum(dim=0)
            for sample, rows in zip(self.samples, self.rows(empirical), strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def kronecker(
        self,
        vectors: Tensor,
        layers: list[str],
        empirical: bool = False,
        sharing: str = "expand",
        corrected: bool = False,
        separate: bool = False,
        only_inputs: bool = False,
    ) -> Tensor:
        """Return the product of K-FAC, or EK-FAC, with vectors ``(P, K)``; what is in no layer has its diagonal.

        With ``only_inputs``, the factors of the gradients are identities.
        """
        product = self.diagonal(empirical).unsqueeze(1) * vectors
        for layer in layers:
            for block in self.blocks(layer, separate):
                given = vectors[block.places]
                product[block.places] = self._block_product(block, given, empirical, sharing, corrected, only_inputs)
        return product

    def _block_product(
        self, block: Block, given: Tensor, empirical: bool, sharing: str, corrected: bool, only_inputs: bool
    ) -> Tensor:
        a_factor: Any = 0.0
        s_factor: Any = 0.0
        kept = []
        for sample, rows in zip(self.samples, self.rows(empirical), strict=True):
            a = sample.inputs[block.layer][block.group][:, block.columns]
            g = torch.einsum("ro,otc->rtc", rows, sample.slopes[block.layer][..., block.outputs])
            kept.append((a, g))
            if sharing == "reduce":
                a, g = a.mean(dim=0, keepdim=True), g.sum(dim=1, keepdim=True)
            a_factor = a_factor + a.mT @ a / len(a) / self.num_samples
            s_factor = s_factor + torch.einsum("rtc,rtd->cd", g, g)
        if only_inputs:
            s_factor = torch.eye(len(s_factor)).double()
        if not corrected:
            return torch.einsum("ce,edk,df->cfk", s_factor, given, a_factor)
        self.unique &= _has_unique_basis(a_factor) and _has_unique_basis(s_factor)
        basis_a, basis_s = torch.linalg.eigh(a_factor)[1], torch.linalg.eigh(s_factor)[1]
        moments = sum((basis_s.mT @ torch.einsum("rtc,td->rcd", g, a) @ basis_a).square().sum(dim=0) for a, g in kept)
        inner = torch.einsum("ci,cdk,dj->ijk", basis_s, given, basis_a) * moments.unsqueeze(2)
        return torch.einsum("ci,ijk,dj->cdk", basis_s, inner, basis_a)


CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module multiplies its inputs with a weight at every position."""
    as_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    convolves = isinstance(module, nn.modules.conv._ConvNd) and type(module).__module__ == "torch.nn.modules.conv"
    return as_linear or convolves or type(module) is nn.Embedding or type(module).__name__ == "Conv1D"


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, or what belongs to its entries, with a row per output ``(c, d)``."""
    if type(module) is nn.Embedding or type(module).__name__ == "Conv1D":
        return weight.mT
    if getattr(module, "transposed", False):  # (inputs, outputs of a group, ...)
        parts = weight.chunk(module.groups)
        return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
    return weight.flatten(1)


def inputs_of(module: nn.Module, given: Tensor) -> list[Tensor]:
    """Return what a weight multiplies at each position, and a one for the bias, ``(T, d + 1)``, by group."""
    if type(module) is nn.Embedding:
        found = [F.one_hot(given.reshape(-1), module.num_embeddings).double()]
    elif not isinstance(module, nn.modules.conv._ConvNd):
        found = [given.reshape(-1, given.shape[-1])]
    else:
        found = [_patches(module, part) for part in given.chunk(module.groups, dim=1)]
    return [torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1) for rows in found]


def _has_unique_basis(factor: Tensor) -> bool:
    """Return whether the eigenvalues differ, but for those that are 0: along these the moments are 0."""
    values = torch.linalg.eigvalsh(factor)
    values = values[values > 1e-12 * values[-1]]
    return len(values) < 2 or bool(values.diff().min() > 1e-6 * values[-1])


def _patches(module: nn.Module, given: Tensor) -> Tensor:
    """Return the values below a kernel at each position: a convolution with unit kernels."""
    channels, kernel = given.shape[1], module.kernel_size
    size = channels * torch.Size(kernel).numel()
    identity = torch.eye(size, dtype=given.dtype)
    if module.transposed:
        units = identity.view(channels, *kernel, size).movedim(-1, 1)
        where = (module.stride, module.padding, module.output_padding, 1, module.dilation)
        found = TRANSPOSED[len(kernel)](given, units, None, *where)
    else:
        units = identity.view(size, channels, *kernel)
        found = CONVOLVE[len(kernel)](given, units, None, module.stride, module.padding, module.dilation)
    return found.flatten(2)[0].mT


def _positions(module: nn.Module, values: Tensor) -> Tensor:
    """Return the outputs of a layer for one sample as ``(T, c)``."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return values.flatten(2)[0].mT
    return values.reshape(-1, values.shape[-1])


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([(t.to_dense() if t.is_sparse else t).reshape(-1) for t in tensors])
