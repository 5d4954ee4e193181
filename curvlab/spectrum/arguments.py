"""Checks of the arguments of this package, with error messages of one sentence."""

from math import isfinite
from numbers import Real
from operator import index

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.forms import unknown_name_message


def check_whole(name: str, value: object, least: int) -> int:
    """Return a whole number (Python or NumPy) of at least ``least`` as an int.

    Raises:
        CurvlabError: The value is not a whole number, or is too small.
    """
    # ``bool`` and integer tensors with one entry also have ``__index__``.
    if isinstance(value, (bool, np.bool_, Tensor)) or not hasattr(value, "__index__"):
        raise CurvlabError(f"{name} must be a whole number, not {_describe(value)}")
    number = index(value)
    if number < least:
        raise CurvlabError(f"{name} must be at least {least}, not {number}")
    return number


def check_real(name: str, value: object, above: float | None = None) -> float:
    """Return a finite real number, above the bound if one is given, as a float.

    Raises:
        CurvlabError: The value is not a finite number, or not above the bound.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise CurvlabError(f"{name} must be a number, not {_describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if above is not None and not number > above:
        raise CurvlabError(f"{name} must be above {above:g}, not {value}")
    if not isfinite(number):
        raise CurvlabError(f"{name} must be finite, not {number}")
    return number


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Check that a value is one of the known names.

    Raises:
        CurvlabError: The value is not one of them.
    """
    if not isinstance(value, str):
        raise CurvlabError(f"{name} must be one of {', '.join(known)}, not {_describe(value)}")
    if value not in known:
        raise CurvlabError(unknown_name_message(name, value, known))


def make_generator(seed: object) -> np.random.Generator:
    """Return a random generator with the given seed.

    Raises:
        CurvlabError: The seed is not a whole number of at least 0.
    """
    return np.random.default_rng(check_whole("seed", seed, 0))


def check_real_tensor(name: str, value: object) -> Tensor:
    """Return a dense real tensor, detached from its graph.

    Raises:
        CurvlabError: The value is not a dense real tensor.
    """
    if isinstance(value, np.ndarray):
        raise CurvlabError(f"{name} must be a tensor, not a NumPy array: use torch.from_numpy({name})")
    if not isinstance(value, Tensor):
        raise CurvlabError(f"{name} must be a tensor, not {_describe(value)}")
    if value.is_complex():
        raise CurvlabError(
            f"{name} must be real, not complex: a real symmetric matrix has real eigenvalues and vectors"
        )
    if value.layout != torch.strided or value.is_meta:
        raise CurvlabError(
            f"{name} is {'on the meta device' if value.is_meta else 'sparse'}; give a dense tensor with values"
        )
    return value.detach()


def _describe(value: object) -> str:
    text = repr(value)
    if len(text) > 40 or "\n" in text:
        return f"a {type(value).__name__}"
    return text
