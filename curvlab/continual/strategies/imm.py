"""Incremental moment matching."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curvlab.continual.drop_transfer import drop_transfer, find_dropping_layers
from curvlab.continual.options import check_number
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.strategies.quadratic import add_pull_, curvature_options, estimate_curvature, try_curvature
from curvlab.errors import CurvlabError
from curvlab.parameters import ParameterSpace, Selection
from curvlab.quantities import Quantity
from curvlab.structures import Structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Batch, Learner

_FLOOR = 1e-8  # added to the curvature, as in the authors' code; parameters without curvature are averaged


class IMM(Strategy):
    """Incremental moment matching (Lee et al., 2017): tasks are learnt without a constraint, then solutions are merged.

    After each task, the merged network is evaluated. ``mean`` is the mean of the solutions (mean-IMM in the paper).
    ``mode`` is the mean weighted by the diagonal curvature of each solution, ``sum_t F_t theta_t / sum_t F_t`` with
    1e-8 added to all entries of ``F_t`` (mode-IMM, and the authors' code). Every task has the same weight. Training
    continues from the last task's own solution (weight-transfer in the paper), with the penalty
    ``l2 * ||theta - theta_{t-1}||^2`` (L2-transfer; no factor 1/2) and with drop-transfer in linear layers
    (``curvlab.continual.drop_transfer``). Buffers, such as the statistics of BatchNorm, are not merged: they are those
    of the last task.

    Curves within a task (``evaluate_every``) show the network in training, not a merged one.

    Memory: two vectors; with ``mode``, three.

    Args:
        mode: ``mean`` or ``mode``.
        quantity: For ``mode``: quantity of ``curvlab.estimate``.
        structure: For ``mode``: structure of ``curvlab.estimate``, of which the diagonal is used.
        backend: For ``mode``: backend of ``curvlab.estimate``.
        params: Selection (as for ``curvlab.estimate``) of the parameters to merge; None for all. The other
            parameters are those of the last task. With a head for each task, exclude the last layer from ``mean``,
            which would average trained and untrained heads.
        samples: For ``mode``: number of training samples of a task for the curvature; None for all.
        l2: Strength of the L2-transfer.
        drop: Dropout probability of drop-transfer, at least 0 and below 1; 0 for none.

    Raises:
        CurvlabError: An option is invalid, no backend computes the curvature, or no linear layer can drop.
    """

    def __init__(
        self,
        mode: Literal["mean", "mode"] = "mode",
        *,
        quantity: Quantity | str = "fisher",
        structure: Structure | str = "diag",
        backend: str = "auto",
        params: Selection | None = None,
        samples: int | None = None,
        l2: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        if mode not in ("mean", "mode"):
            raise CurvlabError(f"mode must be mean or mode, not {mode!r}")
        check_number("l2", l2)
        check_number("drop", drop)
        if drop >= 1:
            raise CurvlabError(f"drop must be below 1, not {drop!r}")
        self.mode, self.l2, self.drop = mode, l2, drop
        self.curvature = curvature_options(quantity, structure, backend, params, samples, adds=False)

    def start(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        if self.mode == "mode":
            try_curvature(learner, self.curvature)
        self.space = ParameterSpace.of(learner.model, self.curvature["params"])
        if self.drop:
            find_dropping_layers(learner.model, self.space.names)
        self.own: Tensor | None = None  # the solution of the last task
        self.merged: Tensor | None = None
        self.weights: Tensor | float = 0.0

    def before_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        if self.own is not None:
            self._load(learner, self.own)

    def loss(self, learner: "Learner", batch: "Batch") -> Tensor:
        """Implement the hook of ``Strategy``."""
        if self.drop == 0 or self.own is None:
            return super().loss(learner, batch)
        with drop_transfer(learner.model, self.space.unflatten(self.own), self.drop):
            return super().loss(learner, batch)

    def after_backward(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        if self.l2 == 0 or self.own is None:
            return
        add_pull_(learner, self.own, self.space, 2 * self.l2)

    def after_task(self, learner: "Learner") -> None:
        """Implement the hook of ``Strategy``."""
        parameters = learner.parameters
        self.own = self.space.flatten({name: parameters[name] for name in self.space.names}).detach().clone()
        weights: Tensor | float = 1.0
        if self.mode == "mode":
            weights = estimate_curvature(learner, **self.curvature).diagonal()
            if bool((weights < 0).any()):
                raise CurvlabError(
                    f"the diagonal of {self.curvature['quantity']} has negative entries, which cannot be weights of "
                    "solutions: use fisher, empirical_fisher or ggn"
                )
            weights = weights + _FLOOR
        self.weights = self.weights + weights
        # A running mean: if the solutions are equal, so is the merged one, bitwise.
        last = self.own if self.merged is None else self.merged
        self.merged = last + weights / self.weights * (self.own - last)
        self._load(learner, self.merged)

    def _load(self, learner: "Learner", vector: Tensor) -> None:
        parameters = learner.parameters
        with torch.no_grad():
            for name, value in self.space.unflatten(vector).items():
                parameters[name].copy_(value)
