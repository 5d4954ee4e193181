"""How well a stream of tasks was learnt, and how much of it was forgotten, from accuracies alone.

``accuracy`` is a matrix ``(T, T)``: ``accuracy[t, i]`` was measured on task i after task t was learnt, and is NaN where
it was not measured. A metric that needs a missing accuracy is NaN, never the mean of those that are there. Of training
on all tasks together, for example, only the last row is known, and so nothing but ``acc``.

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
    """Return ``A_t``, the mean accuracy after task t on the tasks so far, for every t: shape ``(T,)``, float64.

    Raises:
        CurvlabError: The accuracies are not such a matrix.

    Examples:
        >>> average_accuracy(torch.tensor([[0.9, torch.nan], [0.5, 0.7]]))
        tensor([0.9000, 0.6000], dtype=torch.float64)
    """
    a = _checked(accuracy)
    return torch.stack([a[t, : t + 1].mean() for t in range(len(a))])


def acc(accuracy: Tensor) -> float:
    """Return ``A_T``, the mean accuracy on all tasks after the last one.

    Raises:
        CurvlabError: The accuracies are not such a matrix.
    """
    return float(_checked(accuracy)[-1].mean())


def bwt(accuracy: Tensor) -> float:
    """Return backward transfer: how much better tasks are done at the end than when they were learnt.

    It is the mean of ``a[T, i] - a[i, i]`` over all tasks i but the last, negative where tasks are forgotten; NaN for
    one task.

    Raises:
        CurvlabError: The accuracies are not such a matrix.
    """
    a = _checked(accuracy)
    return float((a[-1] - a.diagonal())[:-1].mean())


def fwt(accuracy: Tensor, initial: Tensor) -> float:
    """Return forward transfer: how much better tasks are done just before they are learnt than before the first one.

    It is the mean of ``a[i - 1, i] - initial[i]`` over all tasks i but the first; NaN for one task.

    Args:
        accuracy: ``(T, T)``.
        initial: Accuracy on every task of the network before it has learnt anything, ``(T,)``.

    Raises:
        CurvlabError: The accuracies are not such a matrix, or the initial ones do not fit it.
    """
    a = _checked(accuracy)
    if initial.shape != a.shape[:1]:
        raise CurvlabError(
            f"initial has an accuracy for each of the {len(a)} tasks, shape ({len(a)},), not {tuple(initial.shape)}"
        )
    return float((a.diagonal(1) - initial.to(a)[1:]).mean())


def forgetting(accuracy: Tensor, *, include_last: bool = False) -> float:
    """Return how much worse tasks are done at the end than at their best since they were learnt.

    It is the mean of ``max_t a[t, i] - a[T, i]``, ``i <= t < T``, over all tasks i but the last, negative where tasks
    are done better at the end than ever before; NaN for one task. Accuracies before a task was learnt do not enter, so
    that it does not matter whether they were measured.

    Args:
        accuracy: ``(T, T)``.
        include_last: Take ``t = T`` into the maximum, as the code of Mirzadeh et al. (2020) does: then no task counts
            less than 0.

    Raises:
        CurvlabError: The accuracies are not such a matrix.

    Examples:
        >>> a = torch.tensor([[0.9, 0.1, 0.1], [0.8, 0.9, 0.1], [0.5, 0.95, 0.9]]).double()
        >>> round(forgetting(a), 4), round(forgetting(a, include_last=True), 4)
        (0.175, 0.2)
    """
    a = _checked(accuracy)
    last = len(a) - 1
    stop = last + 1 if include_last else last
    best = [a[i:stop, i].max() for i in range(last)]  # NaN if one of them is
    return float((torch.stack(best) - a[-1, :-1]).mean()) if best else math.nan


def learning_accuracy(accuracy: Tensor) -> float:
    """Return the mean accuracy on every task just after it was learnt, ``a[i, i]``.

    Raises:
        CurvlabError: The accuracies are not such a matrix.
    """
    return float(_checked(accuracy).diagonal().mean())


def summary(accuracy: Tensor, initial: Tensor | None = None) -> dict[str, float]:
    """Return the numbers of a run by name: ``acc``, ``bwt``, ``fwt``, ``forgetting`` and ``learning_accuracy``.

    Args:
        accuracy: ``(T, T)``.
        initial: As ``fwt`` takes it; None if it was not measured.

    Returns:
        NaN for what is not defined, with one task, or not measured.

    Raises:
        CurvlabError: The accuracies are not such a matrix, or the initial ones do not fit it.

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


def _checked(accuracy: Tensor) -> Tensor:
    """Return the accuracies in float64, once they are a matrix of numbers and NaN."""
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or not len(accuracy):
        raise CurvlabError(
            f"accuracies are a matrix (T, T), a row for each task that was learnt and a column for each that was "
            f"measured, not of shape {tuple(accuracy.shape)}"
        )
    if accuracy.isinf().any():
        raise CurvlabError("an accuracy is infinite; give NaN where none was measured")
    return accuracy.detach().double()
