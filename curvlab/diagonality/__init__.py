"""Statistics of how diagonal a curvature matrix is, computed without forming the matrix.

Methods that keep only the diagonal of a Fisher matrix (EWC, IMM, Adam) assume that the other entries do not matter.
This module measures them, with one row per parameter tensor: sums, means and maxima of the diagonal and of the
off-diagonal entries, as in Table 2 of Gepperth and Wiech (2019).
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curvlab.diagonality.blocks import Block
from curvlab.diagonality.outer import OuterBlock
from curvlab.diagonality.statistics import Record, block_record, dense_record
from curvlab.diagonality.streamed import StreamedBlock
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import estimate
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.rows import linear_factors, linear_layers, row_batches
from curvlab.estimators.snapshots import check_backward
from curvlab.parameters import ParameterSpace, Selection
from curvlab.problem import Problem
from curvlab.progress import progress as progress_bar
from curvlab.quantities import Hessian, MaSQ, Quantity, parse_quantity

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Level", "Submatrix", "diagonality", "records", "submatrix"]

Level = Literal["tensor", "layer", "network"]

#: Operations per second of ``time_budget``, so that the method does not depend on the load of the machine.
OPERATIONS_PER_SECOND = 1e11

_LARGEST_HESSIAN = 4000


def diagonality(
    problem: Problem,
    quantity: Quantity | str = "empirical_fisher",
    *,
    per: Level | Sequence[Level] = "tensor",
    params: Selection | None = None,
    time_budget: float = 60.0,
    precision: float = 0.005,
    tile_memory: float = 2e8,
    seed: int = 0,
    progress: bool = False,
) -> "pd.DataFrame":
    """Return statistics of the diagonal blocks of a curvature matrix, one row per parameter tensor.

    The matrix is not formed. The columns, for a block ``F`` of size ``P``, on the scale of the mean over samples:

    ``parameter``, ``size``: name and ``P``. ``diag_sum``, ``diag_mean``, ``diag_max``: of the diagonal.
    ``offdiag_abs_sum``, ``offdiag_abs_mean``, ``offdiag_abs_max``: of ``|F_ij|``, ``i != j``, with the mean over
    ``P (P - 1)`` entries. ``offdiag_signed_sum``: of ``F_ij``, ``i != j``. ``frobenius``: the norm of ``F``;
    ``diag_share``: the norm of the diagonal divided by it. ``zero_fraction``: the fraction of entries to which no
    sample contributes. ``mean_ratio``: ``diag_mean / offdiag_abs_mean``. ``sum_ratio``: ``offdiag_abs_sum / diag_sum``.
    ``method``: ``exact``, or ``sampled`` if all entries of the block would take more than ``time_budget``.
    ``ci95``, ``frobenius_ci95``: half-widths of the 95 % intervals of ``offdiag_abs_sum`` and ``frobenius``;
    ``draws``: the number of draws. An empty tensor has sums of zero and means of NaN.

    Diagonal and signed sum are always exact. In a sampled row, ``zero_fraction`` is a lower bound: it counts the
    entries for which two inputs or two units of a Linear layer are never active together; for other parameters, the
    entries in rows with zero diagonal. ``offdiag_abs_max`` is exact if it equals ``offdiag_abs_max_bound``; otherwise
    it is the largest entry found.

    Args:
        problem: Model, loss and data.
        quantity: Any quantity or its string form; for the Hessian, only tensors of up to 4,000 parameters.
        per: ``tensor``; ``layer`` (a module's own parameters together); ``network`` (all); or several of them.
        params: Selection of parameters: glob patterns of names, compiled regular expressions, or a function of name
            and parameter (``curvlab.parameters.Selection``); None for all trainable ones.
        time_budget: Approximate seconds per row before sampling is used, counted in operations at 100 Gflop/s, so that
            the same call uses the same method on every machine.
        precision: Sampling stops when the 95 % interval is within this fraction of the sum, or the budget is spent.
        tile_memory: Limit of the memory of the tiles of one pass, in bytes; and of the gradients of a block, which are
            computed again in every pass if they are larger.
        seed: Seed of the sampling.
        progress: Show a progress bar on a terminal.

    Raises:
        CurvlabError: An argument, the data or the weights are not valid; the message names which.
        UnsupportedError: The quantity is not defined for this model, or too expensive.

    Examples:
        >>> import torch
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> problem = Problem(torch.nn.Linear(2, 3), "cross_entropy", (torch.rand(20, 2), torch.arange(20) % 3))
        >>> table = diagonality(problem)
        >>> list(table["parameter"]), list(table["method"])
        (['weight', 'bias'], ['exact', 'exact'])
    """
    rows = records(
        problem,
        quantity,
        per=per,
        params=params,
        time_budget=time_budget,
        precision=precision,
        tile_memory=tile_memory,
        seed=seed,
        progress=progress,
    )
    import pandas as pd

    return pd.DataFrame(list(rows))


def records(
    problem: Problem,
    quantity: Quantity | str = "empirical_fisher",
    *,
    per: Level | Sequence[Level] = "tensor",
    params: Selection | None = None,
    time_budget: float = 60.0,
    precision: float = 0.005,
    tile_memory: float = 2e8,
    seed: int = 0,
    skip: Collection[str] = (),
    progress: bool = False,
) -> Iterator[Record]:
    """Yield the rows of ``diagonality`` one by one as they are computed, without those named in ``skip``.

    Arguments, data and model are checked by the call itself, before the first row is computed.
    """
    quantity = parse_quantity(quantity)
    for name, value in (("time_budget", time_budget), ("precision", precision), ("tile_memory", tile_memory)):
        if not value > 0:
            raise CurvlabError(f"{name} must be positive, not {value}")
    space = ParameterSpace.of(problem.model, params)
    groups = [group for level in ([per] if isinstance(per, str) else per) for group in _groups(problem, space, level)]
    if isinstance(quantity, Hessian):
        for name, members in groups:
            _check_hessian(problem, name, members)
    problem.check()
    check_backward(to_first_order(problem), space)

    def rows() -> Iterator[Record]:
        with _enable_gradients():
            blocks = _Blocks(problem, quantity, tile_memory)
        for name, members in groups:
            if name in skip:
                continue
            with progress_bar(f"diagonality of {name}", 1.0, progress) as advance, _enable_gradients():
                if not ParameterSpace.of(problem.model, members).total:
                    record = dense_record(torch.empty(0, 0))
                elif isinstance(quantity, Hessian):
                    record = dense_record(estimate(problem, Hessian(), "dense", params=members).to_dense())
                else:
                    record = block_record(
                        blocks(members),
                        problem.num_samples,
                        precision=precision,
                        max_operations=time_budget * OPERATIONS_PER_SECOND,
                        seed=seed,
                        advance=advance,
                    )
            yield {"parameter": name} | record

    return rows()


@dataclass(frozen=True)
class Submatrix:
    """Some rows and columns of a curvature matrix, including the entries between different tensors.

    Attributes:
        matrix: ``(k, k)``, on the scale of the mean over samples.
        names: Names of the tensors, in order.
        counts: Number of parameters of each tensor.
    """

    matrix: Tensor
    names: tuple[str, ...]
    counts: tuple[int, ...]


def submatrix(problem: Problem, quantity: Quantity | str = "empirical_fisher", *, per_tensor: int = 60) -> Submatrix:
    """Return the entries of the matrix for evenly spaced parameters, at most ``per_tensor`` of each trainable tensor.

    Raises:
        UnsupportedError: The quantity is the Hessian and the model has more than 4,000 parameters.
    """
    quantity = parse_quantity(quantity)
    space = problem.space
    problem.check()
    check_backward(to_first_order(problem), space)
    chosen = {
        name: torch.linspace(0, size - 1, min(size, per_tensor), device=problem.device).long()
        for name, size in zip(space.names, space.sizes, strict=True)
    }
    counts = tuple(len(index) for index in chosen.values())
    if isinstance(quantity, Hessian):
        flat = torch.cat([index + space.slices[name].start for name, index in chosen.items()])
        _check_hessian(problem, "the model", space.names)
        return Submatrix(estimate(problem, quantity, "dense").to_dense()[flat][:, flat], space.names, counts)
    with _enable_gradients():
        blocks = _Blocks(problem, quantity, 2e8)
        parts = [(blocks([name]), index) for name, index in chosen.items() if len(index)]
    columns = torch.cat([block.columns(index) * sqrt(block.unit()) for block, index in parts], dim=1)
    return Submatrix(columns.mT @ columns / problem.num_samples, space.names, counts)


@contextmanager
def _enable_gradients() -> Iterator[None]:
    """Enable gradients, also if the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _groups(problem: Problem, space: ParameterSpace, level: Level) -> list[tuple[str, list[str]]]:
    """Return the rows of a level: the name of each and its parameters."""
    if level == "tensor":
        return [(name, [name]) for name in space.names]
    if level == "network":
        return [("network", list(space.names))]
    if level == "layer":
        layers: dict[str, list[str]] = {}
        for name in space.names:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        return [(layer or type(problem.model).__name__, members) for layer, members in layers.items()]
    raise CurvlabError(f"per must be tensor, layer or network, not {level!r}")


class _Blocks:
    """Function that makes the block of some parameters in the cheapest form that is correct for them."""

    def __init__(self, problem: Problem, quantity: Quantity, tile_memory: float) -> None:
        problem = problem if isinstance(quantity, Hessian) else to_first_order(problem)
        self.problem, self.quantity, self.tile_memory = problem, quantity, tile_memory
        rank_one = not isinstance(quantity, (Hessian, MaSQ))
        self.linear = linear_layers(problem) if rank_one else {}

    def __call__(self, members: list[str]) -> Block:
        block = self._make(members)
        if not bool(block.diagonal().isfinite().all()):
            raise CurvlabError(
                f"the {self.quantity} of {', '.join(members)} is not finite: the model's outputs or gradients overflow"
            )
        return block

    def _make(self, members: list[str]) -> Block:
        sizes = dict(zip(self.problem.space.names, self.problem.space.sizes, strict=True))
        members = [member for member in members if sizes[member]]  # empty tensors have no entries in the block
        layer = members[0].rpartition(".")[0]
        weight, bias = (f"{layer}.{key}".removeprefix(".") for key in ("weight", "bias"))
        if layer in self.linear and {weight, bias}.issuperset(members):
            factors = linear_factors(self.problem, self.quantity, layer, self.linear[layer])
            if len(members) == 2:
                return OuterBlock.of_layer(factors)
            return OuterBlock.of_bias(factors) if members == [bias] else OuterBlock.of_weight(factors)
        size = sum(sizes[member] for member in members)
        return StreamedBlock(partial(row_batches, self.problem, self.quantity, members), size, self.tile_memory)


def _check_hessian(problem: Problem, name: str, members: Sequence[str]) -> None:
    size = ParameterSpace.of(problem.model, members).total
    if size > _LARGEST_HESSIAN:
        raise UnsupportedError(
            f"the Hessian of {name}, with {size:,} parameters, is too large: it is not a sum over rows and has to be "
            f"formed, up to {_LARGEST_HESSIAN:,} parameters; select smaller tensors with params, or use the ggn"
        )
