"""Tables, claims and figures of ``masq_vs_fim``."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from curvlab import plots
from curvlab.analyze.frame.analysis import Report, Results, Table
from curvlab.analyze.frame.conditions import describe_differences
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import divide, list_by_seed, number, where
from curvlab.analyze.masq import streams
from curvlab.analyze.masq.masq_vs_fim_options import MasqVsFimConfig
from curvlab.results import Claim, Column, Gate, Identity, aggregate, mean_column, require_direction

Record = Mapping[str, Any]
Norm = Literal["sumsq", "mean", "scaled"]

NORMS: tuple[Norm, ...] = ("sumsq", "mean", "scaled")
#: Correlation of the entries above which MaSQ and FIM are called proportional (our threshold).
PROPORTIONAL = 0.9
#: Range of "about a factor of 2" (our threshold).
_ABOUT_TWO = (1.5, 3.0)
_LABELS = {"sumsq": "MaSQ, sums", "mean": "MaSQ, means", "scaled": "MaSQ, means / B"}
METHOD_LABELS = {
    "masq": "MaSQ",
    "fim": "FIM, curvlab",
    "sample_gradients": "FIM, per-sample gradients",
    "duplicated_weights": "FIM, duplicated weights",
}
_TABLE = (
    Column("stream", "tasks"),
    Column("parameter", "parameter"),
    mean_column("fim_max", "max FIM"),
    *(mean_column(f"masq_max_{norm}", f"max {_LABELS[norm]}") for norm in NORMS),
    mean_column("ratio", "sums / FIM"),
    mean_column("gradient_part", "factor: gradient"),
    mean_column("noise_part", "factor: noise"),
)
_BATCHES = (
    Column("stream", "tasks"),
    Column("batch_size", "B"),
    mean_column("measured", "trace of MaSQ (means)"),
    mean_column("expected", "closed form"),
    mean_column("relative", "relative difference"),
    mean_column("z", "z-score"),
)
_TRAINING = (
    Column("stream", "tasks"),
    Column("step", "step"),
    mean_column("spearman", "rank correlation"),
    mean_column("pearson", "linear correlation"),
    mean_column("trace_ratio", "trace MaSQ / FIM"),
    mean_column("gradient_share", "B |J|² / trace FIM"),
)
_COSTS = (
    Column("stream", "tasks"),
    Column("label", "method"),
    mean_column("seconds", "seconds"),
    mean_column("peak_mb", "peak MB"),
    Column("seconds_ratio", "seconds / MaSQ"),
    Column("peak_ratio", "peak / MaSQ"),
)
_CANCELLING = (
    Column("stream", "tasks"),
    mean_column("zero_share", "share of weights with J within noise of 0"),
    mean_column("zero_share_large", "the same, 10 % largest FIM"),
    mean_column("increase", "loss increase, these perturbed"),
    mean_column("increase_others", "loss increase, others perturbed"),
)


def conditions(config: MasqVsFimConfig, data: Subject) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``."""
    return {
        **streams.conditions(config, data),
        "network": describe_network(config, data),
        "batch size of MaSQ": config.masq_batch_size,
    }


def ratios(record: Record) -> dict[str, Any]:
    """Return the ratio of the largest entries of MaSQ (sums) and FIM, and its two factors.

    ``gradient_part`` is the largest expected entry of MaSQ (mean over partitions) divided by the largest entry of the
    FIM; a nonzero mean gradient raises it above 1. ``noise_part`` is the largest entry of MaSQ divided by the largest
    expected entry; it differs from 1 by the noise of averaging few batches.
    """
    return {
        **record,
        "ratio": divide(record["masq_max_sumsq"], record["fim_max"]),
        "gradient_part": divide(record["expected_max"], record["fim_max"]),
        "noise_part": divide(record["masq_max_sumsq"], record["expected_max"]),
    }


