"""Training steps of one task."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from curvlab.continual.learner import Batch, Learner
from curvlab.continual.source import Source
from curvlab.continual.strategies.base import Strategy
from curvlab.errors import CurvlabError
from curvlab.progress import Advance
from curvlab.training.natural_gradient import precondition_gradients
from curvlab.training.optimization import make_optimizer, make_schedule
from curvlab.training.options import Training
from curvlab.training.samples import MODEL_ERRORS, make_model_error
from curvlab.training.state import derive_seed

_SHOW_EVERY = 0.1  # seconds
_CHECK_EVERY = 500  # steps between two checks of the losses; each check synchronises with the device
_LOSSES = 100  # the loss of a task is the mean over this many last steps

ORDER, DROPOUT, STRATEGY = range(3)  # independent random streams of a run


def do_steps(
    learner: Learner,
    strategy: Strategy,
    training: Training,
    source: Source,
    evaluate_every: int | None,
    evaluate: Callable[[], str],
    advance: Advance,
) -> tuple[float, float]:
    """Do all steps of a task; return the loss, and the seconds spent in evaluations.

    Args:
        learner: State of the run.
        strategy: The method.
        training: Options of this task, except for the learning rate, which is ``learner.lr``.
        source: Training samples.
        evaluate_every: Number of steps between two evaluations; None for no evaluation.
        evaluate: Function that evaluates the model and returns a text for the progress bar.
        advance: Function that advances a progress bar of tasks.

    Raises:
        CurvlabError: No parameter is trainable, the model or the loss fails, or a loss is NaN or infinite.
    """
    parameters = list(learner.parameters.values())
    if not parameters:
        raise CurvlabError(f"{type(strategy).__name__} freezes all parameters; at least one must be trainable")
    optimizer = make_optimizer(training.optimizer, parameters, learner.lr, training.momentum, training.weight_decay)
    scheduler = make_schedule(training, optimizer, learner.steps)
    clip = training.clip_norm
    # Hooks that the method does not override are not called.
    after_backward, after_step = _get_own_hook(strategy, "after_backward"), _get_own_hook(strategy, "after_step")
    evaluating, shown, shown_at, note = 0.0, 0, -math.inf, ""
    losses = _Losses(learner)
    # If the method overrides the loss, an exception may come from that.
    own_loss = "" if type(strategy).loss is Strategy.loss else f", or the loss of {type(strategy).__name__},"
    blamed, fails = f"the model{own_loss}", f"fails in task {learner.task}"
    for step, batch in enumerate(_batches(learner, source, training.seed), start=1):
        optimizer.zero_grad()
        try:  # a context manager would cost about 1 % of a small step
            loss = strategy.loss(learner, batch)
            loss.backward()
        except MODEL_ERRORS as error:
            raise make_model_error(error, fails, subject=blamed) from error
        if after_backward is not None:
            after_backward(learner)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        if training.optimizer == "ngd":
            with learner.problem(batch) as problem:
                precondition_gradients(problem, training)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        learner.step = step
        if after_step is not None:
            after_step(learner)
        losses.new.append(loss.detach())
        last = step == learner.steps
        measured = evaluate_every is not None and (last or step % evaluate_every == 0)
        if last or measured or len(losses.new) == _CHECK_EVERY:
            losses.check()
        if measured:
            started = time.perf_counter()
            note = evaluate()
            evaluating += time.perf_counter() - started
        if (now := time.monotonic()) > shown_at + _SHOW_EVERY or last:
            advance((step - shown) / learner.steps, note=f"task {learner.task} {note}")
            shown, shown_at = step, now
    return losses.mean, evaluating


def _batches(learner: Learner, source: Source, seed: int) -> Iterator[Batch]:
    epoch_steps = learner.epoch_steps
    for epoch in range(math.ceil(learner.steps / epoch_steps)):
        generator = torch.Generator().manual_seed(derive_seed(seed, learner.task, ORDER, epoch))
        order = torch.randperm(len(source), generator=generator)
        left = learner.steps - epoch * epoch_steps
        yield from source.batches(order[: left * learner.batch_size], learner.batch_size)


class _Losses:
    """Losses of one task; new losses stay on the device, because copying each one would synchronise at every step."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.new: list[Tensor] = []
        self.last: list[float] = []

    @property
    def mean(self) -> float:
        return math.fsum(self.last) / len(self.last)

    def check(self) -> None:
        """Copy the new losses from the device, and check that they are finite."""
        values = torch.stack(self.new).tolist()
        self.new.clear()
        for step, value in enumerate(values, start=self.learner.step - len(values) + 1):
            if not math.isfinite(value):
                raise CurvlabError(
                    f"the training loss is {value} at step {step} of task {self.learner.task}: lower lr (here "
                    f"{self.learner.lr:g}) or the method's strength, or check the scale of the inputs"
                )
        self.last = (self.last + values)[-_LOSSES:]


def _get_own_hook(strategy: Strategy, hook: str) -> Callable[[Learner], None] | None:
    """Return a hook if the method overrides it, else None."""
    bound: Callable[[Learner], None] = getattr(strategy, hook)
    return None if getattr(bound, "__func__", None) is getattr(Strategy, hook) else bound
