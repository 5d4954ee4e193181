"""Metrics of continual learning, computed from a matrix of accuracies.

``accuracy`` is a matrix ``(T, T)``: ``accuracy[t, i]`` is the accuracy on task i after task t was learnt, and NaN if it
was not measured. A metric that needs a missing accuracy is NaN, never the mean of the others. For training on all tasks
together, for example, only the last row is known, so that all metrics but ``acc`` are NaN.

A matrix ``(R, T)`` with another number of rows, or in another order, is a stream that stopped early, several
evaluations per task, or tasks that are learnt again. ``tasks`` then names the task of each row; None means that row t
is after task t. The last of consecutive rows of a task is after it was learnt; the rows before it are evaluations
during its training, which only ``average_accuracy`` uses. A metric that the matrix does not define raises
``UnsupportedError``.

References:
    Lopez-Paz and Ranzato (2017), Gradient episodic memory for continual learning (backward and forward transfer);
    Chaudhry et al. (2018), Riemannian walk for incremental learning (average accuracy, forgetting); Riemer et al.
    (2019), Learning to learn without forgetting by maximizing transfer and minimizing interference (learning accuracy).
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from curvlab.checks import describe_value, whole_number
from curvlab.errors import CurvlabError, UnsupportedError


def average_accuracy(accuracy: Tensor, *, tasks: Sequence[int] | None = None) -> Tensor:
    """Return the mean accuracy on the tasks so far, ``A_t``, in every row: shape ``(R,)``, float64.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        tasks: The task of each row; None if row t is after task t.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` does not fit it.

    Examples:
        >>> average_accuracy(torch.tensor([[0.9, torch.nan], [0.5, 0.7]]))
        tensor([0.9000, 0.6000], dtype=torch.float64)
        >>> average_accuracy(torch.tensor([[0.8, torch.nan], [0.9, torch.nan], [0.5, 0.7]]), tasks=[0, 0, 1])
        tensor([0.8000, 0.9000, 0.6000], dtype=torch.float64)
    """
    rows = _Rows.of(accuracy, tasks)
    return torch.stack([row[sorted(set(rows.tasks[: r + 1]))].mean() for r, row in enumerate(rows.accuracy)])


def acc(accuracy: Tensor, *, tasks: Sequence[int] | None = None) -> float:
    """Return ``A_T``, the mean accuracy on all tasks after the last one.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        tasks: The task of each row; None if row t is after task t.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` does not fit it.
        UnsupportedError: A task is not learnt.
    """
    return float(_Rows.of(accuracy, tasks).require_all("acc").accuracy[-1].mean())


def bwt(accuracy: Tensor, *, tasks: Sequence[int] | None = None) -> float:
    """Return the backward transfer: the change of the accuracies since the tasks were learnt.

    It is the mean of ``a[T, i] - a[i, i]`` over all tasks i except the last. It is negative if tasks are forgotten, and
    NaN for one task.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        tasks: The task of each row; None if row t is after task t.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` does not fit it.
        UnsupportedError: A task is not learnt, or is learnt several times.
    """
    ends = _Rows.of(accuracy, tasks).require_all("bwt").ends().require_once("bwt")
    return float((ends.accuracy[-1] - ends.learnt())[ends.tasks[:-1]].mean())


def fwt(accuracy: Tensor, initial: Tensor, *, tasks: Sequence[int] | None = None) -> float:
    """Return the forward transfer: the gain in accuracy on tasks before they are learnt.

    It is the mean of ``a[i - 1, i] - initial[i]`` over all tasks i except the first; NaN for one task. The last row is
    not used, and may be absent. A task that is learnt again counts before it is first learnt.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        initial: Accuracy of the untrained network on every task, ``(T,)``.
        tasks: The task of each row; None if row t is after task t.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` or ``initial`` does not fit it.
        UnsupportedError: There is no row before a task.
    """
    rows = _Rows.of(accuracy, tasks)
    count = rows.accuracy.shape[1]
    if not isinstance(initial, Tensor) or initial.shape != (count,):
        raise CurvlabError(
            f"initial must have one accuracy per task, shape ({count},), not "
            f"{tuple(initial.shape) if isinstance(initial, Tensor) else describe_value(initial)}"
        )
    if tasks is None and len(rows.tasks) == count - 1:
        rows = _Rows(rows.accuracy, [*rows.tasks, count - 1])  # the row before the last task is all it needs
    ends = rows.require_all("fwt").ends()
    later = [i for i in range(count) if i != ends.tasks[0]]
    before = [ends.accuracy[ends.tasks.index(i) - 1, i] for i in later]
    return float((torch.stack(before) - initial.to(ends.accuracy)[later]).mean()) if before else math.nan


def forgetting(accuracy: Tensor, *, include_last: bool = False, tasks: Sequence[int] | None = None) -> float:
    """Return the forgetting: the loss of accuracy since the best accuracy after a task was learnt.

    It is the mean of ``forgetting_per_task`` over all tasks except the last: ``max_t a[t, i] - a[T, i]``,
    ``i <= t < T``. It is negative if the accuracy at the end is higher than ever before, and NaN for one task.
    Accuracies from before a task was learnt are not used, and may be missing.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        include_last: Include ``t = T`` in the maximum, as the code of Mirzadeh et al. (2020) does; then each task
            contributes at least 0.
        tasks: The task of each row; None if row t is after task t.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` does not fit it.
        UnsupportedError: A task is not learnt.

    Examples:
        >>> a = torch.tensor([[0.9, 0.1, 0.1], [0.8, 0.9, 0.1], [0.5, 0.95, 0.9]]).double()
        >>> round(forgetting(a), 4), round(forgetting(a, include_last=True), 4)
        (0.175, 0.2)
    """
    ends = _Rows.of(accuracy, tasks).require_all("forgetting").ends()
    earlier = [i for i in range(ends.accuracy.shape[1]) if i != ends.tasks[-1]]
    return float(ends.forgetting(include_last)[earlier].mean())


def forgetting_per_task(accuracy: Tensor, *, include_last: bool = False, tasks: Sequence[int] | None = None) -> Tensor:
    """Return the forgetting of every task, ``(T,)``, float64; NaN for the task that is learnt last.

    It is ``max_t a[t, i] - a[T, i]``, ``i <= t < T``. A task that is learnt again counts from when it was first learnt.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        include_last: Include ``t = T`` in the maximum; see ``forgetting``.
        tasks: The task of each row; None if row t is after task t.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` does not fit it.
        UnsupportedError: A task is not learnt.

    Examples:
        >>> forgetting_per_task(torch.tensor([[0.9, 0.1, 0.1], [0.8, 0.9, 0.1], [0.5, 0.95, 0.9]]).double())
        tensor([ 0.4000, -0.0500,     nan], dtype=torch.float64)
    """
    return _Rows.of(accuracy, tasks).require_all("forgetting_per_task").ends().forgetting(include_last)


def learning_accuracy(accuracy: Tensor, *, tasks: Sequence[int] | None = None) -> float:
    """Return the learning accuracy: the mean over tasks of ``a[i, i]``, measured just after the task was learnt.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        tasks: The task of each row; None if row t is after task t.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` does not fit it.
        UnsupportedError: A task is not learnt, or is learnt several times.
    """
    rows = _Rows.of(accuracy, tasks).require_all("learning_accuracy")
    return float(rows.ends().require_once("learning_accuracy").learnt().mean())


def summary(accuracy: Tensor, initial: Tensor | None = None, *, tasks: Sequence[int] | None = None) -> dict[str, float]:
    """Return all metrics by name: ``acc``, ``bwt``, ``fwt``, ``forgetting`` and ``learning_accuracy``.

    Args:
        accuracy: ``(T, T)`` or ``(R, T)``.
        initial: Accuracy of the untrained network on every task, ``(T,)``; None if it was not measured.
        tasks: The task of each row; None if row t is after task t.

    Returns:
        The metrics; NaN for a metric that is not defined or needs a missing accuracy.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``tasks`` or ``initial`` does not fit it.

    Examples:
        >>> summary(torch.tensor([[torch.nan, torch.nan], [0.75, 0.25]]))
        {'acc': 0.5, 'bwt': nan, 'fwt': nan, 'forgetting': nan, 'learning_accuracy': nan}
    """
    values = dict.fromkeys(("acc", "bwt", "fwt", "forgetting", "learning_accuracy"), math.nan)
    metrics = {
        "acc": acc,
        "bwt": bwt,
        "forgetting": forgetting,
        "learning_accuracy": learning_accuracy,
    } | ({} if initial is None else {"fwt": partial(fwt, initial=initial)})
    for name, metric in metrics.items():
        with suppress(UnsupportedError):  # this matrix does not define it
            values[name] = metric(accuracy, tasks=tasks)
    return values


@dataclass(frozen=True)
class _Rows:
    """Accuracies with the task of each row.

    Attributes:
        accuracy: ``(R, T)``, float64.
        tasks: The task of each row.
    """

    accuracy: Tensor
    tasks: list[int]

    @classmethod
    def of(cls, accuracy: Tensor, tasks: Sequence[int] | None) -> "_Rows":
        """Check the accuracies and the tasks of the rows.

        Raises:
            CurvlabError: The accuracies are not a matrix of numbers, or the tasks are not one per row.
        """
        if not isinstance(accuracy, Tensor) or accuracy.ndim != 2 or not accuracy.numel():
            given = f"of shape {tuple(accuracy.shape)}" if isinstance(accuracy, Tensor) else describe_value(accuracy)
            raise CurvlabError(
                "accuracy must be a matrix (T, T), a row for each learnt task and a column for each evaluated task, "
                f"not {given}"
            )
        if accuracy.isinf().any():
            raise CurvlabError("an accuracy is infinite; use NaN for accuracies that were not measured")
        count, columns = accuracy.shape
        if tasks is None:
            if count > columns:
                raise CurvlabError(
                    f"accuracy has {count} rows for {columns} tasks: give the task of each row, such as "
                    "tasks=[0, 0, 1, 1] for two evaluations of each of two tasks"
                )
            of_rows = list(range(count))
        else:
            several = tasks if isinstance(tasks, Iterable) else ()
            of_rows = [whole_number(task, "a task of a row") for task in several]
            if len(of_rows) != count or max(of_rows) >= columns:
                raise CurvlabError(
                    f"tasks must give the task of each of the {count} rows, a whole number below {columns}, not "
                    f"{describe_value(tasks)}"
                )
        return cls(accuracy.detach().double(), of_rows)

    def ends(self) -> "_Rows":
        """Return the rows in which a task has been learnt: the last of consecutive rows of a task."""
        runs = [list(run) for _, run in groupby(range(len(self.tasks)), self.tasks.__getitem__)]
        last = [run[-1] for run in runs if run[-1] < len(self.accuracy)]
        return _Rows(self.accuracy[last], [self.tasks[run[-1]] for run in runs])

    def learnt(self) -> Tensor:
        """Return the accuracy on every task in its row, ``(T,)``; each task has one row."""
        return torch.stack([self.accuracy[self.tasks.index(i), i] for i in range(self.accuracy.shape[1])])

    def forgetting(self, include_last: bool) -> Tensor:
        """Return the best accuracy of each task since it was learnt minus the last, ``(T,)``; NaN for the last task."""
        last = len(self.accuracy) - 1
        found = torch.full_like(self.accuracy[-1], math.nan)
        for i in set(self.tasks) - {self.tasks[-1]}:
            since = self.accuracy[self.tasks.index(i) : last + include_last, i]
            found[i] = since.max() - self.accuracy[-1, i]  # NaN if one of them is
        return found

    def require_all(self, metric: str) -> "_Rows":
        """Return the rows after checking that every task is learnt.

        Raises:
            UnsupportedError: One is not.
        """
        columns = self.accuracy.shape[1]
        if absent := sorted(set(range(columns)) - set(self.tasks)):
            raise UnsupportedError(
                f"{metric} is defined after all {columns} tasks, but no row is after task {absent[0]}: leave out the "
                "columns of tasks that are not learnt, or use average_accuracy"
            )
        return self

    def require_once(self, metric: str) -> "_Rows":
        """Return the rows after checking that no task is learnt again.

        Raises:
            UnsupportedError: One is.
        """
        if again := sorted(i for i in set(self.tasks) if self.tasks.count(i) > 1):
            raise UnsupportedError(
                f"{metric} needs the accuracy on a task just after it was learnt, but task {again[0]} is learnt "
                "several times: use acc or forgetting, which are defined for repeated tasks"
            )
        return self
