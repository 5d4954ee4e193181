"""Batch sizes and lengths of a training: one number, or one for each task of a stream."""

from dataclasses import replace

from curvlab.errors import CurvlabError
from curvlab.training.options import DEFAULTS, Training, TrainingChanges


def check_one_task(training: Training) -> None:
    """Require the options of a training without a stream of tasks.

    Raises:
        CurvlabError: They have no length, or are for several tasks.
    """
    if training.epochs is None and training.steps is None:
        raise CurvlabError("give either epochs or steps")
    for name in ("batch_size", "epochs", "steps"):
        if isinstance(getattr(training, name), tuple):
            raise CurvlabError(f"{name} must be one number here; a list, one number a task, is for continual.run")
    for name in ("lr_decay", "min_lr"):
        if getattr(training, name) != (default := DEFAULTS[name]):
            raise CurvlabError(f"{name} acts from one task to the next, in continual.run; leave it at {default}")


def split_by_task(training: Training, tasks: int) -> tuple[Training, ...]:
    """Return the options of each task, in which every option is one number.

    Args:
        training: Of all tasks; without ``epochs`` and ``steps``, a task has one epoch.
        tasks: How many there are.

    Raises:
        CurvlabError: A list does not have one number a task.

    Examples:
        >>> [task.batch_size for task in split_by_task(Training(batch_size=[16, 32], steps=5), 2)]
        [16, 32]
    """
    if training.epochs is None and training.steps is None:
        training = replace(training, epochs=1)
    each: list[TrainingChanges] = [{} for _ in range(tasks)]
    for name in ("batch_size", "epochs", "steps"):
        values = getattr(training, name)
        if isinstance(values, tuple):
            if len(values) != tasks:
                raise CurvlabError(f"{name} has {len(values)} values, and there are {tasks} tasks")
            for changes, value in zip(each, values, strict=True):
                changes[name] = value
    return tuple(replace(training, **changes) for changes in each)


def get_batch_size(training: Training) -> int:
    """Return the samples a step of a training of one task."""
    assert isinstance(training.batch_size, int)
    return training.batch_size


def count_steps(training: Training, batches: int) -> int:
    """Return the steps of a training of one task.

    Args:
        training: Its options.
        batches: Steps of an epoch.
    """
    if training.steps is not None:
        assert isinstance(training.steps, int)
        return training.steps
    assert isinstance(training.epochs, int)
    return training.epochs * batches
