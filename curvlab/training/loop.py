"""The fit loop."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from curvlab.files import to_path
from curvlab.likelihoods import get_likelihood
from curvlab.progress import progress as progress_bar
from curvlab.training.checkpoint import CheckpointFile, fingerprint
from curvlab.training.evaluation import Evaluation
from curvlab.training.observers import Observer, Observers
from curvlab.training.options import Training, TrainingChanges, combine
from curvlab.training.plan import Plan
from curvlab.training.run import Record, Run
from curvlab.training.samples import Samples
from curvlab.training.state import (
    defer_interrupts,
    derive_seed,
    fork_random_state,
    restore_gradients,
    restore_modes,
)

_DEFAULT = Training()


@dataclass(frozen=True)
class FitResult:
    """Result of a training run.

    Attributes:
        steps: Total number of steps, including those before the run was resumed.
        history: One flat record every ``evaluate_every`` steps and one at the end: ``step``, ``train_loss``
            (mean over the steps since the previous record), ``eval_loss``, ``eval_accuracy``, ``lr`` (of that step).
        evaluation: The last evaluation; None if no evaluation data were given.
        reached_target: Whether the evaluation accuracy reached ``target``.
        resumed_at: The step at which the run was resumed from a checkpoint; 0 for a new run.
        seconds: Wall time of this call.
        observer_seconds: Part of the wall time that was spent in the observers.
    """

    steps: int
    history: list[Record]
    evaluation: Evaluation | None
    reached_target: bool
    resumed_at: int
    seconds: float
    observer_seconds: float


def fit(
    model: nn.Module,
    data: Samples,
    *,
    loss: str = "cross_entropy",
    training: Training = _DEFAULT,
    evaluation: Samples | None = None,
    evaluate_every: int | None = None,
    target: float | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    **changes: Unpack[TrainingChanges],
) -> FitResult:
    """Train a model in place, on its device.

    The same seed gives the same weights (bitwise on the CPU), also when a run is stopped and continued from its
    checkpoint. The model is trained in train mode and evaluated in eval mode. Modes, gradients and the global random
    state are restored afterwards.

    Args:
        model: Any module with one output tensor ``(N, C)`` and trainable parameters.
        data: Inputs ``(N, ...)`` and targets on any device; they are moved to the model batch by batch. Floating-point
            tensors are cast to the model's dtype. Each epoch uses all samples in a new order; its last batch may be
            smaller.
        loss: ``cross_entropy``, ``squared_error`` or ``binary_cross_entropy``; its mean over a batch is minimised.
        training: Options of the training; ``epochs`` or ``steps`` is required.
        evaluation: Samples to evaluate on.
        evaluate_every: Number of steps between two records; None for one epoch.
        target: Stop at the first evaluation whose accuracy (0 to 1) reaches this.
        checkpoint: File for the state of the run; if it exists, the run continues from it.
        checkpoint_every: Number of steps between two writes; the file is also written at the end and on Ctrl-C.
        observers: Objects that are called with the model between steps, such as a ``curvlab.EigenvalueRecorder``. The
            weights are bitwise the same with and without observers. The checkpoint contains the observers' states.
        progress: Whether to show a progress bar in a terminal.
        **changes: Fields of ``training`` to change: ``fit(model, data, lr=0.1, steps=200)`` is short for
            ``fit(model, data, training=Training(lr=0.1, steps=200))``.

    Returns:
        The records and the last evaluation.

    Raises:
        CurvlabError: An option, the data or the weights are invalid; the loss or a weight becomes NaN or infinite;
            the checkpoint belongs to another run or cannot be read or written; an observer changes the model.

    Examples:
        >>> inputs = torch.tensor([[-1.0], [1.0]])
        >>> result = fit(nn.Linear(1, 2), (inputs, torch.tensor([0, 1])), lr=0.1, steps=200, evaluation=(
        ...     inputs, torch.tensor([0, 1])), target=1.0)
        >>> result.reached_target
        True
    """
    started = time.perf_counter()
    training = combine(training, changes)
    plan = Plan(training, get_likelihood(loss), data, evaluation, evaluate_every, target, checkpoint_every)
    plan.check(model)
    observer_list = Observers(observers)
    file = None
    if checkpoint is not None:
        options = plan.describe() | ({"observers": observer_list.names} if observers else {})
        file = CheckpointFile(to_path(checkpoint), fingerprint(options, model, training=data, evaluation=evaluation))
    run = Run(plan, model, observer_list, file)
    with (
        restore_modes(model),
        restore_gradients(model),
        fork_random_state(run.device, derive_seed(training.seed, 0)),
        torch.enable_grad(),
        defer_interrupts() as guard,
        progress_bar("training", plan.steps, enabled=progress) as advance,
    ):
        run.begin()
        try:
            run.do_steps(guard, advance)
        except KeyboardInterrupt as interrupt:
            run.stop(interrupt, guard)
            raise
    end = run.history[-1]
    return FitResult(
        steps=run.step,
        history=run.history,
        evaluation=None if end["eval_loss"] is None else Evaluation(end["eval_loss"], end["eval_accuracy"]),
        reached_target=run.reached_target,
        resumed_at=run.resumed_at,
        seconds=time.perf_counter() - started,
        observer_seconds=observer_list.seconds,
    )
