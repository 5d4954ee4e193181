"""Mirzadeh et al. (2020), Table 2: what is published, and what becomes of its claims."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from curvlab.results import Claim

Record = dict[str, Any]

#: What the methods are called, in the paper's order.
LABELS = {
    "naive": "Naive SGD",
    "ewc": "EWC",
    "agem": "A-GEM",
    "er": "ER-Reservoir",
    "stable": "Stable SGD",
    "joint": "multi-task (joint)",
}
MEMORYLESS = ("naive", "ewc", "stable")
#: By how much Stable SGD is to be above naive fine-tuning; thresholds of ours, below the published differences.
_ABOVE_NAIVE = {"permuted": 0.10, "rotated": 0.08, "split": 0.0}
#: Where the published difference of EWC and naive fine-tuning is less than two of its deviations.
_EWC_NO_WORSE = ("rotated", "split")

UNMATCHED = (
    "The published baselines are of another code than the published Stable SGD, with dropout, batch sizes and learning "
    "rates of their own; ours share code, network, data and number of candidates."
)


@cache
def published() -> dict[str, Any]:
    """Return the table as printed: ``source``, ``data``, ``tasks``, and ``rows`` by stream and method."""
    text = files("curvlab.analyze").joinpath("published/training_regimes_table2.yaml").read_text()
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def beside_published(table: Sequence[Record], data: str, tasks: int) -> list[Record]:
    """Return the rows of a summary, those of a published stream with its numbers under ``published_KEY``, as shares.

    Args:
        table: Records with ``stream`` and ``method``.
        data: Name of the data set.
        tasks: How many the streams have.
    """
    return [{**row, **_published(row["stream"], row["method"], data, tasks)} for row in table]


def _published(stream: str, method: str, data: str, tasks: int) -> Record:
    known = published()
    if known["data"][stream] != data or known["tasks"] != tasks:
        return {}
    row = known["rows"][stream][method]
    return {f"published_{key}": value / 100 if key.startswith("acc") else value for key, value in row.items()}


def claims(found: Sequence[Record]) -> list[Claim]:
    """Return the paper's claims with their verdicts, a value a seed.

    Args:
        found: Records of ``methods``, one a ``stream``, ``method`` and ``seed``, with ``acc`` and ``forgetting``.
    """
    answers = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        answers += _claims(stream, [record for record in found if record["stream"] == stream])
    return answers


def _claims(stream: str, found: Sequence[Record]) -> list[Claim]:
    rows, source = published()["rows"][stream], published()["source"]

    def beside(key: str, method: str, others: Sequence[str], text: str, test: Callable[[float], bool]) -> Claim:
        """Judge a method's value less the best of others, which is the lowest of what is forgotten."""
        best = max if key == "acc" else min
        scale = 100 if key == "acc" else 1
        theirs = (rows[method][key] - best(rows[other][key] for other in others)) / scale
        return Claim.of(text, source, _differences(found, key, method, others, best), test, round(theirs, 4))

    margin, no_worse = _ABOVE_NAIVE[stream], stream in _EWC_NO_WORSE
    return [
        beside(
            "acc",
            "joint",
            ("stable",),
            f"{stream}: training on all tasks at once is above Stable SGD (difference of accuracy)",
            lambda value: value > 0,
        ),
        beside(
            "acc",
            "stable",
            ("ewc",),
            f"{stream}: Stable SGD is above EWC (difference of accuracy)",
            lambda value: value > 0,
        ),
        beside(
            "acc",
            "ewc",
            ("naive",),
            f"{stream}: EWC is {'not below' if no_worse else 'above'} naive fine-tuning (difference of accuracy)",
            lambda value: value > 0 or (no_worse and value == 0),
        ),
        beside(
            "acc",
            "stable",
            ("naive",),
            f"{stream}: Stable SGD is {'far ' if margin else ''}above naive fine-tuning (difference of accuracy"
            + (f" at least {margin:.2f})" if margin else ")"),
            lambda value: value >= margin and value > 0,
        ),
        beside(
            "acc",
            "stable",
            ("agem", "er"),
            f"{stream}: Stable SGD, which keeps no samples, is above A-GEM and ER (difference of accuracy to the best)",
            lambda value: value > 0,
        ),
        beside(
            "forgetting",
            "stable",
            [method for method in MEMORYLESS if method != "stable"],
            f"{stream}: of the methods that keep no samples it forgets least (difference of forgetting to the next)",
            lambda value: value < 0,
        ),
    ]


def _differences(
    found: Sequence[Record], key: str, method: str, others: Sequence[str], best: Callable[[Sequence[float]], float]
) -> list[float]:
    """Return for every seed a method's value less the best of others; NaN where one is missing, none if not run."""
    if not {method, *others} <= {record["method"] for record in found}:
        return []
    of = {(record["seed"], record["method"]): record[key] for record in found}
    differences = []
    for seed in dict.fromkeys(record["seed"] for record in found):
        values = [of.get((seed, name)) for name in (method, *others)]
        own, *rest = [math.nan if value is None else value for value in values]
        differences.append(own - best(rest) if all(map(math.isfinite, (own, *rest))) else math.nan)
    return differences
