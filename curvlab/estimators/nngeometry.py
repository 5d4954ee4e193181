"""NNGeometry (George, "NNGeometry: easy and fast Fisher information matrices and neural tangent kernels", 2021).

This backend uses its Jacobians by module hooks, but not its metrics: ``FIM`` is NaN if a class is saturated and fails
in float64, ``FIM_MonteCarlo`` draws from the global random state, and neither has the empirical Fisher. The Jacobians
are taken of ``R`` functions ``s_r' f`` of the outputs, whose gradients are the rows ``J' s_r`` of any quantity.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from math import sqrt
from typing import Any

import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curvlab.estimators.backend import Backend, BackendResult
from curvlab.estimators.capture import find_changing_hook, forward
from curvlab.estimators.covectors import label_stream, output_covectors
from curvlab.estimators.default_dtype import default_dtype
from curvlab.estimators.layers import Layer, find_layers
from curvlab.estimators.verification import find_library_obstacle
from curvlab.matrices.eigen import symmetric_eigh
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance, no_progress
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Quantity
from curvlab.stateless import copy_model
from curvlab.structures import Kronecker, Structure

_KRONECKER_RULES = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Without ConvTranspose2d: the library keeps every such layer in memory for the rest of the process.
_RULES = (*_KRONECKER_RULES, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)

_Loader = DataLoader[tuple[Tensor, ...]]
_Generate = Callable[[TorchHooksJacobianBackend, _Loader], Mapping[str, Tensor]]


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> BackendResult:
    """See ``curvlab.estimators.backend.Compute``."""
    mean = partial(_mean, problem, quantity, space, batch_size)
    if isinstance(structure, Kronecker):
        return BackendResult(_kronecker(problem.model, structure, space, mean, advance))
    collection = _collection(problem.model, space)
    parts = _parts(collection)
    if structure.name == "block_diag":
        blocks = mean(advance, lambda jacobians, data: jacobians.get_covariance_layer_blocks(data))
        return BackendResult({name: blocks[_layer(name)][parts[name], parts[name]].clone() for name in space.names})
    kept: Tensor | slice = slice(None)
    if space.total < collection.numel():
        flat = torch.arange(collection.numel()).split([layer.numel() for layer in collection.layers.values()])
        indices = dict(zip(collection.layers, flat, strict=True))
        kept = torch.cat([indices[_layer(name)][parts[name]] for name in space.names])
    if structure.name == "diag":
        entries = mean(advance, lambda jacobians, data: {"": jacobians.get_covariance_diag(data)})[""]
        return BackendResult({"entries": entries[kept]})
    matrix = mean(advance, lambda jacobians, data: {"": jacobians.get_covariance_matrix(data)})[""]
    return BackendResult({"matrix": matrix[kept][:, kept]})


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _collection(model: nn.Module, space: ParameterSpace) -> LayerCollection:
    """Return the library's description of the layers with a parameter in the space."""
    collection = LayerCollection()
    for layer in find_layers(model, space).values():
        collection.add_layer_from_model(model, layer.module)
    return collection


def _parts(collection: LayerCollection) -> dict[str, slice]:
    """Return the slice of each parameter among the entries of its layer: the weight first, then the bias."""
    parts = {}
    for name, layer in collection.layers.items():
        weights = layer.weight.numel()
        parts[f"{name}.weight".removeprefix(".")] = slice(0, weights)
        parts[f"{name}.bias".removeprefix(".")] = slice(weights, layer.numel())
    return parts


def _mean(
    problem: Problem,
    quantity: Quantity,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
    generate: _Generate,
) -> dict[str, Tensor]:
    """Return the mean over samples of what ``generate`` returns as a mean over each batch."""
    # A copy, because the library's hooks stay on the model after an exception.
    copy = problem.with_model(copy_model(problem.model))
    collection = _collection(copy.model, space)
    jacobians = TorchHooksJacobianBackend(copy.model, _Rows(copy, quantity), layer_collection=collection)
    working_dtype = torch.promote_types(problem.dtype, torch.get_default_dtype())
    total: dict[str, Tensor] = {}
    for inputs, targets in problem.batches(batch_size):
        assert isinstance(inputs, Tensor)  # the problem is plain
        n = len(inputs)
        # Some of the library's buffers have the default dtype, not the model's.
        with default_dtype(working_dtype):
            means = generate(jacobians, _loader(inputs, targets))
        for name, value in means.items():
            total[name] = total[name].add_(value, alpha=n) if name in total else value.mul_(n)
        advance(n)
    return {name: value.div_(problem.num_samples) for name, value in total.items()}


class _Rows:
    """The ``R`` functions of the outputs whose gradients are the rows of a quantity; returns ``(N, R)`` for a batch."""

    def __init__(self, problem: Problem, quantity: Quantity) -> None:
        self.problem, self.quantity = problem, quantity
        self.rng = label_stream(quantity)
        self.default = torch.get_default_dtype()
        self.count = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with default_dtype(self.default):
            outputs = self.problem.forward({}, inputs)
            covectors = output_covectors(self.problem.loss, self.quantity, outputs.detach(), targets, self.rng)
        self.count = len(covectors)
        return torch.einsum("nc,nrc->nr", outputs, covectors[:])


