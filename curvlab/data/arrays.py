"""Conversion of NumPy arrays to a data set: dtypes, image layout, default class names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from curvlab.data.dataset import Dataset
from curvlab.errors import CurvlabError

Array = np.ndarray[Any, np.dtype[Any]]
KEYS = ("x_train", "y_train", "x_test", "y_test")

# If there are more labels than this, without names, they are probably identifiers and not classes.
_MOST_UNNAMED_CLASSES = 100_000


def from_arrays(name: str, arrays: Mapping[str, Array]) -> Dataset:
    """Convert the arrays named in ``KEYS`` and, if present, ``classes`` to a data set.

    Inputs of uint8 are images ``(N, H, W)``, ``(N, H, W, 1)`` or ``(N, H, W, 3)`` and become float32 in [0, 1] of
    shape ``(N, C, H, W)``; floating-point inputs become float32 without scaling. Labels are integers of any width.

    Raises:
        CurvlabError: An array has another dtype or shape, or the arrays do not fit together; the message begins with
            the key.
    """
    labels = {key: _convert_labels(key, arrays[key]) for key in ("y_train", "y_test")}
    return Dataset(
        name=name,
        x_train=torch.from_numpy(_convert_inputs("x_train", arrays["x_train"])),
        y_train=torch.from_numpy(labels["y_train"]),
        x_test=torch.from_numpy(_convert_inputs("x_test", arrays["x_test"])),
        y_test=torch.from_numpy(labels["y_test"]),
        classes=_convert_classes(arrays["classes"]) if "classes" in arrays else _number_classes(labels),
    )


def _convert_inputs(key: str, x: Array) -> Array:
    if x.dtype == np.uint8:
        if x.ndim == 3:
            x = x[..., np.newaxis]
        if x.ndim != 4 or x.shape[-1] not in (1, 3):
            raise CurvlabError(
                f"{key} is uint8 of shape {x.shape}; images must be (N, H, W), (N, H, W, 1) or "
                "(N, H, W, 3); store other inputs as float32"
            )
        scaled = np.moveaxis(x, -1, 1).astype(np.float32, order="C")
        scaled /= 255
        return scaled
    if x.dtype.kind != "f":
        raise CurvlabError(f"{key} is {x.dtype}; store images as uint8 and other inputs as float32")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which Dataset reports
        return np.ascontiguousarray(x, dtype=np.float32)


def _convert_labels(key: str, y: Array) -> Array:
    if y.dtype.kind not in "iu":
        raise CurvlabError(f"{key} is {y.dtype}; labels must be integers from 0")
    if y.ndim != 1:
        raise CurvlabError(f"{key} has shape {y.shape}; labels must have shape (N,), one class index per sample")
    return np.ascontiguousarray(y, dtype=np.int64)


def _convert_classes(names: Array) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "Uiu":
        raise CurvlabError(f"classes is {names.dtype} of shape {names.shape}; give a list of strings, one per class")
    return tuple(str(name) for name in names)


def _number_classes(labels: Mapping[str, Array]) -> tuple[str, ...]:
    """Return the numbers of the classes as names, up to the highest label."""
    highest = {key: int(y.max(initial=-1)) for key, y in labels.items()}
    key = max(highest, key=highest.__getitem__)
    if highest[key] >= _MOST_UNNAMED_CLASSES:
        raise CurvlabError(
            f"{key} has the label {highest[key]}, which implies as many classes; number the classes from 0"
        )
    if all(y.min(initial=1) > 0 for y in labels.values()):
        raise CurvlabError(
            f"{key}: no sample has the label 0; number the classes from 0, or name all of them in the array classes"
        )
    return tuple(str(index) for index in range(highest[key] + 1))
