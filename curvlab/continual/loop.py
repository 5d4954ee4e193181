"""Training loop over a stream of tasks, the same for every method."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from curvlab.continual import checkpoint as checkpoints
from curvlab.continual.checks import check_loss, check_model, check_options, check_strategy, check_stream
from curvlab.continual.learner import Learner
from curvlab.continual.measure import measure_accuracies
from curvlab.continual.outputs import Head, Outputs, TaskLoss
from curvlab.continual.source import Source
from curvlab.continual.steps import DROPOUT, STRATEGY, do_steps
from curvlab.continual.strategies.base import Strategy
from curvlab.continual.tasks import Part, Task
from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder, to_path
from curvlab.progress import Advance
from curvlab.progress import progress as progress_bar
from curvlab.randomness import preserve_random_state
from curvlab.training.checkpoint import CheckpointFile, fingerprint, model_tensors
from curvlab.training.lengths import count_steps, get_batch_size, split_by_task
from curvlab.training.observers import require_unchanged
from curvlab.training.options import Training, TrainingChanges, combine
from curvlab.training.samples import check_weights, reference
from curvlab.training.state import derive_seed, fork_random_state, restore_gradients, restore_modes

Record = dict[str, Any]
Observe = Callable[[Learner], Mapping[str, Any]]

_DEFAULT = Training(optimizer="sgd", lr=0.1, batch_size=64)


@dataclass
class Result:
    """Measurements of a run with T tasks.

    Attributes:
        accuracy: ``(T, T)``, float64: ``[t, i]`` is the accuracy (0 to 1) on task i after task t; NaN where it was not
            measured. The tasks so far are measured and, except with a growing head, the next task.
        initial: ``(T,)``: accuracy on each task before the first one is learnt; NaN with a growing head.
        curves: With ``evaluate_every``, records of ``task``, ``step`` (within the task), ``on`` (index of the evaluated
            task) and ``accuracy``.
        tasks: One record for each task: ``task``, ``name``, ``steps``, ``lr``, ``loss`` (mean over the last 100 steps;
            for ``DLCFT`` divided by the number of tasks so far), ``seconds`` (training), ``strategy_seconds`` (work of
            the method between tasks), ``evaluation_seconds``, ``bytes`` (memory of the method after the task), and the
            values that ``observe`` returned.
        resumed_at: Number of tasks that were restored from the checkpoint.
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
    loss: TaskLoss = "cross_entropy",
    target_scale: float = 1.0,
    training: Training = _DEFAULT,
    evaluation: Part = "test",
    evaluate_every: int | None = None,
    observe: Observe | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
    **changes: Unpack[TrainingChanges],
) -> Result:
    """Train a model on the tasks of a stream one after another, and measure the accuracy on each task.

    The model is trained in place, in train mode, on its device. The same seed gives the same numbers (bitwise on the
    CPU), also when a run is killed and continued from its checkpoint. Modes, gradients and the global random state are
    restored afterwards.

    Args:
        stream: The tasks; their samples have the same shape.
        model: Any module with one output tensor ``(N, C)``.
        strategy: The method, such as ``curvlab.continual.strategies.EWC(strength=100.0)``; the run uses a copy.
        head: Active outputs of a task, and the output of each class: ``single`` (all outputs, output k for class k),
            ``masked`` (the outputs of the task's classes), ``multi`` (each task has its own outputs, one task after
            another), ``growing`` (the outputs of all classes so far). All rows of the last layer exist from the start;
            ``weight_decay`` also acts on rows of inactive outputs. With ``cross_entropy``, each task needs at least two
            active outputs.
        loss: ``cross_entropy``, or ``squared_error`` (half the squared distance to one-hot targets); the mean over a
            batch is minimised.
        target_scale: Value of a one-hot target in place of 1 (15 in the code of Shon et al. 2022).
        training: Options of the training of each task. The default is SGD with lr 0.1 and batch size 64; a given
            ``Training`` replaces all defaults. Without ``epochs`` and ``steps``, each task has one epoch.
        evaluation: Samples for the accuracies: ``test``, or ``validation`` to choose hyper-parameters.
        evaluate_every: Number of steps between two points of the accuracy curves; None for no curves.
        observe: Function of the learner that is called after every task, with the model in eval mode. It returns a
            dictionary of plain values, which are added to the record of the task. It must not change the model; a
            change is an error, unless it is made through ``.data``.
        checkpoint: File for the state after every task; if it exists, the run continues from it. The model must have
            its weights from before the first task, not those of the stopped run.
        progress: Whether to show a progress bar in a terminal.
        **changes: Fields of ``training`` to change, such as ``lr=0.05, batch_size=[16, 32], epochs=3``.

    Raises:
        CurvlabError: An option, the stream or the model is invalid, or they do not fit together; the loss or a weight
            becomes NaN or infinite; the checkpoint belongs to another run, or cannot be read or written.

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
    stream = check_stream(stream, evaluation)
    check_strategy(strategy)
    if observe is not None and not callable(observe):
        raise CurvlabError(f"observe must be a function of the learner, not {type(observe).__name__}")
    options: dict[str, Any] = {
        "head": head,
        "loss": loss,
        "target_scale": target_scale,
        "evaluation": evaluation,
        "evaluate_every": evaluate_every,
    }
    # A checkpoint stores plain values only.
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    check_options(options)
    trainings = split_by_task(combine(training, changes), len(stream))
    outputs = Outputs(stream, head, check_model(model, stream), reference(model).device)
    check_loss(stream, outputs, loss)
    strategy = copy.deepcopy(strategy)
    checkpoints.name_parameters(strategy, model)
    file = None
    if checkpoint is not None:
        described = options | checkpoints.describe_training(trainings) | {"strategy": checkpoints.describe(strategy)}
        described |= {f"task {i}": f"{task.name} ({task.fingerprint()[:16]})" for i, task in enumerate(stream)}
        file = CheckpointFile(to_path(checkpoint), fingerprint(described, model))
    learner = Learner(model, stream, outputs, loss, options["target_scale"], get_batch_size(trainings[0]))
    return _Run(learner, strategy, options, trainings, observe, file).learn_all(progress)


class _Run:
    """State of a run."""

    def __init__(
        self,
        learner: Learner,
        strategy: Strategy,
        options: Mapping[str, Any],
        trainings: Sequence[Training],
        observe: Observe | None,
        file: CheckpointFile | None,
    ) -> None:
        self.learner, self.strategy, self.options, self.trainings = learner, strategy, options, trainings
        self.observe, self.file = observe, file
        tasks = len(learner.stream)
        self.result = Result(torch.full((tasks, tasks), torch.nan).double(), torch.full((tasks,), torch.nan).double())
        self.saved = 0
        self.began = "" if file is None else checkpoints.hash_weights(learner.model)

    # Stream -----------------------------------------------------------------------------------------------------------

    def learn_all(self, progress: bool) -> Result:
        learner, result = self.learner, self.result
        model, tasks = learner.model, len(learner.stream)
        requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        with (
            restore_modes(model),
            restore_gradients(model),
            fork_random_state(learner.device),
            torch.enable_grad(),
            progress_bar("learning", tasks, enabled=progress) as advance,
        ):
            try:
                self._begin()
                advance(result.resumed_at)
                for learner.task in range(result.resumed_at, tasks):
                    record = self._learn_task(advance)
                    self._measure(record)
                    result.tasks.append(record)
                    if self.file is not None:
                        checkpoints.check_storable(self.strategy, record)
                        self.file.write(self._states())
                        self.saved = len(result.tasks)
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(self._describe_interruption())
                raise
            finally:
                for name, p in model.named_parameters():
                    p.requires_grad_(requires_grad[name])
        return result

    def _begin(self) -> None:
        learner, seed, tasks = self.learner, self.trainings[0].seed, len(self.learner.stream)
        states = None
        if self.file is not None:
            states = checkpoints.read(self.file, self.began)
            if states is None:
                make_writable_folder(self.file.path.parent)
        learner.generator.manual_seed(derive_seed(seed, tasks, STRATEGY))
        with fork_random_state(learner.device, derive_seed(seed, tasks, DROPOUT)):
            self.strategy.start(learner)
        if states is not None:
            self._restore(states)
        elif self.options["head"] != "growing":
            self.result.initial = measure_accuracies(learner, range(tasks), self.options["evaluation"])

    def _measure(self, record: Record) -> None:
        """Evaluate the tasks so far and, except with a growing head, the next task; then call ``observe``."""
        learner, options, model = self.learner, self.options, self.learner.model
        if record["steps"]:
            started = time.perf_counter()
            ahead = 1 if options["head"] == "growing" else 2
            measured = range(min(learner.task + ahead, len(learner.stream)))
            found = measure_accuracies(learner, measured, options["evaluation"])
            self.result.accuracy[learner.task, : len(found)] = found
            record["evaluation_seconds"] += time.perf_counter() - started
        record["bytes"] = checkpoints.count_bytes(self.strategy.state())
        if self.observe is not None:
            with require_unchanged(model), preserve_random_state(), restore_gradients(model), restore_modes(model):
                model.eval()
                seen = self.observe(learner)
            if not isinstance(seen, Mapping):
                raise CurvlabError(
                    f"observe must return a dictionary of plain values (it may be empty), not {type(seen).__name__}"
                )
            if taken := sorted(record.keys() & seen.keys()):
                raise CurvlabError(f"observe must not return {taken[0]!r}, a key of every record: choose another key")
            record |= seen

    # Task -------------------------------------------------------------------------------------------------------------

    def _learn_task(self, advance: Advance) -> Record:
        learner, strategy, options, task = self.learner, self.strategy, self.options, self.learner.task
        training = self.trainings[task]
        # Only tasks with training steps count: joint training starts with the initial rate at the last task.
        decay = training.lr_decay ** sum(record["steps"] > 0 for record in self.result.tasks)
        learner.lr, learner.batch_size = max(training.lr * decay, training.min_lr), get_batch_size(training)
        learner.generator.manual_seed(derive_seed(training.seed, task, STRATEGY))
        learner.step, learner.steps, learner.epoch_steps = 0, 0, 1
        with fork_random_state(learner.device, derive_seed(training.seed, task, DROPOUT)):
            # A run that continues here from a checkpoint starts in the same state.
            learner.model.train()
            learner.model.zero_grad()
            times = [time.perf_counter()]
            source = None
            if tasks := strategy.tasks(learner):
                source = Source(learner, tasks)
                learner.epoch_steps = math.ceil(len(source) / learner.batch_size)
                learner.steps = count_steps(training, learner.epoch_steps)
            times.append(time.perf_counter())
            strategy.before_task(learner)
            times.append(time.perf_counter())
            loss, evaluating = None, 0.0
            if source is None:
                advance()
            else:
                every = options["evaluate_every"]
                loss, evaluating = do_steps(learner, strategy, training, source, every, self._record_curves, advance)
            times.append(time.perf_counter())
            way_out = f"lower lr (here {learner.lr:g}) or the method's strength"
            check_weights(learner.model, f"after the last step of task {task}: {way_out}")
            strategy.after_task(learner)
            check_weights(learner.model, f"after {type(strategy).__name__}.after_task of task {task}: {way_out}")
            times.append(time.perf_counter())
        prepared, before, trained, after = (later - earlier for earlier, later in pairwise(times))
        return {
            "task": task,
            "name": learner.stream[task].name,
            "steps": learner.steps,
            "lr": learner.lr,
            "loss": loss,
            "seconds": prepared + trained - evaluating,
            "strategy_seconds": before + after,
            "evaluation_seconds": evaluating,
        }

    def _record_curves(self) -> str:
        """Evaluate the tasks so far for the curves, and return a text for the progress bar."""
        learner = self.learner
        found = measure_accuracies(learner, range(learner.task + 1), self.options["evaluation"]).tolist()
        self.result.curves += [
            {"task": learner.task, "step": learner.step, "on": on, "accuracy": value} for on, value in enumerate(found)
        ]
        return f"accuracy {sum(found) / len(found):.1%}"

    # Checkpoint ---------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, Any]:
        model, result = self.learner.model, self.result
        return {
            "began": self.began,
            "model": model_tensors(model),
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "strategy": dict(self.strategy.state()),
            "accuracy": result.accuracy,
            "initial": result.initial,
            "curves": result.curves,
            "tasks": result.tasks,
        }

    def _restore(self, states: Mapping[str, Any]) -> None:
        model, result = self.learner.model, self.result
        with torch.no_grad():
            for name, tensor in model_tensors(model).items():
                tensor.copy_(states["model"][name])
        for name, p in model.named_parameters():
            p.requires_grad_(states["requires_grad"][name])
        self.strategy.restore(self.learner, states["strategy"])
        result.accuracy, result.initial = states["accuracy"], states["initial"]
        result.curves, result.tasks = states["curves"], states["tasks"]
        self.saved = result.resumed_at = len(result.tasks)

    def _describe_interruption(self) -> str:
        stopped = f"the run stopped in task {self.learner.task} of {len(self.learner.stream)} (counted from 0)"
        if self.file is None:
            return f"{stopped} and nothing is saved; with checkpoint=PATH it could be continued"
        if not self.saved:
            return f"{stopped}, before the first save in {self.file.path}"
        return (
            f"{stopped}; to continue after task {self.saved - 1}, saved in {self.file.path}, repeat the call with the "
            "model in its initial state"
        )
