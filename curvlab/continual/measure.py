"""How accurate a network is on each of the tasks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from curvlab.continual.learner import Learner
from curvlab.continual.task import Part
from curvlab.training.samples import reference, take, translate_model_errors
from curvlab.training.state import preserve_modes, random_state_restored

_BATCH = 1000


def accuracies(learner: Learner, tasks: Iterable[int], part: Part) -> Tensor:
    """Return the accuracies on tasks, float64; samples that several of them share are gone through once.

    Args:
        learner: The state of the run; its model is measured in eval mode.
        tasks: Which ones.
        part: What they are measured on.

    Raises:
        CurvlabError: The model does not take the samples.
    """
    model = learner.model
    known: dict[int, float] = {}
    with (
        preserve_modes(model),
        random_state_restored(learner.device),
        torch.no_grad(),
        translate_model_errors("fails in evaluation"),
    ):
        model.eval()
        for task in tasks:
            same = next((other for other in known if _alike(learner, task, other, part)), None)
            known[task] = _accuracy(learner, task, part) if same is None else known[same]
    return torch.tensor(list(known.values()), dtype=torch.float64)


def _accuracy(learner: Learner, task: int, part: Part) -> float:
    x, y = getattr(learner.stream[task], part)
    y = learner.outputs.of_labels(y, task)
    counting, like = learner.outputs.counting(task, learner.task), reference(learner.model)
    right = torch.zeros((), dtype=torch.int64, device=like.device)
    for start in range(0, len(x), _BATCH):
        inputs, labels = take((x, y), slice(start, start + _BATCH), like)
        outputs = learner.model(inputs.clone())  # a model may work in place, and a slice is of the data set itself
        if counting is not None:
            outputs = outputs.where(counting, -torch.inf)
        right += (outputs.argmax(1) == labels).sum()
    return int(right) / len(x)


def _alike(learner: Learner, task: int, other: int, part: Part) -> bool:
    if not learner.stream[task].shares(learner.stream[other], part):
        return False
    one, another = (learner.outputs.counting(each, learner.task) for each in (task, other))
    return one is another is None or (one is not None and another is not None and torch.equal(one, another))
