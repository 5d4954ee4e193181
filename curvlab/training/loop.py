"""The fit loop."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder
from curvlab.losses import Loss, get_loss
from curvlab.progress import progress as progress_bar
from curvlab.training.checkpoint import CheckpointFile, fingerprint, model_tensors
from curvlab.training.evaluation import Evaluation, measure
from curvlab.training.observers import Observer, Observers
from curvlab.training.optimization import make_optimizer, make_schedule
from curvlab.training.samples import (
    Samples,
    check_samples,
    check_weights,
    model_errors,
    reference,
    require_module,
    take,
)
from curvlab.training.state import (
    derived_seed,
    gradients_restored,
    interrupts_between_steps,
    modes_restored,
    random_state_restored,
)

Record = dict[str, float | int | None]

_COLLECT_EVERY = 100  # steps: a loss that is not finite is noticed at most this late
_SHOW_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class FitResult:
    """What a training run came to.

    Attributes:
        steps: Steps done in all, those before a resumption included.
        history: One flat record every ``evaluate_every`` steps and one at the end: ``step``, ``train_loss``
            (mean over the steps since the record before), ``eval_loss``, ``eval_accuracy``, ``lr`` (of that step).
        evaluation: The last evaluation; None if no evaluation data were given.
        reached_target: Whether the evaluation accuracy reached ``target``.
        resumed_at: The step at which a checkpoint was taken up; 0 for a run from the start.
        seconds: Wall time of this call.
        observer_seconds: How much of it was spent in the observers.
    """

    steps: int
    history: list[Record]
    evaluation: Evaluation | None
    reached_target: bool
    resumed_at: int
    seconds: float
    observer_seconds: float


class _Run:
    """Where a run stands: weights, optimizer, steps done, records, losses since the last record, observers."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR | None, observers: Observers
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.observers = model, optimizer, scheduler, observers
        self.device = reference(model).device
        self.step = 0
        self.history: list[Record] = []
        self.losses: list[float] = []
        self.recent: list[Tensor] = []  # still on the device: bringing each one would stall it at every step

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_step(self, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
        # Before the step rather than after it: the rate in force stays that of the last step.
        if self.scheduler is not None and self.step:
            self.scheduler.step()
        self.optimizer.zero_grad()
        mean = loss.values(self.model(inputs), targets).mean()
        mean.backward()
        self.optimizer.step()
        self.step += 1
        self.recent.append(mean.detach())

    def collect_losses(self) -> None:
        """Bring the losses from the device, and make sure that they are finite."""
        if not self.recent:
            return
        values = torch.stack(self.recent).tolist()
        self.recent.clear()
        for step, value in enumerate(values, start=self.step - len(values) + 1):
            if not math.isfinite(value):
                raise CurvlabError(
                    f"the training loss is {value} at step {step}: "
                    f"lower lr (here {self.lr:g}) or look at the scale of the inputs"
                )
        self.losses += values

    def check(self) -> None:
        self.collect_losses()
        check_weights(self.model, f"after step {self.step}: lower lr (here {self.lr:g})")

    def record(self, evaluation: Evaluation | None) -> None:
        record: Record = {
            "step": self.step,
            # Exact summation: the same bits however the losses were brought together.
            "train_loss": math.fsum(self.losses) / len(self.losses),
            "eval_loss": None if evaluation is None else evaluation.loss,
            "eval_accuracy": None if evaluation is None else evaluation.accuracy,
            "lr": self.lr,
        }
        self.history.append(record)
        self.losses.clear()

    @property
    def recorded(self) -> bool:
        return bool(self.history) and self.history[-1]["step"] == self.step

    def reached(self, target: float | None) -> bool:
        accuracy = self.history[-1]["eval_accuracy"] if self.history else None
        return target is not None and accuracy is not None and accuracy >= target

    def states(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "model": model_tensors(self.model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.scheduler is None else self.scheduler.state_dict(),
            "random_state": torch.get_rng_state(),
            "device_random_state": torch.cuda.get_rng_state(self.device) if cuda else None,
            "observers": self.observers.states(),
        }

    def restore(self, states: dict[str, Any]) -> None:
        self.step, self.history, self.losses = states["step"], states["history"], states["losses"]
        for name, tensor in model_tensors(self.model).items():
            tensor.copy_(states["model"][name])
        self.optimizer.load_state_dict(states["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(states["schedule"])
        torch.set_rng_state(states["random_state"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["device_random_state"], self.device)
        self.observers.restore(states.get("observers", []))  # files of version 0.1 have none


def fit(
    model: nn.Module,
    data: Samples,
    *,
    loss: str = "cross_entropy",
    optimizer: str = "adam",
    lr: float = 1e-3,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 100,
    seed: int = 0,
    evaluation: Samples | None = None,
    evaluate_every: int | None = None,
    target: float | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    observers: Sequence[Observer] = (),
    progress: bool = True,
) -> FitResult:
    """Train the model in place, on the device where it is.

    The same seed gives the same weights, on the CPU to the bit; so does a run that was stopped and continued
    from its checkpoint. The model is trained in train mode and evaluated in eval mode. Modes, gradients and
    the global random state are afterwards what they were before.

    Args:
        model: Any module with one output tensor ``(N, C)`` and trainable parameters.
        data: Inputs ``(N, ...)`` and targets; on any device, moved batch by batch. Floating tensors are cast
            to the model's dtype. Each epoch goes through all samples in a new order; its last batch may be smaller.
        loss: ``cross_entropy``, ``squared_error`` or ``binary_cross_entropy``; minimised is its mean over a batch.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        lr: Learning rate at the first step.
        momentum: For ``sgd``.
        weight_decay: As the optimizer of ``torch.optim`` understands it.
        schedule: ``constant``, or from ``lr`` to 0 over all steps: ``linear``, ``cosine``.
        epochs: Length of the training; either this or ``steps``.
        steps: Length of the training in batches.
        batch_size: Samples a step.
        seed: Decides the order of the samples and what dropout draws; not the initial weights.
        evaluation: Samples to evaluate on.
        evaluate_every: Steps between two records; None for an epoch.
        target: Stop at the first evaluation whose accuracy (0 to 1) reaches this.
        checkpoint: A file for the state of the run; if it exists, the run goes on from there.
        checkpoint_every: Steps between two writes; written at the end and on Ctrl-C too.
        observers: What looks at the model between steps, such as a ``curvlab.EigenvalueRecorder``; the weights are
            the same bits with and without. What they have seen is in the checkpoint.
        progress: Whether a terminal shows a progress bar.

    Returns:
        The records and the last evaluation.

    Raises:
        CurvlabError: An option, the data or the weights are not right; the loss or a weight ceases to be finite;
            the checkpoint belongs to another run or cannot be read or written; an observer changes the model.

    Examples:
        >>> inputs = torch.tensor([[-1.0], [1.0]])
        >>> result = fit(nn.Linear(1, 2), (inputs, torch.tensor([0, 1])), lr=0.1, steps=200, evaluation=(
        ...     inputs, torch.tensor([0, 1])), target=1.0)
        >>> result.reached_target
        True
    """
    started = time.perf_counter()
    criterion = get_loss(loss)
    _check_lengths(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
    )
    if (epochs is None) == (steps is None):
        raise CurvlabError("give either epochs or steps" + ("" if epochs is None else ", not both"))
    if seed < 0:
        raise CurvlabError(f"seed must be at least 0, not {seed}")
    if target is not None and (evaluation is None or criterion.name != "cross_entropy" or not 0 < target <= 1):
        raise CurvlabError(
            "target is an accuracy above 0 and at most 1; it needs evaluation data and the loss cross_entropy"
        )
    require_module(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise CurvlabError("the model has no trainable parameters (requires_grad is False for all)")
    torch_optimizer = make_optimizer(optimizer, trained, lr, momentum, weight_decay)
    check_weights(model, "at the start of training")
    with modes_restored(model), random_state_restored(trained[0].device):
        model.eval()
        check_samples(model, data, criterion, "training")
        if evaluation is not None:
            check_samples(model, evaluation, criterion, "evaluation")

    size = len(data[0])
    batches = math.ceil(size / batch_size)
    total = steps if steps is not None else batches * (epochs or 0)
    record_every = evaluate_every or batches
    watching = Observers(observers)
    run = _Run(model, torch_optimizer, make_schedule(schedule, torch_optimizer, total), watching)
    file = None
    if checkpoint is not None:
        options = {
            "loss": loss,
            "optimizer": optimizer,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "steps": total,
            "batch_size": batch_size,
            "seed": seed,
            "evaluate_every": record_every,
            "target": target,
        }
        if observers:
            options["observers"] = watching.names
        file = CheckpointFile(Path(checkpoint), fingerprint(options, model, training=data, evaluation=evaluation))

    with (
        modes_restored(model),
        gradients_restored(model),
        random_state_restored(run.device, derived_seed(seed, 0)),
        torch.enable_grad(),
        interrupts_between_steps() as guard,
        progress_bar("training", total, enabled=progress) as advance,
    ):
        if file is not None:
            states = file.read()
            if states is None:
                make_writable_folder(file.path.parent)
            else:
                run.restore(states)
        resumed_at = run.step
        shown, shown_at, note = 0, -math.inf, ""
        like = reference(model)
        order = None
        model.train()
        try:
            while True:
                last = run.step == total
                if run.step and (last or run.step % record_every == 0) and not run.recorded:
                    with guard:
                        run.check()
                    result = None if evaluation is None else measure(model, evaluation, criterion)
                    with guard:
                        run.record(result)
                    note = "" if result is None else str(result)
                finished = last or run.reached(target)
                if due := watching.due(run.step, finished):
                    with guard:
                        run.check()  # a training that diverged is said to have, not that there are no eigenvalues
                    watching.call(due, run.step, model, guard)
                if file is not None and run.step > resumed_at and (finished or run.step % checkpoint_every == 0):
                    with guard:
                        run.check()
                    file.write(run.states())
                if finished or time.monotonic() > shown_at + _SHOW_EVERY:
                    advance(run.step - shown, note=note)
                    shown, shown_at = run.step, time.monotonic()
                if finished:
                    break
                with guard, model_errors(f"fails in step {run.step + 1}"):
                    epoch, position = divmod(run.step, batches)
                    if order is None or position == 0:
                        order = _order(size, seed, epoch).to(data[0].device)
                    index = order[position * batch_size : (position + 1) * batch_size]
                    run.train_step(criterion, *take(data, index, like))
                if len(run.recent) == _COLLECT_EVERY:
                    with guard:
                        run.collect_losses()
        except KeyboardInterrupt as interrupt:
            if file is not None and not guard.broken:
                try:
                    run.check()
                    file.write(run.states())
                    interrupt.add_note(f"training stopped after step {run.step} of {total}, saved in {file.path}")
                except CurvlabError as error:
                    interrupt.add_note(f"training stopped after step {run.step} of {total}, not saved: {error}")
            raise

    end = run.history[-1]
    return FitResult(
        steps=run.step,
        history=run.history,
        evaluation=None if end["eval_loss"] is None else Evaluation(end["eval_loss"], end["eval_accuracy"]),
        reached_target=run.reached(target),
        resumed_at=resumed_at,
        seconds=time.perf_counter() - started,
        observer_seconds=watching.seconds,
    )


def _check_lengths(**lengths: int | None) -> None:
    for name, value in lengths.items():
        if value is not None and value < 1:
            raise CurvlabError(f"{name} must be at least 1, not {value}")


def _order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch; it depends on nothing else, so a run can go on anywhere."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(seed, 1, epoch)))
