"""Online structured Laplace approximation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from curvlab.continual.options import check_number
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import (
    around_here,
    curvature,
    curvature_options,
    try_curvature,
)
from curvlab.errors import CurvlabError
from curvlab.matrices import KFAC, Composite, CurvatureMatrix, Penalty
from curvlab.quantities import Quantity
from curvlab.structures import Structure, parse_structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class OSLA(Strategy):
    """Online structured Laplace approximation (Ritter et al., 2018): a precision of Kronecker factors that grows.

    Minimised is ``loss + 1/2 (theta - mu)' L (theta - mu)`` with ``mu`` the last solution and
    ``L <- L + strength * H`` of the task that was learnt there. Matrices are means over samples, so that 1 is Bayes'
    rule for tasks of one size. There is no prior: give ``weight_decay`` to the run.

    A sum of Kronecker products is none. ``exact`` keeps the pair of factors of every task. ``average`` has one pair a
    layer, the running mean of one factor and the sum of the other, as Shon et al. (2022) accumulate them; it is
    exact where one factor is the same in all tasks, such as the last layer's ``S`` with squared error, but not even
    there with ``tkfac`` as in its own paper (Gao et al.), which weighs each factor by the other. ``nearest`` has
    the pair that is nearest in Frobenius norm to the last one plus the new one. Codes that add both factors (van de
    Ven's after balancing their traces) count the products of one task's with another's, too; that is not offered.

    Memory: a matrix and a vector; with ``exact``, factors a task.

    Args:
        strength: Factor of every task's curvature.
        quantity: Of ``curvlab.estimate``; the paper draws labels, which is ``fisher:samples=1``.
        structure: ``kfac`` or ``tkfac``; with ``exact`` any that has sums.
        merge: ``exact``, ``average`` or ``nearest``.
        backend: Of ``curvlab.estimate``.
        params: Glob patterns of the parameters to protect; None for all.
        samples: Training samples of a task that the curvature is estimated on, drawn at random; None for all.

    Raises:
        CurvlabError: An option is not one of these, or no backend computes the curvature.
    """

    def __init__(
        self,
        strength: float,
        *,
        quantity: Quantity | str = "fisher",
        structure: Structure | str = "kfac",
        merge: Literal["exact", "average", "nearest"] = "exact",
        backend: str = "auto",
        params: Sequence[str] | str | None = None,
        samples: int | None = None,
    ) -> None:
        check_number("strength", strength)
        if merge not in ("exact", "average", "nearest"):
            raise CurvlabError(f"merge is exact, average or nearest, not {merge!r}")
        self.strength, self.merge = strength, merge
        self.curvature = curvature_options(quantity, structure, backend, params, samples, adds=True)
        if merge != "exact" and parse_structure(structure).name not in ("kfac", "tkfac"):
            raise CurvlabError(
                f"merge={merge!r} is of pairs of Kronecker factors, and {structure} has none: its sums are exact, so "
                "take merge='exact'"
            )

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        try_curvature(learner, self.curvature)
        self.penalty = Penalty()
        self.precision: CurvatureMatrix | None = None

    def after_backward(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters)

    def after_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        found = self.strength * curvature(learner, **self.curvature)
        if self.precision is not None:
            found = self._merged(self.precision + found, learner.task)
        self.precision = found
        self.penalty = around_here(found, learner)

    def _merged(self, matrix: CurvatureMatrix, before: int) -> CurvatureMatrix:
        """Return one pair a layer of two, the first of which stands for ``before`` tasks."""
        if self.merge == "exact" or not isinstance(matrix, KFAC | Composite):
            return matrix
        return matrix.nearest() if self.merge == "nearest" else matrix.average_factors((before, 1))
