"""What a run refuses: streams, models and options that do not go together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from curvlab.continual.outputs import LossName
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.tasks import Part, Task
from curvlab.errors import CurvlabError
from curvlab.training.optimization import make_optimizer, make_schedule
from curvlab.training.samples import check_weights, model_errors, reference, take
from curvlab.training.state import modes_restored, random_state_restored


def check_options(options: Mapping[str, Any]) -> None:
    """Require that each option of ``run`` is in its range.

    Raises:
        CurvlabError: One is not.
    """
    if options["loss"] not in get_args(LossName):
        raise CurvlabError(f"loss is cross_entropy or squared_error, not {options['loss']!r}")
    if options["evaluation"] not in ("test", "validation"):
        raise CurvlabError(f"evaluation is on test or validation, not on {options['evaluation']!r}")
    for name in ("batch_size", "evaluate_every"):
        if options[name] is not None and options[name] < 1:
            raise CurvlabError(f"{name} must be at least 1, not {options[name]}")
    for name in ("target_scale", "lr_decay", "clip_norm"):
        if options[name] is not None and not 0 < options[name] < math.inf:
            raise CurvlabError(f"{name} must be a positive number, not {options[name]}")
    if not 0 <= options["min_lr"] < math.inf:
        raise CurvlabError(f"min_lr must be at least 0, not {options['min_lr']}")
    if options["seed"] < 0:
        raise CurvlabError(f"seed must be at least 0, not {options['seed']}")
    if options["target_scale"] != 1 and options["loss"] != "squared_error":
        raise CurvlabError("target_scale belongs to the loss squared_error; leave it at 1")
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = make_optimizer(
        options["optimizer"], [parameter], options["lr"], options["momentum"], options["weight_decay"]
    )
    make_schedule(options["schedule"], optimizer, 1)


def lengths(
    epochs: int | Sequence[int] | None, steps: int | Sequence[int] | None, tasks: int
) -> tuple[str, tuple[int, ...]]:
    """Return what the length of a task is counted in, ``epochs`` or ``steps``, and that of each task.

    Raises:
        CurvlabError: Both are given, or they are not one number or one a task, from 1.
    """
    if epochs is not None and steps is not None:
        raise CurvlabError("give either epochs or steps, not both")
    kind, value = ("epochs", 1 if epochs is None else epochs) if steps is None else ("steps", steps)
    each = tuple(value) if isinstance(value, Sequence) else (value,) * tasks
    if len(each) != tasks:
        raise CurvlabError(f"{kind} has {len(each)} values, and there are {tasks} tasks")
    for count in each:
        if not isinstance(count, int) or count < 1:
            raise CurvlabError(f"{kind} must be a whole number from 1, not {count!r}")
    return kind, each


def check_stream(stream: Sequence[Task], evaluation: Part) -> None:
    """Require tasks with samples of one shape, to learn from and to be evaluated on.

    Raises:
        CurvlabError: There is no task, one is something else, or has other samples or none.
    """
    if not stream:
        raise CurvlabError("the stream has no tasks")
    for i, task in enumerate(stream):
        if not isinstance(task, Task):
            raise CurvlabError(f"a stream is a sequence of tasks, and number {i} is {type(task).__name__}")
        if task.dataset.sample_shape != stream[0].dataset.sample_shape:
            raise CurvlabError(
                f"the samples of a stream have one shape, and those of task {i} ({task.name}) have "
                f"{task.dataset.sample_shape}, not {stream[0].dataset.sample_shape}"
            )
        if not task.sizes[evaluation]:
            raise CurvlabError(f"task {i} ({task.name}) has no {evaluation} samples: make the stream with validation=N")


def check_strategy(strategy: object) -> None:
    """Require a strategy.

    Raises:
        CurvlabError: It is something else.
    """
    if not isinstance(strategy, Strategy):
        name = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
        raise CurvlabError(f"strategy is an object such as curvlab.continual.strategies.Naive(), not {name}")


def check_model(model: nn.Module, stream: Sequence[Task]) -> int:
    """Require a model that can be trained on the samples, and return how many outputs it has.

    Raises:
        CurvlabError: It does not take the samples, does not give one vector of outputs for each, has no trainable
            parameters, or holds values that are not finite.
    """
    if all(not p.requires_grad for p in model.parameters()):
        raise CurvlabError("the model has no trainable parameters (requires_grad is False for all)")
    check_weights(model, "at the start of the run")
    with (
        modes_restored(model),
        random_state_restored(reference(model).device),
        torch.no_grad(),
        model_errors("cannot take the samples"),
    ):
        model.eval()
        outputs = model(take(stream[0].take(torch.arange(1)), slice(None), reference(model))[0])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise CurvlabError(f"the model must return one tensor (N, C); for one sample it returned {shape}")
    return outputs.shape[1]
