"""How diagonal is the Fisher? The table that Gepperth and Wiech (2019), Table 2, set out to give."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.subject import TrainedSubjectConfig
from curvlab.analyze.masq import table2
from curvlab.data import Dataset
from curvlab.diagonality import Level, Submatrix, records, submatrix
from curvlab.errors import UnsupportedError
from curvlab.plots import block_heat_map, diagonality_dots
from curvlab.results import Column, aggregate


class FimDiagonalityConfig(TrainedSubjectConfig):
    """Train a network on some classes of a data set, and measure how diagonal its Fisher is on the training samples."""

    titles: ClassVar[dict[str, str]] = {**TrainedSubjectConfig.titles, "quantity": "curvature"}

    classes: tuple[int, ...] | Literal["all"] = (0, 1, 2, 3, 4)
    """Class indices to train on, or all. The network keeps one output for every class of the data set."""
    quantity: str = "empirical_fisher"
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B,norm=sumsq, ggn or hessian."""
    per: tuple[Level, ...] = ("tensor",)
    """Rows of the table: tensor (a parameter tensor each), layer, network; one or several."""
    time_budget: float = Field(default=60.0, gt=0)
    """Seconds a row may take before its entries are sampled, counted in operations at 100 Gflop/s."""
    precision: float = Field(default=0.005, gt=0)
    """Sampled rows: half-width of the 95 % interval of the off-diagonal sum, as a share of it."""
    tile_memory: float = Field(default=200.0, gt=0)
    """Megabytes that the tiles of one pass may take."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """A network is trained and measured for each; the table has mean and standard deviation."""


PRESETS = {
    "default": Preset(FimDiagonalityConfig(), minutes=0.2),
    "cpu": Preset(
        FimDiagonalityConfig(data="mnist", validation=5000, steps=1000, samples=5000), minutes=1, needs=("mnist",)
    ),
    "paper": Preset(FimDiagonalityConfig(data="mnist", validation=5000, steps=5000), minutes=8, needs=("mnist",)),
}

_VALUES = [
    "diag_sum",
    "diag_mean",
    "offdiag_abs_sum",
    "offdiag_abs_mean",
    "diag_share",
    "zero_fraction",
    "mean_ratio",
    "sum_ratio",
    "paper_diag_mean",
    "paper_offdiag_mean",
]

_SUMS = (
    Column("parameter", "parameter"),
    Column("size", "n"),
    Column("diag_sum", "diag sum", spread="diag_sum_std"),
    Column("offdiag_abs_sum", "off-diag sum |F|", spread="offdiag_abs_sum_std"),
    Column("sum_ratio", "off / diag", spread="sum_ratio_std"),
    Column("diag_share", "diag share of norm", spread="diag_share_std"),
    Column("zero_fraction", "zeros", spread="zero_fraction_std"),
    Column("how", "how"),
)
_MEANS = (
    Column("parameter", "parameter"),
    Column("diag_mean", "diag mean (/ n)", spread="diag_mean_std"),
    Column("offdiag_abs_mean", "off-diag mean (/ n²-n)", spread="offdiag_abs_mean_std"),
    Column("mean_ratio", "diag / off", spread="mean_ratio_std"),
    Column("paper_diag_mean", "diag sum / n²", spread="paper_diag_mean_std"),
    Column("paper_offdiag_mean", "off-diag sum / n⁴", spread="paper_offdiag_mean_std"),
)
_TABLE = (*_SUMS[:4], *_MEANS[1:], *_SUMS[4:])


def check(config: FimDiagonalityConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    subject.check_distinct(per=config.per)
    subject.check_subject(config, dataset)
    problem = subject.problem(config, dataset, subject.network(config, dataset, config.seeds[0]))
    records(problem, config.quantity, per=config.per)  # the call itself checks; no row is asked for


def measure(config: FimDiagonalityConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train the network of the one seed, and yield a record a row."""
    (seed,) = config.seeds
    model, accuracy = subject.train_network(config, dataset, seed, workspace.folder / "checkpoint.pt")
    problem = subject.problem(config, dataset, model)
    for row in records(
        problem,
        config.quantity,
        per=config.per,
        time_budget=config.time_budget,
        precision=config.precision,
        tile_memory=config.tile_memory * 1e6,
        seed=seed,
    ):
        n = row["size"]
        record = row | {
            "paper_diag_mean": row["diag_sum"] / n**2,
            "paper_offdiag_mean": row["offdiag_abs_sum"] / n**4,
            "paper_mean_ratio": n**2 / row["sum_ratio"] if row["sum_ratio"] else None,
            "seed": seed,
            "samples": problem.num_samples,
            "test_accuracy": accuracy,
        }
        # A ratio of nothing to nothing, or a mean of no entries, is not defined.
        yield {key: None if value != value else value for key, value in record.items()}
    try:
        part = submatrix(problem, config.quantity)
    except UnsupportedError:
        return  # the Hessian of a large network: there are no rows to take entries from
    if bool(part.matrix.any()):  # of a network with a single class to learn, there may be nothing to draw
        workspace.save("heat_map", {"seed": seed, **_without_zeros(part)})


