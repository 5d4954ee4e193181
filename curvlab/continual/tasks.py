"""Streams of tasks from one data set; a stream is a tuple of tasks that share its tensors.

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

from curvlab.continual.task import Part, Task, identity
from curvlab.data import Dataset
from curvlab.errors import CurvlabError

__all__ = ["Part", "Task", "disjoint", "permuted", "rotated", "split_classes", "split_data"]


def permuted(
    dataset: Dataset, *, tasks: int, seed: int = 0, validation: int = 0, samples: int | None = None
) -> tuple[Task, ...]:
    """Return tasks with permuted pixels (or entries, if the samples are not images), one permutation per task.

    The first task is the data set without a permutation. The channels of a pixel stay together. With two tasks, this is
    DP10-10 of Gepperth and Wiech (2019).

    Args:
        dataset: Data set of all tasks.
        tasks: Number of tasks; the first tasks of a longer stream are the same.
        seed: Seed of the permutations.
        validation: Number of training samples that each task holds out: the first ones.
        samples: Number of training samples of each task: the first ones after the held-out samples; None for all.

    Raises:
        CurvlabError: A number is out of its range, or the samples are grouped by class.

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
    transforms = [identity]
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
    """Return tasks with rotated images, one counter-clockwise angle per task.

    The angle of task ``t = 1, 2, ...`` is drawn between ``(t - 2)`` and ``(t - 1)`` times ``degrees``. Pixels are
    interpolated by nearest neighbour, with 0 outside the image.

    Args:
        dataset: Data set of all tasks.
        tasks: Number of tasks; the first tasks of a longer stream are the same.
        seed: Seed of the angles.
        validation: Number of training samples that each task holds out: the first ones.
        samples: Number of training samples of each task: the first ones after the held-out samples; None for all.
        degrees: Width of the interval of angles of a task, in degrees.

    Raises:
        CurvlabError: The samples are not images, a number is out of its range, or the samples are grouped by class.
    """
    rows = _first_rows(dataset, tasks, seed, validation, samples)
    if len(dataset.sample_shape) != 3:
        raise CurvlabError(
            f"only images (C, H, W) can be rotated, but the samples of {dataset.name} have shape "
            f"{dataset.sample_shape}; use a permuted stream"
        )
    if not math.isfinite(degrees):
        raise CurvlabError(f"degrees must be a finite number, not {degrees}")
    angles = [degrees * (task - np.random.default_rng([seed, task]).uniform()) for task in range(tasks)]
    return tuple(Task(f"rotated by {angle:.1f}°", dataset, partial(_rotate, angle), *rows) for angle in angles)


def disjoint(
    dataset: Dataset, *, classes: Sequence[Sequence[int]], validation: int = 0, samples: int | None = None
) -> tuple[Task, ...]:
    """Return tasks with disjoint sets of classes.

    A task has the training and test samples of its classes, in the order of the data set. D5-5 and D9-1 of Gepperth and
    Wiech (2019) have the lists ``[range(5), range(5, 10)]`` and ``[range(9), [9]]``.

    Args:
        dataset: Data set of all tasks.
        classes: For each task, the labels of its classes. No class is in two tasks; a class may be in no task.
        validation: Number of training samples that each task holds out: the first ones of its classes.
        samples: Number of training samples of each task: the first ones of its classes after the held-out samples; None
            for all.

    Raises:
        CurvlabError: A class is unknown, has no training samples or is given twice, a list is empty, a number is out of
            its range, or the samples are grouped by class.

    Examples:
        >>> from curvlab.data import load
        >>> nine, one = disjoint(load("digits"), classes=[range(9), [9]], validation=20)
        >>> nine.name, one.name, one.classes
        ('classes 0 to 8', 'class 9', (9,))
        >>> one.train[0].shape, one.validation[1].unique()
        (torch.Size([124, 1, 8, 8]), tensor([9]))
    """
    stream = []
    for present in _check_class_lists(dataset, classes):
        name, wanted = _class_name(present), torch.tensor(present)
        own = torch.isin(dataset.y_train, wanted).nonzero()[:, 0]
        rows = _split_first(f"{dataset.name} in task {name!r}", dataset.y_train[own], validation, samples)
        train_rows, validation_rows = (own[part] for part in rows)
        test_rows = torch.isin(dataset.y_test, wanted).nonzero()[:, 0]
        stream.append(Task(name, dataset, identity, train_rows, validation_rows, test_rows, present))
    return tuple(stream)


