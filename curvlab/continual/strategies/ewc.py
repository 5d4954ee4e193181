"""Elastic weight consolidation with any curvature matrix."""

from typing import TYPE_CHECKING, Literal, get_args

from curvlab.continual.options import check_number
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import (
    curvature_options,
    estimate_curvature,
    make_penalty,
    try_curvature,
)
from curvlab.errors import CurvlabError
from curvlab.matrices import CurvatureMatrix, Penalty
from curvlab.parameters import Selection
from curvlab.quantities import Quantity
from curvlab.structures import Structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner

Mode = Literal["separate", "online", "average", "moving_average"]


class EWC(Strategy):
    """Elastic weight consolidation: a quadratic penalty around the solution of every past task.

    The objective is ``loss + strength/2 sum_t (theta - theta_t)' F_t (theta - theta_t)``, with the factor 1/2 and with
    ``F_t`` the curvature of task ``t`` at its solution ``theta_t``, a mean over samples. For tasks of equal size and a
    loss that is a negative log-likelihood, ``strength=1`` is Bayes' rule with Laplace's approximation: with ``online``
    and ``gamma=1``, and with ``separate`` for two tasks only. Other implementations omit the 1/2 or estimate another
    quantity; the strength must compensate for that.

    ``separate`` keeps the centre of every task (Kirkpatrick et al., 2017). ``online`` has one matrix
    ``F <- gamma F + F_t`` around the last solution (Schwarz et al., 2018; Huszar, 2018). This is exact for quadratic
    losses and ``gamma=1``: from the second task on, the gradient of a task at its own solution, which ``separate``
    omits, is minus the gradient of the previous penalty. ``average`` has the mean of the tasks' matrices around the
    last solution: it is ``online`` with ``gamma=1`` and a strength that decays as ``1/t``. ``moving_average`` has
    ``F <- gamma F + (1 - gamma) F_t`` around the last solution and starts with ``F_1``.

    The curvature of the last task is also estimated, because a longer stream would need it.

    Memory: with ``separate``, a matrix and two vectors for all tasks if matrices can be added; factors for each task
    with ``kfac`` and ``tkfac``, a matrix and a vector for each task with ``ekfac``. With the other modes, a
    matrix and a vector (with ``kfac`` and ``tkfac``, factors for each task).

    Args:
        strength: Strength of the penalty.
        quantity: Quantity of ``curvlab.estimate``; ``masq:batch_size=1000`` is the method of Gepperth and Wiech (2019).
            Use the Hessian for convex losses only: otherwise the penalty decreases along negative curvature.
        structure: Structure of ``curvlab.estimate`` except ``implicit``; ``ekfac`` only with ``separate``.
        backend: Backend of ``curvlab.estimate``.
        params: Selection (as for ``curvlab.estimate``) of the parameters to protect, for example all
            layers except the last; None for all.
        samples: Number of training samples of a task for the curvature, drawn at random; None for all.
        mode: ``separate``, ``online``, ``average`` or ``moving_average``.
        gamma: Factor on the past curvature at every task, 0 to 1: for ``online``, and below 1 for ``moving_average``.

    Raises:
        CurvlabError: An option is invalid, or no backend computes the curvature.

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
        params: Selection | None = None,
        samples: int | None = None,
        mode: Mode = "separate",
        gamma: float = 1.0,
    ) -> None:
        check_number("strength", strength)
        check_number("gamma", gamma, most=1)
        if mode not in get_args(Mode):
            raise CurvlabError(f"mode must be {', '.join(get_args(Mode)[:-1])} or {get_args(Mode)[-1]}, not {mode!r}")
        if mode in ("separate", "average") and gamma != 1:
            raise CurvlabError("gamma belongs to mode='online' and mode='moving_average'; leave it at 1")
        if mode == "moving_average" and gamma == 1:
            raise CurvlabError("a moving average with gamma=1 never includes a new task: set gamma below 1")
        self.strength, self.mode, self.gamma = strength, mode, gamma
        self.curvature = curvature_options(quantity, structure, backend, params, samples, adds=mode != "separate")

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        try_curvature(learner, self.curvature)
        self.penalty = Penalty()
        self.matrix: CurvatureMatrix | None = None  # of all modes except separate

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.penalty.add_gradient_(learner.parameters, self.strength)

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        matrix = estimate_curvature(learner, **self.curvature)
        if self.mode == "separate":
            self.penalty.add(matrix, learner.parameters)
            return
        if self.matrix is not None:
            old, new = self._weights(learner.task + 1)
            matrix = new * matrix if new != 1 else matrix
            if old > 0:  # factors with weight zero would still be stored
                matrix = old * self.matrix + matrix
        self.matrix = matrix
        self.penalty = make_penalty(matrix, learner)

    def _weights(self, tasks: int) -> tuple[float, float]:
        """Return the weights of the previous matrix and of the new one, after this number of tasks."""
        if self.mode == "average":
            return (tasks - 1) / tasks, 1 / tasks
        return self.gamma, 1.0 if self.mode == "online" else 1 - self.gamma
