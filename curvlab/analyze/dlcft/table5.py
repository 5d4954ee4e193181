"""Table 5 of Shon et al. (2022) in its own shape: curvatures in rows, networks with their losses in columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from curvlab.analyze.dlcft.conditions import has_scale, published_tables
from curvlab.analyze.dlcft.options import DlcftConfig, MethodName
from curvlab.analyze.frame.analysis import Record, Table
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import where
from curvlab.results import Column

#: Row -> methods with the non-linear and with the linear network.
ROWS: Mapping[str, tuple[MethodName, MethodName]] = {
    "EWC (diagonal)": ("ewc", "dlcft_diag"),
    "K-FAC": ("osla", "dlcft_kfac"),
    "TK-FAC": ("osla_tkfac", "dlcft_tkfac"),
}
_NETWORKS = {"nonlinear": "non-linear, cross-entropy", "linear": "linear, squared error"}


def make_table5(table: Sequence[Record], config: DlcftConfig, data: Subject, title: str, spread: str) -> list[Table]:
    """Return Table 5, or no table if data-IL was run with none of its methods.

    The published accuracies are shown if the run has the published data and tasks; a dash: not in Table 5.

    Args:
        table: One record per setting and method, with mean and standard deviation over seeds.
        config: The configuration.
        data: Description of the data.
        title: Text with the network and the data.
        spread: Text that says how numbers are averaged over seeds.
    """
    mine = {row["method"]: row for row in where(table, setting="data")}
    if not any(name in mine for pair in ROWS.values() for name in pair):
        return []
    published = published_tables("data", data)[0]
    shown = published["source"] == "Table 5" and has_scale(config, data, "data")
    rows, columns = [], [Column("curvature", "curvature")]
    for curvature, pair in ROWS.items():
        record: dict[str, Any] = {"curvature": curvature}
        for key, name in zip(_NETWORKS, pair, strict=True):
            row = mine.get(name, {})
            record |= {f"{key}_acc": row.get("acc"), f"{key}_std": row.get("acc_std")}
            if shown and name in published["rows"]:
                record[f"{key}_published"] = f"{published['rows'][name]['acc'] / 100:.4f}"
        rows.append(record)
    for key, header in _NETWORKS.items():
        columns.append(Column(f"{key}_acc", header, spread=f"{key}_std"))
        if shown:
            columns.append(Column(f"{key}_published", "Table 5"))
    return [Table(f"Table 5, data-IL: {title}; {spread}", columns, rows)]
