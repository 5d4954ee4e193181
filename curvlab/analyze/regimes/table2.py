"""Mirzadeh et al. (2020), Table 2: the published numbers, and the verdicts on the claims."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from curvlab.analyze.frame.conditions import describe_choice, describe_differences
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.regimes.methods_options import MethodsConfig
from curvlab.results import Claim, Gate, require_direction

Record = dict[str, Any]

#: The methods of the paper without a buffer, from best to worst.
_ORDER = ("stable", "ewc", "naive")
#: Smallest difference of Stable SGD and naive fine-tuning; our thresholds, below the published differences.
_ABOVE_NAIVE = {"permuted": 0.10, "rotated": 0.08, "split": 0.0}
#: Streams with a published difference of EWC and naive fine-tuning below two standard deviations.
_EWC_NO_WORSE = ("rotated", "split")


def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_published("regimes")["table2"]
    return table


def source() -> str:
    """Return the citation of the table."""
    return str(_table()["source"])


def published_rows(stream: str) -> Mapping[str, Mapping[str, float]]:
    """Return the published numbers of a stream by method: accuracies in percent, and forgetting."""
    rows: Mapping[str, Mapping[str, float]] = _table()["rows"][stream]
    return rows


def add_published(table: Sequence[Record], config: MethodsConfig, data: Subject) -> list[Record]:
    """Return the rows of a summary, with ``published_<key>`` for published streams, as fractions.

    Args:
        table: Records with ``stream`` and ``method``.
        config: The configuration.
        data: Description of the data.
    """
    return [{**row, **_published(row["stream"], row["method"], config, data)} for row in table]


def _published(stream: str, method: str, config: MethodsConfig, data: Subject) -> Record:
    if not has_stream(stream, config, data):
        return {}
    row = published_rows(stream).get(method, {})
    return {f"published_{key}": value / 100 if key.startswith("acc") else value for key, value in row.items()}


def has_stream(stream: str, config: MethodsConfig, data: Subject) -> bool:
    """Return whether a run has the published data and number of tasks, so that the numbers are comparable."""
    theirs = _table()["conditions"][stream]
    return (data.data, config.tasks) == (theirs["data"], theirs["tasks"])


# Conditions -----------------------------------------------------------------------------------------------------------


def conditions(config: MethodsConfig, data: Subject, stream: str, samples: int) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``.

    Args:
        config: The configuration.
        data: Description of the data.
        stream: Name of the stream.
        samples: Number of training samples per task.
    """
    network = describe_network(config, data)
    if config.weights is not None:
        network += f" from {config.weights.name}" + (", BatchNorm frozen" if config.fine_tune else "")
    found = {
        "data": data.data,
        "tasks": config.tasks,
        "training samples per task": samples,
        "test samples": data.test,
        "passes": config.epochs,
        "network": network,
        "normalisation": config.normalize,
        "momentum": config.momentum,
        "batch size": describe_choice(config.batch_sizes),
        "seeds": len(config.seeds),
    }
    if stream == "rotated":
        found["degrees a task"] = config.degrees
    if "stable" in config.methods:
        found["dropout of Stable SGD"] = describe_choice(config.dropouts)
    if {"agem", "er"} & set(config.methods):
        found["replayed per step"] = config.replay_batch_size
        found["kept per class and task"] = config.per_class
    return found


def deviations(config: MethodsConfig, data: Subject, samples: Mapping[str, int]) -> list[str]:
    """Return the differences of a run on published streams, with the published values in brackets.

    Args:
        config: The configuration.
        data: Description of the data.
        samples: Number of training samples per task, by stream.
    """
    streams: dict[str, list[str]] = {}
    for stream in samples:
        if has_stream(stream, config, data):
            differ = describe_differences(
                conditions(config, data, stream, samples[stream]), _table()["conditions"][stream]
            )
            streams.setdefault(differ, []).append(stream)
    if not streams:
        return []
    lines = [f"{', '.join(names)}: {text}." for text, names in streams.items() if text]
    if "ewc" in config.methods:
        taken = "all" if config.samples is None else f"{config.samples:,} random"
        lines.append(
            f"EWC: {config.quantity}, {config.structure}, on {taken} samples after each task, {config.ewc_mode} (a "
            "diagonal, moving average over training batches, scaled to [0, 1])."
        )
    lines.append(
        "All methods: one code, equally many candidates, and no dropout except for Stable SGD (Stable SGD and "
        "the other methods come from different codes, with different dropout, batch sizes and learning rates)."
    )
    return lines


def _gate(config: MethodsConfig, data: Subject, stream: str, samples: int) -> Gate:
    ours, known = conditions(config, data, stream, samples), _table()
    theirs = {name: value for name, value in known["conditions"][stream].items() if name in ours}
    return require_direction(ours, theirs, known["direction"][stream])


# Claims ---------------------------------------------------------------------------------------------------------------


