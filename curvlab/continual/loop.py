"""The loop in which every method learns a stream of tasks under the same conditions."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.continual import checkpoint as checkpoints
from curvlab.continual.learner import Batch, Learner
from curvlab.continual.outputs import Head, Outputs
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.tasks import Task
from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder
from curvlab.progress import progress as progress_bar
from curvlab.training.checkpoint import CheckpointFile, fingerprint, model_tensors
from curvlab.training.optimization import make_optimizer, make_schedule
from curvlab.training.samples import check_weights, model_errors, reference
from curvlab.training.state import derived_seed, gradients_restored, modes_restored, random_state_restored

Record = dict[str, Any]

_SHOW_EVERY = 0.1  # seconds
_CHECK_EVERY = 500  # steps between two looks at the losses, each of which waits for the device
_EVALUATION_BATCH = 1000

_ORDER, _DROPOUT, _STRATEGY = range(3)  # the independent random streams of a run


@dataclass
class Result:
    """What a run has measured, T tasks.

    Attributes:
        accuracy: ``(T, T)``, float64: ``[t, i]`` is the accuracy (0 to 1) on task i after task t; NaN where it was not
            measured. Measured are the tasks so far, and, unless the head grows, the next one.
        initial: ``(T,)``: the accuracy before the first task; NaN with a growing head.
        curves: With ``evaluate_every``, records of ``task``, ``step`` (since the task began), ``on`` and ``accuracy``.
        tasks: A record a task: ``task``, ``name``, ``steps``, ``lr``, ``loss`` (mean over its last steps, at most 500),
            ``seconds`` of training, ``strategy_seconds`` of what the method does between tasks, ``evaluation_seconds``,
            ``bytes`` that the method holds after it, and what ``observe`` has returned.
        resumed_at: Tasks that were taken from the checkpoint.
    """

    accuracy: Tensor
    initial: Tensor
    curves: list[Record] = field(default_factory=list)
    tasks: list[Record] = field(default_factory=list)
    resumed_at: int = 0


def run(
    stream: Sequence[Task],
    model: nn.Module,
    strategy: Strategy,
    *,
    head: Head = "single",
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy",
    target_scale: float = 1.0,
    optimizer: str = "sgd",
    lr: float = 0.1,
    lr_decay: float = 1.0,
    min_lr: float = 0.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    clip_norm: float | None = None,
    epochs: int | Sequence[int] | None = None,
    steps: int | Sequence[int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    evaluation: Literal["test", "validation"] = "test",
    evaluate_every: int | None = None,
    observe: Callable[[Learner], Mapping[str, Any]] | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Result:
    """Learn the tasks of a stream one after another, and measure what is left of the earlier ones.

    The model is trained in place, in train mode, on the device where it is. The same seed gives the same numbers, on
    the CPU to the bit; so does a run that was killed and continues from its checkpoint. Modes, gradients and the global
    random state are afterwards what they were before.

    Args:
        stream: The tasks, whose samples have one shape.
        model: Any module with one output tensor ``(N, C)``.
        strategy: The method, such as ``curvlab.continual.strategies.EWC(strength=100.0)``; the run works on a copy.
        head: Which outputs count for a task, and which stand for its classes: ``single`` (all, output k for class k),
            ``masked`` (those of the task's classes), ``multi`` (each task has its own, one after another), ``growing``
            (those of the classes that have come so far). All rows of the last layer are there from the start;
            ``weight_decay`` acts on the ones too that do not count.
        loss: ``cross_entropy``, or ``squared_error`` on one-hot targets, half the squared distance; minimised is the
            mean over a batch.
        target_scale: What a one-hot target has in place of 1 (15 in the code of Shon et al. 2022).
        optimizer: ``adam``, ``adamw`` or ``sgd``; made anew for every task.
        lr: Learning rate of the first task.
        lr_decay: Factor on it from one task to the next (Mirzadeh et al. 2020).
        min_lr: What the decay does not go below.
        momentum: For ``sgd``.
        weight_decay: As the optimizer of ``torch.optim`` understands it.
        schedule: Within a task: ``constant``, or down to 0: ``linear``, ``cosine``.
        clip_norm: Largest norm of the gradient, what a method adds to it included; None for no limit.
        epochs: Length of a task, of all or of each; either this or ``steps``. Without either, one epoch.
        steps: Length of a task in batches, of all or of each.
        batch_size: Samples a step.
        seed: Decides the order of the samples and what dropout and the method draw; not the initial weights.
        evaluation: What accuracies are measured on; hyper-parameters are chosen on ``validation``.
        evaluate_every: Steps between two points of the curves of the tasks so far; None for no curves.
        observe: Called after every task, with the model as it is evaluated; what it returns (plain values) joins the
            record of the task. It must not change the model.
        checkpoint: A file for the state after every task; if it exists, the run goes on from there.
        progress: Whether a terminal shows a progress bar.

    Raises:
        CurvlabError: An option, the stream, the model or its head do not go together; the loss or a weight ceases to
            be finite; the checkpoint belongs to another run, or cannot be read or written.

    Examples:
        >>> from curvlab.continual import permuted
        >>> from curvlab.continual.strategies import Naive
        >>> from curvlab.data import load
        >>> from curvlab.models import build
        >>> stream = permuted(load("digits"), tasks=2)
        >>> result = run(stream, build("mlp", (1, 8, 8), 10, hidden=(32,)), Naive(), epochs=3)
        >>> bool(result.accuracy[0, 0] > result.accuracy[1, 0])
        True
    """
    stream = tuple(stream)
    options: dict[str, Any] = {
        "head": head,
        "loss": loss,
        "target_scale": target_scale,
        "optimizer": optimizer,
        "lr": lr,
        "lr_decay": lr_decay,
        "min_lr": min_lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "clip_norm": clip_norm,
        "batch_size": batch_size,
        "seed": seed,
        "evaluation": evaluation,
        "evaluate_every": evaluate_every,
    }
    _check_options(options)
    _check_stream(stream, evaluation)
    lengths = _lengths(epochs, steps, len(stream))
    check_weights(model, "at the start of the run")
    with modes_restored(model), random_state_restored(reference(model).device):
        model.eval()
        count = _check_model(model, stream, evaluation)
    outputs = Outputs(stream, head, count, reference(model).device)
    rates = [max(lr * lr_decay**task, min_lr) for task in range(len(stream))]
    given, strategy = strategy, copy.deepcopy(strategy)
    learner = Learner(model, stream, outputs, loss, target_scale)
    learner.batch_size = batch_size
    size = len(stream)
    result = Result(torch.full((size, size), torch.nan, dtype=torch.float64), torch.full((size,), torch.nan).double())
    file = None
    if checkpoint is not None:
        options |= {
            "lengths": lengths,
            "stream": [task.fingerprint() for task in stream],
            "strategy": _describe(given),
        }
        file = CheckpointFile(Path(checkpoint), fingerprint(options, model))

    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    with (
        modes_restored(model),
        gradients_restored(model),
        random_state_restored(learner.device),
        torch.enable_grad(),
        progress_bar("learning", size, enabled=progress) as advance,
    ):
        try:
            _begin(learner, strategy, seed)
            states = None if file is None else checkpoints.read(file)
            if states is not None:
                _restore(states, learner, strategy, result)
            elif file is not None:
                make_writable_folder(file.path.parent)
            if not result.tasks and head != "growing":
                result.initial = _accuracies(learner, range(size), evaluation)
            advance(result.resumed_at)
            for task in range(result.resumed_at, size):
                learner.task, learner.lr = task, rates[task]
                learned = _Task(learner, strategy, options, lengths[task])
                record = learned.run(result, advance)
                started = time.perf_counter()
                measured = range(task + 1 if head == "growing" else min(task + 2, size))
                if learned.steps:
                    found = _accuracies(learner, measured, evaluation)
                    result.accuracy[task, : len(found)] = found
                record["evaluation_seconds"] += time.perf_counter() - started
                record["bytes"] = checkpoints.bytes_held(strategy.state())
                if observe is not None:
                    record |= observe(learner)
                result.tasks.append(record)
                if file is not None:
                    file.write(_states(learner, strategy, result))
        finally:
            for name, p in model.named_parameters():
                p.requires_grad_(requires_grad[name])
    return result


class _Task:
    """The training on one task."""

    def __init__(
        self, learner: Learner, strategy: Strategy, options: Mapping[str, Any], length: tuple[str, int]
    ) -> None:
        self.learner, self.strategy, self.options = learner, strategy, options
        self.source = _Source(learner, strategy.tasks(learner))
        self.batch_size: int = options["batch_size"]
        self.batches = math.ceil(len(self.source) / self.batch_size)
        kind, count = length
        self.steps = 0 if not len(self.source) else count * self.batches if kind == "epochs" else count
        learner.steps, learner.step = self.steps, 0
        self.losses: list[Tensor] = []
        self.loss: float | None = None

    def run(self, result: Result, advance: Callable[..., None]) -> Record:
        learner, strategy, options = self.learner, self.strategy, self.options
        task, seed = learner.task, options["seed"]
        learner.generator.manual_seed(derived_seed(seed, task, _STRATEGY))
        with random_state_restored(learner.device, derived_seed(seed, task, _DROPOUT)):
            started = time.perf_counter()
            strategy.before_task(learner)
            before = time.perf_counter()
            evaluating = self._train(result, advance)
            after = time.perf_counter()
            strategy.after_task(learner)
            check_weights(learner.model, f"after task {task}")
            ended = time.perf_counter()
        return {
            "task": task,
            "name": learner.stream[task].name,
            "steps": self.steps,
            "lr": learner.lr,
            "loss": self.loss,
            "seconds": after - before - evaluating,
            "strategy_seconds": before - started + ended - after,
            "evaluation_seconds": evaluating,
        }

    def _train(self, result: Result, advance: Callable[..., None]) -> float:
        """Do all steps, and return the seconds of the evaluations between them."""
        learner, strategy, options = self.learner, self.strategy, self.options
        model = learner.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise CurvlabError("the model has no trainable parameters (requires_grad is False for all)")
        optimizer = make_optimizer(
            options["optimizer"], parameters, learner.lr, options["momentum"], options["weight_decay"]
        )
        scheduler = make_schedule(options["schedule"], optimizer, max(self.steps, 1))
        clip, every = options["clip_norm"], options["evaluate_every"]
        # What naive fine-tuning does not do costs nothing.
        after_backward = _own(strategy, "after_backward")
        after_step = _own(strategy, "after_step")
        evaluating, shown, shown_at, note = 0.0, 0.0, -math.inf, ""
        model.train()
        batches = self._batches()
        with model_errors(f"fails in task {learner.task}"):
            for step in range(1, self.steps + 1):
                optimizer.zero_grad()
                loss = strategy.loss(learner, next(batches))
                loss.backward()
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
                self.losses.append(loss.detach())
                if len(self.losses) == _CHECK_EVERY or step == self.steps:
                    self._check_losses()
                if every is not None and (step % every == 0 or step == self.steps):
                    started = time.perf_counter()
                    note = self._point(result)
                    evaluating += time.perf_counter() - started
                if (now := time.monotonic()) > shown_at + _SHOW_EVERY:
                    advance(step / self.steps - shown, note=f"task {learner.task} {note}")
                    shown, shown_at = step / self.steps, now
        advance(1 - shown, note=f"task {learner.task} {note}")
        return evaluating

    def _batches(self) -> Iterator[Batch]:
        learner = self.learner
        for epoch in range(math.ceil(self.steps / max(self.batches, 1))):
            generator = torch.Generator().manual_seed(
                derived_seed(self.options["seed"], learner.task, _ORDER, epoch) % 2**63
            )
            order = torch.randperm(len(self.source), generator=generator)
            for index in order.split(self.batch_size):
                yield self.source.take(index)

    def _check_losses(self) -> None:
        losses = torch.stack(self.losses)
        self.losses.clear()
        self.loss = float(losses.double().mean())
        if not math.isfinite(self.loss):
            bad = int(losses.isfinite().logical_not().nonzero()[0])
            step = self.learner.step - len(losses) + 1 + bad
            raise CurvlabError(
                f"the training loss is {float(losses[bad])} at step {step} of task {self.learner.task}: lower lr (here "
                f"{self.learner.lr:g}) or the method's strength, or look at the scale of the inputs"
            )

    def _point(self, result: Result) -> str:
        learner = self.learner
        found = _accuracies(learner, range(learner.task + 1), self.options["evaluation"]).tolist()
        result.curves += [
            {"task": learner.task, "step": learner.step, "on": on, "accuracy": value} for on, value in enumerate(found)
        ]
        return f"accuracy {sum(found) / len(found):.1%}"


def _own(strategy: Strategy, hook: str) -> Callable[[Learner], None] | None:
    """Return a hook that is not the one of the base, which does nothing."""
    bound: Callable[[Learner], None] = getattr(strategy, hook)
    return None if getattr(bound, "__func__", None) is getattr(Strategy, hook) else bound


class _Source:
    """The training samples of one task, held as it sees them, or of several, made when they are drawn."""

    def __init__(self, learner: Learner, tasks: Sequence[int]) -> None:
        self.like = reference(learner.model)
        self.learner, self.tasks = learner, tuple(tasks)
        sizes = []
        if len(self.tasks) == 1:
            x, y = learner.stream[self.tasks[0]].train
            self.x, self.y = self._here(x), self._labels(y, self.tasks[0])
            sizes.append(len(x))
        else:
            sizes += [learner.stream[task].sizes["train"] for task in self.tasks]
        self.starts = torch.tensor([0, *sizes]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, index: Tensor) -> Batch:
        if len(self.tasks) == 1:
            index = index.to(self.x.device)
            return Batch(self.x[index], self.y[index], self.tasks[0])
        # Grouped by task; the order within a batch does not matter.
        which = torch.bucketize(index, self.starts[1:-1], right=True)
        parts = []
        for i in which.unique().tolist():
            task = self.tasks[i]
            x, y = self.learner.stream[task].take(index[which == i] - self.starts[i])
            parts.append((self._here(x), self._labels(y, task), torch.full((len(x),), task, device=self.like.device)))
        x, y, task = (torch.cat(part) for part in zip(*parts, strict=True))
        return Batch(x, y, task)

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.like.device, self.like.dtype if x.is_floating_point() else None)

    def _labels(self, y: Tensor, task: int) -> Tensor:
        return self.learner.outputs.of_labels(y, task).to(self.like.device)


def _accuracies(learner: Learner, tasks: Sequence[int], evaluation: str) -> Tensor:
    """Return the accuracies on tasks; samples that several of them share are gone through once."""
    model, like = learner.model, reference(learner.model)
    known: list[tuple[int, float]] = []
    with (
        modes_restored(model),
        random_state_restored(like.device),
        torch.no_grad(),
        model_errors("fails in evaluation"),
    ):
        model.eval()
        for i in tasks:
            task = learner.stream[i]
            same = next((a for j, a in known if _same(learner, i, j, evaluation)), None)
            if same is None:
                x, y = getattr(task, evaluation)
                counting = learner.outputs.counting(i, learner.task)
                right = torch.zeros((), dtype=torch.int64, device=like.device)
                for start in range(0, len(x), _EVALUATION_BATCH):
                    rows = slice(start, start + _EVALUATION_BATCH)
                    part = model(x[rows].to(like.device, like.dtype if x.is_floating_point() else None))
                    if counting is not None:
                        part = part.masked_fill(~counting, -torch.inf)
                    right += (part.argmax(1) == learner.outputs.of_labels(y[rows], i).to(like.device)).sum()
                same = int(right) / len(x)
            known.append((i, same))
    return torch.tensor([accuracy for _, accuracy in known], dtype=torch.float64)


def _same(learner: Learner, i: int, j: int, evaluation: str) -> bool:
    outputs = learner.outputs
    whole = outputs.counting(i, learner.task) is None and outputs.counting(j, learner.task) is None
    return whole and outputs.head == "single" and learner.stream[i].shares(learner.stream[j], evaluation)


# A run that is continued ----------------------------------------------------------------------------------------------


def _begin(learner: Learner, strategy: Strategy, seed: int) -> None:
    learner.generator.manual_seed(derived_seed(seed, len(learner.stream), _STRATEGY))
    with random_state_restored(learner.device, derived_seed(seed, len(learner.stream), _DROPOUT)):
        strategy.start(learner)


def _states(learner: Learner, strategy: Strategy, result: Result) -> dict[str, Any]:
    return {
        "model": model_tensors(learner.model),
        "requires_grad": {name: p.requires_grad for name, p in learner.model.named_parameters()},
        "strategy": dict(strategy.state()),
        "accuracy": result.accuracy,
        "initial": result.initial,
        "curves": result.curves,
        "tasks": result.tasks,
    }


def _restore(states: dict[str, Any], learner: Learner, strategy: Strategy, result: Result) -> None:
    with torch.no_grad():
        for name, tensor in model_tensors(learner.model).items():
            tensor.copy_(states["model"][name])
    for name, p in learner.model.named_parameters():
        p.requires_grad_(states["requires_grad"][name])
    strategy.restore(learner, states["strategy"])
    result.accuracy, result.initial = states["accuracy"], states["initial"]
    result.curves, result.tasks = states["curves"], states["tasks"]
    result.resumed_at = len(result.tasks)


def _describe(strategy: Strategy) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in vars(strategy).items())
    return f"{type(strategy).__name__}({options})"


# What there is to refuse ----------------------------------------------------------------------------------------------


def _check_options(options: Mapping[str, Any]) -> None:
    if options["loss"] not in ("cross_entropy", "squared_error"):
        raise CurvlabError(f"loss is cross_entropy or squared_error, not {options['loss']!r}")
    if options["evaluation"] not in ("test", "validation"):
        raise CurvlabError(f"evaluation is on test or validation, not on {options['evaluation']!r}")
    for name in ("batch_size", "evaluate_every"):
        if options[name] is not None and options[name] < 1:
            raise CurvlabError(f"{name} must be at least 1, not {options[name]}")
    for name in ("target_scale", "lr", "lr_decay", "clip_norm"):
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


def _lengths(
    epochs: int | Sequence[int] | None, steps: int | Sequence[int] | None, tasks: int
) -> list[tuple[str, int]]:
    """Return for each task what its length is counted in, and how long it is."""
    if epochs is not None and steps is not None:
        raise CurvlabError("give either epochs or steps, not both")
    kind, value = ("epochs", 1 if epochs is None else epochs) if steps is None else ("steps", steps)
    each = [value] * tasks if isinstance(value, int) else list(value)
    if len(each) != tasks:
        raise CurvlabError(f"{kind} has {len(each)} values, and there are {tasks} tasks")
    if min(each) < 1:
        raise CurvlabError(f"{kind} must be at least 1, not {min(each)}")
    return [(kind, count) for count in each]


def _check_stream(stream: Sequence[Task], evaluation: str) -> None:
    if not stream:
        raise CurvlabError("the stream has no tasks")
    shapes = {task.dataset.sample_shape for task in stream}
    if len(shapes) > 1:
        raise CurvlabError(f"the samples of a stream have one shape, and here they have {sorted(shapes)}")
    for i, task in enumerate(stream):
        for part in ("train", evaluation):
            if not task.sizes[part]:
                hint = "; make the stream with validation=N" if part == "validation" else ""
                raise CurvlabError(f"task {i} ({task.name}) has no {part} samples{hint}")


def _check_model(model: nn.Module, stream: Sequence[Task], evaluation: str) -> int:
    """Require samples that the model takes, and return how many outputs it has."""
    if all(not p.requires_grad for p in model.parameters()):
        raise CurvlabError("the model has no trainable parameters (requires_grad is False for all)")
    x, y = stream[0].take(torch.arange(1))
    with torch.no_grad(), model_errors("cannot take the samples"):
        like = reference(model)
        outputs = model(x.to(like.device, like.dtype if x.is_floating_point() else None))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise CurvlabError(f"the model must return one tensor (N, C); for one sample it returned {shape}")
    del y, evaluation
    return outputs.shape[1]
