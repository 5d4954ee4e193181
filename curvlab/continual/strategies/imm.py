"""Incremental moment matching."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curvlab.continual.options import check_number
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import curvature, curvature_options, try_curvature
from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace
from curvlab.quantities import Quantity
from curvlab.structures import Structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner

_FLOOR = 1e-8  # of the curvature, as in the authors' code: a parameter without any is the plain mean


class IMM(Strategy):
    """Incremental moment matching (Lee et al., 2017): tasks are learnt without hindrance, and their solutions merged.

    After each task the network is the merged one, and is evaluated so: ``mean`` is the mean of the solutions (the
    paper's mean-IMM), ``mode`` the mean weighted by each one's diagonal curvature, ``sum_t F_t theta_t / sum_t
    F_t`` with 1e-8 added to all of ``F_t`` (its mode-IMM, and the authors' code); every task has the same weight.
    Training goes on from the last task's own solution (the paper's weight-transfer), held to it by ``l2 * ||theta -
    theta_{t-1}||^2`` (its L2-transfer; no factor 1/2). Its drop-transfer is not there. Buffers, such as the
    statistics of BatchNorm, are not merged: they are the last task's.

    Points of a curve within a task (``evaluate_every``) are of the solution in the making, not of a merged one.

    Memory: two vectors, with ``mode`` three.

    Args:
        mode: ``mean`` or ``mode``.
        quantity: For ``mode``, of ``curvlab.estimate``.
        structure: For ``mode``, of ``curvlab.estimate``: its diagonal is used.
        backend: For ``mode``, of ``curvlab.estimate``.
        params: Glob patterns of the parameters to merge; None for all. The others are the last task's. With a head
            for each task, leave out the last layer in ``mean``, which would mix trained with untrained heads.
        samples: For ``mode``, training samples of a task that the curvature is estimated on; None for all.
        l2: Strength of the L2-transfer.

    Raises:
        CurvlabError: An option is not one of these, or no backend computes the curvature.
    """

    def __init__(
        self,
        mode: Literal["mean", "mode"] = "mode",
        *,
        quantity: Quantity | str = "fisher",
        structure: Structure | str = "diag",
        backend: str = "auto",
        params: Sequence[str] | str | None = None,
        samples: int | None = None,
        l2: float = 0.0,
    ) -> None:
        if mode not in ("mean", "mode"):
            raise CurvlabError(f"mode is mean or mode, not {mode!r}")
        check_number("l2", l2)
        self.mode, self.l2 = mode, l2
        self.curvature = curvature_options(quantity, structure, backend, params, samples, adds=False)

    def start(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        if self.mode == "mode":
            try_curvature(learner, self.curvature)
        self.space = ParameterSpace.of(learner.model, self.curvature["params"])
        self.own: Tensor | None = None  # the solution of the last task
        self.merged: Tensor | None = None
        self.weights: Tensor | float = 0.0

    def before_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        if self.own is not None:
            self._load(learner, self.own)

    def after_backward(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        if self.l2 == 0 or self.own is None:
            return
        parameters, last = learner.parameters, self.space.unflatten(self.own)
        for name in self.space.names:
            pull = 2 * self.l2 * (parameters[name].detach() - last[name])
            gradient = parameters[name].grad
            parameters[name].grad = pull if gradient is None else gradient.add_(pull)

    def after_task(self, learner: "Learner") -> None:
        """See ``Strategy``."""
        parameters = learner.parameters
        self.own = self.space.flatten({name: parameters[name] for name in self.space.names}).detach().clone()
        weights: Tensor | float = 1.0
        if self.mode == "mode":
            weights = curvature(learner, **self.curvature).diagonal()
            if bool((weights < 0).any()):
                raise CurvlabError(
                    f"the diagonal of {self.curvature['quantity']} has negative entries, and solutions cannot be "
                    "weighted by them: take fisher, empirical_fisher or ggn"
                )
            weights = weights + _FLOOR
        self.weights = self.weights + weights
        # A running mean: where solutions are equal it is they, to the bit.
        last = self.own if self.merged is None else self.merged
        self.merged = last + weights / self.weights * (self.own - last)
        self._load(learner, self.merged)

    def _load(self, learner: "Learner", vector: Tensor) -> None:
        parameters = learner.parameters
        with torch.no_grad():
            for name, value in self.space.unflatten(vector).items():
                parameters[name].copy_(value)
