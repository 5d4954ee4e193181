"""How diagonal is the Fisher? The table that Gepperth and Wiech (2019), Table 2, set out to give."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console

from curvlab import grid
from curvlab.analyze import gridded, masq_table2, subject
from curvlab.analyze.command import Analysis, GridOptions
from curvlab.analyze.subject import TrainedSubjectConfig
from curvlab.data import Dataset
from curvlab.diagonality import Level, records, submatrix
from curvlab.errors import UnsupportedError
from curvlab.grid import Place
from curvlab.results import (
    Claim,
    Column,
    RunDirectory,
    Stopwatch,
    aggregate,
    render,
    render_claims,
    write_tables,
)
from curvlab.results.plots import block_heat_map, diagonality_bars

Record = dict[str, Any]

CHECKPOINT = "checkpoint.pt"


class FimDiagonalityConfig(TrainedSubjectConfig):
    """Train a network on some classes of a data set, and measure how diagonal its Fisher is on the training samples."""

    titles: ClassVar[Mapping[str, str]] = {**TrainedSubjectConfig.titles, "quantity": "curvature"}

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


PAPER = FimDiagonalityConfig(data="mnist", validation=5000, steps=5000)
PRESETS = {
    "default": FimDiagonalityConfig(),
    "cpu": FimDiagonalityConfig(data="mnist", validation=5000, steps=1000, samples=5000),
    "paper": PAPER,
}
_NO_MATTER = {"seeds", "device", "time_budget", "precision", "tile_memory", "per"}

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


def cell(config: FimDiagonalityConfig, place: Place) -> list[Record]:
    """Train the network of the one seed, and return a record a row."""
    (seed,) = config.seeds
    dataset = subject.dataset(config, place)
    model, accuracy = subject.trained(config, dataset, seed, place.folder / CHECKPOINT)
    problem = subject.problem(config, dataset, model)
    rows = records(
        problem,
        config.quantity,
        per=config.per,
        time_budget=config.time_budget,
        precision=config.precision,
        tile_memory=config.tile_memory * 1e6,
        seed=seed,
    )
    found = []
    for row in rows:
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
        found.append({key: None if value != value else value for key, value in record.items()})
    return found


def run(config: FimDiagonalityConfig, options: GridOptions, console: Console) -> None:
    """Train and measure, a cell a seed, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, and nothing is written; or a cell has
            failed, and what the others gave is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = subject.dataset(config, options)
        data_hash = dataset.fingerprint()
    _check(config, dataset)
    with gridded.opened("fim_diagonality", config, options) as directory:
        with clock("cells"):
            found, failed = gridded.run(ANALYSIS.cells([config]), options, directory)
        table = summarise(found)
        claims = masq_table2.claims(found, _is_paper(config))
        write_tables(directory, found, (*_TABLE, gridded.SEEDS) if failed else _TABLE, summary=table)
        directory.write_json("claims.json", claims)
        with clock("figures"):
            _figures(config, dataset, directory, table, seed=found[0]["seed"])
        gridded.write_provenance(directory, config.seeds, data_hash, clock, config.device)
        _print(console, config, dataset, found, table, claims, directory)
        gridded.report_failures(console, directory)


def _check(config: FimDiagonalityConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    subject.check_distinct(seeds=config.seeds, per=config.per)
    subject.check(config, dataset)
    problem = subject.problem(config, dataset, subject.network(config, dataset, config.seeds[0]))
    records(problem, config.quantity, per=config.per)  # the call itself checks; no row is asked for


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


def table_figure(table: Sequence[Record], title: str) -> Figure:
    """Draw sums and means of a table of ``summarise`` as bars, the published ones marked."""
    return diagonality_bars(table, title, masq_table2.published()["rows"])


def _is_paper(config: FimDiagonalityConfig) -> bool:
    return config.model_dump(exclude=_NO_MATTER) == PAPER.model_dump(exclude=_NO_MATTER)


def _figures(
    config: FimDiagonalityConfig, dataset: Dataset, directory: RunDirectory, table: Sequence[Record], seed: int
) -> None:
    tensors = [row for row in table if "." in row["parameter"]]
    title = f"{subject.describe(config, dataset, config.quantity)} on {Path(config.data).name}"
    directory.write_figure(
        "sums_and_means",
        gridded.marked(
            diagonality_bars(tensors, title, masq_table2.published()["rows"] if _is_paper(config) else None),
            directory.path,
        ),
    )
    (of_seed,) = ANALYSIS.cells([config], [seed])
    checkpoint = grid.folder_of(directory.path / gridded.STORE, of_seed.key) / CHECKPOINT
    if config.steps and not checkpoint.exists():
        return  # the network was trained on a machine of a cluster that does not share this folder
    model, _ = subject.trained(config, dataset, seed, checkpoint)
    try:
        part = submatrix(subject.problem(config, dataset, model), config.quantity)
    except UnsupportedError:
        return  # the Hessian of a large network: there are no rows to take entries from
    directory.write_figure(
        "heat_map",
        block_heat_map(part.matrix.cpu().numpy(), part.names, part.counts, f"{title}\nevenly spaced parameters"),
    )


def _print(
    console: Console,
    config: FimDiagonalityConfig,
    dataset: Dataset,
    found: Sequence[Record],
    table: Sequence[Record],
    claims: Sequence[Claim],
    directory: RunDirectory,
) -> None:
    seeds = len({record["seed"] for record in found})
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    if seeds < len(config.seeds):
        spread += f" of {len(config.seeds)}"
    samples = config.samples or len(dataset.x_train)
    title = f"{subject.describe(config, dataset, config.quantity)}, {samples:,} samples of {config.data}; {spread}"
    console.print(render(table, _SUMS, title), crop=False)
    console.print(render(table, _MEANS, "Means: of the entries, and with the paper's denominators"), crop=False)
    if _is_paper(config):
        title = f"{masq_table2.published()['source']}, beside ours"
        console.print(render(masq_table2.beside_published(table), masq_table2.COLUMNS, title), crop=False)
        console.print(render_claims(claims), crop=False)
    accuracies = [record["test_accuracy"] for record in found if record["test_accuracy"] is not None]
    if accuracies:
        console.print(f"Test accuracy of the trained networks: {min(accuracies):.1%} to {max(accuracies):.1%}.")
    saved = f"Saved in {directory.path}: table (.json .csv .md .tex), claims, provenance, figures, {gridded.STORE}."
    console.print(saved, markup=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=FimDiagonalityConfig,
    presets=PRESETS,
    run=run,
    description="How diagonal is the Fisher? Trains a network, and measures its curvature on and off the diagonal, a "
    "row a parameter tensor, every entry counted (or sampled, with its interval, where there are too many).",
    cell=cell,
)
