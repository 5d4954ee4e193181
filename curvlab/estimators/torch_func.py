"""The reference: every quantity by plain automatic differentiation, one sample (and class or output) at a time.

It is slow, simple and correct in float64: every other estimator is tested against it. A positive semi-definite
quantity is given by *rows*: vectors ``v`` over the parameters with ``F = 1/N sum v v'``.

The Kronecker factors of a layer follow from its inputs ``a_t`` and the gradients ``g_rt`` of row ``r`` with respect to
its outputs, at positions ``t`` (one position for a Linear layer on ``(N, d)``; the output positions of a convolution).
If the layer is called several times, its uses are further positions (Eschenhagen et al. 2023). Padding is not
a position of the inputs (see ``curvlab.estimators.padding``). Sample ``n`` has

- expand: ``A_n = 1/T sum_t a_t a_t'`` and ``S_n = sum_r sum_t g_rt g_rt'``;
- reduce: ``A_n = b b'`` with ``b = 1/T sum_t a_t``, and ``S_n = sum_r h_r h_r'`` with ``h_r = sum_t g_rt``.

K-FAC is ``A = mean A_n`` and ``S = mean S_n``. TK-FAC (Gao et al. 2021) weights each by the trace of the other: its
``A`` is ``mean tr(S_n) A_n`` scaled to trace one, its ``S`` is ``mean tr(A_n) S_n`` scaled to the trace of the layer's
block, ``mean sum_r ||G_r||^2`` with the gradients ``G_r = sum_t g_rt a_t'``. With one position this is the method of
the paper; with any number of positions the trace is exact. The rescaled variant has K-FAC's ``A``, and K-FAC's ``S``
scaled such that the trace is exact.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import copy
from itertools import islice
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.batches import Inputs
from curvlab.errors import UnsupportedError
from curvlab.estimators.backend import Backend, BackendResult
from curvlab.estimators.capture import to_working_dtype, working_dtype
from curvlab.estimators.covectors import label_stream
from curvlab.estimators.layers import Layer, check_scale, is_transposed_convolution
from curvlab.estimators.memory import at_most
from curvlab.estimators.padding import find_padding, padding_of, without_gradient
from curvlab.estimators.products import product
from curvlab.estimators.rows import full_batches
from curvlab.estimators.rules import agree, coarsest
from curvlab.estimators.uses import watch
from curvlab.estimators.verification import kronecker_layers
from curvlab.likelihoods import Terms
from curvlab.matrices.eigen import symmetric_eigh
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance, no_progress
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, MaSQ, Quantity
from curvlab.structures import EKFACStructure, KFACStructure, Kronecker, Structure, TKFACStructure, is_forward_only

_BYTES = 6.4e7  # limit of the rows of a sample that are held at once


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
        layers = kronecker_layers(problem, space, structure)[0]
        if isinstance(structure, EKFACStructure):
            return BackendResult(_eigenvalue_corrected(problem, quantity, structure, layers, advance))
        return BackendResult(_factors(problem, quantity, structure, layers, advance))
    if isinstance(quantity, Hessian):
        return BackendResult(_from_dense(_hessian(problem, space, batch_size, advance), structure.name, space))
    parts = {"matrix": slice(None)} if structure.name in ("dense", "diag") else space.slices
    total: dict[str, Tensor] = {}
    for rows in per_sample_rows(problem, quantity, space, advance):
        for name, part in parts.items():
            v = rows[:, part]
            term = v.square().sum(dim=0) if structure.name == "diag" else v.mT @ v
            total[name] = total[name] + term if name in total else term
    means = {name: value / problem.num_samples for name, value in total.items()}
    return BackendResult({"entries": means["matrix"]} if structure.name == "diag" else means)


def _from_dense(matrix: Tensor, structure: str, space: ParameterSpace) -> Mapping[str, Tensor]:
    if structure == "dense":
        return {"matrix": matrix}
    if structure == "diag":
        return {"entries": matrix.diagonal().clone()}
    return {name: matrix[part, part].clone() for name, part in space.slices.items()}


def per_sample_rows(
    problem: Problem, quantity: Quantity, space: ParameterSpace, advance: Advance = no_progress
) -> Iterator[Tensor]:
    """Yield rows ``(R, P)`` with ``F = 1/N sum v v'``: one sample at a time, for MaSQ one mini-batch at a time.

    If the rows of a sample take more than 64 MB, they are yielded in several pieces. They are in at least float32.
    """
    if isinstance(quantity, MaSQ):
        yield from _masq_rows(problem, quantity, space, advance)
        return
    rng = label_stream(quantity)
    fitting = max(1, int(at_most(_BYTES, share=1 / 16) / (max(space.total, 1) * working_dtype(problem.dtype).itemsize)))
    for inputs, targets in problem.batches():
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            parameters = _leaves(problem, space)
            outputs = problem.forward(parameters, x)
            rows = _sample_rows(problem.loss, quantity, outputs, y, list(parameters.values()), rng)
            while piece := list(islice(rows, fitting)):
                yield torch.stack(piece)
            advance(1)


def _sample_rows(
    loss: Terms, quantity: Quantity, outputs: Tensor, target: Tensor, parameters: list[Tensor], rng: np.random.Generator
) -> Iterator[Tensor]:
    """Yield the rows of one sample, ``(P,)``."""
    # In float64, because in float32 the probability of a class may round to one, and its complement to zero.
    outputs = outputs.double()
    target = target.double() if target.is_floating_point() else target
    f, y, weights = loss.split_terms(outputs, target)
    if isinstance(quantity, EmpiricalFisher) and loss.unit == "sample":
        yield _gradient(loss.values(outputs, target), parameters)
    elif isinstance(quantity, EmpiricalFisher):
        # A term of weight w counts as w terms, each with 1/w of its gradient: none if it is 0.
        for value, w in zip(loss.each.values(f, y), weights.tolist(), strict=True):
            yield _gradient(value, parameters) * (w**-0.5 if w else 0.0)
    elif isinstance(quantity, Fisher) and quantity.samples is not None:
        masses = loss.each.masses(f.detach(), y).sqrt()
        for drawn in loss.each.sample(f, quantity.samples, rng).unbind(dim=1):
            value = (masses * loss.each.entry_values(f, drawn)).sum()
            yield _gradient(value, parameters) / sqrt(quantity.samples)
    elif isinstance(quantity, Fisher):
        # Expectation of the outer product over y: every outcome of every entry, weighted by its probability.
        masses = loss.each.masses(f.detach(), y)
        for outcome, probability in zip(*loss.each.outcomes(f.detach()), strict=True):
            entries = loss.each.entry_values(f, outcome).flatten()
            for entry, w in zip(entries, (probability * masses).flatten(), strict=True):
                gradient = _gradient(entry, parameters)
                yield w.sqrt().to(gradient.dtype) * gradient
    else:
        for factor in _root_of_hessian(loss, outputs.detach(), target):
            yield _gradient(outputs[0] @ factor, parameters)


def _root_of_hessian(loss: Terms, outputs: Tensor, target: Tensor) -> Tensor:
    """Return ``s`` ``(R, C)`` such that ``sum_r s_r s_r'`` is the Hessian of a sample's loss in its outputs.

    Raises:
        UnsupportedError: The Hessian has a negative eigenvalue.
    """
    at = outputs.requires_grad_()
    slope = _gradient(loss.values(at, target), [at], create_graph=True)
    hessian = torch.stack([_gradient(s, [at]) for s in slope])
    values, vectors = torch.linalg.eigh(hessian)
    if bool(values.min() < -1e-9 * values.abs().max() - 1e-12):
        raise UnsupportedError(
            f"{loss} has no GGN as a sum of outer products: its Hessian with respect to the outputs has a negative "
            "eigenvalue; use ggn as implicit, fisher, or hessian"
        )
    factors: Tensor = (vectors * values.clamp(min=0).sqrt()).mT
    return factors


def _masq_rows(problem: Problem, quantity: MaSQ, space: ParameterSpace, advance: Advance) -> Iterator[Tensor]:
    batches = -(-problem.num_samples // quantity.batch_size)
    per_batch = {"sumsq": 1.0, "scaled": 1.0, "mean": sqrt(problem.num_units / batches)}[quantity.norm]
    for inputs, targets in full_batches(problem, quantity):
        parameters = _leaves(problem, space)
        total = problem.loss.values(problem.forward(parameters, inputs), targets).sum()
        reduced = total if quantity.norm == "sumsq" else total / problem.loss.count(targets)
        yield (per_batch * _gradient(reduced, list(parameters.values()))).unsqueeze(0)
        advance(len(inputs))


def _hessian(problem: Problem, space: ParameterSpace, batch_size: int | None, advance: Advance) -> Tensor:
    total = torch.zeros(space.total, space.total, dtype=working_dtype(problem.dtype), device=problem.device)
    n, loss = 0, 0.0
    for inputs, targets in problem.batches(batch_size):
        parameters = list(_leaves(problem, space).values())
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            named = dict(zip(space.names, parameters, strict=True))
            value = problem.loss.values(problem.forward(named, inputs), targets).sum()
            gradient = _gradient(value, parameters, create_graph=True)
            for i in range(space.total):
                if gradient[i].requires_grad:
                    total[i] += _gradient(gradient[i], parameters)
        n, loss = n + len(inputs), loss + float(value.detach().abs())
        advance(len(inputs))
    eps = problem.eps()
    # A block can be zero, such as that of a bias before a normalisation; it then contains only rounding errors.
    bound = max(float(total.abs().max()) * eps**0.5, 100 * eps * loss)
    if bool((total - total.mT).abs().max() > bound):
        raise UnsupportedError(
            f"the second derivative of {type(problem.model).__name__} that torch computes is not symmetric, so it is "
            "wrong (a fused kernel such as weight_norm's is known to cause this); replace that module"
        )
    return (total + total.mT) / (2 * n)


def _leaves(problem: Problem, space: ParameterSpace) -> dict[str, Tensor]:
    values = problem.parameters()
    return {name: values[name].clone().requires_grad_() for name in space.names}


def _gradient(value: Tensor, parameters: list[Tensor], create_graph: bool = False) -> Tensor:
    if not value.requires_grad:  # it depends on none of the parameters
        return torch.cat([to_working_dtype(torch.zeros_like(p)).reshape(-1) for p in parameters])
    gradients = torch.autograd.grad(
        value, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([to_working_dtype(g.to_dense() if g.is_sparse else g).reshape(-1) for g in gradients])


def _factors(
    problem: Problem, quantity: Quantity, structure: Kronecker, layers: Mapping[str, Layer], advance: Advance
) -> dict[str, Tensor]:
    weighted = isinstance(structure, TKFACStructure) and structure.variant == "gao"
    sums: dict[str, Tensor] = defaultdict(
        lambda: torch.zeros((), dtype=working_dtype(problem.dtype), device=problem.device)
    )
    for name, inputs, gradients, padding in _layer_samples(problem, quantity, layers, advance):
        a, g = inputs[~without_gradient(padding, gradients).all(dim=0)], gradients
        count = max(1, len(a))  # of positions; all can be padding
        if structure.sharing == "reduce":
            a, g, count = a.sum(dim=0, keepdim=True) / count, g.sum(dim=1, keepdim=True), 1
        # The inputs of an embedding are unit vectors, so that their moment is diagonal.
        input_moment = (a.square().sum(dim=0) if layers[name].is_embedding else a.mT @ a) / count
        gradient_moment = (g.mT @ g).sum(dim=0)
        if is_forward_only(structure):
            gradient_moment = torch.eye(len(gradient_moment)).to(gradient_moment)
        sums[f"{name}|A"] = sums[f"{name}|A"] + input_moment * (gradient_moment.trace() if weighted else 1)
        sums[f"{name}|S"] = sums[f"{name}|S"] + gradient_moment * (_trace(input_moment) if weighted else 1)
        sums[f"{name}|trace"] = sums[f"{name}|trace"] + (gradients.mT @ inputs).square().sum()
    means = {name: value / problem.num_samples for name, value in sums.items()}
    tiny = torch.finfo(problem.dtype).tiny  # for a layer whose gradients are zero
    for name, layer in layers.items():
        trace = means.pop(f"{name}|trace")
        if weighted:
            means[f"{name}|A"] /= _trace(means[f"{name}|A"]).clamp(min=tiny)
        if isinstance(structure, TKFACStructure):
            now = _trace(means[f"{name}|A"]) * means[f"{name}|S"].trace()
            check_scale(layer, float(now), float(trace), problem.dtype)
            means[f"{name}|S"] *= trace / now.clamp(min=tiny)
    return means


def _trace(factor: Tensor) -> Tensor:
    return factor.sum() if factor.ndim == 1 else factor.trace()


def _eigenvalue_corrected(
    problem: Problem, quantity: Quantity, structure: EKFACStructure, layers: Mapping[str, Layer], advance: Advance
) -> dict[str, Tensor]:
    kfac = _factors(problem, quantity, KFACStructure(structure.sharing), layers, no_progress)
    bases = {name.replace("|", "|U_"): symmetric_eigh(factor)[1] for name, factor in kfac.items()}
    return bases | _moments(problem, quantity, layers, bases, advance)


def compute_in_basis(
    problem: Problem, quantity: Quantity, structure: EKFACStructure, space: ParameterSpace, bases: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return K-FAC's factors and EK-FAC's eigenvalues, ``LAYER|values``, in the bases ``LAYER|U_A``, ``LAYER|U_S``."""
    layers = kronecker_layers(problem, space, structure)[0]
    kfac = _factors(problem, quantity, KFACStructure(structure.sharing), layers, no_progress)
    rotations = {name: bases[name.replace("|", "|U_")] for name in kfac}
    rotated = {name: rotations[name].mT @ factor @ rotations[name] for name, factor in kfac.items()}
    return rotated, _moments(problem, quantity, layers, bases, no_progress)


