"""How diagonal is the Fisher? Table 2 of Gepperth and Wiech (2019), with every entry counted."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.functions import OwnProblem
from curvlab.analyze.frame.values import where
from curvlab.analyze.masq import table2
from curvlab.analyze.masq.fim_diagonality_options import PRESETS, FimDiagonalityConfig
from curvlab.analyze.masq.streams import first_classes
from curvlab.commandline.options import RunOptions
from curvlab.data import Dataset
from curvlab.diagonality import Submatrix, records, submatrix
from curvlab.errors import UnsupportedError
from curvlab.grid import Place
from curvlab.grid.functions import names_function
from curvlab.results import Column, aggregate, mean_column
from curvlab.text import write_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    mean_column("diag_sum", "diag sum"),
    mean_column("offdiag_abs_sum", "off-diag sum |F|"),
    mean_column("sum_ratio", "off / diag"),
    mean_column("diag_share", "diag share of norm"),
    mean_column("zero_fraction", "zeros"),
    Column("how", "how"),
)
_MEANS = (
    Column("parameter", "parameter"),
    mean_column("diag_mean", "diag mean (/ n)"),
    mean_column("offdiag_abs_mean", "off-diag mean (/ n²-n)"),
    mean_column("mean_ratio", "diag / off"),
    mean_column("paper_diag_mean", "diag sum / n²"),
    mean_column("paper_offdiag_mean", "off-diag sum / n⁴"),
)
_TABLE = (*_SUMS[:4], *_MEANS[1:], *_SUMS[4:])


def check(config: FimDiagonalityConfig, dataset: Dataset | OwnProblem) -> None:
    """Check the configuration, the data and the curvature options.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_distinct(per=config.per)
    if config.streams:
        subject.check_distinct(streams=config.streams)
    subject.check_subject(config, dataset)
    problem = subject.problem(config, dataset, subject.network(config, dataset, config.seeds[0]))
    records(problem, config.quantity, per=config.per)  # the call checks its arguments and computes no row


def load_dataset(config: FimDiagonalityConfig, options: RunOptions | Place) -> Dataset | OwnProblem:
    """Return the samples of the classes, or of the first task of a single stream; all samples for several streams."""
    if not config.streams:
        return subject.load_subject(config, options)
    whole = subject.load_dataset(config.model_copy(update={"classes": "all"}), options)
    return whole.select(first_classes(config.streams[0], whole.num_classes)) if len(config.streams) == 1 else whole


def split(config: FimDiagonalityConfig) -> list[FimDiagonalityConfig]:
    """Return one configuration per stream; the configuration itself without streams."""
    return [config.model_copy(update={"streams": (stream,)}) for stream in config.streams] or [config]


def measure(config: FimDiagonalityConfig, dataset: Dataset | OwnProblem, workspace: Workspace) -> Iterator[Record]:
    """Train the network of one seed, and yield one record per row of the table."""
    (seed,) = config.seeds
    stream = {"stream": config.streams[0]} if config.streams else {}
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
            **stream,
            "seed": seed,
            "samples": problem.num_samples,
            "test_accuracy": accuracy,
        }
        # 0 / 0 and the mean of no entries are NaN.
        yield {key: None if value != value else value for key, value in record.items()}
    try:
        part = submatrix(problem, config.quantity)
    except UnsupportedError:
        return  # the Hessian of a large network has no backend that gives single rows
    if bool(part.matrix.any()):  # with a single class, all entries may be zero
        workspace.save("heat_map", {**stream, "seed": seed, **_without_zeros(part)})


def _without_zeros(part: Submatrix) -> Record:
    """Return the submatrix without zero rows, rounded to three digits, for the heat map."""
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
    """Return mean and standard deviation over seeds, and how each row was computed.

    Args:
        found: Records of ``table.json``.

    Returns:
        One record per parameter, from ``curvlab.results.aggregate``, with ``method`` (``exact`` or ``sampled``) and
        ``how``, its text in the table with the interval of the off-diagonal sum.
    """
    table = aggregate(found, ["parameter", "size"], _VALUES)
    for row in table:
        members = [record for record in found if record["parameter"] == row["parameter"]]
        sampled = [record for record in members if record["method"] == "sampled"]
        widest = max((r["ci95"] / r["offdiag_abs_sum"] for r in sampled if r["offdiag_abs_sum"]), default=0.0)
        row["method"] = "sampled" if sampled else "exact"
        row["how"] = f"sampled, ±{100 * widest:.2f} %" if sampled else "exact"
    return table


