"""From a name, a likelihood or a loss of torch to a likelihood."""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from curvlab.errors import CurvlabError
from curvlab.likelihoods.base import Likelihood
from curvlab.likelihoods.bernoulli import BinaryCrossEntropy
from curvlab.likelihoods.categorical import CrossEntropy
from curvlab.likelihoods.gaussian import HeteroscedasticGaussian, SquaredError
from curvlab.likelihoods.poisson import Poisson
from curvlab.likelihoods.torch_losses import from_torch
from curvlab.text import did_you_mean

LossName = Literal["cross_entropy", "squared_error", "binary_cross_entropy", "poisson", "heteroscedastic_gaussian"]

LIKELIHOODS: Mapping[str, Likelihood] = {
    likelihood.name: likelihood
    for likelihood in (CrossEntropy(), SquaredError(), BinaryCrossEntropy(), Poisson(), HeteroscedasticGaussian())
}


def get_likelihood(loss: "LossName | str | Likelihood | nn.Module") -> Likelihood:
    """Return the likelihood for a loss.

    Args:
        loss: A likelihood, its name, or a loss of ``torch.nn`` (see ``curvlab.likelihoods.torch_losses``).

    Raises:
        CurvlabError: The name is unknown, or the loss is not a likelihood.

    Examples:
        >>> import torch
        >>> get_likelihood("cross_entropy").values(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
        >>> print(get_likelihood(nn.CrossEntropyLoss(label_smoothing=0.1)))
        cross_entropy:label_smoothing=0.1,ignore_index=-100
    """
    if isinstance(loss, Likelihood):
        return loss
    if isinstance(loss, nn.Module):
        return from_torch(loss)
    if not isinstance(loss, str):
        raise CurvlabError(
            f"loss must be one of the names {', '.join(LIKELIHOODS)}, a likelihood of curvlab.likelihoods or a loss of "
            f"torch.nn, not {'the class ' + loss.__name__ if isinstance(loss, type) else 'a ' + type(loss).__name__}"
        )
    if loss not in LIKELIHOODS:
        raise CurvlabError(
            f"there is no loss {loss!r}{did_you_mean(loss, LIKELIHOODS) or ';'} available: {', '.join(LIKELIHOODS)}"
        )
    return LIKELIHOODS[loss]