def _without_zeros(part: Submatrix) -> Record:
    """Return what is drawn of a matrix: the rows that are not all zero, to the digits that a colour shows."""
    matrix = part.matrix.cpu().numpy()
    alive = np.abs(matrix).max(axis=1) > 0
    ends = np.cumsum([0, *part.counts])
    return {
        "names": part.names,
        "counts": [int(alive[start:end].sum()) for start, end in pairwise(ends)],
        "zero_rows": int((~alive).sum()),
        "matrix": [[float(f"{value:.3g}") for value in row] for row in matrix[np.ix_(alive, alive)]],
    }


def summarise(found: Sequence[Record]) -> list[Record]:
    """Return mean and standard deviation over the seeds of records, and how each row was obtained.

    Args:
        found: Records as ``table.json`` has them.

    Returns:
        One record a parameter, as ``curvlab.results.aggregate`` makes them, with ``method`` and, in words, ``how``:
        exact, or sampled with the interval of the off-diagonal sum.
    """
    table = aggregate(found, ["parameter", "size"], _VALUES)
    for row in table:
        members = [record for record in found if record["parameter"] == row["parameter"]]
        sampled = [record for record in members if record["method"] == "sampled"]
        widest = max((r["ci95"] / r["offdiag_abs_sum"] for r in sampled if r["offdiag_abs_sum"]), default=0.0)
        row["method"] = "sampled" if sampled else "exact"
        row["how"] = f"sampled, ±{100 * widest:.2f} %" if sampled else "exact"
    return table


def report(run: Results[FimDiagonalityConfig]) -> Report:
    """Return the tables, the claims of Table 2, and the figures."""
    found, config = run.records["table"], run.config
    table = summarise(found)
    conditions = table2.conditions(config, run.subject)
    title = f"{subject.describe(config, run.subject, config.quantity)} on {run.subject.data}"
    tables = [
        Table(f"{title}, {found[0]['samples']:,} samples; {run.spread}", _SUMS, table),
        Table("Means: of the entries, and with the paper's denominators", _MEANS, table),
    ]
    is_paper = table2.has_network(conditions)
    if is_paper:
        tables.append(Table(f"{table2.source()}, beside ours", table2.COLUMNS, table2.beside_published(table)))

    def dots() -> Figure:
        tensors = [row for row in table if "." in row["parameter"]]
        return diagonality_dots(tensors, title, table2.published_rows() if is_paper else None)

    def heat_map() -> Figure:
        part: dict[str, Any] = run.artifacts["heat_map"][0]
        zeros = f"; {part['zero_rows']} of zeros left out" if part["zero_rows"] else ""
        above = f"{title}\nrows of evenly spaced parameters, seed {part['seed']}{zeros}"
        return block_heat_map(part["matrix"], part["names"], part["counts"], above)

    accuracies = [record["test_accuracy"] for record in found if record["test_accuracy"] is not None]
    notes = []
    if accuracies:
        notes.append(f"Test accuracy of the trained networks: {min(accuracies):.1%} to {max(accuracies):.1%}.")
    return Report(
        Table(tables[0].title, _TABLE, table),
        tables,
        table2.claims(found, conditions),
        table2.identities(found, conditions),
        {"sums_and_means": dots} | ({"heat_map": heat_map} if run.artifacts["heat_map"] else {}),
        deviations=table2.deviations(conditions) if is_paper else [],
        notes=notes,
    )


ANALYSIS = Analysis(
    config=FimDiagonalityConfig,
    question="How diagonal is the Fisher? Trains a network, and measures its curvature on and off the diagonal, a "
    "row a parameter tensor, every entry counted (or sampled, with its interval, where there are too many).",
    presets=PRESETS,
    check=check,
    measure=measure,
    report=report,
    artifacts=("heat_map",),
    items=("Table 2",),
)
