"""Expand a base configuration and axes (a grid, a list of points, random samples) to configurations."""

import math
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from curvlab.errors import CurvlabError
from curvlab.grid.run_spec import canonical

Config = dict[str, Any]

_MAX_COMBINATIONS = 1_000_000  # more are most likely a mistake, and would fill the memory before the first run
_RANGES = {
    "uniform": "[low, high], finite numbers with low <= high and a finite difference",
    "log_uniform": "[low, high], finite numbers with 0 < low <= high",
    "integers": "[low, high], integers with low <= high, at most 2^53 of them",
    "choice": "a list of values",
}


def expand(
    base: Mapping[str, Any],
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Config]:
    """Yield the base configuration updated by every combination of a point, a sample and a grid entry.

    Args:
        base: Values that all configurations share.
        grid: Key -> its values; the last key varies fastest.
        points: Partial configurations, such as values of two keys that belong together.
        samples: Partial configurations drawn by ``draw``.

    Raises:
        CurvlabError: An axis is empty, has a value twice (1, 1.0 and True are equal) or one that is not a JSON value;
            two axes set the same key; or there are more than a million combinations.

    Examples:
        >>> [(c["lr"], c["seed"]) for c in expand({"lr": 0.1}, grid={"lr": [0.1, 0.01], "seed": [0, 1]})]
        [(0.1, 0), (0.1, 1), (0.01, 0), (0.01, 1)]
        >>> list(expand({}, points=[{"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adam", "lr": 0.001}]))
        [{'optimizer': 'sgd', 'lr': 0.1}, {'optimizer': 'adam', 'lr': 0.001}]
    """
    grid = grid or {}
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise CurvlabError(f"the grid needs a list of values for {name!r}, not {reprlib.repr(values)}")
        _require_distinct(f"the grid's list for {name!r}", values)
    _require_distinct("the list of points", points or [])
    axes = [points or [{}], samples or [{}]]
    taken = set(grid)
    for axis in axes:
        names = {name for point in axis for name in point}
        if names & taken:
            raise CurvlabError(f"{min(names & taken)!r} is set by two axes; remove it from one of them")
        taken |= names
    if (count := math.prod(map(len, (*axes, *grid.values())))) > _MAX_COMBINATIONS:
        raise CurvlabError(
            f"the axes have {count:,} combinations, and a sweep has at most {_MAX_COMBINATIONS:,}; give fewer values"
        )
    for point, sample, *values in product(*axes, *grid.values()):
        yield {**base, **point, **sample, **dict(zip(grid, values, strict=True))}


def _require_distinct(what: str, values: Sequence[Any]) -> None:
    """Refuse equal values, since they would silently be one run."""
    seen: dict[Any, Any] = {}
    for value in values:
        canonical(value)  # refuses other than JSON values
        same = _hashable(value)
        if same in seen:
            first, again = reprlib.repr(seen[same]), reprlib.repr(value)
            what_again = f"{again} twice" if first == again else f"{first} and {again}, which are equal"
            raise CurvlabError(f"{what} has {what_again}; equal values are one run, so remove one of them")
        seen[same] = value


def _hashable(value: Any) -> Any:
    """Return a hashable object that is equal for equal values: 1, 1.0 and True are equal."""
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(item)) for name, item in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def draw(count: int, ranges: Mapping[str, Mapping[str, Sequence[Any]]], seed: int = 0) -> list[Config]:
    """Draw random values for keys.

    A larger count begins with the same values. The values of a key do not depend on the other keys.

    Args:
        count: Number of draws.
        ranges: Key -> one of ``{"uniform": [low, high]}``, ``{"log_uniform": [low, high]}``,
            ``{"integers": [low, high]}`` (both included) and ``{"choice": [value, ...]}``.
        seed: Seed of the draws.

    Raises:
        CurvlabError: A range has another form, or is too wide for float64.

    Examples:
        >>> drawn = draw(3, {"lr": {"log_uniform": [1e-4, 1e-1]}, "width": {"choice": [10, 30]}})
        >>> [(f"{c['lr']:.4f}", c["width"]) for c in drawn]
        [('0.0002', 10), ('0.0007', 30), ('0.0002', 30)]
    """
    columns = {}
    for name, given in ranges.items():
        if not isinstance(given, Mapping) or len(given) != 1:
            raise CurvlabError(f"random: {name} needs one of {', '.join(_RANGES)}, not {given!r}")
        ((kind, bounds),) = given.items()
        if kind not in _RANGES:
            raise CurvlabError(f"random: {name} needs one of {', '.join(_RANGES)}, not {kind!r}")
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        columns[name] = [_scale(name, kind, bounds, float(u)) for u in generator.random(count)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _scale(name: str, kind: str, bounds: Sequence[Any], u: float) -> Any:
    """Map ``u`` in ``[0, 1)`` to a value of the range."""
    if kind == "choice" and isinstance(bounds, Sequence) and not isinstance(bounds, str) and bounds:
        return bounds[int(u * len(bounds))]
    if isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(_is_finite, bounds)) and bounds[0] <= bounds[1]:
        low, high = bounds
        if kind == "uniform" and _is_finite(high - low):
            return low + u * (high - low)
        if kind == "log_uniform" and low > 0:
            return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        # u has 53 bits and could not reach all of more integers.
        if kind == "integers" and isinstance(low, int) and isinstance(high, int) and high - low < 2**53:
            return low + int(u * (high - low + 1))
    raise CurvlabError(f"random: {name} needs {kind}: {_RANGES[kind]}, not {reprlib.repr(bounds)}")


def _is_finite(number: Any) -> bool:
    """Return whether a value is a number that a finite float can represent."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False
