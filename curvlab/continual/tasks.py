"""Streams of tasks, made of one data set: a stream is a tuple of tasks that share its tensors.

References:
    Goodfellow et al. (2013), An empirical investigation of catastrophic forgetting (permuted); Lopez-Paz and Ranzato
    (2017), Gradient episodic memory for continual learning (rotated); Mirzadeh et al. (2020), Understanding the role
    of training regimes in continual learning, whose public code the angles and the order of the classes follow;
    Gepperth and Wiech (2019), Simplified computation and interpretation of Fisher matrices in incremental learning
    (disjoint); Shon et al. (2022), DLCFT: Deep linear continual fine-tuning for general incremental learning (split by
    data).
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from curvlab.continual.task import Part, Task, unchanged
from curvlab.data import Dataset
from curvlab.errors import CurvlabError

__all__ = ["Part", "Task", "disjoint", "permuted", "rotated", "split_classes", "split_data"]


def permuted(
    dataset: Dataset, *, tasks: int, seed: int = 0, validation: int = 0, samples: int | None = None
) -> tuple[Task, ...]:
    """Return tasks in which the pixels of every image, or the entries of other samples, are in another order.

    The first task is the data set as it is. The channels of a pixel stay together. With two tasks, this is DP10-10 of
    Gepperth and Wiech (2019).

    Args:
        dataset: What the tasks are made of.
        tasks: How many; fewer are the beginning of more.
        seed: Of the orders.
        validation: Training samples, the first ones, that each task holds out.
        samples: Training samples, the first ones after those, that each task is learnt from; None for all.

    Raises:
        CurvlabError: A number is out of its range, or the first samples would be of few classes.

    Examples:
        >>> from curvlab.data import load
        >>> stream = permuted(load("digits"), tasks=3, validation=200)
        >>> [task.name for task in stream]
        ['permuted 1', 'permuted 2', 'permuted 3']
        >>> stream[2].train[0].shape, stream[2].validation[0].shape
        (torch.Size([1237, 1, 8, 8]), torch.Size([200, 1, 8, 8]))
    """
    rows = _first_rows(dataset, tasks, seed, validation, samples)
    shape = dataset.sample_shape
    places = math.prod(shape[1:] if len(shape) == 3 else shape)
    transforms = [unchanged]
    for task in range(1, tasks):
        order = torch.from_numpy(np.random.default_rng([seed, task]).permutation(places))
        transforms.append(partial(_permute, order))
    return tuple(Task(f"permuted {i}", dataset, transform, *rows) for i, transform in enumerate(transforms, start=1))


def rotated(
    dataset: Dataset,
    *,
    tasks: int,
    seed: int = 0,
    validation: int = 0,
    samples: int | None = None,
    degrees: float = 10.0,
) -> tuple[Task, ...]:
    """Return tasks in which all images are turned by an angle of the task, counter-clockwise.

    That of task ``t = 1, 2, ...`` is drawn between ``(t - 2)`` and ``(t - 1)`` times ``degrees``. A pixel is that of
    the nearest place, outside the image 0.

    Args:
        dataset: What the tasks are made of.
        tasks: How many; fewer are the beginning of more.
        seed: Of the angles.
        validation: Training samples, the first ones, that each task holds out.
        samples: Training samples, the first ones after those, that each task is learnt from; None for all.
        degrees: From a task's angles to the next one's.

    Raises:
        CurvlabError: The samples are not images, a number is out of its range, or the first samples would be of few
            classes.
    """
    rows = _first_rows(dataset, tasks, seed, validation, samples)
    if len(dataset.sample_shape) != 3:
        raise CurvlabError(
            f"only images (C, H, W) can be rotated, and the samples of {dataset.name} have shape "
            f"{dataset.sample_shape}; take a permuted stream"
        )
    if not math.isfinite(degrees):
        raise CurvlabError(f"degrees must be a finite number, not {degrees}")
    angles = [degrees * (task - np.random.default_rng([seed, task]).uniform()) for task in range(tasks)]
    return tuple(Task(f"rotated by {angle:.1f}°", dataset, partial(_rotate, angle), *rows) for angle in angles)


def disjoint(
    dataset: Dataset, *, classes: Sequence[Sequence[int]], validation: int = 0, samples: int | None = None
) -> tuple[Task, ...]:
    """Return tasks of some classes each, by lists of them.

    A task has the training and the test samples of its classes, in the order of the data set. D5-5 and D9-1 of
    Gepperth and Wiech (2019) have the lists ``[range(5), range(5, 10)]`` and ``[range(9), [9]]``.

    Args:
        dataset: What the tasks are made of.
        classes: For each task the labels of its classes. No class is in two tasks; some may be in none.
        validation: Training samples that each task holds out: the first ones of its own.
        samples: Training samples that each task is learnt from: the first ones of its own after those; None for all.

    Raises:
        CurvlabError: A class is unknown, without training samples or given twice, a list is empty, a number is out of
            its range, or the first samples would be of few classes.

    Examples:
        >>> from curvlab.data import load
        >>> nine, one = disjoint(load("digits"), classes=[range(9), [9]], validation=20)
        >>> nine.name, one.name, one.classes
        ('classes 0 to 8', 'class 9', (9,))
        >>> one.train[0].shape, one.validation[1].unique()
        (torch.Size([124, 1, 8, 8]), tensor([9]))
    """
    stream = []
    for present in _class_lists(dataset, classes):
        name, wanted = _class_name(present), torch.tensor(present)
        own = torch.isin(dataset.y_train, wanted).nonzero()[:, 0]
        rows = _first(f"{dataset.name} in task {name!r}", dataset.y_train[own], validation, samples)
        train_rows, validation_rows = (own[part] for part in rows)
        test_rows = torch.isin(dataset.y_test, wanted).nonzero()[:, 0]
        stream.append(Task(name, dataset, unchanged, train_rows, validation_rows, test_rows, present))
    return tuple(stream)


def split_classes(
    dataset: Dataset, *, tasks: int, seed: int | None = None, validation: int = 0, samples: int | None = None
) -> tuple[Task, ...]:
    """Return tasks of equally many classes each, all classes of the data set together.

    Args:
        dataset: What the tasks are made of.
        tasks: How many; they divide the number of classes.
        seed: Of the order in which classes are dealt out; None for that of their labels.
        validation: Training samples that each task holds out: the first ones of its own.
        samples: Training samples that each task is learnt from: the first ones of its own after those; None for all.

    Raises:
        CurvlabError: The classes cannot be split equally, one is without training samples, a number is out of its
            range, or the first samples would be of few classes.

    Examples:
        >>> from curvlab.data import load
        >>> [task.classes for task in split_classes(load("digits"), tasks=5)]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        >>> [task.classes for task in split_classes(load("digits"), tasks=5, seed=0)]
        [(4, 6), (2, 7), (3, 5), (0, 9), (1, 8)]
    """
    _check_stream(tasks, 0 if seed is None else seed)
    count = dataset.num_classes
    if count % tasks:
        possible = ", ".join(str(n) for n in range(1, count + 1) if not count % n)
        raise CurvlabError(
            f"the {count} classes of {dataset.name} cannot be split equally into {tasks} tasks: "
            f"choose one of {possible}, or give lists of classes to disjoint"
        )
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    classes = [sorted(part.tolist()) for part in np.split(order, tasks)]
    return disjoint(dataset, classes=classes, validation=validation, samples=samples)


def split_data(
    dataset: Dataset, *, tasks: int, seed: int = 0, validation: int = 0, samples: int | None = None
) -> tuple[Task, ...]:
    """Return tasks of equally many training samples each, drawn from all classes; the test samples are all, in each.

    Every training sample is in one task; where their number cannot be divided, sizes differ by one.

    Args:
        dataset: What the tasks are made of.
        tasks: How many.
        seed: Decides which samples a task has.
        validation: Of its training samples, how many each task holds out.
        samples: Of the others, how many each task is learnt from; None for all.

    Raises:
        CurvlabError: A number is out of its range.

    Examples:
        >>> from curvlab.data import load
        >>> [len(task.train[0]) for task in split_data(load("digits"), tasks=10)]
        [144, 144, 144, 144, 144, 144, 144, 143, 143, 143]
    """
    _check_stream(tasks, seed)
    total = len(dataset.x_train)
    if tasks > total:
        raise CurvlabError(f"cannot split the {total} training samples of {dataset.name} into {tasks} tasks")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(total))
    stream = []
    for i, own in enumerate(order.tensor_split(tasks), start=1):
        learnt, held_out = _counted(f"{dataset.name} in part {i}", len(own), validation, samples)
        stream.append(Task(f"part {i}", dataset, unchanged, own[learnt], own[held_out]))
    return tuple(stream)


def _check_stream(tasks: int, seed: int) -> None:
    if tasks < 1:
        raise CurvlabError(f"tasks must be at least 1, not {tasks}")
    if seed < 0:
        raise CurvlabError(f"seed must be at least 0, not {seed}")


def _first_rows(dataset: Dataset, tasks: int, seed: int, validation: int, samples: int | None) -> tuple[slice, slice]:
    _check_stream(tasks, seed)
    return _first(dataset.name, dataset.y_train, validation, samples)


def _first(owner: str, y: Tensor, validation: int, samples: int | None) -> tuple[slice, slice]:
    """Return which of the samples with the labels ``y`` are learnt from and which, before them, are held out.

    Samples that are grouped by class, such as those of a folder of images, have first ones of the first classes only.
    """
    rows = _counted(owner, len(y), validation, samples)
    changes, classes = int((y[1:] != y[:-1]).sum()), len(y.unique())
    if (validation or samples is not None) and 0 < changes < classes:
        raise CurvlabError(
            f"the training samples of {owner} are grouped by class, so that the first ones, which validation and "
            "samples stand for, are of few classes: shuffle the data set first"
        )
    return rows


def _counted(owner: str, total: int, validation: int, samples: int | None) -> tuple[slice, slice]:
    """Return which of ``total`` samples are learnt from and which, before them, are held out."""
    if not 0 <= validation < total:
        raise CurvlabError(
            f"cannot hold out {validation} of the {total} training samples of {owner}: choose 0 to {total - 1}"
        )
    rest = total - validation
    if samples is not None and not 1 <= samples <= rest:
        held_out = f", of which {validation} are held out" if validation else ""
        raise CurvlabError(
            f"cannot learn from {samples} of the {total} training samples of {owner}{held_out}: choose 1 to {rest}"
        )
    return slice(validation, None if samples is None else validation + samples), slice(validation)


def _class_lists(dataset: Dataset, classes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the labels of every task, once they are known to be right."""
    if not len(classes):
        raise CurvlabError("there is no list of classes; give one for each task")
    with_samples = set(dataset.y_train.unique().tolist())
    task_of: dict[int, int] = {}
    for task, present in enumerate(classes, start=1):
        if not len(present):
            raise CurvlabError(f"the list of classes of task {task} is empty; name at least one")
        for label in present:
            if label not in range(dataset.num_classes):
                raise CurvlabError(
                    f"there is no class {label}; {dataset.name} has the classes 0 to {dataset.num_classes - 1}"
                )
            if label in task_of:
                raise CurvlabError(
                    f"class {label} is given twice (task {task_of[label]} and task {task}); a class is in one task"
                )
            if label not in with_samples:
                raise CurvlabError(
                    f"{dataset.name} has no training sample of class {label}; give disjoint lists without it"
                )
            task_of[label] = task
    return [tuple(int(label) for label in present) for present in classes]


def _class_name(classes: tuple[int, ...]) -> str:
    first, last = classes[0], classes[-1]
    if len(classes) == 1:
        return f"class {first}"
    if len(classes) > 2 and classes == tuple(range(first, last + 1)):
        return f"classes {first} to {last}"
    shown = [*map(str, classes)] if len(classes) <= 5 else [*map(str, classes[:3]), "...", str(last)]
    return f"classes {', '.join(shown)}"


def _permute(order: Tensor, x: Tensor) -> Tensor:
    flat = x.flatten(2) if x.ndim == 4 else x.flatten(1)
    return flat.index_select(flat.ndim - 1, order).reshape(x.shape)


def _rotate(angle: float, x: Tensor) -> Tensor:
    if not len(x):
        return x  # torch refuses to turn nothing
    # Imported here because it takes longer than all else in this module.
    from torchvision.transforms.functional import InterpolationMode, rotate

    turned: Tensor = rotate(x, angle, interpolation=InterpolationMode.NEAREST)
    return turned
