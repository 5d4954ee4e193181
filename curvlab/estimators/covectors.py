"""Covectors in output space, from which a backward pass gives the rows of a Gram-type curvature.

A positive semi-definite quantity is ``F = 1/N sum v v'``, and each row is ``v = J' s``: the transposed Jacobian of the
network times a *covector* ``s``, of which a sample has one or several.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import UnsupportedError
from curvlab.likelihoods import Likelihood
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, MaSQ, Quantity

_BYTES = 1.6e7  # approximate limit of the covectors that are made at once
_MANY = 100  # covectors per sample from which on sampling is suggested


@dataclass(frozen=True)
class Covectors:
    """The covectors of a batch, ``R`` per sample, computed on demand, because ``(N, R, C)`` may not fit in memory.

    Iteration gives ``R`` tensors ``(N, C)``; a slice is a tensor ``(N, rows, C)``. They have the dtype of the outputs.

    Args:
        make: Computes covectors ``(N, rows, C)`` from the tensors and a range of indices.
        tensors: Tensors from which they are computed, one row per sample; the first is ``(N, C)``.
        count: ``R``.
        dtype: Dtype of the outputs.

    Examples:
        >>> from curvlab.likelihoods import CrossEntropy
        >>> logits, labels = torch.zeros(5, 1000), torch.zeros(5, dtype=torch.int64)
        >>> covectors = output_covectors(CrossEntropy(), Fisher(), logits, labels, label_stream(Fisher()))
        >>> len(covectors), covectors[10:14].shape, next(iter(covectors.select(slice(0, 2)))).shape
        (999, torch.Size([5, 4, 1000]), torch.Size([2, 1000]))
    """

    make: Callable[[tuple[Tensor, ...], range], Tensor]
    tensors: tuple[Tensor, ...]
    count: int
    dtype: torch.dtype

    def __len__(self) -> int:
        """Return the number of covectors per sample."""
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the covectors of all samples, ``(N, C)``."""
        for some in self.chunks():
            yield from some.unbind(dim=1)

    def __getitem__(self, part: slice) -> Tensor:
        """Return consecutive covectors, ``(N, rows, C)``."""
        if part.step not in (None, 1):
            raise ValueError(f"a slice of covectors needs a step of 1, not {part.step}")
        return self.make(self.tensors, range(self.count)[part]).to(self.dtype)

    def chunks(self) -> Iterator[Tensor]:
        """Yield all covectors in order, ``(N, rows, C)``, as many at once as fit in a few megabytes."""
        for start in range(0, self.count, self.chunk_size):
            yield self[start : start + self.chunk_size]

    @property
    def chunk_size(self) -> int:
        """Number of covectors that are made at once."""
        first = self.tensors[0]
        return max(1, int(_BYTES / max(1, first.numel() * first.element_size())))

    def select(self, samples: slice) -> "Covectors":
        """Return the covectors of some samples."""
        return Covectors(self.make, tuple(tensor[samples] for tensor in self.tensors), self.count, self.dtype)


def output_covectors(
    loss: Likelihood, quantity: Quantity, outputs: Tensor, targets: Tensor, rng: np.random.Generator
) -> Covectors:
    """Return the covectors of a batch; labels are drawn in this call.

    The GGN has the covectors of the loss's Hessian with respect to the outputs (``Likelihood.hessian_form``).

    Args:
        loss: Likelihood of the problem.
        quantity: Any quantity except the Hessian.
        outputs: ``(N, C)``, without a graph.
        targets: Targets of these samples.
        rng: Stream of labels.

    Raises:
        UnsupportedError: The quantity has no covectors (the Hessian is not a Gram matrix).
    """
    if isinstance(quantity, (EmpiricalFisher, MaSQ)):
        return Covectors(
            lambda tensors, part: loss.some_gradients(tensors[0], part),
            (loss.empirical_gradients(outputs, targets),),
            loss.num_gradients(outputs),
            outputs.dtype,
        )
    if isinstance(quantity, Fisher) and quantity.samples is not None:
        scale = sqrt(quantity.samples)
        drawn = loss.draw(outputs, quantity.samples, rng)

        def gradients(tensors: tuple[Tensor, ...], part: range) -> Tensor:
            f, y, labels = tensors
            return loss.drawn_gradients(f, y, labels[:, part.start : part.stop]) / scale

        return Covectors(gradients, (outputs, targets, drawn), quantity.samples, outputs.dtype)
    if isinstance(quantity, (Fisher, GGN)):
        form = loss.hessian_form if isinstance(quantity, GGN) else loss
        scales = form.factor_scales(outputs, targets)
        return Covectors(form.some_factors, scales, form.num_factors(outputs.shape[1]), outputs.dtype)
    raise UnsupportedError(f"{quantity.name} is not a sum of outer products of gradients")


