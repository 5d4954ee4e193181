"""Numbers that a user gives: what is not such a number is refused in one sentence."""

import math
from numbers import Integral, Real
from operator import index

import numpy as np
from torch import Tensor

from curvlab.errors import CurvlabError


def real_number(value: object, what: str) -> float:
    """Return a finite real number: a Python or NumPy number or a tensor without dimensions, never a bool.

    Raises:
        CurvlabError: It is not one; the message begins with ``what``.
    """
    plain = _plain(value)
    try:
        number = float(plain) if isinstance(plain, Real) and not isinstance(plain, bool) else None
    except OverflowError:  # a whole number above 1e308
        number = math.inf
    if number is None or not math.isfinite(number):
        raise CurvlabError(f"{what} must be a finite real number, not {shown(value)}")
    return number


def whole_number(value: object, what: str, least: int = 0) -> int:
    """Return a whole number from ``least``: a Python or NumPy number or a tensor without dimensions, never a bool.

    Raises:
        CurvlabError: It is not one; the message begins with ``what``.
    """
    plain = _plain(value)
    if not isinstance(plain, Integral) or isinstance(plain, bool) or plain < least:
        raise CurvlabError(f"{what} must be a whole number from {least}, not {shown(value)}")
    return index(plain)


def _plain(value: object) -> object:
    """Return the Python number of a NumPy number, array or tensor without dimensions; else the value itself."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        return value.item()
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    return value


def shown(value: object) -> str:
    """Return what a value is, for a message: its short form, or what kind of tensor or array."""
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype} and shape {value.shape}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