def split_classes(
    dataset: Dataset, *, tasks: int, seed: int | None = None, validation: int = 0, samples: int | None = None
) -> tuple[Task, ...]:
    """Return tasks that split all classes of the data set into sets of equal size.

    Args:
        dataset: Data set of all tasks.
        tasks: Number of tasks; it must divide the number of classes.
        seed: Seed of the order in which classes are assigned to tasks; None for the order of the labels.
        validation: Number of training samples that each task holds out: the first ones of its classes.
        samples: Number of training samples of each task: the first ones of its classes after the held-out samples; None
            for all.

    Raises:
        CurvlabError: The classes cannot be split equally, a class has no training samples, a number is out of its
            range, or the samples are grouped by class.

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
            f"choose {possible}, or give disjoint() lists of classes"
        )
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    classes = [sorted(part.tolist()) for part in np.split(order, tasks)]
    return disjoint(dataset, classes=classes, validation=validation, samples=samples)


def split_data(
    dataset: Dataset,
    *,
    tasks: int,
    seed: int = 0,
    validation: int = 0,
    samples: int | None = None,
    skew: float = 0.0,
) -> tuple[Task, ...]:
    """Return tasks that split the training samples into parts of equal size, with all test samples in each.

    Every training sample is in one task; if their number is not divisible by ``tasks``, sizes differ by one. The parts
    are random. With ``skew``, that share of the samples is sorted by class, the classes in random order, before it is
    cut into parts, so that each part mostly has a few classes; the other samples are random.

    Args:
        dataset: Data set of all tasks.
        tasks: Number of tasks.
        seed: Seed of the split.
        validation: Number of its training samples that each task holds out.
        samples: Number of training samples of each task, without the held-out samples; None for all.
        skew: Share of the samples that are sorted by class, 0 to 1.

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
        raise CurvlabError(
            f"cannot split the {total} training samples of {dataset.name} into {tasks} tasks; choose at most {total}"
        )
    if not 0 <= skew <= 1:
        raise CurvlabError(f"skew must be between 0 and 1, not {skew}")
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(total))
    parts = order.tensor_split(tasks) if not skew else _skewed_parts(order, dataset.y_train, tasks, skew, rng)
    stream = []
    for i, own in enumerate(parts, start=1):
        train_rows, held_out = _split_rows(f"{dataset.name} in part {i}", len(own), validation, samples)
        stream.append(Task(f"part {i}", dataset, identity, own[train_rows], own[held_out]))
    return tuple(stream)


def _skewed_parts(order: Tensor, y: Tensor, tasks: int, skew: float, rng: np.random.Generator) -> list[Tensor]:
    """Return the rows of parts, each with its share of sorted and of random rows, in a random order."""
    place = torch.from_numpy(rng.permutation(int(y.max()) + 1))  # of each class in the sorted rows
    parts = order.tensor_split(tasks)
    sizes = [round(skew * len(part)) for part in parts]
    chosen = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    chosen = chosen[place[y[chosen]].argsort(stable=True)]
    random = (part[size:] for part, size in zip(parts, sizes, strict=True))
    rows = [torch.cat(pair) for pair in zip(chosen.split(sizes), random, strict=True)]
    return [own[torch.from_numpy(rng.permutation(len(own)))] for own in rows]


def _check_stream(tasks: int, seed: int) -> None:
    if tasks < 1:
        raise CurvlabError(f"tasks must be at least 1, not {tasks}")
    if seed < 0:
        raise CurvlabError(f"seed must be at least 0, not {seed}")


def _first_rows(dataset: Dataset, tasks: int, seed: int, validation: int, samples: int | None) -> tuple[slice, slice]:
    _check_stream(tasks, seed)
    return _split_first(dataset.name, dataset.y_train, validation, samples)


def _split_first(owner: str, y: Tensor, validation: int, samples: int | None) -> tuple[slice, slice]:
    """Return the training rows and, before them, the held-out rows of samples with the labels ``y``.

    If samples are grouped by class, as in a folder of images, the first samples have the first classes only: this is an
    error.
    """
    rows = _split_rows(owner, len(y), validation, samples)
    changes, classes = int((y[1:] != y[:-1]).sum()), len(y.unique())
    if (validation or samples is not None) and 0 < changes < classes:
        raise CurvlabError(
            f"the training samples of {owner} are grouped by class, so that validation and samples, which take the "
            "first ones, would select few classes: shuffle the data set first"
        )
    return rows


def _split_rows(owner: str, total: int, validation: int, samples: int | None) -> tuple[slice, slice]:
    """Return the training rows and, before them, the held-out rows of ``total`` samples."""
    if not 0 <= validation < total:
        raise CurvlabError(
            f"cannot hold out {validation} of the {total} training samples of {owner}: choose 0 to {total - 1}"
        )
    rest = total - validation
    if samples is not None and not 1 <= samples <= rest:
        held_out = f", of which {validation} are held out" if validation else ""
        raise CurvlabError(
            f"cannot train on {samples} of the {total} training samples of {owner}{held_out}: choose 1 to {rest}"
        )
    return slice(validation, None if samples is None else validation + samples), slice(validation)


def _check_class_lists(dataset: Dataset, classes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the labels of every task, after a check."""
    if not len(classes):
        raise CurvlabError("classes has no lists; give one list for each task")
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
                    f"class {label} is given twice (task {task_of[label]} and task {task}); give each class once"
                )
            if label not in with_samples:
                raise CurvlabError(f"{dataset.name} has no training sample of class {label}; remove it from the lists")
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
        return x  # torchvision cannot rotate an empty batch
    # Imported here because it takes longer than the rest of this module.
    from torchvision.transforms.functional import InterpolationMode, rotate

    rotated_images: Tensor = rotate(x, angle, interpolation=InterpolationMode.NEAREST)
    return rotated_images
