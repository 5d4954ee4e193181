"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from curvlab.training.options import OptimizerName, ScheduleName, Training

__all__ = ["OptimizerName", "ScheduleName", "make_optimizer", "make_schedule"]

_PEAK = 0.3  # fraction of the steps at which one_cycle is highest


def _follow_cosine(first: float, last: float, fraction: float) -> float:
    """Return the value of half a cosine from ``first`` to ``last`` at a fraction of the way."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * fraction))


# Factor on the learning rate at a fraction of the training, from 0 at the first step to 1 after the last.
# None for a constant rate, which then needs no scheduler.
_FACTORS: dict[ScheduleName, Callable[[Training, float], float] | None] = {
    "constant": None,
    "linear": lambda _, fraction: 1.0 - fraction,
    "cosine": lambda _, fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
    "step": lambda training, fraction: (
        training.schedule_factor ** sum(drop <= fraction for drop in training.schedule_drops)
    ),
    "exponential": lambda training, fraction: training.schedule_factor**fraction,
    "one_cycle": lambda _, fraction: (
        _follow_cosine(1 / 25, 1.0, fraction / _PEAK)
        if fraction < _PEAK
        else _follow_cosine(1.0, 0.0, (fraction - _PEAK) / (1 - _PEAK))
    ),
}


def make_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Return an optimizer for these parameters; for ``ngd`` it takes the natural gradients as gradients.

    Raises:
        CurvlabError: The name is unknown, a value is out of its range, or ``momentum`` is set for an optimizer other
            than ``sgd``.
    """
    training = Training(optimizer=name, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name in ("sgd", "ngd"):
        return SGD(parameters, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return (Adam if name == "adam" else AdamW)(parameters, lr=training.lr, weight_decay=training.weight_decay)


def make_schedule(training: Training, optimizer: Optimizer, steps: int) -> LambdaLR | None:
    """Return the learning-rate schedule for ``steps`` steps; None for a constant learning rate."""
    factor = _FACTORS[training.schedule]
    return None if factor is None else LambdaLR(optimizer, lambda step: factor(training, step / steps))
