"""Metrics of continual learning, computed from a matrix of accuracies.

``accuracy`` is a matrix ``(T, T)``: ``accuracy[t, i]`` is the accuracy on task i after task t was learnt, and NaN if it
was not measured. A metric that needs a missing accuracy is NaN, never the mean of the others. For training on all tasks
together, for example, only the last row is known, so that all metrics but ``acc`` are NaN.

References:
    Lopez-Paz and Ranzato (2017), Gradient episodic memory for continual learning (backward and forward transfer);
    Chaudhry et al. (2018), Riemannian walk for incremental learning (average accuracy, forgetting); Riemer et al.
    (2019), Learning to learn without forgetting by maximizing transfer and minimizing interference (learning accuracy).
"""

import math

import torch
from torch import Tensor

from curvlab.errors import CurvlabError


def average_accuracy(accuracy: Tensor) -> Tensor:
    """Return the mean accuracy ``A_t`` on the tasks so far, after every task t: shape ``(T,)``, float64.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix.

    Examples:
        >>> average_accuracy(torch.tensor([[0.9, torch.nan], [0.5, 0.7]]))
        tensor([0.9000, 0.6000], dtype=torch.float64)
    """
    a = _check_matrix(accuracy)
    return torch.stack([a[t, : t + 1].mean() for t in range(len(a))])


def acc(accuracy: Tensor) -> float:
    """Return ``A_T``, the mean accuracy on all tasks after the last one.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix.
    """
    return float(_check_matrix(accuracy)[-1].mean())


def bwt(accuracy: Tensor) -> float:
    """Return the backward transfer: the change of the accuracies since the tasks were learnt.

    It is the mean of ``a[T, i] - a[i, i]`` over all tasks i except the last. It is negative if tasks are forgotten, and
    NaN for one task.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix.
    """
    a = _check_matrix(accuracy)
    return float((a[-1] - a.diagonal())[:-1].mean())


def fwt(accuracy: Tensor, initial: Tensor) -> float:
    """Return the forward transfer: the gain in accuracy on tasks before they are learnt.

    It is the mean of ``a[i - 1, i] - initial[i]`` over all tasks i except the first; NaN for one task.

    Args:
        accuracy: ``(T, T)``.
        initial: Accuracy of the untrained network on every task, ``(T,)``.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``initial`` does not have its length.
    """
    a = _check_matrix(accuracy)
    if initial.shape != a.shape[:1]:
        raise CurvlabError(f"initial must have one accuracy per task, shape ({len(a)},), not {tuple(initial.shape)}")
    return float((a.diagonal(1) - initial.to(a)[1:]).mean())


def forgetting(accuracy: Tensor, *, include_last: bool = False) -> float:
    """Return the forgetting: the loss of accuracy since the best accuracy after a task was learnt.

    It is the mean of ``max_t a[t, i] - a[T, i]``, ``i <= t < T``, over all tasks i except the last. It is negative if
    the accuracy at the end is higher than ever before, and NaN for one task. Accuracies from before a task was learnt
    are not used, and may be missing.

    Args:
        accuracy: ``(T, T)``.
        include_last: Include ``t = T`` in the maximum, as the code of Mirzadeh et al. (2020) does; then each task
            contributes at least 0.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix.

    Examples:
        >>> a = torch.tensor([[0.9, 0.1, 0.1], [0.8, 0.9, 0.1], [0.5, 0.95, 0.9]]).double()
        >>> round(forgetting(a), 4), round(forgetting(a, include_last=True), 4)
        (0.175, 0.2)
    """
    a = _check_matrix(accuracy)
    last = len(a) - 1
    stop = last + 1 if include_last else last
    best = [a[i:stop, i].max() for i in range(last)]  # NaN if one of them is
    return float((torch.stack(best) - a[-1, :-1]).mean()) if best else math.nan


def learning_accuracy(accuracy: Tensor) -> float:
    """Return the learning accuracy: the mean over tasks of ``a[i, i]``, measured just after the task was learnt.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix.
    """
    return float(_check_matrix(accuracy).diagonal().mean())


def summary(accuracy: Tensor, initial: Tensor | None = None) -> dict[str, float]:
    """Return all metrics by name: ``acc``, ``bwt``, ``fwt``, ``forgetting`` and ``learning_accuracy``.

    Args:
        accuracy: ``(T, T)``.
        initial: Accuracy of the untrained network on every task, ``(T,)``; None if it was not measured.

    Returns:
        The metrics; NaN for a metric that is not defined or needs a missing accuracy.

    Raises:
        CurvlabError: ``accuracy`` is not such a matrix, or ``initial`` does not have its length.

    Examples:
        >>> summary(torch.tensor([[torch.nan, torch.nan], [0.75, 0.25]]))
        {'acc': 0.5, 'bwt': nan, 'fwt': nan, 'forgetting': nan, 'learning_accuracy': nan}
    """
    return {
        "acc": acc(accuracy),
        "bwt": bwt(accuracy),
        "fwt": math.nan if initial is None else fwt(accuracy, initial),
        "forgetting": forgetting(accuracy),
        "learning_accuracy": learning_accuracy(accuracy),
    }


def _check_matrix(accuracy: Tensor) -> Tensor:
    """Return the accuracies in float64, after a check of their shape and values."""
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or not len(accuracy):
        raise CurvlabError(
            "accuracy must be a matrix (T, T), a row for each learnt task and a column for each evaluated task, not "
            f"of shape {tuple(accuracy.shape)}"
        )
    if accuracy.isinf().any():
        raise CurvlabError("an accuracy is infinite; use NaN for accuracies that were not measured")
    return accuracy.detach().double()
