"""Checks of numbers and tensors given by the user, with error messages of one sentence."""

import math
from collections.abc import Sequence
from contextlib import suppress
from numbers import Integral, Real
from operator import index

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError


def real_number(value: object, what: str) -> float:
    """Return a finite real number as a float.

    Args:
        value: A Python or NumPy number or a tensor without dimensions; a bool is not a number here.
        what: The name of the value, with which the error message begins.

    Raises:
        CurvlabError: The value is not a finite real number.
    """
    plain = _plain(value)
    try:
        number = float(plain) if isinstance(plain, Real) and not isinstance(plain, bool) else None
    except OverflowError:  # a whole number above 1e308
        number = math.inf
    if number is None or not math.isfinite(number):
        raise CurvlabError(f"{what} must be a finite real number, not {describe_value(value)}")
    return number


def positive_number(value: object, what: str) -> float:
    """Return a finite number above 0 as a float.

    Args:
        value: A Python or NumPy number or a tensor without dimensions; a bool is not a number here.
        what: The name of the value, with which the error message begins.

    Raises:
        CurvlabError: The value is not a finite number above 0.
    """
    with suppress(CurvlabError):
        if (number := real_number(value, what)) > 0:
            return number
    raise CurvlabError(f"{what} must be a finite number above 0, not {describe_value(value)}")


def whole_number(value: object, what: str, least: int = 0) -> int:
    """Return a whole number of at least ``least`` as an int.

    Args:
        value: A Python or NumPy number or a tensor without dimensions; a bool is not a number here.
        what: The name of the value, with which the error message begins.
        least: The smallest allowed value.

    Raises:
        CurvlabError: The value is not a whole number, or is too small.
    """
    plain = _plain(value)
    if not isinstance(plain, Integral) or isinstance(plain, bool) or plain < least:
        raise CurvlabError(f"{what} must be a whole number from {least}, not {describe_value(value)}")
    return index(plain)


def to_double(value: object, what: str, shape: Sequence[int | str], *, finite: bool = True) -> Tensor:
    """Return a dense real tensor of a given shape in float64.

    Args:
        value: A tensor of floating-point or whole numbers.
        what: The name of the value, with which the error message begins.
        shape: Its length in each dimension; a name stands for any length from 1.
        finite: Whether the entries must be finite. They are not read if it is False, as inside of ``torch.func``.

    Raises:
        CurvlabError: The value is not such a tensor.

    Examples:
        >>> to_double([0.0, 1.0], "start", (2,))
        Traceback (most recent call last):
        curvlab.errors.CurvlabError: start must be a dense real tensor (2,), not [0.0, 1.0]
    """
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_complex()
        or value.dtype == torch.bool
        or value.ndim != len(shape)
        or any(a < 1 if isinstance(b, str) else a != b for a, b in zip(value.shape, shape, strict=True))
    ):
        text = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise CurvlabError(f"{what} must be a dense real tensor ({text}), not {describe_value(value)}")
    if finite and not bool(value.isfinite().all()):
        raise CurvlabError(f"{what} must be finite, but {int((~value.isfinite()).sum())} entries are NaN or infinite")
    return value.double()


def _plain(value: object) -> object:
    """Convert a NumPy number, array or tensor without dimensions to a Python number; return other values unchanged."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        return value.item()
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    return value


def describe_value(value: object) -> str:
    """Describe a value in an error message: its short ``repr``, or the dtype and shape of a tensor or array."""
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype} and shape {value.shape}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