def compare_in_order(found: Sequence[Record]) -> list[Record]:
    """Return the pairwise differences of Stable SGD, EWC and naive fine-tuning, one record per stream and seed.

    Keys: ``stream``, ``seed``, ``stable-ewc``, ``ewc-naive``, ``stable-naive`` (differences of accuracy, None if a run
    is missing), ``smallest`` of the three, and ``holds``, whether all are above 0. Streams in which one of the three
    methods was not run have no record.

    Args:
        found: Records of ``table.json``, see ``claims``.
    """
    records: list[Record] = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        mine = [record for record in found if record["stream"] == stream]
        links = {f"{a}-{b}": _differences(mine, "acc", a, [b], max) for a, b in [*pairwise(_ORDER), _ORDER[::2]]}
        seeds = dict.fromkeys(record["seed"] for record in mine)
        for seed, *values in zip(seeds, *links.values(), strict=False):  # a link is empty if a method was not run
            known = all(map(math.isfinite, values))
            records.append(
                {"stream": stream, "seed": seed}
                | {link: value if math.isfinite(value) else None for link, value in zip(links, values, strict=True)}
                | {"smallest": min(values) if known else None, "holds": min(values) > 0 if known else None}
            )
    return records


def claims(found: Sequence[Record], config: MethodsConfig, data: Subject) -> list[Claim]:
    """Return the paper's claims with their verdicts, from one value per seed; all are judged as directions.

    Args:
        found: Records of ``methods``, one per ``stream``, ``method`` and ``seed``, with ``acc``, ``forgetting`` and
            ``samples``.
        config: The configuration.
        data: Description of the data.
    """
    answers = []
    for stream in dict.fromkeys(record["stream"] for record in found):
        mine = [record for record in found if record["stream"] == stream]
        answers += _claims(stream, mine, _gate(config, data, stream, mine[0]["samples"]))
    return answers


def _claims(stream: str, found: Sequence[Record], gate: Gate) -> list[Claim]:
    rows = published_rows(stream)
    margin, no_worse = _ABOVE_NAIVE[stream], stream in _EWC_NO_WORSE
    least = f"at least {margin:.2f}" if margin else "above 0"
    smallest = [math.nan if (value := row["smallest"]) is None else value for row in compare_in_order(found)]
    theirs = min(rows[a]["acc"] - rows[b]["acc"] for a, b in pairwise(_ORDER)) / 100

    def compare(key: str, method: str, others: Sequence[str], text: str, test: Callable[[float], bool]) -> Claim:
        """Judge the value of a method minus the best of others: the highest accuracy, or the lowest forgetting."""
        best, scale = (max, 100) if key == "acc" else (min, 1)
        printed = (rows[method][key] - best(rows[other][key] for other in others)) / scale
        values = _differences(found, key, method, others, best)
        return Claim.of(f"{stream}: {text}", source(), values, test, float(f"{printed:.4f}"), gate)

    def above(method: str, others: Sequence[str], text: str) -> Claim:
        return compare("acc", method, others, f"{text} (difference of accuracy)", lambda value: value > 0)

    return [
        above("joint", ["stable"], "joint training is better than Stable SGD"),
        Claim.of(
            f"{stream}: Stable SGD is better than EWC, and EWC better than naive fine-tuning (smaller difference)",
            source(),
            smallest,
            lambda value: value > 0,
            float(f"{theirs:.4f}"),
            gate,
        ),
        above("stable", ["ewc"], "Stable SGD is better than EWC"),
        compare(
            "acc",
            "ewc",
            ["naive"],
            f"EWC is {'not worse' if no_worse else 'better'} than naive fine-tuning (difference of accuracy)",
            lambda value: value > 0 or (no_worse and value == 0),
        ),
        compare(
            "acc",
            "stable",
            ["naive"],
            f"Stable SGD is {'much ' if margin else ''}better than naive fine-tuning (difference of accuracy {least})",
            lambda value: value >= margin and value > 0,
        ),
        above("stable", ["agem", "er"], "Stable SGD, without a buffer, is better than both A-GEM and ER"),
        compare(
            "forgetting",
            "stable",
            [method for method in _ORDER if method != "stable"],
            "Stable SGD forgets less than EWC and naive fine-tuning (difference of forgetting to the lower one)",
            lambda value: value < 0,
        ),
    ]


def _differences(
    found: Sequence[Record], key: str, method: str, others: Sequence[str], best: Callable[[Sequence[float]], float]
) -> list[float]:
    """Return the value of a method minus the best of others, per seed; NaN if one is missing, empty if not run."""
    if not {method, *others} <= {record["method"] for record in found}:
        return []
    by_run = {(record["seed"], record["method"]): record[key] for record in found}
    differences = []
    for seed in dict.fromkeys(record["seed"] for record in found):
        values = [by_run.get((seed, name)) for name in (method, *others)]
        own, *rest = [math.nan if value is None else value for value in values]
        differences.append(own - best(rest) if all(map(math.isfinite, (own, *rest))) else math.nan)
    return differences