def cost_rows(found: Sequence[Record]) -> list[dict[str, Any]]:
    """Return mean seconds and peak memory of each method, and their ratios to those of MaSQ."""
    rows = aggregate(found, ["stream", "method"], ["seconds", "peak_mb"])
    for row in rows:
        row["label"] = METHOD_LABELS[row["method"]]
        own = where(rows, stream=row["stream"], method="masq")
        for key, name in (("seconds", "seconds_ratio"), ("peak_mb", "peak_ratio")):
            base = own[0][key] if own else None
            row[name] = row[key] / base if base and row[key] is not None else None
    return rows


def claims(results: Results[MasqVsFimConfig]) -> list[Claim]:
    """Return the claims with their verdicts."""
    known = read_published("masq")["figures6to8"]
    ours = conditions(results.config, results.subject)
    gate = require_direction(ours, known["conditions"], known["direction"])
    gate_cost = require_direction(ours, known["conditions"], known["direction of costs"])
    answers = []
    for stream in results.config.streams:
        mine = {kind: where(records, stream=stream) for kind, records in results.records.items()}
        answers += _claims(stream, mine, results.config.seeds, gate, gate_cost)
    return answers


def _claims(
    stream: str, found: Mapping[str, Sequence[Record]], seeds: Sequence[int], gate: Gate, gate_cost: Gate
) -> list[Claim]:
    source = read_published("masq")["figures6to8"]["source"]

    def tensors(seed: int, norm: str = "sumsq") -> list[float]:
        return [divide(r[f"masq_max_{norm}"], r["fim_max"]) for r in where(found["table"], seed=seed)]

    def per_seed(kind: str, value: Callable[[int], float]) -> list[float]:
        return list_by_seed(found[kind], seeds, value) if found[kind] else []

    def last(seed: int, key: str) -> float:
        return number(max(where(found["training"], seed=seed), key=lambda r: r["step"])[key])

    def cost(seed: int, method: str, key: str) -> float:
        of = {name: [r[key] for r in where(found["costs"], seed=seed, method=name)] for name in (method, "masq")}
        return divide(number(of[method][0]), number(of["masq"][0])) if all(of.values()) else float("nan")

    def claim(
        text: str,
        values: Sequence[float],
        test: Callable[[float], bool],
        where: str = source,
        gate: Gate = gate,
        published: Any = None,
    ) -> Claim:
        return Claim.of(f"{stream}: {text}", where, values, test, published, gate)

    low, high = _ABOUT_TWO
    return [
        claim(
            f"the largest entries of MaSQ (sums) and FIM differ by about a factor of 2 ({low:g} to {high:g}) in every "
            "tensor (the smallest factor)",
            per_seed("table", lambda seed: min(max(r, divide(1, r)) for r in tensors(seed))),
            lambda value: low <= value <= high,
            published=2.0,
        ),
        claim(
            f"the same for the largest factor ({low:g} to {high:g})",
            per_seed("table", lambda seed: max(max(r, divide(1, r)) for r in tensors(seed))),
            lambda value: low <= value <= high,
            published=2.0,
        ),
        claim(
            "with sums the largest entries of MaSQ are 0.3 to 30 times the FIM's (the ratio farthest from 1)",
            per_seed("table", lambda seed: max(tensors(seed), key=lambda r: max(r, divide(1, r)))),
            lambda value: 0.3 <= value <= 30,
            "ours: the reading of the norm",
        ),
        claim(
            "with means in place of sums, the largest entry of MaSQ is below a tenth of the FIM's (largest ratio)",
            per_seed("table", lambda seed: max(tensors(seed, "mean"))),
            lambda value: value < 0.1,
            "ours: the reading of the norm",
        ),
        claim(
            f"MaSQ is not proportional to the FIM: linear correlation below {PROPORTIONAL:g} at the end",
            per_seed("training", lambda seed: last(seed, "pearson")),
            lambda value: value < PROPORTIONAL,
            f"{source}; section 3.4",
        ),
        claim(
            f"MaSQ does not rank parameters as the FIM does: rank correlation below {PROPORTIONAL:g} at the end",
            per_seed("training", lambda seed: last(seed, "spearman")),
            lambda value: value < PROPORTIONAL,
            f"{source}; section 3.4",
        ),
        claim(
            "MaSQ needs less memory than the FIM with duplicated weights (ratio of peaks, FIM / MaSQ)",
            per_seed("costs", lambda seed: cost(seed, "duplicated_weights", "peak_mb")),
            lambda value: value > 1,
            "abstract; section 2.5",
            gate_cost,
        ),
        claim(
            "MaSQ needs less time than the FIM with duplicated weights (ratio of seconds, FIM / MaSQ)",
            per_seed("costs", lambda seed: cost(seed, "duplicated_weights", "seconds")),
            lambda value: value > 1,
            "section 2.5",
            gate_cost,
        ),
        claim(
            "the FIM needs at least twice the memory of MaSQ even without duplicated weights (ratio of peaks, "
            "curvlab's FIM)",
            per_seed("costs", lambda seed: cost(seed, "fim", "peak_mb")),
            lambda value: value >= 2,
            "abstract; section 2.5",
            gate_cost,
        ),
        claim(
            "a weight with a large FIM and zero mean gradient is useless: perturbing such weights does not increase "
            "the loss more than perturbing as many other weights (difference of the increases)",
            per_seed("cancelling", lambda seed: _rise(where(found["cancelling"], seed=seed)[0])),
            lambda value: value <= 0,
            "section 4, Why FIM is problematic",
        ),
    ]