def report(results: Results[FimDiagonalityConfig]) -> Report:
    """Return the tables, the claims of Table 2, and the figures, for each stream if there are several."""
    streams, kept = results.config.streams, results.artifacts["heat_map"]
    if not streams:
        return _report(results, results.records["table"], kept)
    named = []
    for stream in streams:
        classes = tuple(first_classes(stream, results.subject.num_classes))
        one = replace(results, config=results.config.model_copy(update={"classes": classes}))
        found = where(results.records["table"], stream=stream)
        if found:  # empty if every run of the stream failed
            named.append((stream, _report(one, found, where(kept, stream=stream), stream)))
    rows = [{"stream": stream, **row} for stream, part in named for row in part.summary.records]
    tables = [replace(t, title=f"{stream}: {t.title}") for stream, part in named for t in part.tables or ()]
    return Report(
        Table(f"{_title(results)}; {results.spread}", (Column("stream", "tasks"), *_TABLE), rows),
        tables,
        [claim for stream, part in named for claim in table2.claims_of_stream(stream, part.claims)],
        [replace(one, text=f"{stream}, {one.text}") for stream, part in named for one in part.identities],
        {f"{name}_{stream}": draw for stream, part in named for name, draw in part.figures.items()},
        deviations=[line for stream, part in named for line in part.deviations if stream == "D5-5"],
        notes=[f"{stream}: {note}" for stream, part in named for note in part.notes],
    )


def _title(results: Results[FimDiagonalityConfig]) -> str:
    config, data = results.config, results.subject.data
    return subject.describe(config, results.subject, config.quantity) + f" on {data}" * (data != config.model)


def _report(
    results: Results[FimDiagonalityConfig], found: Sequence[Record], heat_maps: Sequence[Any], stream: str = ""
) -> Report:
    """Return the report for one set of classes, with the published numbers of Table 2, which are those of D5-5."""
    table = summarise(found)
    conditions = table2.conditions(results.config, results.subject, found)
    title = _title(results)
    drawn = f"{stream}: {title}" if stream else title
    tables = [
        Table(f"{title}, {write_count(found[0]['samples'], 'sample')}; {results.spread}", _SUMS, table),
        Table("Means of the entries, and means with the paper's denominators", _MEANS, table),
    ]
    by_name = not names_function(results.config.model)  # the claims are about named tensors of an mlp
    is_paper = table2.has_network(conditions) and stream in ("", "D5-5")
    if is_paper:
        tables.append(Table(f"{table2.source()}, and our values", table2.COLUMNS, table2.add_published(table)))

    def dots() -> "Figure":
        tensors = [row for row in table if "." in row["parameter"]] or table  # without per=tensor, what there is
        return plots.diagonality_dots(tensors, drawn, table2.published_rows() if is_paper else None)

    accuracies = [record["test_accuracy"] for record in found if record["test_accuracy"] is not None]
    notes = []
    if accuracies:
        ends = dict.fromkeys(f"{value:.1%}" for value in (min(accuracies), max(accuracies)))
        notes.append(f"Test accuracy of the trained networks: {' to '.join(ends)}.")
    if not any(row["diag_sum"] for row in table):
        notes.append("All entries are zero, so there is no heat map.")
    return Report(
        Table(tables[0].title, _TABLE, table),
        tables,
        table2.claims(found, conditions) if by_name else [],
        table2.identities(found, conditions) if by_name else [],
        {"sums_and_means": dots} | ({"heat_map": partial(_draw_heat_map, heat_maps[0], drawn)} if heat_maps else {}),
        deviations=table2.deviations(conditions) if is_paper else [],
        notes=notes,
    )


def _draw_heat_map(part: Record, title: str) -> "Figure":
    zeros = f"; {part['zero_rows']} zero rows left out" if part["zero_rows"] else ""
    above = f"{title}\nrows of evenly spaced parameters, seed {part['seed']}{zeros}"
    return plots.block_heat_map(part["matrix"], part["names"], part["counts"], above)


ANALYSIS = Analysis(
    config=FimDiagonalityConfig,
    question="How diagonal is the Fisher? Trains a network and measures its curvature on and off the diagonal, one row "
    "per parameter tensor, from all entries (or from a sample of them, with a confidence interval, for large tensors).",
    presets=PRESETS,
    check=check,
    load=load_dataset,
    measure=measure,
    report=report,
    parts=split,
    artifacts=("heat_map",),
)
