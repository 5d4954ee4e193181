"""From a base configuration and axes to configurations: a grid, a list, random samples."""

import math
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from curvlab.errors import CurvlabError
from curvlab.grid.cell import canonical

Config = dict[str, Any]

_MOST = 1_000_000  # combinations: more are a slip, and would fill the memory before the first is run
_RANGES = {
    "uniform": "[low, high], finite numbers in this order, whose difference is finite",
    "log_uniform": "[low, high], finite numbers above 0 in this order",
    "integers": "[low, high], whole numbers in this order, at most 2^53 of them",
    "choice": "a list of values",
}


def expand(
    base: Mapping[str, Any],
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Config]:
    """Yield every combination of a point, a sample and an entry of the grid, over the base configuration.

    Args:
        base: What all have in common.
        grid: Key -> its values; the last key varies fastest.
        points: Configurations in part, such as two keys that only go together.
        samples: The same, drawn by ``draw``.

    Raises:
        CurvlabError: An axis is empty, has a value twice (1, 1.0 and True are the same) or one that is not of JSON; two
            axes set the same key; or there are more than a million combinations.

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
            raise CurvlabError(f"{min(names & taken)!r} is set by two axes; let one of them do it")
        taken |= names
    if (count := math.prod(map(len, (*axes, *grid.values())))) > _MOST:
        raise CurvlabError(
            f"the axes have {count:,} combinations, and a sweep has at most {_MOST:,}; take fewer values"
        )
    for point, sample, *values in product(*axes, *grid.values()):
        yield {**base, **point, **sample, **dict(zip(grid, values, strict=True))}


def _require_distinct(what: str, values: Sequence[Any]) -> None:
    """Refuse a value that is there twice, since it would silently be one run."""
    seen: dict[Any, Any] = {}
    for value in values:
        canonical(value)  # or it is refused
        same = _hashable(value)
        if same in seen:
            first, again = reprlib.repr(seen[same]), reprlib.repr(value)
            what_again = f"{again} twice" if first == again else f"{first} and {again}, which are the same"
            raise CurvlabError(f"{what} has {what_again}; a value is run once, so leave one of them out")
        seen[same] = value


def _hashable(value: Any) -> Any:
    """Return what is equal where the values are: 1, 1.0 and True too."""
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(item)) for name, item in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def draw(count: int, ranges: Mapping[str, Mapping[str, Sequence[Any]]], seed: int = 0) -> list[Config]:
    """Draw values for keys; a larger count begins with the same values, and a key has the same beside any others.

    Args:
        count: How many.
        ranges: Key -> one of ``{"uniform": [low, high]}``, ``{"log_uniform": [low, high]}``,
            ``{"integers": [low, high]}`` (both included) and ``{"choice": [value, ...]}``.
        seed: Of the draws.

    Raises:
        CurvlabError: A range is none of these, or is wider than its numbers can tell apart.

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
        columns[name] = [_one(name, kind, bounds, float(u)) for u in generator.random(count)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _one(name: str, kind: str, bounds: Sequence[Any], u: float) -> Any:
    """Return the value at ``u`` of ``[0, 1)``."""
    if kind == "choice" and isinstance(bounds, Sequence) and not isinstance(bounds, str) and bounds:
        return bounds[int(u * len(bounds))]
    if isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(_is_finite, bounds)) and bounds[0] <= bounds[1]:
        low, high = bounds
        if kind == "uniform" and _is_finite(high - low):
            return low + u * (high - low)
        if kind == "log_uniform" and low > 0:
            return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        # u has 53 bits: of more integers it would leave some out.
        if kind == "integers" and isinstance(low, int) and isinstance(high, int) and high - low < 2**53:
            return low + int(u * (high - low + 1))
    raise CurvlabError(f"random: {name} needs {kind}: {_RANGES[kind]}, not {reprlib.repr(bounds)}")


def _is_finite(number: Any) -> bool:
    """Say whether it is a number, and one that a float can be."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False
