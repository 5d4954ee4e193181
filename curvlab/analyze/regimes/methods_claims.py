"""Mirzadeh et al. (2020), Table 2: what is published, and what becomes of its claims."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from curvlab import yaml_file
from curvlab.analyze.frame.conditions import differing, either
from curvlab.analyze.regimes.methods_options import MethodsConfig
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
#: From the best to the worst of them.
_ORDER = ("stable", "ewc", "naive")
#: By how much Stable SGD is to be above naive fine-tuning; thresholds of ours, below the published differences.
_ABOVE_NAIVE = {"permuted": 0.10, "rotated": 0.08, "split": 0.0}
#: Where the published difference of EWC and naive fine-tuning is less than two of its deviations.
_EWC_NO_WORSE = ("rotated", "split")


@cache
def published() -> dict[str, Any]:
    """Return the table as printed.

    ``source``, ``data``, ``tasks``, and by stream ``conditions`` and ``rows``, these by method.
    """
    text = files("curvlab.analyze").joinpath("published/training_regimes_table2.yaml").read_text()
    table: dict[str, Any] = yaml_file.loads(text)
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


# In what a run differs ------------------------------------------------------------------------------------------------


def deviations(config: MethodsConfig, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return in what a configuration differs from the published runs, with what these had in brackets, a line each.

    Args:
        config: Of the analysis.
        sizes: By stream, the training samples of a task and the test samples of the data set.
    """
    streams: dict[str, list[str]] = {}
    for stream in config.streams:
        theirs = {"data": published()["data"][stream], "tasks": published()["tasks"]}
        theirs |= published()["conditions"][stream]
        differ = differing(_conditions(config, *sizes[stream]), theirs)
        streams.setdefault(differ, []).append(stream)
    lines = [f"{', '.join(names)}: {text}." for text, names in streams.items() if text]
    if "ewc" in config.methods:
        taken = "all" if config.samples is None else f"{config.samples:,} random"
        lines.append(
            f"EWC: {config.quantity}, {config.structure}, of {taken} samples after each task, {config.ewc_mode} (a "
            "diagonal, the moving average over the batches of the training, scaled to between 0 and 1)."
        )
    lines.append(
        "All methods: one code, with the same dropout (none, but for Stable SGD) and number of candidates (Stable SGD "
        "is of another code than the rest, which have dropout, batch sizes and learning rates of their own)."
    )
    return lines


def _conditions(config: MethodsConfig, training: int, test: int) -> dict[str, Any]:
    """Return the conditions under the names that the published ones have."""
    network = f"{config.model} {'-'.join(map(str, config.hidden))}" if config.model == "mlp" else config.model
    if config.weights is not None:
        network += f" from {config.weights.name}" + (", BatchNorm frozen" if config.fine_tune else "")
    conditions = {
        "data": Path(config.data).name,
        "tasks": config.tasks,
        "degrees a task": config.degrees,
        "training samples a task": training,
        "test samples": test,
        "passes": config.epochs,
        "network": network,
        "normalisation": config.normalize,
        "momentum": config.momentum,
        "batch size": either(config.batch_sizes),
        "seeds": len(config.seeds),
    }
    if "stable" in config.methods:
        conditions["dropout of Stable SGD"] = either(config.dropouts)
    if {"agem", "er"} & set(config.methods):
        conditions["replayed a step"] = config.replay_batch_size
        conditions["kept a class and task"] = config.per_class
    return conditions


# Claims ---------------------------------------------------------------------------------------------------------------


def order(found: Sequence[Record]) -> list[Record]:
    """Return, a record a stream and seed, by how much Stable SGD is above EWC, EWC above naive fine-tuning and so on.

    Keys: ``stream``, ``seed``, ``stable-ewc``, ``ewc-naive``, ``stable-naive`` (differences of accuracy, None where a
    run is missing), ``smallest`` of the three, and ``holds``, whether all are above 0. None of a stream in which not
    all three methods were run.

    Args:
        found: As for ``claims``.
    """
    records: list[Record] = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        mine = [record for record in found if record["stream"] == stream]
        links = {f"{a}-{b}": _differences(mine, "acc", a, [b], max) for a, b in [*pairwise(_ORDER), _ORDER[::2]]}
        seeds = dict.fromkeys(record["seed"] for record in mine)
        for seed, *values in zip(seeds, *links.values(), strict=False):  # no value at all where one was not run
            known = all(map(math.isfinite, values))
            records.append(
                {"stream": stream, "seed": seed}
                | {link: value if math.isfinite(value) else None for link, value in zip(links, values, strict=True)}
                | {"smallest": min(values) if known else None, "holds": min(values) > 0 if known else None}
            )
    return records


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

    smallest = [math.nan if (value := row["smallest"]) is None else value for row in order(found)]
    theirs = [(rows[a]["acc"] - rows[b]["acc"]) / 100 for a, b in pairwise(_ORDER)]
    margin, no_worse = _ABOVE_NAIVE[stream], stream in _EWC_NO_WORSE
    return [
        beside(
            "acc",
            "joint",
            ("stable",),
            f"{stream}: training on all tasks at once is above Stable SGD (difference of accuracy)",
            lambda value: value > 0,
        ),
        Claim.of(
            f"{stream}: Stable SGD is above EWC, and EWC above naive fine-tuning (smallest difference of accuracy)",
            source,
            smallest,
            lambda value: value > 0,
            round(min(theirs), 4),
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
