"""Standard error of a Monte Carlo Fisher, due to the sampling of labels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.rows import row_batches
from curvlab.estimators.snapshots import check_backward
from curvlab.parameters import ParameterSpace, Selection, Vectors
from curvlab.problem import Problem
from curvlab.quantities import Fisher, Quantity, parse_quantity


@dataclass(frozen=True)
class StandardError:
    """Standard errors over the draws of labels, for given data, in float64.

    Attributes:
        trace: Standard error of the trace, a scalar tensor.
        diagonal: Standard error of every entry of the diagonal, ``(P,)``.
        quadratic_forms: Standard error of ``delta' F delta``: ``(K,)`` for ``(P, K)``, a scalar for one vector, None
            without vectors.
    """

    trace: Tensor
    diagonal: Tensor
    quadratic_forms: Tensor | None


def standard_error(
    problem: Problem,
    quantity: Quantity | str,
    deltas: Vectors | None = None,
    *,
    params: Selection | None = None,
) -> StandardError:
    """Return the standard error of ``estimate`` for a Monte Carlo Fisher.

    The estimate is a mean over samples of means over ``k`` independent draws. If ``s_n^2`` is the variance over the
    draws of sample ``n``, the variance of the estimate is ``1/(N^2 k) sum_n s_n^2``. One draw has no variance, so for
    ``k = 1`` the variance is estimated from two other draws. The estimate is unbiased, so this is its whole error; the
    squared standard error is unbiased too. If a network is almost certain of its labels, rare labels can contribute to
    the curvature. If none of them is drawn, neither the estimate nor its standard error includes them.

    Args:
        problem: Model, loss and data.
        quantity: ``Fisher(samples=k)``, or its string form.
        deltas: Vectors for quadratic forms: ``(P,)``, several as ``(P, K)``, or a dict of parameter-shaped tensors.
        params: Selection of parameters: glob patterns of names, compiled regular expressions, or a function of name
            and parameter (``curvlab.parameters.Selection``); None for all trainable ones.

    Raises:
        CurvlabError: The quantity draws no labels, or a vector does not fit the parameters.
        UnsupportedError: A sample's output is random or depends on its batch.

    Examples:
        >>> model, data = torch.nn.Linear(2, 3), (torch.ones(50, 2), torch.zeros(50, dtype=torch.int64))
        >>> few, many = (standard_error(Problem(model, data=data), Fisher(samples=k)).trace for k in (2, 200))
        >>> bool(many < few / 5)
        True
    """
    quantity = parse_quantity(quantity)
    if not (isinstance(quantity, Fisher) and quantity.samples is not None):
        raise CurvlabError(f"{quantity} draws no labels, so it has no standard error; use fisher:samples=k")
    space = ParameterSpace.of(problem.model, params)
    vectors = None if deltas is None else space.flatten(deltas).to(problem.device, torch.float64)
    draws = max(quantity.samples, 2)
    problem.check()
    problem = to_first_order(problem)
    check_backward(problem, space)
    sums: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad():
        for rows in _whole_samples(row_batches(problem, Fisher(draws, quantity.seed), space.names), draws):
            # The rows are divided by the square root of the number of draws.
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
    """Yield rows in batches of whole samples: the rows of one sample may come in several pieces."""
    pieces: list[Tensor] = []
    for rows in batches:
        pieces.append(rows)
        if sum(map(len, pieces)) % draws == 0:
            yield torch.cat(pieces)
            pieces.clear()
