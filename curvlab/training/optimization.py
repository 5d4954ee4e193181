"""The optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from curvlab.errors import CurvlabError

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine"]

OPTIMIZERS = ("adam", "adamw", "sgd")

# The factor on the learning rate at a fraction of the training, from 0 at the first step to 1 after the last;
# none for a constant one, which then costs nothing.
SCHEDULES: dict[str, Callable[[float], float] | None] = {
    "constant": None,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
}


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Return the optimizer of that name over these parameters.

    Raises:
        CurvlabError: The name is unknown, a value is out of its range, or momentum is given to one without.
    """
    if name not in OPTIMIZERS:
        raise CurvlabError(f"there is no optimizer {name!r}; the optimizers are {', '.join(OPTIMIZERS)}")
    if not 0 < lr < math.inf:
        raise CurvlabError(f"lr must be a positive number, not {lr}")
    if not 0 <= momentum < 1:
        raise CurvlabError(f"momentum must be at least 0 and below 1, not {momentum}")
    if not 0 <= weight_decay < math.inf:
        raise CurvlabError(f"weight_decay must be at least 0, not {weight_decay}")
    if name == "sgd":
        return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum:
        raise CurvlabError(f"momentum belongs to sgd; {name} has its own, so leave momentum at 0")
    return (Adam if name == "adam" else AdamW)(parameters, lr=lr, weight_decay=weight_decay)


def make_schedule(name: str, optimizer: Optimizer, steps: int) -> LambdaLR | None:
    """Return the schedule of that name over ``steps`` steps; None for a constant learning rate.

    Raises:
        CurvlabError: The name is unknown.
    """
    if name not in SCHEDULES:
        raise CurvlabError(f"there is no schedule {name!r}; the schedules are {', '.join(SCHEDULES)}")
    factor = SCHEDULES[name]
    return None if factor is None else LambdaLR(optimizer, lambda step: factor(step / steps))
