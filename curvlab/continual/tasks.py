"""Streams of tasks, made of one data set: a stream is a tuple of tasks that share its tensors.

References:
    Goodfellow et al. (2013), An empirical investigation of catastrophic forgetting (permuted); Lopez-Paz and Ranzato
    (2017), Gradient episodic memory for continual learning (rotated); Mirzadeh et al. (2020), Understanding the role
    of training regimes in continual learning, whose public code the angles follow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from curvlab.data import Dataset
from curvlab.errors import CurvlabError

Samples = tuple[Tensor, Tensor]


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Task:
    """Samples of a data set, seen through a transformation of their inputs.

    Nothing is held but the data set, which tasks share: samples are taken, and transformed, when they are asked for.

    Args:
        name: What to call it.
        dataset: Where its samples are from.
        transform: From inputs ``(N, ...)`` to those of the task, in the same shape.
        train_rows: Which of the training samples it is learnt from.
        validation_rows: Which of the training samples are held out, such as to choose hyper-parameters.
        test_rows: Which of the test samples it is tested on.
    """

    name: str
    dataset: Dataset = field(repr=False)
    transform: Callable[[Tensor], Tensor] = field(default=_unchanged, repr=False)
    train_rows: slice | Tensor = field(default_factory=lambda: slice(None), repr=False)
    validation_rows: slice | Tensor = field(default_factory=lambda: slice(0), repr=False)
    test_rows: slice | Tensor = field(default_factory=lambda: slice(None), repr=False)

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

    def _of(self, x: Tensor, y: Tensor, rows: slice | Tensor) -> Samples:
        return self.transform(x[rows]), y[rows]


def permuted(dataset: Dataset, *, tasks: int, seed: int = 0, validation: int = 0) -> tuple[Task, ...]:
    """Return tasks in which the pixels of every image, or the entries of other samples, are in another order.

    The first task is the data set as it is. The channels of a pixel stay together.

    Args:
        dataset: What the tasks are made of.
        tasks: How many; fewer are the beginning of more.
        seed: Of the orders.
        validation: Training samples, the first ones, that each task holds out.

    Raises:
        CurvlabError: A number is out of its range.

    Examples:
        >>> from curvlab.data import load
        >>> stream = permuted(load("digits"), tasks=3, validation=200)
        >>> [task.name for task in stream]
        ['permuted 1', 'permuted 2', 'permuted 3']
        >>> stream[2].train[0].shape, stream[2].validation[0].shape
        (torch.Size([1237, 1, 8, 8]), torch.Size([200, 1, 8, 8]))
    """
    rows = _rows(dataset, tasks, seed, validation)
    shape = dataset.sample_shape
    places = math.prod(shape[1:] if len(shape) == 3 else shape)
    transforms = [_unchanged]
    for task in range(1, tasks):
        order = torch.from_numpy(np.random.default_rng([seed, task]).permutation(places))
        transforms.append(partial(_permute, order))
    return tuple(Task(f"permuted {i}", dataset, transform, *rows) for i, transform in enumerate(transforms, start=1))


def rotated(
    dataset: Dataset, *, tasks: int, seed: int = 0, validation: int = 0, degrees: float = 10.0
) -> tuple[Task, ...]:
    """Return tasks in which all images are turned by an angle of the task, counter-clockwise.

    That of task ``t = 1, 2, ...`` is drawn between ``(t - 2)`` and ``(t - 1)`` times ``degrees``. A pixel is that of
    the nearest place, outside the image 0.

    Args:
        dataset: What the tasks are made of.
        tasks: How many; fewer are the beginning of more.
        seed: Of the angles.
        validation: Training samples, the first ones, that each task holds out.
        degrees: From a task's angles to the next one's.

    Raises:
        CurvlabError: The samples are not images, or a number is out of its range.
    """
    rows = _rows(dataset, tasks, seed, validation)
    if len(dataset.sample_shape) != 3:
        raise CurvlabError(
            f"only images (C, H, W) can be rotated, and the samples of {dataset.name} have shape "
            f"{dataset.sample_shape}; take a permuted stream"
        )
    if not math.isfinite(degrees):
        raise CurvlabError(f"degrees must be a finite number, not {degrees}")
    angles = [degrees * (task - np.random.default_rng([seed, task]).uniform()) for task in range(tasks)]
    return tuple(Task(f"rotated by {angle:.1f}°", dataset, partial(_rotate, angle), *rows) for angle in angles)


def _rows(dataset: Dataset, tasks: int, seed: int, validation: int) -> tuple[slice, slice]:
    """Return which training samples are learnt from and which are held out, once the arguments are right."""
    if tasks < 1:
        raise CurvlabError(f"tasks must be at least 1, not {tasks}")
    if seed < 0:
        raise CurvlabError(f"seed must be at least 0, not {seed}")
    total = len(dataset.x_train)
    if not 0 <= validation < total:
        raise CurvlabError(
            f"cannot hold out {validation} of the {total} training samples of {dataset.name}: choose 0 to {total - 1}"
        )
    return slice(validation, None), slice(validation)


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
