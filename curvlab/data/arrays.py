"""From the NumPy arrays that a reader found to a data set: dtypes, image layout, default class names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from curvlab.data.dataset import Dataset
from curvlab.errors import CurvlabError

Array = np.ndarray[Any, np.dtype[Any]]
KEYS = ("x_train", "y_train", "x_test", "y_test")

# More than this without names is not a set of classes but, most likely, of identifiers.
_MOST_UNNAMED_CLASSES = 100_000


def from_arrays(name: str, arrays: Mapping[str, Array]) -> Dataset:
    """Convert arrays under ``KEYS`` and, if there, ``classes``.

    Inputs of uint8 are images ``(N, H, W)``, ``(N, H, W, 1)`` or ``(N, H, W, 3)`` and become float32 in [0, 1] of
    shape ``(N, C, H, W)``; floating inputs are taken as they are, in float32. Labels are integers of any width.

    Raises:
        CurvlabError: An array has another dtype or shape, or they do not fit together; the message begins with its key.
    """
    labels = {key: _labels(key, arrays[key]) for key in ("y_train", "y_test")}
    return Dataset(
        name=name,
        x_train=torch.from_numpy(_inputs("x_train", arrays["x_train"])),
        y_train=torch.from_numpy(labels["y_train"]),
        x_test=torch.from_numpy(_inputs("x_test", arrays["x_test"])),
        y_test=torch.from_numpy(labels["y_test"]),
        classes=_classes(arrays["classes"]) if "classes" in arrays else _counted(labels),
    )


def _inputs(key: str, x: Array) -> Array:
    if x.dtype == np.uint8:
        if x.ndim == 3:
            x = x[..., np.newaxis]
        if x.ndim != 4 or x.shape[-1] not in (1, 3):
            raise CurvlabError(
                f"{key} is uint8 of shape {x.shape}; images are (N, H, W), (N, H, W, 1) or (N, H, W, 3), "
                "and other inputs are stored as float32"
            )
        scaled = np.moveaxis(x, -1, 1).astype(np.float32, order="C")
        scaled /= 255
        return scaled
    if x.dtype.kind != "f":
        raise CurvlabError(f"{key} is {x.dtype}; store images as uint8 and other inputs as float32")
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which Dataset reports
        return np.ascontiguousarray(x, dtype=np.float32)


def _labels(key: str, y: Array) -> Array:
    if y.dtype.kind not in "iu":
        raise CurvlabError(f"{key} is {y.dtype}; labels are integers, the classes counted from 0")
    if y.ndim != 1:
        raise CurvlabError(f"{key} has shape {y.shape}; labels have shape (N,), one class index a sample")
    return np.ascontiguousarray(y, dtype=np.int64)


def _classes(names: Array) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "Uiu":
        raise CurvlabError(f"classes is {names.dtype} of shape {names.shape}; give a list of strings, one a class")
    return tuple(str(name) for name in names)


def _counted(labels: Mapping[str, Array]) -> tuple[str, ...]:
    """Name the classes by their numbers, up to the highest label."""
    highest = {key: int(y.max(initial=-1)) for key, y in labels.items()}
    key = max(highest, key=highest.__getitem__)
    if highest[key] >= _MOST_UNNAMED_CLASSES:
        raise CurvlabError(
            f"{key} has the label {highest[key]}, which would make as many classes; number the classes from 0"
        )
    return tuple(str(index) for index in range(highest[key] + 1))