def _loader(inputs: Tensor, targets: Tensor) -> _Loader:
    """Return a batch in the form that the library needs: a DataLoader whose sampler has as many indices as samples."""
    n = len(inputs)
    indices: Any = range(n)
    # Detached, because the library sets requires_grad. A DataLoader without a generator draws from the global one.
    whole = inputs.detach(), targets
    return DataLoader(indices, batch_size=n, collate_fn=lambda _: whole, generator=torch.Generator())


def _kronecker(
    model: nn.Module,
    structure: Kronecker,
    space: ParameterSpace,
    mean: Callable[[Advance, _Generate], dict[str, Tensor]],
    advance: Advance,
) -> dict[str, Tensor]:
    columns = {name: _columns(layer) for name, layer in find_layers(model, space).items()}
    ekfac = structure.name == "ekfac"
    factors = mean(no_progress if ekfac else advance, _factors)
    for layer, (kept, _) in columns.items():
        factors[f"{layer}|A"] = factors[f"{layer}|A"][kept, kept].clone()
    if not ekfac:
        return factors
    tensors: dict[str, Tensor] = {}
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, (kept, width) in columns.items():
        a, s = (symmetric_eigh(factors[f"{layer}|{side}"])[1] for side in "AS")
        tensors[f"{layer}|U_A"], tensors[f"{layer}|U_S"] = a, s
        # The library projects the whole homogeneous weight: columns that are not selected get zeros.
        before, behind = kept.start, width - kept.stop
        bases[layer] = nn.functional.pad(a, (before, behind, before, behind)), s
    values = mean(advance, lambda jacobians, data: jacobians.get_kfe_diag(bases, data))
    for layer, (kept, width) in columns.items():
        tensors[f"{layer}|values"] = values[layer].view(-1, width)[:, kept].clone()
    return tensors


def _columns(layer: Layer) -> tuple[slice, int]:
    """Return which columns of a layer's homogeneous weight are in the space, and how many it has."""
    d = layer.module.get_parameter("weight")[0].numel()
    width = d + (layer.module.bias is not None)
    return slice(0 if layer.weight else d, width if layer.bias else d), width


def _factors(jacobians: TorchHooksJacobianBackend, data: _Loader) -> dict[str, Tensor]:
    """Return the K-FAC factors of a batch on curvlab's scale.

    In ``A`` the library sums over ``T`` positions, while curvlab takes the mean; it divides ``S`` by ``T``, while
    curvlab does not. It also multiplies ``A`` by the square root of ``R`` and divides ``S`` by it.
    """
    positions: dict[nn.Module, int] = {}

    def hook(module: nn.Module, _: object, output: Tensor) -> None:
        positions[module] = output.shape[2:].numel()

    with ExitStack() as hooks:
        for module in jacobians.m_to_l:
            hooks.callback(module.register_forward_hook(hook).remove)
        theirs = jacobians.get_kfac_blocks(data)
    factors: dict[str, Tensor] = {}
    for layer, (a, s) in theirs.items():
        scale = positions[jacobians.l_to_m[layer]] * sqrt(jacobians.function.count)
        factors[f"{layer}|A"], factors[f"{layer}|S"] = a.div_(scale), s.mul_(scale)
    return factors


def obstacle(
    problem: Problem,
    quantity: Quantity,  # noqa: ARG001 - its rules are the same for every quantity
    structure: Structure,
    space: ParameterSpace,
) -> str | None:
    """See ``curvlab.estimators.backend.Obstacle``."""
    inputs = problem.probe()[0][0]
    assert isinstance(inputs, Tensor)
    if not inputs.is_floating_point():
        return "it differentiates with respect to the inputs, and these are integers"
    layers = find_layers(problem.model, space)
    modules = {name: layer.module for name, layer in layers.items()}
    for name, module in modules.items():
        reason = _rule_obstacle(module, structure)
        if reason:
            return f"{reason} ({name or 'the model'})"
    if reason := find_library_obstacle(problem, space) or find_changing_hook(problem, modules):
        return reason
    calls = forward(problem, layers, inputs)[1]
    for name, module in modules.items():
        given = calls[name][0].inputs
        found, right = given.ndim if given is not None else 0, _input_dimensions(module)
        if found != right:
            kind = type(module).__name__
            return f"its rule for {kind} needs inputs of {right} dimensions, not {found} ({name or 'the model'})"
    return None


def _rule_obstacle(module: nn.Module, structure: Structure) -> str | None:
    kind = type(module).__name__
    if type(module) not in (_KRONECKER_RULES if isinstance(structure, Kronecker) else _RULES):
        return f"it has no rule for {kind}"
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            return f"its rule for {kind} is wrong with groups"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            how = module.padding if isinstance(module.padding, str) else module.padding_mode
            return f"its rule for {kind} needs zero padding of a given width, not {how!r}"
        if isinstance(structure, Kronecker) and structure.sharing == "reduce":
            return f"its factors of {kind} are for sharing=expand, not reduce"
    return None


def _input_dimensions(module: nn.Module) -> int:
    if isinstance(module, nn.LayerNorm):
        return 1 + len(module.normalized_shape)
    return {nn.Linear: 2, nn.BatchNorm1d: 2, nn.Conv1d: 3}.get(type(module), 4)


_STRUCTURES = ("dense", "block_diag", "diag", "kfac", "ekfac")
BACKEND = Backend(
    "nngeometry",
    dict.fromkeys((Fisher, EmpiricalFisher, GGN), _STRUCTURES),
    compute,
    obstacle,
    library=True,
)
