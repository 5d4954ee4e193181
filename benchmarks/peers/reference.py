"""Curvature by plain autograd on the peer's own loss, one sample at a time: it shares no code with curvlab.

With the Jacobian ``J_n`` of a sample's outputs, every second moment is ``sum_n J_n' R_n' R_n J_n``. The rows ``R_n`` are
a root of the Hessian of the loss in the outputs (GGN, and the Fisher, which equals it for these losses), or the
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
        inputs: By layer, what its weight multiplies at each position, ``(T, d)``.
        slopes: By layer, the Jacobian of the outputs in the layer's outputs, ``(O, T, c)``.
        root: A root of the Hessian of the loss in the outputs, ``(O, O)``.
        gradients: Gradients of the loss in the outputs, ``(1, O)``, or one per term.
    """

    jacobian: Tensor
    inputs: dict[str, Tensor]
    slopes: dict[str, Tensor]
    root: Tensor
    gradients: Tensor


class Reference:
    """The curvature of a case.

    Args:
        model: The model in float64.
        loss: The loss of ``torch.nn``.
        batches: The batches, in a list.
        names: Names of the selected parameters, in the order of the model.
        call: Model and batch to outputs and targets.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, batches: list[Any], names: tuple[str, ...], call: Call):
        self.model, self.loss, self.call = model, loss, call
        self.batches = [map_batch(batch, in_float64) for batch in batches]
        own = dict(model.named_parameters())
        self.parameters = {name: own[name] for name in names}
        self.mean = loss.reduction == "mean"
        self.num_samples = sum(map(length, self.batches))
        with torch.no_grad():
            self.terms = sum(self._terms(*self._apply(batch)) for batch in self.batches)
        self.layers = self._find_layers()
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
        """Return the Linear layers and convolutions that are called once with their own selected parameters."""
        calls: dict[str, int] = {}
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if isinstance(module, kinds) and getattr(module, "groups", 1) == 1:

                    def count(*_: Any, name: str = name) -> None:
                        calls[name] = calls.get(name, 0) + 1

                    hooks.callback(module.register_forward_hook(count).remove)
            with torch.no_grad():
                self._apply(map_batch(self.batches[0], torch.clone))
        once = {name for name, number in calls.items() if number == 1}
        modules = dict(self.model.named_modules())
        return {name: modules[name] for name in once if self._own(name)}

    def _own(self, layer: str) -> list[str]:
        prefix = f"{layer}." if layer else ""
        return [name for name in (f"{prefix}weight", f"{prefix}bias") if name in self.parameters]

    def _sample(self, batch: Any) -> Sample:
        inputs: dict[str, Tensor] = {}
        results: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, module in self.layers.items():

                def keep(module: nn.Module, given: Any, result: Tensor, name: str = name) -> Tensor:
                    inputs[name] = self._patches(module, given[0].detach().clone(), self._own(name))
                    results[name] = result
                    return result.clone()  # which the next module may change in place

                hooks.callback(module.register_forward_hook(keep).remove)
            outputs, targets = self._apply(batch)
        wanted = [*self.parameters.values(), *results.values()]
        flat, shape = outputs.reshape(-1), outputs.shape
        rows: list[list[Tensor]] = []
        for output in flat:
            found = torch.autograd.grad(output, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append([g.to_dense() if g.is_sparse else g for g in found])
        p = len(self.parameters)
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row[:p]]) for row in rows])
        slopes = {
            name: torch.stack([_positions(self.layers[name], row[p + i]) for row in rows])
            for i, name in enumerate(results)
        }
        at = flat.detach().requires_grad_()
        hessian = torch.zeros(len(flat), len(flat), dtype=torch.float64)
        gradients = torch.zeros(1, len(flat), dtype=torch.float64)
        if self._terms(outputs, targets):
            (slope,) = torch.autograd.grad(self._total(at.view(shape), targets), at, create_graph=True)
            if slope.requires_grad:
                hessian = torch.stack([torch.autograd.grad(s, at, retain_graph=True)[0] for s in slope])
            each = self._each(at.view(shape), targets)
            gradients = torch.stack([torch.autograd.grad(value, at, retain_graph=True)[0] for value in each])
            gradients = gradients / self.terms**0.5 if self.mean else gradients.sum(dim=0, keepdim=True)
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        return Sample(jacobian, inputs, slopes, (vectors * values.clamp(min=0).sqrt()).mT, gradients)

    def _patches(self, module: nn.Module, given: Tensor, own: list[str]) -> Tensor:
        if not isinstance(module, nn.Linear):
            size = module.weight[0].numel()
            identity = torch.eye(size, dtype=given.dtype).view(size, *module.weight.shape[1:])
            function = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[given.ndim]
            given = function(given, identity, None, module.stride, module.padding, module.dilation)
        found = _positions(module, given)
        columns = [found] if any(name.endswith("weight") for name in own) else []
        if any(name.endswith("bias") for name in own):
            columns.append(torch.ones_like(found[:, :1]))
        return torch.cat(columns, dim=1)

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

    def diagonal(self, empirical: bool) -> Tensor:
        """Return the diagonal of the GGN or the empirical Fisher, ``(P,)``."""
        parts = [
            (rows @ sample.jacobian).square().sum(dim=0)
            for sample, rows in zip(self.samples, self.rows(empirical), strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def kronecker(
        self, vectors: Tensor, empirical: bool, sharing: str = "expand", corrected: bool = False, separate: bool = False
    ) -> Tensor:
        """Return the product of K-FAC, or EK-FAC, with vectors ``(P, K)``; parameters outside have their diagonal."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        parts = dict(zip(self.parameters, vectors.split(sizes), strict=True))
        diagonals = dict(zip(self.parameters, self.diagonal(empirical).split(sizes), strict=True))
        product = {name: diagonals[name].unsqueeze(1) * part for name, part in parts.items()}
        for layer in self.layers:
            own = self._own(layer)
            for names in [[name] for name in own] if separate else [own]:
                columns = self._columns(layer, names)
                product |= self._block(layer, names, columns, parts, empirical, sharing, corrected)
        return torch.cat([product[name] for name in self.parameters])

    def _columns(self, layer: str, names: list[str]) -> slice:
        """Return the columns of the layer's inputs that some of its parameters multiply."""
        if len(names) == len(self._own(layer)):
            return slice(None)
        return slice(None, -1) if names[0].endswith("weight") else slice(-1, None)

    def _block(
        self,
        layer: str,
        names: list[str],
        columns: slice,
        parts: Mapping[str, Tensor],
        empirical: bool,
        sharing: str,
        corrected: bool,
    ) -> dict[str, Tensor]:
        a_factor: Any = 0.0
        s_factor: Any = 0.0
        kept = []
        for sample, rows in zip(self.samples, self.rows(empirical), strict=True):
            a = sample.inputs[layer][:, columns]
            g = torch.einsum("ro,otc->rtc", rows, sample.slopes[layer])
            kept.append((a, g))
            if sharing == "reduce":
                a, g = a.mean(dim=0, keepdim=True), g.sum(dim=1, keepdim=True)
            a_factor = a_factor + a.mT @ a / len(a) / self.num_samples
            s_factor = s_factor + torch.einsum("rtc,rtd->cd", g, g)
        outputs = len(s_factor)
        given = torch.cat([parts[name].view(outputs, -1, parts[name].shape[1]) for name in names], dim=1)  # (c, d, K)
        if corrected:
            basis_a, basis_s = torch.linalg.eigh(a_factor)[1], torch.linalg.eigh(s_factor)[1]
            moments = sum(
                (basis_s.mT @ torch.einsum("rtc,td->rcd", g, a) @ basis_a).square().sum(dim=0) for a, g in kept
            )
            inner = torch.einsum("ci,cdk,dj->ijk", basis_s, given, basis_a) * moments.unsqueeze(2)
            found = torch.einsum("ci,ijk,dj->cdk", basis_s, inner, basis_a)
        else:
            found = torch.einsum("ce,edk,df->cfk", s_factor, given, a_factor)
        widths = [parts[name].shape[0] // outputs for name in names]
        return {
            name: part.reshape(parts[name].shape)
            for name, part in zip(names, found.split(widths, dim=1), strict=True)
        }


def _positions(module: nn.Module, values: Tensor) -> Tensor:
    """Return inputs or outputs of a layer for one sample as ``(T, c)``."""
    if isinstance(module, nn.Linear):
        return values.reshape(-1, values.shape[-1])
    return values.flatten(2)[0].mT


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([(t.to_dense() if t.is_sparse else t).reshape(-1) for t in tensors])
