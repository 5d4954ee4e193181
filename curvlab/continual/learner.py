"""State of a run as passed to a strategy: the network in training and the tasks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvlab.continual.outputs import Outputs, TaskLoss, mean_loss, one_hot
from curvlab.continual.task import Task
from curvlab.errors import UnsupportedError
from curvlab.problem import Problem
from curvlab.training.samples import reference, take
from curvlab.training.state import restore_modes


class Batch(NamedTuple):
    """Samples of one task or of several tasks.

    Attributes:
        x: Inputs ``(N, ...)`` on the model's device, in its dtype.
        y: Index of the output for the label of each sample, ``(N,)``.
        task: Index of the task of all samples, or of each sample, ``(N,)``.
    """

    x: Tensor
    y: Tensor
    task: int | Tensor

    @property
    def tasks(self) -> Tensor:
        """Task of each sample, ``(N,)``."""
        return torch.full_like(self.y, self.task) if isinstance(self.task, int) else self.task


class Learner:
    """State of a run, as passed to the hooks of a strategy.

    Attributes:
        model: The network.
        stream: The tasks. By the rules of continual learning, a method uses only the samples of the current task.
        task: Index of the current task, from 0.
        outputs: The active outputs of the network for each task.
        loss_name: ``cross_entropy`` or ``squared_error``.
        target_scale: Value of the one-hot targets of squared error.
        lr: Learning rate at the start of the current task.
        batch_size: Samples per step of the current task.
        steps: Number of steps of the current task.
        step: Number of steps done in the current task.
        epoch_steps: Number of steps per epoch of the current task.
        generator: Random generator for the strategy; on the CPU, and seeded again at every task.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: Sequence[Task],
        outputs: Outputs,
        loss_name: TaskLoss,
        target_scale: float,
        batch_size: int,
    ) -> None:
        self.model = model
        self.stream = stream
        self.outputs = outputs
        self.loss_name = loss_name
        self.target_scale = target_scale
        self.batch_size = batch_size
        self.task = 0
        self.lr = 0.0
        self.steps = 0
        self.step = 0
        self.epoch_steps = 1
        self.generator = torch.Generator()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return reference(self.model).device

    @property
    def epoch(self) -> int:
        """Index of the current epoch of the task, from 0; in epoch 0 the samples of a step are new."""
        return self.step // self.epoch_steps

    def loss(self, outputs: Tensor, y: Tensor, task: int | Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            outputs: All outputs of the network, ``(N, C)``.
            y: Index of the output for the label of each sample, ``(N,)``.
            task: Task of all samples, or of each sample, ``(N,)``; the loss uses only the active outputs of the task.
        """
        return mean_loss(self.loss_name, outputs, y, self.outputs.active_mask(task, self.task), self.target_scale)

    def batch(self, x: Tensor, y: Tensor, task: int) -> Batch:
        """Return samples of a task as a batch, in the model's dtype and on its device.

        Args:
            x: Inputs ``(N, ...)``.
            y: Labels ``(N,)``.
            task: Task of all samples.
        """
        x, y = take((x, self.outputs.map_labels(y, task)), slice(None), reference(self.model))
        return Batch(x, y, task)

    def samples(self, task: int | None = None, limit: int | None = None) -> Batch:
        """Return training samples of a task, in the model's dtype and on its device.

        Args:
            task: Index of the task; None for the current task.
            limit: Maximum number of samples, drawn with ``generator``; None for all.
        """
        task = self.task if task is None else task
        chosen = self.stream[task]
        size = chosen.sizes["train"]
        if limit is None or limit >= size:
            return self.batch(*chosen.train, task)
        return self.batch(*chosen.take(torch.randperm(size, generator=self.generator)[:limit]), task)

    @contextmanager
    def problem(self, samples: Batch | None = None) -> Iterator[Problem]:
        """Context that yields a ``Problem`` of the current task, with the active outputs of the task.

        Inside the context, the network is in eval mode and returns only these outputs.

        Args:
            samples: Samples of tasks with the same outputs; None for all training samples of the current task.

        Raises:
            CurvlabError: ``Problem`` does not accept the model or the samples, or the samples are of several tasks that
                have different outputs.
        """
        samples = self.samples() if samples is None else samples
        active = self.outputs.active_mask(samples.task, self.task)
        if active is not None and active.ndim > 1:
            raise UnsupportedError(
                f"the samples are of several tasks with different outputs (head {self.outputs.head!r}), which have no "
                "common curvature: use head='single' or head='growing', or samples of one task"
            )
        y: Any = samples.y
        handle = None
        columns = torch.arange(self.outputs.count, device=y.device)
        if active is not None:
            columns = active.nonzero()[:, 0]
            y = (active.cumsum(0) - 1)[y]
            handle = self.model.register_forward_hook(lambda _module, _inputs, output: output[:, columns])
        if self.loss_name == "squared_error":
            y = one_hot(y, reference(self.model).new_empty(len(y), len(columns)), self.target_scale)
        try:
            with restore_modes(self.model):
                self.model.eval()
                yield Problem(self.model, self.loss_name, (samples.x, y))
        finally:
            if handle is not None:
                handle.remove()
