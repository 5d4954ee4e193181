"""Elastic weight consolidation, with any curvature."""

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
from curvlab.matrices import CurvatureMatrix, Penalty
from curvlab.quantities import Quantity
from curvlab.structures import Structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class EWC(Strategy):
    """Elastic weight consolidation: a quadratic around the solution of every past task, of its curvature there.

    Minimised is ``loss + strength/2 sum_t (theta - theta_t)' F_t (theta - theta_t)`` with the factor 1/2 and means over
    samples. So ``strength=1`` is Bayes' rule with Laplace's approximation, for tasks of one size and a loss that is
    a negative log-likelihood: with ``online`` and ``gamma=1``, and with ``separate`` for two tasks only. Other
    codes leave out the 1/2 or estimate another quantity, which the strength has to make up for.

    ``separate`` keeps the centre of every task (Kirkpatrick et al., 2017). ``online`` has one matrix
    ``F <- gamma F + F_t`` around the last solution (Schwarz et al., 2018; Huszar, 2018), which for quadratic
    losses and ``gamma=1`` is exact: the gradient of a task at its own solution, which ``separate`` leaves out from the
    second task on, is minus that of the penalty before it.

    The curvature of the last task is estimated, too: a stream that goes on would need it.

    Memory: ``separate``, a matrix and two vectors for all tasks where matrices can be added; for ``kfac`` and ``tkfac``
    factors a task, for ``ekfac`` a matrix and a vector a task. ``online``, a matrix and a vector (factors a task).

    Args:
        strength: Of the penalty.
        quantity: Of ``curvlab.estimate``; ``masq:batch_size=1000`` is the method of Gepperth and Wiech (2019). The
            Hessian is for losses that are convex: elsewhere the penalty pulls away along negative curvature.
        structure: Of ``curvlab.estimate``, but for ``implicit``; ``ekfac`` only with ``separate``.
        backend: Of ``curvlab.estimate``.
        params: Glob patterns of the parameters to protect, such as those of all layers but the last; None for all.
        samples: Training samples of a task that the curvature is estimated on, drawn at random; None for all.
        mode: ``separate`` or ``online``.
        gamma: For ``online``, what is left of the past at every task, 0 to 1.

    Raises:
        CurvlabError: An option is not one of these, or no backend computes the curvature.

    Examples:
        >>> EWC(100.0, quantity="fisher", structure="kfac").curvature["structure"]
        'kfac'
    """

    def __init__(
        self,
        strength: float,
        *,
        quantity: Quantity | str = "empirical_fisher",
        structure: Structure | str = "diag",
        backend: str = "auto",
        params: Sequence[str] | str | None = None,
        samples: int | None = None,
        mode: Literal["separate", "online"] = "separate",
        gamma: float = 1.0,
    ) -> None:
        check_number("strength", strength)
        check_number("gamma", gamma, most=1)
        if mode not in ("separate", "online"):
            raise CurvlabError(f"mode is separate or online, not {mode!r}")
        if mode == "separate" and gamma != 1:
            raise CurvlabError("gamma belongs to mode='online'; leave it at 1")
        self.strength, self.mode, self.gamma = strength, mode, gamma
        self.curvature = curvature_options(quantity, structure, backend, params, samples, adds=mode == "online")

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        try_curvature(learner, self.curvature)
        self.penalty = Penalty()
        self.matrix: CurvatureMatrix | None = None  # online

    def after_backward(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters, self.strength)

    def after_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        matrix = curvature(learner, **self.curvature)
        if self.mode == "separate":
            self.penalty.add(matrix, learner.parameters)
            return
        if self.matrix is not None and self.gamma > 0:  # factors of weight zero would be kept as others are
            matrix = self.gamma * self.matrix + matrix
        self.matrix = matrix
        self.penalty = around_here(matrix, learner)
