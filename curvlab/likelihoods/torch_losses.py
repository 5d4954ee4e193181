"""The losses of ``torch.nn`` as likelihoods.

=========================== ========================================================================
``nn.CrossEntropyLoss``     ``CrossEntropy`` with the same weight, ignore_index and label_smoothing
``nn.MSELoss``              ``SquaredError(variance=1/2)``: ``(f - y)^2``
``nn.BCEWithLogitsLoss``    ``BinaryCrossEntropy`` with the same pos_weight
``nn.PoissonNLLLoss``       ``Poisson``
=========================== ========================================================================

The reduction ``mean`` of the last three also divides by the number of outputs of a term, and so does the likelihood.
A mean over terms is the default unit of a problem with such a loss; a matrix is a mean for ``sum`` and ``none`` too.
"""

import math
from typing import Any

import numpy as np
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.likelihoods.base import Likelihood
from curvlab.likelihoods.bernoulli import BinaryCrossEntropy
from curvlab.likelihoods.categorical import CrossEntropy
from curvlab.likelihoods.gaussian import SquaredError
from curvlab.likelihoods.poisson import Poisson


def from_torch(loss: nn.Module) -> Likelihood:
    """Return the likelihood of a loss of ``torch.nn``.

    Raises:
        CurvlabError: There is none: the loss is no negative log-likelihood of the outputs, or its options are not
            supported.

    Examples:
        >>> print(from_torch(nn.MSELoss(reduction="sum")))
        squared_error:variance=0.5
        >>> print(from_torch(nn.MSELoss()))
        squared_error:variance=0.5, mean over the outputs
    """
    kind = type(loss)
    if kind is nn.CrossEntropyLoss:
        options: dict[str, Any] = {key: getattr(loss, key) for key in ("weight", "label_smoothing", "ignore_index")}
        return CrossEntropy(**options)
    if kind is nn.MSELoss:
        found: Likelihood = SquaredError(variance=0.5)
    elif kind is nn.BCEWithLogitsLoss:
        if loss.weight is not None:
            raise CurvlabError(
                "nn.BCEWithLogitsLoss(weight=...) weights the samples of a batch by position: leave it out"
            )
        found = BinaryCrossEntropy(pos_weight=loss.pos_weight)
    elif kind is nn.PoissonNLLLoss:
        if not loss.log_input or loss.full:
            raise CurvlabError("nn.PoissonNLLLoss is supported with log_input=True and full=False only")
        found = Poisson()
    else:
        raise CurvlabError(f"nn.{kind.__name__} is not a loss of a likelihood that curvlab knows: {_way_out(loss)}")
    return MeanOverOutputs(found) if loss.reduction == "mean" else found


def _way_out(loss: nn.Module) -> str:
    if isinstance(loss, nn.NLLLoss):
        return "let the model return logits, without log_softmax, and give nn.CrossEntropyLoss"
    if isinstance(loss, nn.BCELoss):
        return "let the model return logits, without sigmoid, and give nn.BCEWithLogitsLoss"
    if isinstance(loss, nn.GaussianNLLLoss):
        return "give HeteroscedasticGaussian(), with the means and the log variances as outputs"
    return "give FromFunction(nll) with a function of outputs and targets that returns one number per term"


class MeanOverOutputs(Likelihood):
    """A likelihood of independent outputs whose loss is divided by the number of outputs ``C`` of a term.

    Args:
        summed: The likelihood, which sums over outputs.
    """

    def __init__(self, summed: Likelihood) -> None:
        self.summed = summed
        self.name = summed.name  # type: ignore[misc]

    def __str__(self) -> str:
        """Return the name of the likelihood."""
        return f"{self.summed}, mean over the outputs"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over outputs."""
        return self.summed.values(outputs, targets) / outputs.shape[1]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check the targets."""
        self.summed.check(outputs, targets)

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradients divided by ``C``."""
        return self.summed.gradients(outputs, targets) / outputs.shape[1]

    def weights(self, targets: Tensor) -> Tensor:
        """Return the weights of the terms."""
        return self.summed.weights(targets)

    def align(self, targets: Tensor) -> Tensor:
        """Return targets in the shape of the methods."""
        return self.summed.align(targets)

    def num_factors(self, num_outputs: int) -> int:
        """Return the number of factors."""
        return self.summed.num_factors(num_outputs)

    def factor_scales(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return the scales divided by the root of ``C``."""
        first, *others = self.summed.factor_scales(outputs, targets)
        return (first / math.sqrt(outputs.shape[1]), *others)

    def some_factors(self, scales: tuple[Tensor, ...], part: range) -> Tensor:
        """Return some factors, which are linear in the scales."""
        return self.summed.some_factors(scales, part)

    def fisher_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return the products divided by ``C``."""
        return self.summed.fisher_product(outputs, targets, vectors) / outputs.shape[1]

    def sample(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw targets."""
        return self.summed.sample(outputs, count, rng)

    def draw(self, outputs: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Draw what ``drawn_gradients`` needs."""
        return self.summed.draw(outputs, count, rng)

    def drawn_gradients(self, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
        """Return the gradients divided by the root of ``C``."""
        return self.summed.drawn_gradients(outputs, targets, drawn) / math.sqrt(outputs.shape[1])

    def entry_values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every entry."""
        return self.summed.entry_values(outputs, targets)

    def masses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the masses divided by ``C``."""
        return self.summed.masses(outputs, targets) / outputs.shape[1]

    def outcomes(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outcomes."""
        return self.summed.outcomes(outputs)


def default_unit(loss: object) -> str:
    """Return what a mean is over by default: terms for a loss of ``torch.nn`` with the reduction ``mean``."""
    return "term" if isinstance(loss, nn.Module) and getattr(loss, "reduction", "") == "mean" else "sample"
