"""A likelihood for samples that consist of several terms: tokens of a sequence, pixels of an image.

The outputs of a sample are ``T`` terms of ``C`` numbers, flattened to one row ``(T C,)``. The loss of a sample is the
sum over its terms, which are independent given the outputs: the output Fisher of a sample is block-diagonal, with a
block for each term.
"""

from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.likelihoods.base import Likelihood, precise

Unit = Literal["sample", "term"]


class Terms(Likelihood):
    """The loss of samples ``(N, T C)``, the sum over their terms, in the interface of a likelihood.

    Methods take the targets of the data, ``(N, *S)`` or ``(N, *S, ...)``, where ``S`` are the dimensions of the terms.

    Args:
        each: Likelihood of a term.
        unit: What a mean is over. It decides what the empirical Fisher is made of: the gradient of a sample is the sum
            over its terms (``sample``), or each term has a gradient of its own (``term``).

    Attributes:
        num_outputs: ``C``, known after the first forward pass of the model.
        dims: Number of dimensions of ``S``.
    """

    def __init__(self, each: Likelihood, unit: Unit = "sample") -> None:
        self.each, self.unit = each, unit
        self.name = each.name  # type: ignore[misc]
        self.num_outputs: int | None = None
        self.dims = 0

    def __str__(self) -> str:
        """Return the text of the likelihood."""
        return str(self.each)

    def flatten(self, outputs: Tensor) -> Tensor:
        """Return outputs ``(N, *S, C)`` as ``(N, T C)``, and remember ``C`` and the number of dimensions of ``S``.

        Raises:
            UnsupportedError: An earlier batch had other dimensions.
        """
        dims, last = outputs.ndim - 2, outputs.shape[-1]
        if self.num_outputs is None:
            self.num_outputs, self.dims = last, dims
        elif (self.num_outputs, self.dims) != (last, dims):
            raise UnsupportedError(
                f"the model returned outputs of {self.num_outputs} numbers per term and {self.dims} dimensions of "
                f"terms, and then of {last} and {dims}: all batches need the same, which outputs that compare the "
                "samples of a batch cannot have"
            )
        return outputs.flatten(1)

    def _count(self, outputs: Tensor) -> int:
        """Return ``T``."""
        return outputs.shape[1] // max(1, self._num_outputs(outputs))

    def _num_outputs(self, outputs: Tensor) -> int:
        return outputs.shape[1] if self.num_outputs is None else self.num_outputs

    def _rows(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(-1, self._num_outputs(outputs))

    def _targets(self, targets: Tensor, terms: int | None = None) -> Tensor:
        """Return targets with one row per term.

        Raises:
            CurvlabError: There are not ``T`` targets in a sample.
        """
        shape = targets.shape
        if targets.ndim < 1 + self.dims or (terms is not None and prod(shape[1 : 1 + self.dims]) != terms):
            dims = ", S" * bool(self.dims)
            raise CurvlabError(
                f"the targets of a batch have shape {tuple(shape)}, but the model returns {terms or self.dims} "
                f"{'terms' if terms else 'dimensions of terms'} per sample: targets must be (N{dims}) or (N{dims}, ...)"
            )
        return self.each.align(targets.reshape(-1, *shape[1 + self.dims :]))

    @property
    def _is_single(self) -> bool:
        return not self.dims

    def _split(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._rows(outputs), self._targets(targets, self._count(outputs))

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over terms of every sample, ``(N,)``."""
        if self._is_single:
            return self.each.values(outputs, self.each.align(targets))
        return self.each.values(*self._split(outputs, targets)).view(len(outputs), -1).sum(dim=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check the targets of a batch.

        Args:
            outputs: Outputs of one sample, ``(1, T C)``: their values do not matter, and other batches may have other
                ``T``.
            targets: Targets of the batch.
        """
        rows = self._targets(targets)
        self.each.check(outputs[:, : self._num_outputs(outputs)].detach().expand(len(rows), -1), rows)

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of every sample's loss, ``(N, T C)``."""
        return self.each.gradients(*self._split(outputs, targets)).view(outputs.shape)

    def count(self, targets: Tensor) -> float:
        """Return the number of units in a batch: of samples, or of the terms that count, with their weights."""
        return float(len(targets)) if self.unit == "sample" else float(self.each.weights(self._targets(targets)).sum())

    # The empirical Fisher ---------------------------------------------------------------------------------------------

    def num_gradients(self, outputs: Tensor) -> int:
        """Return the number of gradients per sample: one, or one per term."""
        return 1 if self.unit == "sample" else self._count(outputs)

    def empirical_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradients ``(N, T C)`` from which ``some_gradients`` selects.

        Of single terms, they are divided by the root of the term's weight ``w``: the gradient has the factor ``w``, and
        the outer product must have it once.
        """
        found = self.gradients(outputs, targets)
        if self.unit == "sample":
            return found
        weights = self.each.weights(self._targets(targets, self._count(outputs)))
        scale = weights.clamp(min=torch.finfo(torch.float64).tiny).rsqrt() * (weights > 0)
        return (self._rows(found) * scale.to(found).unsqueeze(1)).view(outputs.shape)

    def some_gradients(self, gradients: Tensor, part: range) -> Tensor:
        """Return a consecutive part of a sample's gradients, ``(N, len(part), T C)``."""
        if self.unit == "sample":
            return super().some_gradients(gradients, part)
        return self._spread(self._rows(gradients).unsqueeze(1), len(gradients), part, 1)

    def _spread(self, blocks: Tensor, samples: int, part: range, per_term: int) -> Tensor:
        """Return rows of samples that are zero except for one term.

        Args:
            blocks: Rows of the terms, ``(N T, per_term, C)``.
            samples: ``N``.
            part: The wanted rows of a sample, of ``0 .. T per_term - 1``.
            per_term: Number of rows per term.
        """
        blocks = blocks.view(samples, -1, per_term, blocks.shape[2])
        terms, c = blocks.shape[1], blocks.shape[3]
        rows = blocks.new_zeros(samples, len(part), terms, c)
        for index, row in enumerate(part):
            term, which = divmod(row, per_term)
            rows[:, index, term] = blocks[:, term, which]
        return rows.flatten(2)

    # The Fisher information -------------------------------------------------------------------------------------------

    def num_factors(self, num_outputs: int) -> int:
        """Return the number of factors of ``T C`` outputs, ``T`` times that of a term."""
        c = self.num_outputs or num_outputs
        return num_outputs // c * self.each.num_factors(c)

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return the scales of all terms, one row per sample."""
        if self._is_single:
            return self.each.factor_scales(outputs, self.each.align(targets))
        scales = self.each.factor_scales(*self._split(outputs, targets))
        return tuple(scale.reshape(len(outputs), -1, *scale.shape[1:]) for scale in scales)

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return a consecutive part of the factors of a sample, ``(N, len(part), T C)``."""
        if self._is_single:
            return self.each.some_factors(scales, part)
        assert self.num_outputs is not None
        first = scales[0]
        samples, terms = first.shape[:2]
        per_term = self.each.num_factors(self.num_outputs)
        rows = first.new_zeros(samples, len(part), terms, self.num_outputs)
        for term in range(part.start // per_term, -(-part.stop // per_term)):
            start, stop = max(part.start, term * per_term), min(part.stop, (term + 1) * per_term)
            own = tuple(scale[:, term] for scale in scales)
            block = self.each.some_factors(own, range(start - term * per_term, stop - term * per_term))
            rows[:, start - part.start : stop - part.start, term] = block
        return rows.flatten(2)

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return the product of each sample's output Fisher with its vector ``(N, T C)``."""
        f, y = self._split(outputs, targets)
        return self.each.fisher_product(f, y, self._rows(vectors)).view(outputs.shape)

    @property
    def hessian_form(self) -> "Terms":
        """The terms with the Hessian of their loss in place of the Fisher."""
        form = self.each.hessian_form
        if form is self.each:
            return self
        other = Terms(form, self.unit)
        other.num_outputs, other.dims = self.num_outputs, self.dims
        return other

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw targets for all terms, ``(N, count, T, ...)``; ``(N, count, ...)`` for one term."""
        return self._group(self.each.sample(self._rows(outputs), count, rng), outputs)

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Return the draws of all terms, ``(N, count, T, ...)``; ``(N, count, ...)`` for one term."""
        return self._group(self.each.draw(self._rows(outputs), count, rng), outputs)

    def _group(self, drawn: Tensor, outputs: Tensor) -> Tensor:
        if self._is_single:
            return drawn
        return drawn.view(len(outputs), -1, *drawn.shape[1:]).transpose(1, 2)

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        """Return the output gradients of drawn targets, summed over terms, ``(N, k, T C)``."""
        if self._is_single:
            return self.each.drawn_gradients(outputs, self.each.align(targets), drawn)
        f, y = self._split(outputs, targets)
        drawn = drawn.transpose(1, 2).flatten(0, 1)  # (N T, k, ...)
        found = self.each.drawn_gradients(f, y, drawn).view(len(outputs), -1, drawn.shape[1], f.shape[1])
        return found.transpose(1, 2).flatten(2)

    # For the reference ------------------------------------------------------------------------------------------------

    def split_terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs ``(N T, C)``, targets and weights, one row per term."""
        f, y = self._split(outputs, targets)
        return f, y, self.each.weights(y).to(precise(outputs))
