"""What a Gram-type curvature pulls back through a network: its rows in output space.

A positive semi-definite quantity is ``F = 1/N sum v v'``, and each ``v = J' s``: the network's Jacobian, transposed,
times a *seed* ``s``, of which a sample has one or several.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import UnsupportedError
from curvlab.losses import Loss
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, MaSQ, Quantity

_BYTES = 1.6e7  # about what the seeds that are made at once may take
_MANY = 100  # seeds a sample, from which on fewer would do


@dataclass(frozen=True)
class Seeds:
    """The seeds of a batch, ``R`` a sample, made when they are asked for: ``(N, R, C)`` may not fit in memory.

    Iterating over them gives ``R`` tensors ``(N, C)``; a slice of them is a tensor ``(N, rows, C)``. They have the
    dtype of the outputs.

    Args:
        make: From tensors and a range of seeds to those, ``(N, rows, C)``.
        tensors: What they are made of, a row a sample; the outputs first.
        count: ``R``.

    Examples:
        >>> from curvlab.losses import get_loss
        >>> logits = torch.zeros(5, 1000)
        >>> seeds = output_rows(get_loss("cross_entropy"), Fisher(), logits, logits, label_stream(Fisher()))
        >>> len(seeds), seeds[10:14].shape, next(iter(seeds.of(slice(0, 2)))).shape
        (999, torch.Size([5, 4, 1000]), torch.Size([2, 1000]))
    """

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    count: int

    def __len__(self) -> int:
        """Return how many seeds a sample has."""
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the seeds of all samples, ``(N, C)``."""
        for some in self.pieces():
            yield from some.unbind(dim=1)

    def __getitem__(self, part: slice) -> Tensor:
        """Return consecutive seeds, ``(N, rows, C)``."""
        if part.step not in (None, 1):
            raise ValueError(f"seeds are taken in a row, not with a step of {part.step}")
        return self.make(*self.tensors, range(self.count)[part]).to(self.tensors[0].dtype)

    def pieces(self) -> Iterator[Tensor]:
        """Yield all seeds in order, ``(N, rows, C)``, as many at once as fit in a few megabytes."""
        for start in range(0, self.count, self.fitting):
            yield self[start : start + self.fitting]

    @property
    def fitting(self) -> int:
        """How many are made at once."""
        return max(1, int(_BYTES / max(1, self.tensors[0].nbytes)))

    def of(self, samples: slice) -> "Seeds":
        """Return those of some samples."""
        return Seeds(self.make, tuple(tensor[samples] for tensor in self.tensors), self.count)


def output_rows(loss: Loss, quantity: Quantity, outputs: Tensor, targets: Tensor, rng: np.random.Generator) -> Seeds:
    """Return the seeds of a batch; labels are drawn by the call itself.

    For these losses the GGN is the exact Fisher: the Hessian of a sample's loss in the outputs of an exponential
    family's natural parameters is the variance of its gradient (Martens, JMLR 2020, section 9.2).

    Args:
        loss: Of the problem.
        quantity: Any but the Hessian.
        outputs: ``(N, C)``, without a graph.
        targets: Of these samples.
        rng: The stream of labels.

    Raises:
        UnsupportedError: The quantity has no rows (the Hessian is not a Gram matrix).
    """
    if isinstance(quantity, (EmpiricalFisher, MaSQ)):
        return Seeds(lambda f, y, part: loss.gradients(f, y).unsqueeze(1)[:, _slice(part)], (outputs, targets), 1)
    if isinstance(quantity, Fisher) and quantity.samples is not None:
        scale = sqrt(quantity.samples)
        drawn = loss.draw(outputs, quantity.samples, rng)
        return Seeds(
            lambda f, labels, part: loss.drawn_gradients(f, labels[:, _slice(part)]) / scale,
            (outputs, drawn),
            quantity.samples,
        )
    if isinstance(quantity, (Fisher, GGN)):
        return Seeds(loss.output_factors, (outputs,), loss.num_factors(outputs.shape[1]))
    raise UnsupportedError(f"{quantity.name} is not a sum of outer products of gradients")


def output_product(
    loss: Loss, quantity: Quantity, outputs: Tensor, targets: Tensor, rng: np.random.Generator
) -> Callable[[Tensor], Tensor]:
    """Return what multiplies vectors ``(N, C)`` with ``sum_r s_r s_r'`` of each sample; see ``output_rows``."""
    if isinstance(quantity, GGN) or (isinstance(quantity, Fisher) and quantity.samples is None):
        return lambda vectors: loss.fisher_product(outputs, vectors).to(outputs.dtype)
    seeds = output_rows(loss, quantity, outputs, targets, rng)
    held = [seeds[:]] if len(seeds) <= seeds.fitting else None

    def multiply(vectors: Tensor) -> Tensor:
        terms = (
            torch.einsum("nrc,nr->nc", some, torch.einsum("nrc,nc->nr", some, vectors))
            for some in held or seeds.pieces()
        )
        return reduce(torch.add, terms)

    return multiply


def label_stream(quantity: Quantity) -> np.random.Generator:
    """Return the stream of a Monte Carlo Fisher's labels: the same for every pass over the data."""
    return np.random.default_rng(quantity.seed if isinstance(quantity, Fisher) else 0)


def fewer_seeds(loss: Loss, quantity: Quantity, num_outputs: int) -> str | None:
    """Return a sentence on the cost of an exact Fisher or GGN with many outputs, and on what takes less; else None.

    Examples:
        >>> from curvlab.losses import get_loss
        >>> fewer_seeds(get_loss("cross_entropy"), Fisher(), 1000)
        'fisher takes 999 backward passes a batch, and fisher:samples=1, which is unbiased, takes one'
        >>> fewer_seeds(get_loss("cross_entropy"), Fisher(), 10) is None
        True
    """
    exact = isinstance(quantity, GGN) or (isinstance(quantity, Fisher) and quantity.samples is None)
    count = loss.num_factors(num_outputs)
    if not exact or count < _MANY:
        return None
    return f"{quantity} takes {count:,} backward passes a batch, and fisher:samples=1, which is unbiased, takes one"


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
