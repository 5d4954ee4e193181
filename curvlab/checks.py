"""Checks of numbers given by the user, with error messages of one sentence."""

import math
from numbers import Integral, Real
from operator import index

import numpy as np
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
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
