"""What a strategy is given: the network in training, and what it may know of the tasks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvlab.continual.outputs import Outputs, TaskLoss, mean_loss, one_hot
from curvlab.continual.task import Task
from curvlab.problem import Problem
from curvlab.training.samples import reference, take
from curvlab.training.state import preserve_modes


class Batch(NamedTuple):
    """Samples of one task or of several.

    Attributes:
        x: Inputs ``(N, ...)`` on the model's device, in its dtype.
        y: Which output stands for the label, ``(N,)``.
        task: The task that all are of, or that of each, ``(N,)``.
    """

    x: Tensor
    y: Tensor
    task: int | Tensor

    @property
    def tasks(self) -> Tensor:
        """The task of each sample, ``(N,)``."""
        return torch.full_like(self.y, self.task) if isinstance(self.task, int) else self.task


class Learner:
    """The state of a run as a strategy sees it.

    Attributes:
        model: The network.
        stream: The tasks. By the rules of continual learning a method looks at the samples of the present one only.
        task: Which one is being learnt, from 0.
        outputs: Which outputs of the network count for a task.
        loss_name: ``cross_entropy`` or ``squared_error``.
        target_scale: Of the one-hot targets of squared error.
        lr: Learning rate at the start of the present task.
        batch_size: Samples a step of the present task.
        steps: How many steps the present task has.
        step: How many of them are done.
        epoch_steps: How many steps it takes to see each sample once.
        generator: For what a strategy draws; on the CPU, and seeded anew at every task.
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
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return reference(self.model).device

    @property
    def epoch(self) -> int:
        """How many times each sample has been seen, so that 0 means that those of this step are new."""
        return self.step // self.epoch_steps

    def loss(self, outputs: Tensor, y: Tensor, task: int | Tensor) -> Tensor:
        """Return the mean loss of outputs ``(N, C)`` of the network, a scalar.

        Args:
            outputs: Of the network, all of them.
            y: Which output stands for the label, ``(N,)``.
            task: Of all samples, or of each, ``(N,)``; outputs that do not count for a task have no part in its loss.
        """
        return mean_loss(self.loss_name, outputs, y, self.outputs.counting(task, self.task), self.target_scale)

    def batch(self, x: Tensor, y: Tensor, task: int) -> Batch:
        """Return samples of a task, in the model's dtype and on its device.

        Args:
            x: Inputs ``(N, ...)``.
            y: Labels ``(N,)``.
            task: The task that all are of.
        """
        x, y = take((x, self.outputs.of_labels(y, task)), slice(None), reference(self.model))
        return Batch(x, y, task)

    def samples(self, task: int | None = None, limit: int | None = None) -> Batch:
        """Return training samples of a task, in the model's dtype and on its device.

        Args:
            task: None for the present one.
            limit: At most so many, drawn with ``generator``; None for all.
        """
        task = self.task if task is None else task
        chosen = self.stream[task]
        size = chosen.sizes["train"]
        if limit is None or limit >= size:
            return self.batch(*chosen.train, task)
        return self.batch(*chosen.take(torch.randperm(size, generator=self.generator)[:limit]), task)

    @contextmanager
    def problem(self, samples: Batch | None = None) -> Iterator[Problem]:
        """Give the present task as a ``Problem``, whose outputs are those that count for it.

        In between the network is in eval mode, and gives these outputs alone.

        Args:
            samples: Of one task; None for all training samples of the present one.

        Raises:
            CurvlabError: As ``Problem`` raises it.
        """
        samples = self.samples() if samples is None else samples
        assert isinstance(samples.task, int)
        counting = self.outputs.counting(samples.task, self.task)
        y: Any = samples.y
        handle = None
        columns = torch.arange(self.outputs.count, device=y.device)
        if counting is not None:
            columns = counting.nonzero()[:, 0]
            y = (counting.cumsum(0) - 1)[y]
            handle = self.model.register_forward_hook(lambda _module, _inputs, output: output[:, columns])
        if self.loss_name == "squared_error":
            y = one_hot(y, reference(self.model).new_empty(len(y), len(columns)), self.target_scale)
        try:
            with preserve_modes(self.model):
                self.model.eval()
                yield Problem(self.model, self.loss_name, (samples.x, y))
        finally:
            if handle is not None:
                handle.remove()
