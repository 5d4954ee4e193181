"""Online structured Laplace approximation."""

from typing import TYPE_CHECKING, Literal

from curvlab.continual.options import check_number
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import (
    curvature_options,
    estimate_curvature,
    make_penalty,
    try_curvature,
)
from curvlab.errors import CurvlabError
from curvlab.matrices import KFAC, Composite, CurvatureMatrix, Penalty
from curvlab.parameters import Selection
from curvlab.quantities import Quantity
from curvlab.structures import Structure, parse_structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class OSLA(Strategy):
    """Online structured Laplace approximation (Ritter et al., 2018), with Kronecker-factored precision matrices.

    The objective is ``loss + 1/2 (theta - mu)' L (theta - mu)``, where ``mu`` is the last solution, and
    ``L <- L + strength * H`` with the curvature ``H`` of each task at its solution. Matrices are means over samples, so
    that ``strength=1`` is Bayes' rule for tasks of equal size. There is no prior: use ``weight_decay`` of the run.

    A sum of Kronecker products is not a Kronecker product. ``exact`` keeps the pair of factors of every task.
    ``average`` keeps one pair per layer, the running mean of one factor and the sum of the other, as accumulated by
    Shon et al. (2022). It is exact if one factor is the same for all tasks (``S`` of the last layer with squared
    error), except with ``tkfac`` as in its own paper (Gao et al.), which weights each factor by the other. ``nearest``
    keeps the pair that is nearest in Frobenius norm to the sum of the last pair and the new one. Implementations that
    add both factors (van de Ven's after balancing their traces) also count the products of one task's factor with
    another task's; this is not available here.

    Memory: a matrix and a vector; with ``exact``, factors for each task.

    Args:
        strength: Factor of every task's curvature.
        quantity: Quantity of ``curvlab.estimate``; the paper draws labels, which is ``fisher:samples=1``.
        structure: ``kfac`` or ``tkfac``; with ``exact`` any structure that supports sums.
        merge: ``exact``, ``average`` or ``nearest``.
        backend: Backend of ``curvlab.estimate``.
        params: Selection (as for ``curvlab.estimate``) of the parameters to protect; None for all.
        samples: Number of training samples of a task for the curvature, drawn at random; None for all.

    Raises:
        CurvlabError: An option is invalid, or no backend computes the curvature.
    """

    def __init__(
        self,
        strength: float,
        *,
        quantity: Quantity | str = "fisher",
        structure: Structure | str = "kfac",
        merge: Literal["exact", "average", "nearest"] = "exact",
        backend: str = "auto",
        params: Selection | None = None,
        samples: int | None = None,
    ) -> None:
        check_number("strength", strength)
        if merge not in ("exact", "average", "nearest"):
            raise CurvlabError(f"merge must be exact, average or nearest, not {merge!r}")
        self.strength, self.merge = strength, merge
        self.curvature = curvature_options(quantity, structure, backend, params, samples, adds=True)
        if merge != "exact" and parse_structure(structure).name not in ("kfac", "tkfac"):
            raise CurvlabError(
                f"merge={merge!r} requires Kronecker factors, which {structure} does not have: its sums are exact, so "
                "use merge='exact'"
            )

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        try_curvature(learner, self.curvature)
        self.penalty = Penalty()
        self.precision: CurvatureMatrix | None = None

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters)

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        found = self.strength * estimate_curvature(learner, **self.curvature)
        if self.precision is not None:
            found = self._merge(self.precision + found, learner.task)
        self.precision = found
        self.penalty = make_penalty(found, learner)

    def _merge(self, matrix: CurvatureMatrix, before: int) -> CurvatureMatrix:
        """Merge two pairs of factors per layer into one; the first pair is for ``before`` tasks."""
        if self.merge == "exact" or not isinstance(matrix, KFAC | Composite):
            return matrix
        return matrix.nearest() if self.merge == "nearest" else matrix.average_factors((before, 1))
