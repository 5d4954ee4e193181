"""backpack."""

from collections.abc import Mapping

from torch import Tensor

from curvlab.estimators.backend import Backend
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance
from curvlab.quantities import Quantity
from curvlab.structures import Structure


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> Mapping[str, Tensor]:
    """See ``curvlab.estimators.backend.Compute``."""
    raise NotImplementedError


BACKEND = Backend("backpack", {}, compute, library=True)