def _moments(
    problem: Problem,
    quantity: Quantity,
    layers: Mapping[str, Layer],
    bases: Mapping[str, Tensor],
    advance: Advance,
) -> dict[str, Tensor]:
    moments: dict[str, Tensor] = {}
    for name, inputs, gradients, _ in _layer_samples(problem, quantity, layers, advance):
        left = bases[f"{name}|U_A"]
        rotated = (gradients @ bases[f"{name}|U_S"]).mT @ (inputs @ left if left.ndim > 1 else inputs * left)
        term = rotated.square().sum(dim=0) / problem.num_samples
        moments[f"{name}|values"] = moments.get(f"{name}|values", 0) + term
    return moments


def _layer_samples(
    problem: Problem, quantity: Quantity, layers: Mapping[str, Layer], advance: Advance
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield a layer's name, inputs ``(T, d)``, output gradients ``(R, T, o)`` and padding ``(T,)`` for every sample.

    Raises:
        UnsupportedError: For some row of a sample, they do not give the gradient of the layer's parameters.
    """
    rng = label_stream(quantity)
    names = list(dict.fromkeys(parameter for layer in layers.values() for parameter in layer.parameters))
    numbers: dict[str, int] = {}  # of calls, by layer
    for inputs, targets in problem.batches():
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            leaves = _leaves(problem, problem.space)
            outputs, calls = _calls(problem, layers, x, leaves)
            _check_numbers({name: len(seen) for name, seen in calls.items()}, numbers)
            shifts = [shift for seen in calls.values() for _, shift in seen]
            wanted = [*shifts, *(leaves[name] for name in names)]
            rows = torch.stack(list(_sample_rows(problem.loss, quantity, outputs, y, wanted, rng)))
            parts = list(rows.split([tensor.numel() for tensor in wanted], dim=1))
            parameter_gradients = dict(zip(names, parts[len(shifts) :], strict=True))
            masks = find_padding(x)
            for name, seen in calls.items():
                uses, padding = [], []
                for given, shift in seen:
                    row, mask = parts.pop(0), padding_of(masks, layers[name], shift)
                    slope = _flatten_positions(layers[name].module, row.reshape(len(row), *shift.shape[1:]))
                    uses.append((_patches(layers[name], given), slope))
                    padding.append(slope.new_zeros(slope.shape[1], dtype=torch.bool) if mask is None else mask[0])
                patches, slopes = torch.cat([a for a, _ in uses]), torch.cat([g for _, g in uses], dim=1)
                dtype = coarsest(problem.dtype, *(shift.dtype for _, shift in seen))  # lower within autocast
                _check(layers[name], patches, slopes, parameter_gradients, dtype)
                yield name, patches, slopes, torch.cat(padding)
            advance(1)


def _check_numbers(now: Mapping[str, int], before: dict[str, int]) -> None:
    """Compare the numbers of calls of a sample with those of earlier samples, and record them."""
    for name, number in now.items():
        if not number or before.setdefault(name, number) != number:
            raise UnsupportedError(
                f"{name or 'the model'} is called {number} times for some samples and {before.get(name, 'several')} "
                "times for others, but Kronecker factors need the same number of calls for all: leave it out with "
                "params=[...]"
            )


def _check(layer: Layer, inputs: Tensor, slopes: Tensor, right: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Compare ``G_r = sum_t g_rt a_t'`` with the gradients of the layer's parameters, ``(R, size)`` by name."""
    outputs = slopes.shape[2]
    own = {name: layer.own(right[name], dim=1) for name in layer.parameters}
    parts = [own[layer.bias].reshape(len(slopes), outputs, 1)] if layer.bias else []
    parts = [layer.to_homogeneous(own[layer.weight]), *parts] if layer.weight else parts
    scale = float(inputs.norm() * slopes.norm())
    if not agree((slopes.mT @ inputs).flatten(), torch.cat(parts, dim=2).flatten(), scale, dtype):
        raise UnsupportedError(
            f"the gradient of {layer.name or 'the model'} ({layer.kind}) does not follow from its "
            "inputs and the gradients of its outputs for some sample, so it has no Kronecker factors; use diag, "
            "block_diag or dense"
        )


def _calls(
    problem: Problem, layers: Mapping[str, Layer], x: Inputs, leaves: dict[str, Tensor]
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Return the outputs of one sample, and for each call of a layer its input and a zero that is added to its output.

    The gradient with respect to this zero is that with respect to the layer's output, even if the output is changed
    later.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def record(key: str, given: Tensor, output: Tensor) -> Tensor:
        shift = torch.zeros_like(output, requires_grad=True)
        calls[key].append((to_working_dtype(given.detach().clone()), shift))
        return output + shift

    with watch(layers, record):
        outputs = problem.forward(leaves, x)
    return outputs, calls


def _patches(layer: Layer, x: Tensor) -> Tensor:
    """Return the vectors that the homogeneous weight multiplies at each position, ``(T, d)``."""
    module, columns = layer.module, []
    if isinstance(module, nn.modules.conv._ConvNd):
        # With the identity as weight, the outputs are the patches, for every padding, stride and dilation.
        channels, size = x.shape[1], x.shape[1] * prod(module.kernel_size)
        identity = torch.eye(size, dtype=x.dtype, device=x.device)
        if is_transposed_convolution(module):
            weight = identity.view(channels, -1, size).transpose(1, 2).unflatten(2, module.kernel_size)
            convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
            x = convolve(x, weight, None, module.stride, module.padding, module.output_padding, 1, module.dilation)
        else:
            one_group = copy(module)
            one_group.groups = 1
            x = one_group._conv_forward(x, identity.view(size, channels, *module.kernel_size), None)
    if isinstance(module, nn.Embedding):
        x = F.one_hot(x.long(), module.num_embeddings).to(module.weight)
        if module.padding_idx is not None:
            x[..., module.padding_idx] = 0
    patches = _flatten_positions(module, x)[0]
    if layer.weight is not None:
        columns.append(patches)
    if layer.bias is not None:
        columns.append(torch.ones_like(patches[:, :1]))
    return torch.cat(columns, dim=1)


def _flatten_positions(module: nn.Module, values: Tensor) -> Tensor:
    """Return outputs of a layer, ``(K, ..., channels)`` or ``(K, channels, ...)``, as ``(K, T, channels)``."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return values.flatten(2).mT
    return values.reshape(len(values), -1, values.shape[-1])


_ANY = ("dense", "block_diag", "diag", "implicit")
_WITH_FACTORS = (*_ANY, "kfac", "ekfac", "tkfac")
BACKEND = Backend(
    "torch",
    {**dict.fromkeys((Fisher, EmpiricalFisher, GGN), _WITH_FACTORS), MaSQ: _ANY, Hessian: _ANY},
    compute,
    product=product,
)
