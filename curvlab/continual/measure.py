"""Accuracy of a network on each task."""

from collections.abc import Iterable

import torch
from torch import Tensor

from curvlab.continual.learner import Learner
from curvlab.continual.task import Part
from curvlab.training.samples import reference, take, translate_model_errors
from curvlab.training.state import fork_random_state, restore_modes

_BATCH = 1000


def measure_accuracies(learner: Learner, tasks: Iterable[int], part: Part) -> Tensor:
    """Return the accuracies on tasks, float64; samples that several tasks share are evaluated once.

    Args:
        learner: State of the run; its model is evaluated in eval mode.
        tasks: Indices of the tasks.
        part: Part of the samples to evaluate on.

    Raises:
        CurvlabError: The model fails on the samples.
    """
    model = learner.model
    known: dict[int, float] = {}
    with (
        restore_modes(model),
        fork_random_state(learner.device),
        torch.no_grad(),
        translate_model_errors("fails in evaluation"),
    ):
        model.eval()
        for task in tasks:
            same = next((other for other in known if _have_same_accuracy(learner, task, other, part)), None)
            known[task] = _measure_accuracy(learner, task, part) if same is None else known[same]
    return torch.tensor(list(known.values()), dtype=torch.float64)


def _measure_accuracy(learner: Learner, task: int, part: Part) -> float:
    x, y = getattr(learner.stream[task], part)
    y = learner.outputs.map_labels(y, task)
    active, like = learner.outputs.active_mask(task, learner.task), reference(learner.model)
    correct = torch.zeros((), dtype=torch.int64, device=like.device)
    for start in range(0, len(x), _BATCH):
        inputs, labels = take((x, y), slice(start, start + _BATCH), like)
        outputs = learner.model(inputs.clone())  # a model may write in place, and a slice is a view of the data set
        if active is not None:
            outputs = outputs.where(active, -torch.inf)
        correct += (outputs.argmax(1) == labels).sum()
    return int(correct) / len(x)


def _have_same_accuracy(learner: Learner, task: int, other: int, part: Part) -> bool:
    if not learner.stream[task].shares(learner.stream[other], part):
        return False
    one, another = (learner.outputs.active_mask(each, learner.task) for each in (task, other))
    return one is another is None or (one is not None and another is not None and torch.equal(one, another))
