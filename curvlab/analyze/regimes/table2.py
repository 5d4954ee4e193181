"""Mirzadeh et al. (2020), Table 2: what is published, and what becomes of its claims."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from curvlab.analyze.frame.conditions import differing, either
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.regimes.methods_config import MethodsConfig
from curvlab.results import Claim, Gate, require_direction

Record = dict[str, Any]

#: The methods of the paper that keep no samples, from the best to the worst.
_ORDER = ("stable", "ewc", "naive")
#: By how much Stable SGD is to be above naive fine-tuning; thresholds of ours, below the published differences.
_ABOVE_NAIVE = {"permuted": 0.10, "rotated": 0.08, "split": 0.0}
#: Where the published difference of EWC and naive fine-tuning is less than two of its deviations.
_EWC_NO_WORSE = ("rotated", "split")


def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_published("regimes")["table2"]
    return table


def source() -> str:
    """Return where the table stands."""
    return str(_table()["source"])


def published_rows(stream: str) -> Mapping[str, Mapping[str, float]]:
    """Return the published numbers of a stream by method: accuracies in percent, and forgetting."""
    rows: Mapping[str, Mapping[str, float]] = _table()["rows"][stream]
    return rows


def beside_published(table: Sequence[Record], config: MethodsConfig, data: Subject) -> list[Record]:
    """Return the rows of a summary, those of a published stream with its numbers under ``published_KEY``, as shares.

    Args:
        table: Records with ``stream`` and ``method``.
        config: Of the run.
        data: Of the run.
    """
    return [{**row, **_published(row["stream"], row["method"], config, data)} for row in table]


def _published(stream: str, method: str, config: MethodsConfig, data: Subject) -> Record:
    if not has_stream(stream, config, data):
        return {}
    row = published_rows(stream).get(method, {})
    return {f"published_{key}": value / 100 if key.startswith("acc") else value for key, value in row.items()}


def has_stream(stream: str, config: MethodsConfig, data: Subject) -> bool:
    """Say whether a run is of the published data and number of tasks, beside whose numbers its own can stand."""
    theirs = _table()["conditions"][stream]
    return (data.data, config.tasks) == (theirs["data"], theirs["tasks"])


# Conditions -----------------------------------------------------------------------------------------------------------


def conditions(config: MethodsConfig, data: Subject, stream: str, samples: int) -> dict[str, Any]:
    """Return the conditions of a run under the names that the published ones have.

    Args:
        config: Of the run.
        data: Of the run.
        stream: Name of the stream.
        samples: Training samples of a task.
    """
    network = describe_network(config, data)
    if config.weights is not None:
        network += f" from {config.weights.name}" + (", BatchNorm frozen" if config.fine_tune else "")
    found = {
        "data": data.data,
        "tasks": config.tasks,
        "training samples a task": samples,
        "test samples": data.test,
        "passes": config.epochs,
        "network": network,
        "normalisation": config.normalize,
        "momentum": config.momentum,
        "batch size": either(config.batch_sizes),
        "seeds": len(config.seeds),
    }
    if stream == "rotated":
        found["degrees a task"] = config.degrees
    if "stable" in config.methods:
        found["dropout of Stable SGD"] = either(config.dropouts)
    if {"agem", "er"} & set(config.methods):
        found["replayed a step"] = config.replay_batch_size
        found["kept a class and task"] = config.per_class
    return found


def deviations(config: MethodsConfig, data: Subject, samples: Mapping[str, int]) -> list[str]:
    """Return in what a run of published streams differs from the published ones, with what these had in brackets.

    Args:
        config: Of the run.
        data: Of the run.
        samples: By stream, the training samples of a task.
    """
    streams: dict[str, list[str]] = {}
    for stream in samples:
        if has_stream(stream, config, data):
            differ = differing(conditions(config, data, stream, samples[stream]), _table()["conditions"][stream])
            streams.setdefault(differ, []).append(stream)
    if not streams:
        return []
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


def _gate(config: MethodsConfig, data: Subject, stream: str, samples: int) -> Gate:
    ours, known = conditions(config, data, stream, samples), _table()
    theirs = {name: value for name, value in known["conditions"][stream].items() if name in ours}
    return require_direction(ours, theirs, known["direction"][stream])


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


def claims(found: Sequence[Record], config: MethodsConfig, data: Subject) -> list[Claim]:
    """Return the paper's claims with their verdicts, a value a seed; all of them are about directions.

    Args:
        found: Records of ``methods``, one a ``stream``, ``method`` and ``seed``, with ``acc``, ``forgetting`` and
            ``samples``.
        config: Of the run.
        data: Of the run.
    """
    answers = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        mine = [record for record in found if record["stream"] == stream]
        answers += _claims(stream, mine, _gate(config, data, stream, mine[0]["samples"]))
    return answers


def _claims(stream: str, found: Sequence[Record], gate: Gate) -> list[Claim]:
    rows = published_rows(stream)
    margin, no_worse = _ABOVE_NAIVE[stream], stream in _EWC_NO_WORSE
    far = f"at least {margin:.2f}" if margin else "above 0"
    smallest = [math.nan if (value := row["smallest"]) is None else value for row in order(found)]
    theirs = min(rows[a]["acc"] - rows[b]["acc"] for a, b in pairwise(_ORDER)) / 100

    def compare(key: str, method: str, others: Sequence[str], text: str, test: Callable[[float], bool]) -> Claim:
        """Judge a method's value less the best of others, which is the lowest of what is forgotten."""
        best, scale = (max, 100) if key == "acc" else (min, 1)
        printed = (rows[method][key] - best(rows[other][key] for other in others)) / scale
        values = _differences(found, key, method, others, best)
        return Claim.of(f"{stream}: {text}", source(), values, test, float(f"{printed:.4f}"), gate)

    def above(method: str, others: Sequence[str], text: str) -> Claim:
        return compare("acc", method, others, f"{text} (difference of accuracy)", lambda value: value > 0)

    return [
        above("joint", ["stable"], "training on all tasks at once is above Stable SGD"),
        Claim.of(
            f"{stream}: Stable SGD is above EWC, and EWC above naive fine-tuning (smallest difference of accuracy)",
            source(),
            smallest,
            lambda value: value > 0,
            float(f"{theirs:.4f}"),
            gate,
        ),
        above("stable", ["ewc"], "Stable SGD is above EWC"),
        compare(
            "acc",
            "ewc",
            ["naive"],
            f"EWC is {'not below' if no_worse else 'above'} naive fine-tuning (difference of accuracy)",
            lambda value: value > 0 or (no_worse and value == 0),
        ),
        compare(
            "acc",
            "stable",
            ["naive"],
            f"Stable SGD is {'far ' if margin else ''}above naive fine-tuning (difference of accuracy {far})",
            lambda value: value >= margin and value > 0,
        ),
        above("stable", ["agem", "er"], "Stable SGD, which keeps no samples, is above the better of A-GEM and ER"),
        compare(
            "forgetting",
            "stable",
            [method for method in _ORDER if method != "stable"],
            "of Stable SGD, EWC and naive fine-tuning Stable SGD forgets least (difference of forgetting to the next)",
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
