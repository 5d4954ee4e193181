"""What the functions of this package take: each kind of argument is checked here, in one sentence."""

from math import isfinite
from numbers import Real
from operator import index

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.forms import unknown


def whole(name: str, value: object, least: int) -> int:
    """Return a whole number, NumPy's among them.

    Raises:
        CurvlabError: It is none, or below the least.
    """
    # In Python True is 1 and has an index, and so has a tensor of one whole number.
    if isinstance(value, (bool, np.bool_, Tensor)) or not hasattr(value, "__index__"):
        raise CurvlabError(f"{name} is a whole number, not {_shown(value)}")
    number = index(value)
    if number < least:
        raise CurvlabError(f"{name} must be at least {least}, not {number}")
    return number


def real(name: str, value: object, above: float | None = None) -> float:
    """Return a finite number.

    Raises:
        CurvlabError: It is none, or not above the bound.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise CurvlabError(f"{name} is a number, not {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if above is not None and not number > above:
        raise CurvlabError(f"{name} must be above {above:g}, not {value}")
    if not isfinite(number):
        raise CurvlabError(f"{name} must be finite, not {number}")
    return number


def choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise unless a value is one of the known names.

    Raises:
        CurvlabError: It is none of them.
    """
    if not isinstance(value, str):
        raise CurvlabError(f"{name} is one of {', '.join(known)}, not {_shown(value)}")
    if value not in known:
        raise CurvlabError(unknown(name, value, known))


def generator_of(seed: object) -> np.random.Generator:
    """Return the random numbers of a seed.

    Raises:
        CurvlabError: It is not a whole number of at least 0.
    """
    return np.random.default_rng(whole("seed", seed, 0))


def real_tensor(name: str, value: object) -> Tensor:
    """Return a tensor of real numbers, without its graph.

    Raises:
        CurvlabError: It is not a tensor, not dense, or complex.
    """
    if isinstance(value, np.ndarray):
        raise CurvlabError(f"{name} is a tensor, not a NumPy array: torch.from_numpy({name}) makes one of it")
    if not isinstance(value, Tensor):
        raise CurvlabError(f"{name} is a tensor, not {_shown(value)}")
    if value.is_complex():
        raise CurvlabError(f"{name} is complex; the vectors and eigenvalues of a real symmetric matrix are real")
    if value.layout != torch.strided or value.is_meta:
        raise CurvlabError(f"{name} is {'on the meta device' if value.is_meta else 'sparse'}; take a dense tensor")
    return value.detach()


def _shown(value: object) -> str:
    text = repr(value)
    if len(text) > 40 or "\n" in text:
        return f"a {type(value).__name__}"
    return text
