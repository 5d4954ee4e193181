"""How far a Monte Carlo Fisher is from the exact one: the standard error of its draws of labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.rows import row_batches
from curvlab.estimators.snapshots import check_reached
from curvlab.parameters import ParameterSpace, Vectors
from curvlab.problem import Problem
from curvlab.quantities import Fisher, Quantity, parse_quantity


@dataclass(frozen=True)
class StandardError:
    """Standard errors over the draws of labels, the data given, in float64.

    Attributes:
        trace: Of the trace, a scalar tensor.
        diagonal: Of every entry of the diagonal, ``(P,)``.
        quadratic_forms: Of ``delta' F delta``: ``(K,)`` for ``(P, K)``, a scalar for one vector, None without vectors.
    """

    trace: Tensor
    diagonal: Tensor
    quadratic_forms: Tensor | None


def standard_error(
    problem: Problem,
    quantity: Quantity | str,
    deltas: Vectors | None = None,
    *,
    params: Sequence[str] | str | None = None,
) -> StandardError:
    """Return the standard error of what ``estimate`` gives for a Monte Carlo Fisher.

    The estimate is a mean over samples of means over ``k`` draws, which are independent: with ``s_n^2`` the variance
    over the draws of sample ``n``, its variance is ``1/(N^2 k) sum_n s_n^2``. One draw shows no variance: for ``k = 1``
    the variance of a draw is that of two others. The estimate is unbiased, so that this is all of its error, and its
    square is unbiased too. A network that is all but certain of its labels has curvature at labels that are hardly ever
    drawn: where they were not, neither the estimate nor its error knows of them.

    Args:
        problem: Model, loss and data.
        quantity: ``Fisher(samples=k)``, or its string form.
        deltas: Vectors for quadratic forms: ``(P,)``, several as ``(P, K)``, or a dict of parameter-shaped tensors.
        params: Glob patterns of parameter names; None for all trainable ones.

    Raises:
        CurvlabError: The quantity is not drawn, or a vector is not of the parameters' space.
        UnsupportedError: A sample's output is random or depends on its batch.

    Examples:
        >>> model, data = torch.nn.Linear(2, 3), (torch.ones(50, 2), torch.zeros(50, dtype=torch.int64))
        >>> few, many = (standard_error(Problem(model, data=data), Fisher(samples=k)).trace for k in (2, 200))
        >>> bool(many < few / 5)
        True
    """
    quantity = parse_quantity(quantity)
    if not (isinstance(quantity, Fisher) and quantity.samples is not None):
        raise CurvlabError(f"{quantity} draws no labels, so that it has no such error; fisher:samples=k has one")
    space = ParameterSpace.of(problem.model, params)
    vectors = None if deltas is None else space.flatten(deltas).to(problem.device, torch.float64)
    draws = max(quantity.samples, 2)
    problem.check()
    problem = to_first_order(problem)
    check_reached(problem, space)
    sums: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad():
        for rows in _whole_samples(row_batches(problem, Fisher(draws, quantity.seed), space.names), draws):
            # The rows of an estimate are divided by the root of the number of draws.
            gradients = rows.detach().double().unflatten(0, (-1, draws)) * sqrt(draws)
            squares = [gradients.square().sum(dim=2), gradients.square()]
            if vectors is not None:
                squares.append((gradients @ vectors).square())
            terms = [square.var(dim=1).sum(dim=0) for square in squares]
            sums = [total + term for total, term in zip(sums, terms, strict=True)] if sums else terms
    errors = [total.sqrt() / (problem.num_samples * sqrt(quantity.samples)) for total in sums]
    if not all(bool(error.isfinite().all()) for error in errors):
        raise CurvlabError(f"the standard error of {quantity} is not finite: the model's outputs or gradients overflow")
    return StandardError(errors[0], errors[1], errors[2] if vectors is not None else None)


def _whole_samples(batches: Iterable[Tensor], draws: int) -> Iterator[Tensor]:
    """Yield rows, in batches that end with a sample: one's rows may come in several pieces."""
    pieces: list[Tensor] = []
    for rows in batches:
        pieces.append(rows)
        if sum(map(len, pieces)) % draws == 0:
            yield torch.cat(pieces)
            pieces.clear()
