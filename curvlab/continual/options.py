"""Checks of numeric options of runs, methods and buffers."""

import math
from typing import Any

from curvlab.errors import CurvlabError


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """Check that an option is a finite number from 0 to ``most``.

    Raises:
        CurvlabError: It is not such a number.
    """
    if not is_number(value) or not 0 <= value <= most or value == math.inf:
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise CurvlabError(f"{name} must be a number of at least 0{limit}, not {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Check that an option is a finite number above 0.

    Raises:
        CurvlabError: It is not such a number.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise CurvlabError(f"{name} must be a positive number, not {value!r}")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Check that an option is a whole number from ``least``.

    Raises:
        CurvlabError: It is not such a number.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CurvlabError(f"{name} must be a whole number from {least}, not {value!r}")


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, but not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
