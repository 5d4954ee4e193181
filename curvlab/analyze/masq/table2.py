"""Gepperth and Wiech (2019), Table 2: the published numbers, and the verdicts on the claims."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from curvlab.analyze.frame.conditions import describe_differences, lowest_accuracy, training_conditions
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import number, where
from curvlab.analyze.masq.fim_diagonality_options import FimDiagonalityConfig
from curvlab.results import Claim, Column, Gate, Identity, mean_column, require_direction

Record = dict[str, Any]

#: What "several orders of magnitude" means: a factor of a thousand.
_SEVERAL_ORDERS = 1000


def _as_printed(number: float) -> str:
    return f"{number:g}"


#: Columns with the published numbers and ours.
COLUMNS = (
    Column("parameter", "parameter"),
    Column("published_diag_sum", "published diag sum", format=_as_printed),
    mean_column("diag_sum", "ours"),
    Column("published_offdiag_abs_sum", "published off-diag sum", format=_as_printed),
    mean_column("offdiag_abs_sum", "ours"),
    Column("published_diag_mean", "published diag mean", format=_as_printed),
    mean_column("paper_diag_mean", "ours (/ n²)"),
    Column("published_offdiag_mean", "published off-diag mean", format=_as_printed),
    mean_column("paper_offdiag_mean", "ours (/ n⁴)"),
)


def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_published("masq")["table2"]
    return table


def source() -> str:
    """Return the citation of the table."""
    return str(_table()["source"])


def published_rows() -> Mapping[str, Mapping[str, float]]:
    """Return the published numbers by parameter name."""
    rows: Mapping[str, Mapping[str, float]] = _table()["rows"]
    return rows


def add_published(table: Sequence[Record]) -> list[Record]:
    """Return the rows of a summary that the paper also has, with its numbers as ``published_<key>``."""
    rows = published_rows()
    return [
        {**row, **{f"published_{key}": value for key, value in rows[row["parameter"]].items()}}
        for row in table
        if row["parameter"] in rows
    ]


def conditions(config: FimDiagonalityConfig, data: Subject, found: Sequence[Record]) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``.

    Args:
        config: The configuration.
        data: Description of the data.
        found: Records of ``fim_diagonality``, for the test accuracy.
    """
    return {
        "data": data.data,
        "classes": list(range(data.num_classes)) if config.classes == "all" else list(config.classes),
        "network": describe_network(config, data),
        "quantity": config.quantity,
        "held out": config.validation,
        "samples": config.samples or "all",
        **training_conditions(config),
        "test accuracy": lowest_accuracy(found),
    }


def has_network(ours: Mapping[str, Any]) -> bool:
    """Return whether a run has the published network and data, so that the numbers are comparable."""
    return not require_direction(ours, _table()["conditions"], _table()["direction"]).reason


def deviations(ours: Mapping[str, Any]) -> list[str]:
    """Return the differences from the published run, with the published values in brackets."""
    differ = describe_differences(ours, _table()["conditions"])
    return [f"{differ}."] if differ else []


def claims(found: Sequence[Record], ours: Mapping[str, Any]) -> list[Claim]:
    """Return the paper's claims with their verdicts; all of them are judged as directions.

    Args:
        found: Records of ``fim_diagonality``, one per seed and parameter tensor.
        ours: Conditions of the run, from ``conditions``.
    """
    labels = _table()["labels"]
    gate = require_direction(ours, _table()["conditions"], _table()["direction"])
    if not any(record["parameter"] in labels for record in found):
        gate = Gate("no parameter tensor was measured: add tensor to per")
    printed = published_rows()

    def claim(name: str, text: str, where: str, key: str, test: Callable[[float], bool], theirs: Any) -> Claim:
        return Claim.of(f"{labels[name]}: {text}", where, _values(found, name, key), test, theirs, gate)

    answers = []
    # For the output layer (W3, b3) this is an identity.
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        row = printed.get(name)
        answers.append(
            claim(
                name,
                "the off-diagonal sum exceeds the diagonal sum",
                "Table 2; section 3.3" if row else "ours: not in Table 2",
                "sum_ratio",
                lambda value: value > 1,
                None if row is None else float(f"{row['offdiag_abs_sum'] / row['diag_sum']:.3g}"),
            )
        )
    for name, row in printed.items():
        if name == "fc3.bias":
            continue  # ten entries with signed sum zero: the ratio of means is at most 9, see identities
        answers.append(
            claim(
                name,
                "diagonal entries are larger than off-diagonal ones by at least an order of magnitude on average "
                "(means over n and n² - n entries)",
                "Table 2; section 4",
                "mean_ratio",
                lambda value: value >= 10,
                float(f"{row['diag_mean'] / row['offdiag_mean']:.3g}"),
            )
        )
    for name in ("fc1.bias", "fc2.bias", "fc3.weight"):
        answers.append(
            claim(
                name,
                f"on average, diagonal entries are larger by several orders of magnitude (factor {_SEVERAL_ORDERS:,})",
                "Table 2, caption",
                "mean_ratio",
                lambda value: value >= _SEVERAL_ORDERS,
                None,
            )
        )
    return answers


def claims_of_stream(stream: str, found: Sequence[Claim]) -> list[Claim]:
    """Return the claims for a stream; Table 2 has numbers for D5-5 only, the text states the claims for all streams.

    Args:
        stream: D5-5, D9-1 or DP10-10.
        found: Claims from ``claims``.
    """
    if stream == "D5-5":
        return [replace(claim, text=f"{stream}, {claim.text}") for claim in found]
    return [
        replace(claim, text=f"{stream}, {claim.text}", source='section 3.3, "for all SLTs"', published=None)
        for claim in found
        if "caption" not in claim.source
    ]


def identities(found: Sequence[Record], ours: Mapping[str, Any]) -> list[Identity]:
    """Return the statements that hold for every network, or follow from the printed numbers, with our values.

    Args:
        found: Records of ``fim_diagonality``.
        ours: Conditions of the run, from ``conditions``.
    """
    if not has_network(ours):
        return []
    rows = [
        Identity(
            f"{label}: in a softmax output layer the signed sum is zero, so that the off-diagonal sum is at least the "
            "diagonal sum (ratio)",
            _values(found, name, "sum_ratio"),
        )
        for name, label in (("fc3.weight", "W3"), ("fc3.bias", "b3"))
    ]
    rows.append(
        Identity(
            "b3: with ten entries it follows that the diagonal mean is at most 9 times the off-diagonal mean, less "
            "than an order of magnitude (ratio)",
            _values(found, "fc3.bias", "mean_ratio"),
        )
    )
    return rows + [
        Identity(
            f"{_table()['labels'][name]}: with the paper's denominators the ratio of the means is n² times the ratio "
            f"of the sums, for every matrix (published: {row['diag_mean'] / row['offdiag_mean']:.3g})",
            _values(found, name, "paper_mean_ratio"),
        )
        for name, row in published_rows().items()
    ]


def _values(found: Sequence[Record], name: str, key: str) -> list[float]:
    return [number(record[key]) for record in where(found, parameter=name)]
