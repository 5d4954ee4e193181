"""Synaptic intelligence."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlab.continual.options import check_number, check_positive
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import make_importance_matrix, make_penalty
from curvlab.matrices import Penalty
from curvlab.parameters import ParameterSpace, Selection, check_selection

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner


class SI(Strategy):
    """Synaptic intelligence (Zenke et al., 2017): parameters are protected by their contribution to the loss decrease.

    The objective is ``loss + strength * sum_k Omega_k (theta_k - theta~_k)^2`` (equation 4; no factor 1/2), where
    ``theta~`` is the last solution. ``w_k`` is the sum of ``-g_k (change of theta_k)`` over the steps of a task, with
    the gradient of the loss alone, before the penalty, clipping and weight decay. After the task,
    ``Omega_k <- max(0, Omega_k + w_k / (Delta_k^2 + xi))`` (equation 5), where ``Delta_k`` is the total change. The
    maximum is not in the paper, but in the authors' code: ``w_k`` can be negative if a parameter changes for other
    reasons than the loss.

    Memory: two vectors; during a task three more, and two during a step.

    Args:
        strength: Strength of the penalty, ``c`` in the paper.
        xi: Damping constant that keeps the importance finite.
        params: Selection (as for ``curvlab.estimate``) of the parameters to protect; None for all.

    Raises:
        CurvlabError: The strength is negative, or ``xi`` is not positive.
    """

    def __init__(self, strength: float, *, xi: float = 0.1, params: Selection | None = None) -> None:
        check_number("strength", strength)
        check_positive("xi", xi)
        self.strength, self.xi = strength, xi
        self.params = check_selection(params)

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.space = ParameterSpace.of(learner.model, self.params)
        self.penalty = Penalty()
        self.omega = torch.zeros_like(self._parameters(learner))
        self.path: dict[str, Tensor] = {}
        self.step: dict[str, tuple[Tensor, Tensor]] = {}

    def before_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        self.since = self._parameters(learner)
        self.path = self.space.unflatten(torch.zeros_like(self.since))

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        parameters = learner.parameters
        in_space = {name: parameters[name] for name in self.space.names}
        self.step = {n: (p.grad.clone(), p.detach().clone()) for n, p in in_space.items() if p.grad is not None}
        self.penalty.add_gradient_(parameters, 2 * self.strength)

    def after_step(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        parameters = learner.parameters
        for name, (gradient, before) in self.step.items():
            self.path[name].addcmul_(gradient, before.sub_(parameters[name].detach()))

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        change = self._parameters(learner) - self.since
        path = self.space.flatten(self.path)
        self.omega = (self.omega + path / (change.square() + self.xi)).clamp(min=0)
        self.penalty = make_penalty(make_importance_matrix(self.omega, self.space, "si", learner), learner)
        self.path, self.step, self.since = {}, {}, change.new_empty(0)  # no longer needed

    def _parameters(self, learner: "Learner") -> Tensor:
        parameters = learner.parameters
        return self.space.flatten({name: parameters[name] for name in self.space.names}).detach().clone()
