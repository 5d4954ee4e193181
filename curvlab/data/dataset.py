"""Data sets: four tensors that fit together, and the names of the classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from curvlab.errors import CurvlabError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples in memory.

    Args:
        name: Name of the data set, or the path of your own data.
        x_train: Inputs, float32, shape ``(N, ...)``; images are ``(N, C, H, W)``, scaled to [0, 1] if stored as bytes.
        y_train: Class indices, int64, shape ``(N,)``.
        x_test: Test inputs, with the sample shape of ``x_train``.
        y_test: Test class indices, in the form of ``y_train``.
        classes: Names of the classes, by index.

    Raises:
        CurvlabError: The tensors do not fit together, a label is out of range, or an input is NaN or infinite.

    Examples:
        >>> x, y = torch.zeros(3, 5), torch.tensor([0, 1, 1])
        >>> data = Dataset("tiny", x, y, x, y, classes=("no", "yes"))
        >>> data.sample_shape, data.num_classes
        ((5,), 2)
        >>> data.select([1])
        Dataset(name='tiny', classes=('no', 'yes'))
    """

    name: str
    x_train: Tensor = field(repr=False)
    y_train: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for split, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            _check_split(split, x, y, len(self.classes))
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise CurvlabError(
                f"a sample of x_train has shape {self.sample_shape} but one of x_test {tuple(self.x_test.shape[1:])}; "
                "the two must be the same"
            )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x_train.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes, including classes without samples."""
        return len(self.classes)

    def select(self, classes: Sequence[int]) -> "Dataset":
        """Return the samples of some classes, in their order; labels and ``classes`` do not change.

        Args:
            classes: Class indices.

        Raises:
            CurvlabError: No class is given, a class is given twice or does not exist, or a split has no sample of them.
        """
        chosen = list(classes)
        if not chosen:
            raise CurvlabError(f"no class is selected; {self.name} has the classes 0 to {self.num_classes - 1}")
        for index in chosen:
            if index not in range(self.num_classes):
                raise CurvlabError(
                    f"there is no class {index}; {self.name} has the classes 0 to {self.num_classes - 1}: choose among "
                    "them, or all of them"
                )
            if chosen.count(index) > 1:
                raise CurvlabError(f"class {index} is selected more than once; name each class once")
        wanted = torch.tensor(chosen)
        train, test = torch.isin(self.y_train, wanted), torch.isin(self.y_test, wanted)
        for split, mask in (("training", train), ("test", test)):
            if not mask.any():
                raise CurvlabError(
                    f"{self.name} has no {split} samples of the selected classes {chosen}; select others"
                )
        return replace(
            self,
            x_train=self.x_train[train],
            y_train=self.y_train[train],
            x_test=self.x_test[test],
            y_test=self.y_test[test],
        )

    def hold_out(self, n: int) -> tuple["Dataset", tuple[Tensor, Tensor]]:
        """Hold out the first ``n`` training samples for validation.

        With ``n=5000`` on MNIST, this is the split of the TensorFlow tutorial: 55,000 training samples and 5,000
        validation samples.

        Returns:
            The data set without these samples, and the held-out ``(inputs, labels)``.

        Raises:
            CurvlabError: ``n`` is less than 1, or leaves no training samples.
        """
        total = len(self.x_train)
        if not 0 < n < total:
            raise CurvlabError(
                f"cannot hold out {n} of the {total} training samples of {self.name}: choose 1 to {total - 1}"
            )
        rest = replace(self, x_train=self.x_train[n:], y_train=self.y_train[n:])
        return rest, (self.x_train[:n], self.y_train[:n])

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of dtypes, shapes and bytes of ``x_train, y_train, x_test, y_test``."""
        digest = hashlib.sha256()
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def _check_split(split: str, x: Tensor, y: Tensor, num_classes: int) -> None:
    """Check one split; ``split`` is ``train`` or ``test``."""
    if x.dtype != torch.float32 or y.dtype != torch.int64:
        raise CurvlabError(f"x_{split} must be float32 and y_{split} int64, not {x.dtype} and {y.dtype}")
    if x.ndim < 2 or y.ndim != 1:
        raise CurvlabError(
            f"x_{split} must have shape (N, ...) and y_{split} (N,), not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if len(x) != len(y):
        raise CurvlabError(f"x_{split} has {len(x)} samples but y_{split} has {len(y)}; give one label per sample")
    if x.numel() == 0:
        raise CurvlabError(f"x_{split} has no samples, or empty samples (shape {tuple(x.shape)}); give at least one")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise CurvlabError(
            f"y_{split} has the label {low if low < 0 else high}; "
            f"with {num_classes} classes the labels are 0 to {num_classes - 1}"
        )
    if not x.isfinite().all():
        nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
        raise CurvlabError(
            f"x_{split} holds {nan} NaN and {infinite} infinite of {x.numel()} values; remove or replace them"
        )
