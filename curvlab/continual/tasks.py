"""Streams of tasks, made of one data set: a stream is a tuple of tasks that share its tensors.

References:
    Goodfellow et al. (2013), An empirical investigation of catastrophic forgetting (permuted); Lopez-Paz and Ranzato
    (2017), Gradient episodic memory for continual learning (rotated); Mirzadeh et al. (2020), Understanding the role
    of training regimes in continual learning, whose public code the angles and the order of the classes follow;
    Gepperth and Wiech (2019), Simplified computation and interpretation of Fisher matrices in incremental learning
    (disjoint); Shon et al. (2022), DLCFT: Deep linear continual fine-tuning for general incremental learning (split by
    data).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from curvlab.data import Dataset
from curvlab.errors import CurvlabError

Samples = tuple[Tensor, Tensor]
Part = Literal["train", "validation", "test"]

_PROBES = 100  # samples by which transformations are told apart

# Hashing a data set takes as long as an epoch of a small network, and all tasks of a stream share one.
_FINGERPRINTS: WeakKeyDictionary[Dataset, str] = WeakKeyDictionary()


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Task:
    """Samples of a data set, seen through a transformation of their inputs.

    Nothing is held but the data set, which tasks share, and rows of it: samples are taken, and transformed, when they
    are asked for.

    Args:
        name: What to call it.
        dataset: Where its samples are from.
        transform: From inputs ``(N, ...)`` to those of the task, in the same shape: each sample by itself, and always
            in the same way.
        train_rows: Which of the training samples it is learnt from: a slice, indices or a mask.
        validation_rows: Which of the training samples are held out, such as to choose hyper-parameters.
        test_rows: Which of the test samples it is tested on.
        classes: The classes that it is of, as labels of the data set; None for all of the data set. Labels stay those
            of the data set.

    Raises:
        CurvlabError: The rows do not exist, there is no sample to learn from or to test on, a sample is both learnt
            from and held out, or ``classes`` are not those of the samples.

    Examples:
        >>> from curvlab.data import load
        >>> digits = load("digits")
        >>> odd = digits.y_train % 2 == 1
        >>> task = Task("odd", digits, train_rows=odd, test_rows=digits.y_test % 2 == 1, classes=(1, 3, 5, 7, 9))
        >>> task.sizes
        {'train': 726, 'validation': 0, 'test': 180}
    """

    name: str
    dataset: Dataset = field(repr=False)
    transform: Callable[[Tensor], Tensor] = field(default=_unchanged, repr=False)
    train_rows: slice | Tensor = field(default_factory=lambda: slice(None), repr=False)
    validation_rows: slice | Tensor = field(default_factory=lambda: slice(0), repr=False)
    test_rows: slice | Tensor = field(default_factory=lambda: slice(None), repr=False)
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not self.sizes[part]:
                raise CurvlabError(f"task {self.name!r} has no {part} sample; choose other rows or classes")
        held_out = torch.zeros(len(self.dataset.x_train), dtype=torch.bool)
        held_out[self._rows["validation"]] = True
        both = int(held_out[self._rows["train"]].sum())
        if both:
            raise CurvlabError(
                f"task {self.name!r} learns from {both} of the samples that it holds out; leave them out of train_rows"
            )
        if self.classes is not None:
            self._check_classes(self.classes)

    @property
    def train(self) -> Samples:
        """Inputs ``(N, ...)`` and class indices ``(N,)`` to learn from."""
        return self._of(self.dataset.x_train, self.dataset.y_train, self.train_rows)

    @property
    def validation(self) -> Samples:
        """Inputs and class indices that are held out."""
        return self._of(self.dataset.x_train, self.dataset.y_train, self.validation_rows)

    @property
    def test(self) -> Samples:
        """Inputs and class indices to test on."""
        return self._of(self.dataset.x_test, self.dataset.y_test, self.test_rows)

    @property
    def sizes(self) -> dict[Part, int]:
        """How many samples ``train``, ``validation`` and ``test`` have."""
        return {part: len(rows) for part, rows in self._rows.items()}

    def take(self, index: Tensor) -> Samples:
        """Return the training samples ``train[0][index], train[1][index]``; only they are made.

        Args:
            index: Integers, shape ``(N,)``.
        """
        return self._of(self.dataset.x_train, self.dataset.y_train, self._rows["train"][index])

    def shares(self, other: "Task", part: Part) -> bool:
        """Return whether another task is known to have the very same ``train``, ``validation`` or ``test``."""
        return (
            self.dataset is other.dataset
            and self.transform == other.transform
            and torch.equal(self._rows[part], other._rows[part])
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of what the task consists of, whatever it is called.

        It covers the bytes of the data set, which are hashed once for all of its tasks, the rows of each part, the
        classes, and what the transformation makes of a ramp and of the first training samples, at most 100.
        """
        if self.dataset not in _FINGERPRINTS:
            _FINGERPRINTS[self.dataset] = self.dataset.fingerprint()
        classes = None if self.classes is None else [int(label) for label in self.classes]
        digest = hashlib.sha256(f"{_FINGERPRINTS[self.dataset]} {classes}".encode())
        samples = self.dataset.x_train[self._rows["train"][:_PROBES]]
        # Where samples are blank, a ramp still shows what becomes of a pixel.
        ramp = torch.linspace(float(samples.min()), float(samples.max()), samples[0].numel()).reshape(samples[:1].shape)
        for tensor in (*self._rows.values(), self.transform(torch.cat([samples, ramp]))):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def _rows(self) -> dict[Part, Tensor]:
        """The rows of each part as indices."""
        train, test = len(self.dataset.x_train), len(self.dataset.x_test)
        return {
            "train": self._indices("train", self.train_rows, train),
            "validation": self._indices("validation", self.validation_rows, train),
            "test": self._indices("test", self.test_rows, test),
        }

    def _indices(self, part: Part, rows: slice | Tensor, total: int) -> Tensor:
        try:
            indices = torch.arange(total)[rows]
        except (IndexError, TypeError, ValueError) as error:
            raise CurvlabError(
                f"{part}_rows of task {self.name!r} must be a slice, indices or a mask of {total} samples ({error})"
            ) from error
        if indices.ndim != 1:
            raise CurvlabError(
                f"{part}_rows of task {self.name!r} must be a slice, indices or a mask of {total} samples, not {rows}"
            )
        return indices

    def _check_classes(self, classes: tuple[int, ...]) -> None:
        known = range(self.dataset.num_classes)
        if not classes or len(set(classes)) < len(classes) or any(label not in known for label in classes):
            raise CurvlabError(
                f"the classes of task {self.name!r} must be different ones of 0 to {known[-1]}, not {classes}"
            )
        for part, rows in self._rows.items():
            y = self.dataset.y_test if part == "test" else self.dataset.y_train
            present = set(y[rows].unique().tolist())
            if others := sorted(present - set(classes)):
                raise CurvlabError(
                    f"task {self.name!r} has {part} samples of class {others[0]}, which is none of its classes; "
                    f"leave them out of {part}_rows"
                )
            if part == "train" and (absent := sorted(set(classes) - present)):
                raise CurvlabError(
                    f"task {self.name!r} learns from no sample of class {absent[0]}; "
                    "let it learn from more samples, or leave the class out"
                )

    def _of(self, x: Tensor, y: Tensor, rows: slice | Tensor) -> Samples:
        return self.transform(x[rows]), y[rows]


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
    transforms = [_unchanged]
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
        stream.append(Task(name, dataset, _unchanged, train_rows, validation_rows, test_rows, present))
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
        stream.append(Task(f"part {i}", dataset, _unchanged, own[learnt], own[held_out]))
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
