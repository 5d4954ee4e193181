"""Batch sizes and lengths of training: one number, or one for each task of a stream."""

from dataclasses import replace

from curvlab.errors import CurvlabError
from curvlab.training.options import DEFAULTS, Training, TrainingChanges


def check_one_task(training: Training) -> None:
    """Check that the options are for one task.

    Raises:
        CurvlabError: Neither ``epochs`` nor ``steps`` is given, or an option is for several tasks.
    """
    if training.epochs is None and training.steps is None:
        raise CurvlabError("give either epochs or steps")
    for name in ("batch_size", "epochs", "steps"):
        if isinstance(getattr(training, name), tuple):
            raise CurvlabError(f"{name} must be one number here; a list with one number per task is for continual.run")
    for name in ("lr_decay", "min_lr"):
        if getattr(training, name) != (default := DEFAULTS[name]):
            raise CurvlabError(f"{name} is for the tasks of continual.run; leave it at {default} here")


def split_by_task(training: Training, tasks: int) -> tuple[Training, ...]:
    """Return the options of each task; in them, every option is one number.

    Args:
        training: Options of all tasks; without ``epochs`` and ``steps``, each task has one epoch.
        tasks: Number of tasks.

    Raises:
        CurvlabError: A list does not have one number per task.

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
                raise CurvlabError(f"{name} has {len(values)} values for {tasks} tasks; give one value per task")
            for changes, value in zip(each, values, strict=True):
                changes[name] = value
    return tuple(replace(training, **changes) for changes in each)


def get_batch_size(training: Training) -> int:
    """Return the batch size of a training on one task."""
    assert isinstance(training.batch_size, int)
    return training.batch_size


def count_steps(training: Training, batches: int) -> int:
    """Return the number of steps of a training on one task.

    Args:
        training: Options of the training.
        batches: Number of steps per epoch.
    """
    if training.steps is not None:
        assert isinstance(training.steps, int)
        return training.steps
    assert isinstance(training.epochs, int)
    return training.epochs * batches
