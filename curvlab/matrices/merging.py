"""Averages of models weighted by their curvature."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.block_diagonal import BlockDiagonal
from curvlab.matrices.composite import Composite
from curvlab.matrices.damping import Damping, DampingLike
from curvlab.matrices.dense import Dense
from curvlab.matrices.diagonal import Diagonal
from curvlab.matrices.eigen import require_positive
from curvlab.matrices.penalty import select_parameters, to_matrix_dtype
from curvlab.parameters import Vectors


def merge(
    models: Sequence[nn.Module | Vectors], matrices: Sequence[CurvatureMatrix], damping: DampingLike = 0.0
) -> dict[str, Tensor]:
    """Return the average of models weighted by their Fishers, ``(sum_i F_i)^-1 sum_i F_i theta_i``.

    These parameters minimise ``sum_i (theta - theta_i)' F_i (theta - theta_i)``, the sum of the quadratic penalties of
    EWC around the solutions (Matena and Raffel, 2022, Merging models with Fisher-weighted averaging; with diagonal
    Fishers also the mode-IMM of Lee et al., 2017). The model with the larger Fisher dominates: a network that is less
    sure of its data, or was trained less, counts more. Multiply a matrix by a number to give its model another weight:
    ``merge([a, b], [F_a, 0.5 * F_b])``, or divide each by its trace for equal ones.

    With damping, the result is ``(sum_i F_i + D)^-1 (sum_i F_i theta_i + D mean)``, in which directions without
    curvature have the plain mean of the models. Without damping, this is so for parameters whose row of the sum is
    exactly zero (``diag``, ``block_diag``, ``dense``); other singular sums need damping. A sum of K-FAC matrices is
    exact, up to 5,000 parameters per layer.

    Args:
        models: Models with the same architecture, their parameters by name (other names are ignored), or flat vectors
            ``(P,)``. They are not changed.
        matrices: ``F_i`` of each model, of one structure over the same parameters.
        damping: ``D``; see ``CurvatureMatrix.solve``.

    Returns:
        The merged parameters by name, in the dtypes of the first model, for ``model.load_state_dict(merged,
        strict=False)``. Buffers are not merged.

    Raises:
        CurvlabError: The models do not fit the matrices, the matrices cannot be added (EK-FAC), or their damped sum is
            not positive definite.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((3,),)), Info("fisher", "diag", "cross_entropy", "torch", 10)
        >>> fishers = [Diagonal(torch.tensor(entries), space, info) for entries in ([1.0, 3.0, 0.0], [1.0, 1.0, 0.0])]
        >>> merge([torch.zeros(3), torch.ones(3)], fishers)
        {'w': tensor([0.5000, 0.2500, 0.5000])}
    """
    for several in (models, matrices):
        if not isinstance(several, Sequence) or not several:
            raise CurvlabError(f"merge needs a list of models and one of matrices, not {describe_value(several)}")
    for matrix in matrices:
        if not isinstance(matrix, CurvatureMatrix):
            raise CurvlabError(f"merge needs a curvature matrix for each model, not {describe_value(matrix)}")
    if len(models) != len(matrices):
        raise CurvlabError(f"merge needs one matrix for each model, but got {len(models)} and {len(matrices)}")
    if len({(matrix.dtype, matrix.device) for matrix in matrices}) > 1:
        raise CurvlabError("the matrices have different dtypes or devices: move them with to()")
    given = [dict(model.named_parameters()) if isinstance(model, nn.Module) else model for model in models]
    thetas = [_flatten(matrix, parameters) for matrix, parameters in zip(matrices, given, strict=True)]
    total = reduce(add, matrices)
    with torch.no_grad():
        # Equal models stay what they are, bit by bit.
        mean = thetas[0] + torch.stack([theta - thetas[0] for theta in thetas]).mean(dim=0)
        pull = torch.stack([matrix @ (theta - mean) for matrix, theta in zip(matrices, thetas, strict=True)]).sum(dim=0)
        damped = _damp_zeros(total, total._damping(damping))
        way = total._spectral(
            lambda values: require_positive(values, damped).reciprocal(), pull.unsqueeze(1), damped
        ).squeeze(1)
        merged = total.space.unflatten(mean + way)
    if not all(bool(tensor.isfinite().all()) for tensor in merged.values()):
        raise CurvlabError(f"the merged parameters overflow {total.dtype}: move models and matrices to torch.float64")
    first = given[0]
    return {name: t if isinstance(first, Tensor) else t.to(first[name].dtype) for name, t in merged.items()}


def _flatten(matrix: CurvatureMatrix, parameters: Vectors) -> Tensor:
    """Return the parameters of a model as a flat vector in the dtype of its matrix, checked."""
    if isinstance(parameters, Tensor):
        flat = matrix._flat(to_matrix_dtype(matrix, parameters))
    else:
        flat = matrix._flat(select_parameters(matrix, parameters))
    if flat.ndim != 1:
        raise CurvlabError(f"merge needs one vector for each model, not a tensor of shape {tuple(flat.shape)}")
    if not bool(flat.isfinite().all()):
        raise CurvlabError("the parameters of a model hold NaN or infinity: leave it out of merge")
    return flat.detach()


def _damp_zeros(matrix: CurvatureMatrix, damping: Damping) -> Damping:
    """Return a damping that is positive also where a row of the matrix is zero; this changes no other row."""
    if damping.factored:
        return damping
    added = dict(_added_to_zeros(matrix))
    parts = {
        name: torch.where(part == 0, added[name], part) if name in added and bool(added[name].any()) else part
        for name, part in damping.parts.items()
    }
    return replace(damping, parts=parts)


def _added_to_zeros(matrix: CurvatureMatrix) -> Iterator[tuple[str, Tensor]]:
    """Yield, by parameter name, a positive number for each row that is zero, and zero for the others."""
    names, sizes = matrix.space.names, list(matrix.space.sizes)
    if isinstance(matrix, Composite):
        for part in matrix.parts:
            yield from _added_to_zeros(part)
    elif isinstance(matrix, Diagonal):
        yield from zip(names, (matrix.entries == 0).to(matrix.dtype).split(sizes), strict=True)
    elif isinstance(matrix, Dense):
        yield from zip(names, _zero_rows(matrix.matrix).split(sizes), strict=True)
    elif isinstance(matrix, BlockDiagonal):
        yield from ((name, _zero_rows(block)) for name, block in matrix.blocks.items())


def _zero_rows(block: Tensor) -> Tensor:
    # A number of the size of the block, beside which its other eigenvalues are not rounding errors.
    size = block.abs().amax() if block.numel() else block.new_zeros(())
    return (block == 0).all(dim=1) * torch.where(size > 0, size, 1)