def _rise(record: Record) -> float:
    return number(record["increase"]) - number(record["increase_others"])


def identities(results: Results[MasqVsFimConfig]) -> list[Identity]:
    """Return identities that hold for any network, and the example of cancelling gradients."""
    batches = results.records["batches"]
    seeds = [seed for seed in results.seeds if where(batches, seed=seed)]

    def largest(key: str, seed: int, condition: Callable[[Record], bool]) -> float:
        values = [abs(r[key]) for r in where(batches, seed=seed) if r[key] is not None and condition(r)]
        return max(values, default=float("nan"))

    n = results.config.partition_samples
    table = results.records["table"]
    return [
        Identity(
            "MaSQ with one batch, J², is at most the FIM in every entry (largest excess, relative to the largest FIM)",
            [max(r["gradient_excess"] for r in where(table, seed=seed)) for seed in seeds],
        ),
        Identity(
            "MaSQ with batches of one is the FIM, with one batch the squared gradient (largest relative difference of "
            "traces)",
            [largest("relative", seed, lambda r: r["batch_size"] in (1, n)) for seed in seeds],
        ),
        Identity(
            "MaSQ, mean over partitions, is J² + (F - J²) (N - B) / (B (N - 1)) (largest z-score of a batch size)",
            [largest("z", seed, lambda _: True) for seed in seeds],
        ),
        Identity(
            "The same (largest relative difference of traces, 1 < B < N)",
            [largest("relative", seed, lambda r: 1 < r["batch_size"] < n) for seed in seeds],
        ),
        Identity(
            "Two samples whose gradients cancel, a logistic weight w = 0 with x = 1 and both labels: J² is 0 and the "
            "FIM 1/4, and so is the second derivative of the loss: the weight is not useless (FIM - second derivative)",
            [fim - hessian for j, fim, hessian in [cancelling_example()] if j == 0],
        ),
    ]


def cancelling_example(w: float = 0.0) -> tuple[float, float, float]:
    """Return mean gradient, FIM and second derivative of a logistic loss on two samples ``x = 1`` with both labels.

    Examples:
        >>> cancelling_example()
        (0.0, 0.25, 0.25)
    """
    p = 1 / (1 + math.exp(-w))
    gradients = [p - label for label in (0, 1)]
    return fmean(gradients), fmean(g**2 for g in gradients), p * (1 - p)