def output_product(
    loss: Likelihood, quantity: Quantity, outputs: Tensor, targets: Tensor, rng: np.random.Generator
) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies vectors ``(N, C)`` by ``sum_r s_r s_r'`` of each sample, in their own memory.

    Besides, it needs a few megabytes, or as much as one sample needs.
    """
    if isinstance(quantity, GGN) or (isinstance(quantity, Fisher) and quantity.samples is None):
        form = loss.hessian_form if isinstance(quantity, GGN) else loss
        return _by_samples(lambda some, vectors: form.fisher_product(outputs[some], targets[some], vectors), outputs)
    covectors = output_covectors(loss, quantity, outputs, targets, rng)
    if outputs.numel() * outputs.element_size() * len(covectors) <= _BYTES:
        held = covectors[:]
        return lambda vectors: vectors.copy_(_project(held, vectors))
    return _by_samples(
        lambda some, vectors: reduce(torch.add, (_project(s, vectors) for s in covectors.select(some).chunks())),
        outputs,
    )


def _project(covectors: Tensor, vectors: Tensor) -> Tensor:
    """Return ``sum_r s_nr (s_nr . v_n)`` for covectors ``(N, R, C)`` and vectors ``(N, C)``."""
    return torch.einsum("nrc,nr->nc", covectors, torch.einsum("nrc,nc->nr", covectors, vectors))


def _by_samples(multiply: Callable[[slice, Tensor], Tensor], outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a product that is computed for some samples at a time.

    Args:
        multiply: Function of a slice of samples and their vectors.
        outputs: ``(N, C)``.
    """
    step = max(1, int(_BYTES / max(1, outputs.shape[1] * outputs.element_size())))

    def product(vectors: Tensor) -> Tensor:
        for start in range(0, len(outputs), step):
            some = slice(start, start + step)
            vectors[some] = multiply(some, vectors[some])
        return vectors

    return product


def label_stream(quantity: Quantity) -> np.random.Generator:
    """Return the random stream of a Monte Carlo Fisher's labels, which is the same in every pass over the data."""
    return np.random.default_rng(quantity.seed if isinstance(quantity, Fisher) else 0)


def suggest_sampling(loss: Likelihood, quantity: Quantity, num_outputs: int) -> str | None:
    """Return a clause that suggests a Monte Carlo Fisher if the exact Fisher or GGN has many outputs; else None.

    Examples:
        >>> from curvlab.likelihoods import CrossEntropy
        >>> suggest_sampling(CrossEntropy(), Fisher(), 1000)
        'fisher needs 999 backward passes per batch; fisher:samples=1, which is unbiased, needs one'
        >>> suggest_sampling(CrossEntropy(), Fisher(), 10) is None
        True
    """
    exact = isinstance(quantity, GGN) or (isinstance(quantity, Fisher) and quantity.samples is None)
    count = loss.num_factors(num_outputs)
    if not exact or count < _MANY:
        return None
    return f"{quantity} needs {count:,} backward passes per batch; fisher:samples=1, which is unbiased, needs one"
