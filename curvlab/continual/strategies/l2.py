"""Plain L2 penalty: every parameter has the same importance."""

from typing import TYPE_CHECKING

from torch import Tensor

from curvlab.continual.options import check_number
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import add_pull_
from curvlab.parameters import ParameterSpace, Selection, check_selection

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class L2(Strategy):
    """Penalise the distance to the last solution: the baseline of the methods with importance weights.

    The objective is ``loss + strength/2 ||theta - theta_{t-1}||^2`` with the last solution as the centre: EWC with the
    identity in place of the Fisher (Kirkpatrick et al., 2017, Figure 2).

    Memory: a vector.

    Args:
        strength: Strength of the penalty.
        params: Selection (as for ``curvlab.estimate``) of the parameters to protect; None for all.

    Raises:
        CurvlabError: The strength is negative.
    """

    def __init__(self, strength: float, *, params: Selection | None = None) -> None:
        check_number("strength", strength)
        self.strength = strength
        self.params = check_selection(params)

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.space = ParameterSpace.of(learner.model, self.params)
        self.centre: Tensor | None = None

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        if self.centre is not None and self.strength:
            add_pull_(learner, self.centre, self.space, self.strength)

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        parameters = learner.parameters
        self.centre = self.space.flatten({name: parameters[name] for name in self.space.names}).detach().clone()
