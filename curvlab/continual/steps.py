"""The steps of one task, and the losses of them."""

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
from curvlab.training.optimization import make_optimizer, make_schedule
from curvlab.training.options import Training
from curvlab.training.samples import MODEL_ERRORS, make_model_error
from curvlab.training.state import derived_seed

_SHOW_EVERY = 0.1  # seconds
_CHECK_EVERY = 500  # steps between two looks at the losses, each of which waits for the device
_LOSSES = 100  # how many of the last ones the loss of a task is the mean of

ORDER, DROPOUT, STRATEGY = range(3)  # the independent random streams of a run


def do_steps(
    learner: Learner,
    strategy: Strategy,
    training: Training,
    source: Source,
    evaluate_every: int | None,
    evaluate: Callable[[], str],
    advance: Advance,
) -> tuple[float, float]:
    """Do all steps of a task; return the loss, and the seconds of the evaluations between them.

    Args:
        learner: The state of the run.
        strategy: The method.
        training: The options of this task; the learning rate is the learner's.
        source: Of the samples.
        evaluate_every: Steps between two evaluations; None for none.
        evaluate: Evaluates, and returns what to show of it.
        advance: Of a progress bar of tasks.

    Raises:
        CurvlabError: There is nothing to train, the model or the loss fails, or a loss is not finite.
    """
    parameters = list(learner.parameters.values())
    if not parameters:
        raise CurvlabError(f"{type(strategy).__name__} leaves no parameter to train")
    optimizer = make_optimizer(training.optimizer, parameters, learner.lr, training.momentum, training.weight_decay)
    scheduler = make_schedule(training, optimizer, learner.steps)
    clip = training.clip_norm
    # What naive fine-tuning does not do costs nothing.
    after_backward, after_step = _own(strategy, "after_backward"), _own(strategy, "after_step")
    evaluating, shown, shown_at, note = 0.0, 0, -math.inf, ""
    losses = _Losses(learner)
    # A loss of its own is the method's, and what fails in it may be, too.
    own = "" if type(strategy).loss is Strategy.loss else f", or the loss of {type(strategy).__name__},"
    blamed, fails = f"the model{own}", f"fails in task {learner.task}"
    for step, batch in enumerate(_batches(learner, source, training.seed), start=1):
        optimizer.zero_grad()
        try:  # a context manager, entered at every step, would take a percent of a small one
            loss = strategy.loss(learner, batch)
            loss.backward()
        except MODEL_ERRORS as error:
            raise make_model_error(error, fails, subject=blamed) from error
        if after_backward is not None:
            after_backward(learner)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
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
        generator = torch.Generator().manual_seed(derived_seed(seed, learner.task, ORDER, epoch))
        order = torch.randperm(len(source), generator=generator)
        left = learner.steps - epoch * epoch_steps
        yield from source.batches(order[: left * learner.batch_size], learner.batch_size)


class _Losses:
    """Those of one task; new ones are still on the device, as bringing each one would stall it at every step."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.new: list[Tensor] = []
        self.last: list[float] = []

    @property
    def mean(self) -> float:
        return math.fsum(self.last) / len(self.last)

    def check(self) -> None:
        """Bring the new ones, and make sure that they are finite."""
        values = torch.stack(self.new).tolist()
        self.new.clear()
        for step, value in enumerate(values, start=self.learner.step - len(values) + 1):
            if not math.isfinite(value):
                raise CurvlabError(
                    f"the training loss is {value} at step {step} of task {self.learner.task}: lower lr (here "
                    f"{self.learner.lr:g}) or the method's strength, or look at the scale of the inputs"
                )
        self.last = (self.last + values)[-_LOSSES:]


def _own(strategy: Strategy, hook: str) -> Callable[[Learner], None] | None:
    """Return a hook that is not the one of the base, which does nothing."""
    bound: Callable[[Learner], None] = getattr(strategy, hook)
    return None if getattr(bound, "__func__", None) is getattr(Strategy, hook) else bound
