"""Statistics of a block as a record: exact if that is affordable, else sampled, with the method in the record."""

from math import inf, nan, sqrt
from typing import Any

import torch
from torch import Tensor

from curvlab.diagonality.blocks import Block, OffDiagonal
from curvlab.diagonality.sampling import sample_off_diagonal
from curvlab.progress import Advance

Record = dict[str, Any]


def block_record(
    block: Block, num_samples: int, *, precision: float, max_operations: float, seed: int, advance: Advance
) -> Record:
    """Return the statistics of a Gram-type block (see ``curvlab.diagonality``)."""
    diagonal = block.diagonal().double()
    total = block.total()
    n = num_samples / block.unit()
    if not bool(diagonal.any()):  # no gradient reaches the block: there is nothing to sum or sample
        return _record(diagonal, OffDiagonal(), total, n, zero_fraction=1.0)
    if block.operations() <= max_operations:
        sums = block.off_diagonal(advance)
        zero_fraction = 1 - (sums.nonzeros + int(torch.count_nonzero(diagonal))) / block.size**2
        return _record(diagonal, sums, total, n, zero_fraction=zero_fraction)
    sampled = sample_off_diagonal(block, precision, max_operations, seed, advance)
    square_sum, square_ci = sampled.square_sum, sampled.square_sum_ci95
    if block.gram_operations() <= max_operations:
        square_sum, square_ci = max(0.0, block.square_sum() - float(diagonal.square().sum())), 0.0
    largest, bound = _find_largest(block, diagonal)
    record = _record(
        diagonal,
        OffDiagonal(sampled.abs_sum, square_sum, largest),
        total,
        n,
        zero_fraction=block.certain_zeros(),
    )
    norm = record["frobenius"]
    return record | {
        "method": "sampled",
        "ci95": sampled.abs_sum_ci95 / n,
        "frobenius_ci95": square_ci / n**2 / (2 * norm) if norm else 0.0,
        "offdiag_abs_max_bound": bound / n,
        "draws": sampled.draws,
    }


def dense_record(matrix: Tensor) -> Record:
    """Return the statistics of a symmetric dense matrix, by their definitions."""
    diagonal = matrix.diagonal().double()
    rest = matrix.double() - diagonal.diag()
    sums = OffDiagonal()
    sums.add(rest, 1)
    zeros = 1 - int(torch.count_nonzero(matrix)) / matrix.numel() if matrix.numel() else nan
    return _record(diagonal, sums, float(matrix.double().sum()), 1, zero_fraction=zeros)


def _record(diagonal: Tensor, sums: OffDiagonal, total: float, n: float, *, zero_fraction: float) -> Record:
    size = len(diagonal)
    entries = size * (size - 1)
    diag_sum = float(diagonal.sum())
    diag_squares = float(diagonal.square().sum())
    frobenius = sqrt(diag_squares + sums.square_sum)
    diag_mean, off_mean = diag_sum / size if size else nan, sums.abs_sum / entries if entries else nan
    return {
        "size": size,
        "diag_sum": diag_sum / n,
        "diag_mean": diag_mean / n,
        "diag_max": float(diagonal.max()) / n if size else 0.0,
        "offdiag_abs_sum": sums.abs_sum / n,
        "offdiag_abs_mean": off_mean / n,
        "offdiag_abs_max": sums.abs_max / n,
        "offdiag_signed_sum": (total - diag_sum) / n,
        "frobenius": frobenius / n,
        "diag_share": _ratio(sqrt(diag_squares), frobenius),
        "zero_fraction": zero_fraction,
        "mean_ratio": _ratio(diag_mean, off_mean),
        "sum_ratio": _ratio(sums.abs_sum, diag_sum),
        "method": "exact",
        "ci95": 0.0,
        "frobenius_ci95": 0.0,
        "offdiag_abs_max_bound": sums.abs_max / n,
        "draws": 0,
    }


def _ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return inf if a else nan


def _find_largest(block: Block, diagonal: Tensor) -> tuple[float, float]:
    """Return the largest absolute off-diagonal entry among the largest diagonal entries, and a bound for all entries.

    Since ``|F_ij| <= sqrt(F_ii F_jj)``, an entry above this bound for the next diagonal entry is the largest of all;
    then both returned values are the same.
    """
    order = diagonal.argsort(descending=True)
    found, count = 0.0, 256
    while True:
        gram = block.gram(order[:count])
        gram.diagonal().zero_()
        found = max(found, float(gram.abs().max()))
        if count >= len(order):
            return found, found
        bound = sqrt(float(diagonal[order[0]]) * float(diagonal[order[count]]))
        if found >= bound:
            return found, found
        if count >= 4096:
            return found, bound
        count *= 2