def report(results: Results[MasqVsFimConfig]) -> Report:
    """Return tables, claims and figures."""
    config, records = results.config, results.records
    tensors = [ratios(record) for record in records["table"]]
    keys = ["fim_max", *(f"masq_max_{norm}" for norm in NORMS), "ratio", "gradient_part", "noise_part"]
    title = (
        f"Largest entries of a {describe_network(config, results.subject)} on {results.subject.data}; {results.spread}"
    )
    summary = Table(title, _TABLE, aggregate(tensors, ["stream", "parameter"], keys))

    def table(name: str, title: str, columns: Sequence[Column], by: Sequence[str]) -> Table:
        values = [column.key for column in columns if column.key not in by]
        return Table(title, columns, aggregate(records[name], by, values))

    tables = [summary]
    if records["batches"]:
        tables += [
            table(
                "batches",
                f"MaSQ over the batch size, N = {config.partition_samples:,}",
                _BATCHES,
                ["stream", "batch_size"],
            ),
            table(
                "training",
                f"MaSQ (B = {config.masq_batch_size:,}) and FIM over training",
                _TRAINING,
                ["stream", "step"],
            ),
            table("cancelling", "Gradients that cancel", _CANCELLING, ["stream"]),
        ]
    if records["costs"]:
        tables.append(Table("Seconds and memory", _COSTS, cost_rows(records["costs"])))
    theirs = read_published("masq")["figures6to8"]["conditions"]
    differ = describe_differences(conditions(config, results.subject), theirs)
    return Report(
        summary,
        tables,
        claims(results),
        identities(results),
        {
            "maxima": lambda: plots.draw_panels(_maxima(results), height=2.3),
            "batches_and_training": lambda: plots.draw_panels(_lines(results), reference="closed form"),
        },
        {"costs_summary": cost_rows(records["costs"])},
        [f"{differ}."] if differ and results.subject.data == theirs["data"] else [],
        _notes(tensors),
    )


def _notes(tensors: Sequence[Record]) -> list[str]:
    parts = {
        key: fmean(r[key] for r in tensors if r[key] == r[key]) for key in ("ratio", "gradient_part", "noise_part")
    }
    return [
        f"Largest entry of MaSQ (sums) over that of the FIM: {parts['ratio']:.2f}, mean over tensors. It is the "
        f"product of {parts['gradient_part']:.2f} (mean gradient) and "
        f"{parts['noise_part']:.2f} (noise of averaging few batches).",
        "Sums: 1/N Σ (Σ g)²; means: 1/M Σ (mean g)²; means / B: 1/N Σ (mean g)², over M batches of B of N samples. "
        "Parallel runs slow each other down; use --jobs 1 to measure seconds.",
    ]


def _maxima(results: Results[MasqVsFimConfig]) -> "list[plots.Panel]":
    panels: list[plots.Panel] = []
    for stream in results.config.streams:
        points = []
        for record in where(results.records["table"], stream=stream):
            named = {"FIM": record["fim_max"], **{_LABELS[norm]: record[f"masq_max_{norm}"] for norm in NORMS}}
            points += [
                {"parameter": record["parameter"], "which": which, "value": value or None}
                for which, value in named.items()
            ]
        panels.append(plots.Panel(stream, points, "parameter", "value", "which", "", "largest entry (nats)", log="y"))
    return panels


def _lines(results: Results[MasqVsFimConfig]) -> "list[plots.Panel]":
    batches, training = results.records["batches"], results.records["training"]
    z = [record for record in batches if record["z"] is not None]
    return [
        plots.Panel(
            "a", batches, "batch_size", "measured", "stream", "batch size B", "trace of MaSQ (nats)", "xy", "expected"
        ),
        plots.Panel("b", z, "batch_size", "z", "stream", "batch size B", "z-score", "x", level=0.0),
        plots.Panel(
            "c", training, "step", "spearman", "stream", "training step", "rank correlation", "x", level=PROPORTIONAL
        ),
        plots.Panel(
            "d", training, "step", "pearson", "stream", "training step", "linear correlation", "x", level=PROPORTIONAL
        ),
    ]
