"""State and steps of one run of the fit loop."""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder
from curvlab.problem import Problem
from curvlab.progress import Advance
from curvlab.training.checkpoint import CheckpointFile, model_tensors
from curvlab.training.evaluation import Evaluation, measure
from curvlab.training.lengths import get_batch_size
from curvlab.training.natural_gradient import precondition_gradients
from curvlab.training.observers import Observers
from curvlab.training.optimization import make_optimizer, make_schedule
from curvlab.training.plan import Plan
from curvlab.training.samples import Samples, check_weights, reference, take, translate_model_errors
from curvlab.training.state import StepGuard, derive_seed, restore_modes

Record = dict[str, float | int | None]

_COLLECT_EVERY = 100  # steps: the maximum delay until a NaN or infinite loss is detected
_SHOW_EVERY = 0.1  # seconds


class Run:
    """State of a run: weights, optimizer, number of steps done, records, losses since the last record, observers.

    Args:
        plan: Options and samples of the run.
        model: The model to train.
        observers: Observers to call between steps.
        file: Checkpoint file; None for no checkpoint.

    Attributes:
        step: Number of steps done.
        resumed_at: Number of steps that were done in the checkpoint.
        history: The records.
    """

    def __init__(self, plan: Plan, model: nn.Module, observers: Observers, file: CheckpointFile | None) -> None:
        self.plan, self.model, self.observers, self.file = plan, model, observers, file
        training = plan.training
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(
            training.optimizer, self.parameters, training.lr, training.momentum, training.weight_decay
        )
        self.scheduler = make_schedule(training, self.optimizer, plan.steps)
        self.batch_size = get_batch_size(training)
        self.batches, self.total, self.record_every = plan.batches, plan.steps, plan.record_every
        self.like = reference(model)
        self.device = self.like.device
        self.step = self.resumed_at = 0
        self.history: list[Record] = []
        self.losses: list[float] = []
        self.recent: list[Tensor] = []  # kept on the device: copying each one would synchronise at every step
        self._order: Tensor | None = None
        self._note = ""

    def begin(self) -> None:
        """Restore the state from the checkpoint file, if it exists.

        Raises:
            CurvlabError: The file belongs to another run or cannot be read, or its folder is not writable.
        """
        if self.file is None:
            return
        states = self.file.read()
        if states is None:
            make_writable_folder(self.file.path.parent)
        else:
            self.restore(states)
        self.resumed_at = self.step

    def do_steps(self, guard: StepGuard, advance: Advance) -> None:
        """Do the remaining steps, with records, observer calls and checkpoints between them.

        Args:
            guard: Context for work that must not be interrupted half-way.
            advance: Function that advances a progress bar of steps.

        Raises:
            CurvlabError: A loss or a weight is NaN or infinite, the model fails, an observer changes the model, or the
                checkpoint cannot be written.
        """
        shown, shown_at = 0, -math.inf
        self.model.train()
        while True:
            finished = self._do_due_work(guard)
            if finished or time.monotonic() > shown_at + _SHOW_EVERY:
                advance(self.step - shown, note=self._note)
                shown, shown_at = self.step, time.monotonic()
            if finished:
                return
            with guard, translate_model_errors(f"fails in step {self.step + 1}"):
                self.train_step(*self._batch())
            if len(self.recent) == _COLLECT_EVERY:
                with guard:
                    self.collect_losses()

    def stop(self, interrupt: KeyboardInterrupt, guard: StepGuard) -> None:
        """Save the run after Ctrl-C if it stopped between two steps, and add a note to the exception."""
        if self.file is None or guard.broken:
            return
        stopped = f"training stopped after step {self.step} of {self.total}"
        try:
            self.check()
            self.file.write(self.states())
            interrupt.add_note(f"{stopped}, saved in {self.file.path}")
        except CurvlabError as error:
            interrupt.add_note(f"{stopped}, not saved: {error}")

    def _do_due_work(self, guard: StepGuard) -> bool:
        """Do the record, the observer calls and the checkpoint that are due; return whether the run is done."""
        plan = self.plan
        last = self.step == self.total
        if self.step and (last or self.step % self.record_every == 0) and not self.recorded:
            with guard:
                self.check()
            evaluation = None if plan.evaluation is None else measure(self.model, plan.evaluation, plan.loss)
            with guard:
                self.record(evaluation)
            self._note = "" if evaluation is None else str(evaluation)
        finished = last or self.reached_target
        if due := self.observers.due(self.step, finished):
            with guard:
                self.check()  # report divergence here, before an observer fails because of it
            self.observers.call(due, self.step, self.model, guard)
        kept = finished or self.step % plan.checkpoint_every == 0
        if self.file is not None and self.step > self.resumed_at and kept:
            with guard:
                self.check()
            self.file.write(self.states())
        return finished

    def _batch(self) -> Samples:
        """Return the samples of the next step."""
        inputs, _ = self.plan.data
        epoch, position = divmod(self.step, self.batches)
        if self._order is None or position == 0:
            self._order = _order(len(inputs), self.plan.training.seed, epoch).to(inputs.device)
        size = self.batch_size
        index = self._order[position * size : (position + 1) * size]
        return take(self.plan.data, index, self.like)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Do one step."""
        # The scheduler steps before the optimizer, so that ``lr`` stays the rate of the last step.
        if self.scheduler is not None and self.step:
            self.scheduler.step()
        self.optimizer.zero_grad()
        mean = self.plan.loss.values(self.model(inputs), targets).mean()
        mean.backward()
        if self.plan.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.plan.training.clip_norm)
        if self.plan.training.optimizer == "ngd":
            with restore_modes(self.model):
                problem = Problem(self.model.eval(), self.plan.loss, (inputs, targets))
                precondition_gradients(problem, self.plan.training)
        self.optimizer.step()
        self.step += 1
        self.recent.append(mean.detach())

    def collect_losses(self) -> None:
        """Copy the losses from the device, and check that they are finite."""
        if not self.recent:
            return
        values = torch.stack(self.recent).tolist()
        self.recent.clear()
        for step, value in enumerate(values, start=self.step - len(values) + 1):
            if not math.isfinite(value):
                raise CurvlabError(
                    f"the training loss is {value} at step {step}: "
                    f"lower lr (here {self.lr:g}) or check the scale of the inputs"
                )
        self.losses += values

    def check(self) -> None:
        """Check that losses and weights are finite."""
        self.collect_losses()
        check_weights(self.model, f"after step {self.step}: lower lr (here {self.lr:g})")

    def record(self, evaluation: Evaluation | None) -> None:
        """Append the record of this step."""
        record: Record = {
            "step": self.step,
            # Exact summation: the result does not depend on how the losses were grouped.
            "train_loss": math.fsum(self.losses) / len(self.losses),
            "eval_loss": None if evaluation is None else evaluation.loss,
            "eval_accuracy": None if evaluation is None else evaluation.accuracy,
            "lr": self.lr,
        }
        self.history.append(record)
        self.losses.clear()

    @property
    def recorded(self) -> bool:
        """Whether this step has a record."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    @property
    def reached_target(self) -> bool:
        """Whether the last evaluation reached the target."""
        accuracy = self.history[-1]["eval_accuracy"] if self.history else None
        return self.plan.target is not None and accuracy is not None and accuracy >= self.plan.target

    def states(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
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
        """Restore what ``states`` returned."""
        self.step, self.history, self.losses = states["step"], states["history"], states["losses"]
        for name, tensor in model_tensors(self.model).items():
            tensor.copy_(states["model"][name])
        self.optimizer.load_state_dict(states["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(states["schedule"])
        torch.set_rng_state(states["random_state"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["device_random_state"], self.device)
        self.observers.restore(states.get("observers", []))  # absent in files of version 0.1


def _order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch; it depends on the arguments only, so any epoch can be resumed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, 1, epoch)))
