"""NNGeometry (George, "NNGeometry: easy and fast Fisher information matrices and neural tangent kernels", 2021).

Its Jacobians by module hooks are used, its metrics are not: ``FIM`` is NaN where a class is saturated and fails in
float64, ``FIM_MonteCarlo`` draws from the global random state, and neither has the empirical Fisher. The Jacobians are
those of ``R`` functions of the outputs, ``s_r' f``, whose gradients are the rows ``J' s_r`` of every quantity alike.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from math import sqrt

import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curvlab.errors import UnsupportedError
from curvlab.estimators.backend import Backend
from curvlab.estimators.capture import unfaithful_modules
from curvlab.estimators.seeds import label_stream, output_rows
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Quantity
from curvlab.structures import Kronecker, Structure

#: Number of dimensions of the input for which its rule is right.
_RULES: Mapping[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.BatchNorm1d: 2,
    nn.BatchNorm2d: 4,
    nn.GroupNorm: 4,
    nn.LayerNorm: 2,  # with one normalised dimension; see _input_dimensions
}
_KRONECKER_RULES = (nn.Linear, nn.Conv1d, nn.Conv2d)
_PROBE_SAMPLES = 2


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> Mapping[str, Tensor]:
    """See ``curvlab.estimators.backend.Compute``."""

    def mean(advance: Advance, generate: _Generate) -> dict[str, Tensor]:
        return _mean(problem, quantity, space, batch_size, advance, generate)

    if isinstance(structure, Kronecker):
        columns = _columns(problem.model, space)
        factors = mean(advance if structure.name == "kfac" else _silent, _factors)
        for layer, kept in columns.items():
            factors[f"{layer}|A"] = factors[f"{layer}|A"][kept, kept]
        if structure.name == "kfac":
            return factors
        return _eigenvalues(factors, columns, lambda generate: mean(advance, generate))
    collection = _collection(problem.model, space)
    parts = _parts(collection)
    if structure.name == "block_diag":
        blocks = mean(advance, lambda jacobians, _, data: jacobians.get_covariance_layer_blocks(data))
        return {name: blocks[_owner(name)][parts[name], parts[name]] for name in space.names}
    starts = {name: collection.p_pos[_owner(name)] for name in space.names}
    index = torch.cat([torch.arange(p.start, p.stop) + starts[n] for n, p in parts.items() if n in starts])
    if structure.name == "diag":
        entries = mean(advance, lambda jacobians, _, data: {"entries": jacobians.get_covariance_diag(data)})["entries"]
        return {"entries": entries[index]}
    matrix = mean(advance, lambda jacobians, _, data: {"matrix": jacobians.get_covariance_matrix(data)})["matrix"]
    return {"matrix": matrix if len(index) == len(matrix) else matrix[index][:, index]}


_Scales = dict[str, float]
_Generate = Callable[[TorchHooksJacobianBackend, _Scales, DataLoader[int]], Mapping[str, Tensor]]


def _silent(_: float = 1, /, *, note: str = "") -> None:
    pass


def _mean(
    problem: Problem,
    quantity: Quantity,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
    generate: _Generate,
) -> dict[str, Tensor]:
    """Return the mean over samples of what ``generate`` makes of a batch as a mean over it."""
    # A copy: after an exception the library's hooks stay on the model.
    copy = Problem(deepcopy(problem.model), problem.loss.name, problem.data)
    collection = _collection(copy.model, space)
    positions: dict[str, int] = {}
    scales: _Scales = {}

    def count(layer: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            positions[layer] = output.shape[2:].numel()

        return hook

    for layer in collection.layers:
        copy.model.get_submodule(layer).register_forward_hook(count(layer))
    rng = label_stream(quantity)
    default = torch.get_default_dtype()

    def function(inputs: Tensor, targets: Tensor) -> Tensor:
        with _default_dtype(default):
            outputs = copy.forward({}, inputs)
            seeds = output_rows(problem.loss, quantity, outputs.detach(), targets, rng).to(outputs.dtype)
        found = {layer: t * sqrt(seeds.shape[1]) for layer, t in positions.items()}
        if scales and scales != found:
            raise UnsupportedError("backend nngeometry takes batches of one image size; backend torch takes any")
        scales.update(found)
        return torch.einsum("nc,nrc->nr", outputs, seeds)

    jacobians = TorchHooksJacobianBackend(copy.model, function, layer_collection=collection)
    total: dict[str, Tensor] = {}
    for inputs, targets in problem.batches(batch_size):
        # Some of its buffers are of the default dtype, whatever the model's.
        with _default_dtype(torch.promote_types(problem.dtype, default)):
            means = generate(jacobians, scales, _loader(inputs, targets))
        for name, value in means.items():
            total[name] = total[name] + len(inputs) * value if name in total else len(inputs) * value
        advance(len(inputs))
    return {name: value / problem.num_samples for name, value in total.items()}


def _loader(inputs: Tensor, targets: Tensor) -> DataLoader[int]:
    """Return a batch as the library asks for it: a DataLoader whose sampler has a length."""
    n = len(inputs)
    # Its own generator: a DataLoader draws from the global one. Detached: the library sets requires_grad.
    return DataLoader(
        range(n),  # type: ignore[arg-type]
        batch_size=n,
        collate_fn=lambda _: (inputs.detach(), targets),
        generator=torch.Generator(),
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _factors(jacobians: TorchHooksJacobianBackend, scales: _Scales, data: DataLoader[int]) -> dict[str, Tensor]:
    """Return a batch's factors on our scale: theirs spread the positions and the square root of ``R`` otherwise."""
    factors: dict[str, Tensor] = {}
    for layer, (a, s) in jacobians.get_kfac_blocks(data).items():
        factors[f"{layer}|A"] = a / scales[layer]
        factors[f"{layer}|S"] = s * scales[layer]
    return factors


def _eigenvalues(
    factors: Mapping[str, Tensor], columns: Mapping[str, slice], mean: Callable[[_Generate], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return EK-FAC: the eigenvectors of the factors, and the second moments along them by a second pass."""
    bases: dict[str, Tensor] = {}
    whole: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, kept in columns.items():
        bases[f"{layer}|U_A"], bases[f"{layer}|U_S"] = (_eigenvectors(factors[f"{layer}|{side}"]) for side in "AS")
        # The library projects the homogeneous input; where that is not asked for whole, the rest goes to zero.
        a = bases[f"{layer}|U_A"]
        square = a.new_zeros(kept.stop, kept.stop)
        square[kept, kept] = a
        whole[layer] = square, bases[f"{layer}|U_S"]

    def padded(jacobians: TorchHooksJacobianBackend) -> dict[str, tuple[Tensor, Tensor]]:
        full = {}
        for layer, (a, s) in whole.items():
            module = jacobians.l_to_m[layer]
            missing = _width(module) - len(a)
            full[layer] = nn.functional.pad(a, (0, missing, 0, missing)), s
        return full

    values = mean(lambda jacobians, _, data: jacobians.get_kfe_diag(padded(jacobians), data))
    for layer, kept in columns.items():
        outputs = len(bases[f"{layer}|U_S"])
        bases[f"{layer}|values"] = values[layer].view(outputs, -1)[:, kept]
    return bases
