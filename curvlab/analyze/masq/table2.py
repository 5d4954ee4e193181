"""Gepperth and Wiech (2019), Table 2: what is published, and what becomes of its claims."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvlab.analyze.frame.conditions import differing
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.subject import Subject, describe_network
from curvlab.analyze.frame.values import number, where
from curvlab.results import Claim, Column, Identity, require_direction

if TYPE_CHECKING:
    from curvlab.analyze.masq.fim_diagonality import FimDiagonalityConfig

Record = dict[str, Any]

#: What "several orders of magnitude" means: a factor of a thousand.
_SEVERAL_ORDERS = 1000


def _as_printed(number: float) -> str:
    return f"{number:g}"


#: The published numbers and ours, side by side.
COLUMNS = (
    Column("parameter", "parameter"),
    Column("published_diag_sum", "published diag sum", format=_as_printed),
    Column("diag_sum", "ours", spread="diag_sum_std"),
    Column("published_offdiag_abs_sum", "published off-diag sum", format=_as_printed),
    Column("offdiag_abs_sum", "ours", spread="offdiag_abs_sum_std"),
    Column("published_diag_mean", "published diag mean", format=_as_printed),
    Column("paper_diag_mean", "ours (/ n²)", spread="paper_diag_mean_std"),
    Column("published_offdiag_mean", "published off-diag mean", format=_as_printed),
    Column("paper_offdiag_mean", "ours (/ n⁴)", spread="paper_offdiag_mean_std"),
)


def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_published("masq")["table2"]
    return table


def source() -> str:
    """Return where the table stands."""
    return str(_table()["source"])


def published_rows() -> Mapping[str, Mapping[str, float]]:
    """Return the published numbers by the name of the parameter."""
    rows: Mapping[str, Mapping[str, float]] = _table()["rows"]
    return rows


def beside_published(table: Sequence[Record]) -> list[Record]:
    """Return the rows of a summary that the paper has too, its numbers under keys that begin with ``published_``."""
    rows = published_rows()
    return [
        {**row, **{f"published_{key}": value for key, value in rows[row["parameter"]].items()}}
        for row in table
        if row["parameter"] in rows
    ]


def conditions(config: "FimDiagonalityConfig", data: Subject) -> dict[str, Any]:
    """Return the conditions of a run under the names that the published ones have."""
    return {
        "data": data.data,
        "classes": list(range(data.num_classes)) if config.classes == "all" else list(config.classes),
        "network": describe_network(config, data),
        "quantity": config.quantity,
        "held out": config.validation,
        "samples": config.samples or "all",
        "optimizer": config.optimizer,
        "learning rate": config.lr,
        "batch size": config.batch_size,
        "steps": config.steps,
    }


def has_network(ours: Mapping[str, Any]) -> bool:
    """Say whether a run is of the published network and data, beside whose numbers its own can stand."""
    return not require_direction(ours, _table()["conditions"], _table()["direction"]).reason


def deviations(ours: Mapping[str, Any]) -> list[str]:
    """Return in what a run differs from the published one, with what that had in brackets."""
    differ = differing(ours, _table()["conditions"])
    return [f"{differ}."] if differ else []


def claims(found: Sequence[Record], ours: Mapping[str, Any]) -> list[Claim]:
    """Return the paper's claims with their verdicts; all of them are about directions.

    Args:
        found: Records of ``fim_diagonality``, one a seed and parameter tensor.
        ours: Of ``conditions``.
    """
    labels = _table()["labels"]
    gate = require_direction(ours, _table()["conditions"], _table()["direction"])
    printed = published_rows()

    def claim(name: str, text: str, where: str, key: str, test: Callable[[float], bool], theirs: Any) -> Claim:
        return Claim.of(f"{labels[name]}: {text}", where, _values(found, name, key), test, theirs, gate)

    answers = []
    # For the output layer, W3 and b3, it is an identity.
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        row = printed.get(name)
        answers.append(
            claim(
                name,
                "the off-diagonal sum exceeds the diagonal sum",
                "Table 2; section 3.3" if row else "ours: left out of Table 2",
                "sum_ratio",
                lambda value: value > 1,
                None if row is None else float(f"{row['offdiag_abs_sum'] / row['diag_sum']:.3g}"),
            )
        )
    for name, row in printed.items():
        if name == "fc3.bias":
            continue  # of ten entries whose signed sum is zero the means are at most 9 times apart: see identities
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
                f"the same by several orders of magnitude (a factor of {_SEVERAL_ORDERS:,})",
                "Table 2, caption",
                "mean_ratio",
                lambda value: value >= _SEVERAL_ORDERS,
                None,
            )
        )
    return answers


def identities(found: Sequence[Record], ours: Mapping[str, Any]) -> list[Identity]:
    """Return what is true of any network, or of the printed numbers alone, with what it comes to here.

    Args:
        found: Records of ``fim_diagonality``.
        ours: Of ``conditions``.
    """
    if not has_network(ours):
        return []
    rows = [
        Identity(
            f"{label}: the off-diagonal sum reaches the diagonal one in every softmax output layer, whose signed sum "
            "is zero (their ratio)",
            _values(found, name, "sum_ratio"),
        )
        for name, label in (("fc3.weight", "W3"), ("fc3.bias", "b3"))
    ]
    rows.append(
        Identity(
            "b3: with ten entries and that identity, the mean on the diagonal is at most 9 times the mean off it, and "
            "never an order of magnitude (their ratio)",
            _values(found, "fc3.bias", "mean_ratio"),
        )
    )
    return rows + [
        Identity(
            f"{_table()['labels'][name]}: with the paper's denominators the means are apart by n² times the ratio of "
            f"the sums, whatever the matrix (printed: {row['diag_mean'] / row['offdiag_mean']:.3g})",
            _values(found, name, "paper_mean_ratio"),
        )
        for name, row in published_rows().items()
    ]


def _values(found: Sequence[Record], name: str, key: str) -> list[float]:
    return [number(record[key]) for record in where(found, parameter=name)]
