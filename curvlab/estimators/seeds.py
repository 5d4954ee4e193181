"""What a Gram-type curvature pulls back through a network: its rows in output space.

A positive semi-definite quantity is ``F = 1/N sum v v'``, and each ``v = J' s``: the network's Jacobian, transposed,
times a *seed* ``s``, of which a sample has one or several.
"""

from math import sqrt

import numpy as np
from torch import Tensor

from curvlab.errors import UnsupportedError
from curvlab.losses import Loss
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, MaSQ, Quantity


def output_rows(loss: Loss, quantity: Quantity, outputs: Tensor, targets: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the seeds of a batch, ``(N, R, C)``.

    For these losses the GGN is the exact Fisher: the Hessian of a sample's loss in the outputs of an exponential
    family's natural parameters is the variance of its gradient (Martens, JMLR 2020, section 9.2).

    Raises:
        UnsupportedError: The quantity has no rows (the Hessian is not a Gram matrix).
    """
    if isinstance(quantity, (EmpiricalFisher, MaSQ)):
        return loss.gradients(outputs, targets).unsqueeze(1)
    if isinstance(quantity, Fisher) and quantity.samples is not None:
        return loss.sample_gradients(outputs, quantity.samples, rng) / sqrt(quantity.samples)
    if isinstance(quantity, (Fisher, GGN)):
        return loss.output_factors(outputs)
    raise UnsupportedError(f"{quantity.name} is not a sum of outer products of gradients")


def label_stream(quantity: Quantity) -> np.random.Generator:
    """Return the stream of a Monte Carlo Fisher's labels: the same for every pass over the data."""
    return np.random.default_rng(quantity.seed if isinstance(quantity, Fisher) else 0)
