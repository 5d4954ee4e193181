"""Gepperth and Wiech (2019), Table 2: what is published, and what becomes of its claims."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from curvlab import yaml_file
from curvlab.results import Claim, Column

Record = dict[str, Any]


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


@cache
def published() -> dict[str, Any]:
    """Return the table as printed: ``source``, ``labels`` and ``rows`` by parameter name."""
    text = files("curvlab.analyze").joinpath("published/masq_table2.yaml").read_text()
    table: dict[str, Any] = yaml_file.loads(text)
    return table


def beside_published(table: Sequence[Record]) -> list[Record]:
    """Return the rows of a summary that the paper has too, its numbers under keys that begin with ``published_``."""
    rows = published()["rows"]
    return [
        {**row, **{f"published_{key}": value for key, value in rows[row["parameter"]].items()}}
        for row in table
        if row["parameter"] in rows
    ]


def claims(found: Sequence[Record], tested: bool) -> list[Claim]:
    """Return the paper's claims with their verdicts.

    Args:
        found: Records of ``fim_diagonality``, one a seed and parameter tensor.
        tested: Whether they are of the paper's configuration; if not, no claim is tested.
    """
    rows, labels = published()["rows"], published()["labels"]
    by_name: dict[str, list[Record]] = {}
    for record in found:
        by_name.setdefault(record["parameter"], []).append(record)

    def claim(
        text: str, source: str, printed: float | str | None, name: str, key: str, test: Callable[[float], bool]
    ) -> Claim:
        # A number that is not finite is null in a record that was read back.
        values = [math.nan if r[key] is None else float(r[key]) for r in by_name.get(name, ())] if tested else []
        return Claim.of(text, source, values, test, printed)

    answers = []
    for name, row in rows.items():
        identity = " (true of any softmax output layer: its signed sum is zero)" if name.startswith("fc3") else ""
        answers.append(
            claim(
                f"{labels[name]}: the off-diagonal sum reaches or exceeds the diagonal sum{identity}",
                "Table 2; section 3.3",
                float(f"{row['offdiag_abs_sum'] / row['diag_sum']:.3g}"),
                name,
                "sum_ratio",
                lambda value: value >= 1,
            )
        )
    for name, row in rows.items():
        printed = float(f"{row['diag_mean'] / row['offdiag_mean']:.3g}")
        answers.append(
            claim(
                f"{labels[name]}: diagonal entries are larger than off-diagonal ones by at least an order of "
                "magnitude on average (the printed means divide by n² and n⁴, ours by n and n² - n)",
                "Table 2; section 4",
                printed,
                name,
                "mean_ratio",
                lambda value: value >= 10,
            )
        )
        answers.append(
            claim(
                f"{labels[name]}: the same with the paper's denominators",
                "Table 2, caption",
                printed,
                name,
                "paper_mean_ratio",
                lambda value: value >= 10,
            )
        )
    for name, label in labels.items():
        if name not in rows:
            answers.append(
                claim(
                    f"{label}: its matrix takes too much memory to compute (ours: its off-diagonal over diagonal sum)",
                    "Table 2, caption",
                    "not computed",
                    name,
                    "sum_ratio",
                    lambda value: not math.isfinite(value),
                )
            )
    return answers
