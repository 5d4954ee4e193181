"""Measurements of a network after each task of a stream: curvature, weight change, and the cost of the change."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.analyze.regimes import options as regimes
from curvlab.continual.learner import Learner
from curvlab.estimators import estimate
from curvlab.matrices import CurvatureMatrix
from curvlab.parameters import ParameterSpace
from curvlab.spectrum import deflated_power_iteration, spectral_density, top_eigenvalues
from curvlab.training import evaluate

_PROBES, _STEPS = 2, 40  # of a spectral density


class RegimeObserver:
    """Measures the network after each task: curvature, weight change, and loss increase on the previous task.

    The values that the next measurement needs are in a file, which is written before the checkpoint of the task.
    """

    def __init__(self, config: regimes.ObservedConfig, checkpoint: Path) -> None:
        self._config, self._checkpoint = config, checkpoint

    def file(self, task: int) -> Path:
        """Return the file of a task, counted from 0."""
        return self._checkpoint.with_stem(f"{self._checkpoint.stem}-{task}")

    def __call__(self, learner: Learner) -> Mapping[str, Any]:
        """Return the measurements after a task; ``curvlab.continual.run`` calls it."""
        config, task = self._config, learner.task
        samples = [regimes.take_samples(config, learner.stream[t]) for t in range(max(task - 1, 0), task + 1)]
        losses = [evaluate(learner.model, *xy).loss for xy in samples]
        with learner.problem(learner.batch(*samples[-1], task)) as problem:
            hessian = estimate(problem, "hessian", "implicit")
            lanczos = config.solver == "lanczos"
            k = config.top
            top = top_eigenvalues(hessian, k, tol=config.tol) if lanczos else deflated_power_iteration(hessian, k)
            spectrum = count_above(hessian, float(top.values[0]))
            space, weights = problem.space, problem.space.flatten(problem.parameters()).double()
        before = torch.load(self.file(task - 1)) if task else None
        fixed = None
        if before is not None:
            step = weights - before["weights"]
            near = before["weights"] + config.fixed_step * step / step.norm()
            fixed = _evaluate_at(learner.model, space, near, samples[0]) - before["loss"]
        torch.save({"weights": weights, "loss": losses[-1]}, self.file(task))
        return {
            "lambda_max": float(top.values[0]),
            "residual": float(top.residuals[0]),
            "matvecs": top.matvecs,
            "task_loss": losses[-1],
            "distance": None if before is None else float((weights - before["weights"]).norm()),
            "loss_forgetting": None if before is None else losses[0] - before["loss"],
            "fixed_forgetting": fixed,
            "top": top.values.tolist(),
            "spectrum": spectrum,
        }


def count_above(hessian: CurvatureMatrix, largest: float) -> dict[str, list[float]]:
    """Return how many eigenvalues of a matrix are above values of four decades up to the largest one."""
    density = spectral_density(hessian, probes=_PROBES, steps=_STEPS)
    values = abs(largest) * torch.logspace(-4, 0, 41, dtype=torch.float64)
    above = density.size * (1 - density.cdf(values)[0])
    return {"values": values.tolist(), "above": above.tolist()}


def _evaluate_at(model: nn.Module, space: ParameterSpace, weights: Tensor, samples: tuple[Tensor, Tensor]) -> float:
    """Return the mean loss of a model on samples at other weights ``(P,)``."""
    moved = deepcopy(model)
    named = dict(moved.named_parameters())
    with torch.no_grad():
        for name, value in space.unflatten(weights).items():
            named[name].copy_(value)
    return evaluate(moved, *samples).loss
