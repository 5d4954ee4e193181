"""One task of a stream: rows of a data set with a transformation of the inputs."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvlab.data import Dataset
from curvlab.errors import CurvlabError

Samples = tuple[Tensor, Tensor]
Part = Literal["train", "validation", "test"]

_PROBES = 100  # samples that enter the fingerprint of a transformation

# Hashing a data set takes as long as an epoch of a small network, and all tasks of a stream share the data set.
_FINGERPRINTS: WeakKeyDictionary[Dataset, str] = WeakKeyDictionary()


def identity(x: Tensor) -> Tensor:
    """Return the inputs without a change."""
    return x


@dataclass(frozen=True, eq=False)
class Task:
    """Rows of a data set with a transformation of the inputs.

    A task stores only the data set, which tasks share, and row indices; samples are selected and transformed on access.

    Args:
        name: Name of the task.
        dataset: Data set of the samples.
        transform: Function from inputs ``(N, ...)`` to inputs of the same shape; it must be deterministic and treat
            each sample independently.
        train_rows: Rows of the training samples to train on: a slice, indices or a mask.
        validation_rows: Rows of the training samples to hold out, for example to choose hyper-parameters.
        test_rows: Rows of the test samples to test on.
        classes: Classes of the task, as labels of the data set; None for all classes of the data set. Labels are not
            renumbered.

    Raises:
        CurvlabError: Rows do not exist, there is no training or test sample, a training sample is also held out, or
            ``classes`` are not the classes of the samples.

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
    transform: Callable[[Tensor], Tensor] = field(default=identity, repr=False)
    train_rows: slice | Tensor = field(default_factory=lambda: slice(None), repr=False)
    validation_rows: slice | Tensor = field(default_factory=lambda: slice(0), repr=False)
    test_rows: slice | Tensor = field(default_factory=lambda: slice(None), repr=False)
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not self.sizes[part]:
                raise CurvlabError(f"task {self.name!r} has no {part} samples; choose other rows or classes")
        held_out = torch.zeros(len(self.dataset.x_train), dtype=torch.bool)
        held_out[self._rows["validation"]] = True
        both = int(held_out[self._rows["train"]].sum())
        if both:
            raise CurvlabError(
                f"task {self.name!r} has {both} samples in train_rows and in validation_rows; remove them from one"
            )
        if self.classes is not None:
            self._check_classes(self.classes)

    @property
    def train(self) -> Samples:
        """Inputs ``(N, ...)`` and class indices ``(N,)`` to train on."""
        return self._select(self.dataset.x_train, self.dataset.y_train, self.train_rows)

    @property
    def validation(self) -> Samples:
        """Held-out inputs and class indices."""
        return self._select(self.dataset.x_train, self.dataset.y_train, self.validation_rows)

    @property
    def test(self) -> Samples:
        """Inputs and class indices to test on."""
        return self._select(self.dataset.x_test, self.dataset.y_test, self.test_rows)

    @property
    def sizes(self) -> dict[Part, int]:
        """Number of samples of ``train``, ``validation`` and ``test``."""
        return {part: len(rows) for part, rows in self._rows.items()}

    def take(self, index: Tensor) -> Samples:
        """Return the training samples ``train[0][index], train[1][index]``; only these are transformed.

        Args:
            index: Integers, shape ``(N,)``.
        """
        return self._select(self.dataset.x_train, self.dataset.y_train, self._rows["train"][index])

    def shares(self, other: "Task", part: Part) -> bool:
        """Return whether another task is known to have identical ``train``, ``validation`` or ``test`` samples."""
        return (
            self.dataset is other.dataset
            and self.transform == other.transform
            and torch.equal(self._rows[part], other._rows[part])
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the content of the task, without its name.

        The content is the bytes of the data set (hashed once for all of its tasks), the rows of each part, the classes,
        and the transformed values of a ramp and of the first training samples, at most 100.
        """
        if self.dataset not in _FINGERPRINTS:
            _FINGERPRINTS[self.dataset] = self.dataset.fingerprint()
        classes = None if self.classes is None else [int(label) for label in self.classes]
        digest = hashlib.sha256(f"{_FINGERPRINTS[self.dataset]} {classes}".encode())
        samples = self.dataset.x_train[self._rows["train"][:_PROBES]]
        # If samples are blank, the ramp still shows the effect of the transformation.
        ramp = torch.linspace(float(samples.min()), float(samples.max()), samples[0].numel()).reshape(samples[:1].shape)
        for tensor in (*self._rows.values(), self.transform(torch.cat([samples, ramp]))):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def _rows(self) -> dict[Part, Tensor]:
        """Rows of each part as indices."""
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
                f"the classes of task {self.name!r} must be distinct and from 0 to {known[-1]}, not {classes}"
            )
        for part, rows in self._rows.items():
            y = self.dataset.y_test if part == "test" else self.dataset.y_train
            present = set(y[rows].unique().tolist())
            if others := sorted(present - set(classes)):
                raise CurvlabError(
                    f"task {self.name!r} has {part} samples of class {others[0]}, which is not in its classes; "
                    f"remove them from {part}_rows"
                )
            if part == "train" and (absent := sorted(set(classes) - present)):
                raise CurvlabError(
                    f"task {self.name!r} has no training sample of class {absent[0]}; "
                    "add samples of it to train_rows, or remove the class"
                )

    def _select(self, x: Tensor, y: Tensor, rows: slice | Tensor) -> Samples:
        return self.transform(x[rows]), y[rows]
