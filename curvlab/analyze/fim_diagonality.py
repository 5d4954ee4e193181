"""How diagonal is the Fisher? The table that Gepperth and Wiech (2019), Table 2, set out to give."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn

from curvlab.analyze import masq_table2
from curvlab.analyze.command import Analysis, Config, RunOptions
from curvlab.data import Dataset, load
from curvlab.diagonality import Level, records, submatrix
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.models import build
from curvlab.problem import Problem
from curvlab.quantities import parse_quantity
from curvlab.results import (
    Claim,
    Column,
    RunDirectory,
    Stopwatch,
    aggregate,
    collect,
    open_run,
    render,
    render_claims,
    write_tables,
)
from curvlab.results.plots import block_heat_map, diagonality_bars
from curvlab.training import fit
from curvlab.training.optimization import OptimizerName, ScheduleName

Record = dict[str, Any]


class FimDiagonalityConfig(Config):
    """Train a network on some classes of a data set, and measure how diagonal its Fisher is on the training samples."""

    titles: ClassVar[Mapping[str, str]] = {
        "data": "data",
        "model": "network",
        "optimizer": "training",
        "quantity": "curvature",
        "seeds": "computation",
    }

    data: str = "digits"
    """digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, or the path of your own .npz file or image folder."""
    classes: tuple[int, ...] | Literal["all"] = (0, 1, 2, 3, 4)
    """Class indices to train on, or all. The network keeps one output for every class of the data set."""
    validation: int = Field(default=0, ge=0)
    """Hold out so many training samples, the first ones."""
    model: str = "mlp"
    """mlp, cnn, resnet20, or torchvision:NAME."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (30, 30)
    """Hidden sizes of the mlp; no number for a linear model."""
    weights: Path | None = None
    """Start from the weights in this file."""
    optimizer: OptimizerName = "adam"
    """How the network is trained."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum, for sgd only."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, as the optimizer of torch.optim understands it."""
    schedule: ScheduleName = "constant"
    """Learning-rate schedule; linear and cosine end at 0."""
    steps: int = Field(default=500, ge=0)
    """Training steps (mini-batches); 0 analyses the network as it is initialised or loaded."""
    batch_size: int = Field(default=100, ge=1)
    """Samples a training step."""
    quantity: str = "empirical_fisher"
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B,norm=sumsq, ggn or hessian."""
    samples: int | None = Field(default=None, ge=1)
    """Take the curvature on so many training samples, the first ones; none means all."""
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
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network and of the statistics."""


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


def run(config: FimDiagonalityConfig, options: RunOptions, console: Console) -> None:
    """Train, measure, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable; nothing is written then.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = _dataset(config, options)
        data_hash = dataset.fingerprint()
    _check(config, dataset)
    directory = open_run(options.out, "fim_diagonality", config.to_yaml())
    found: list[Record] = []
    try:
        for seed in config.seeds:
            for record in _of_seed(config, dataset, seed, directory, clock):
                found.append(record)
        table = summarise(found)
        claims = masq_table2.claims(found, _is_paper(config))
        write_tables(directory, found, _TABLE, summary=table)
        directory.write_json("claims.json", claims)
        with clock("figures"):
            _figures(config, dataset, directory, table)
        # Written last, and once: what a finished run is from stays.
        if not (directory.path / "provenance.json").exists():
            directory.write_json("provenance.json", _provenance(config, data_hash, clock, directory))
    except (CurvlabError, KeyboardInterrupt) as stop:
        _save_what_is_finished(directory, found, stop)
        raise
    _print(console, config, dataset, found, table, claims, directory)


def _save_what_is_finished(directory: RunDirectory, found: Sequence[Record], stop: BaseException) -> None:
    if found:
        with suppress(CurvlabError):  # the disk may be full: that is then what is reported
            write_tables(directory, found, _TABLE, summary=summarise(found))
    elif isinstance(stop, UnsupportedError):
        directory.discard()  # a trained network is of no use where the configuration can never be done
    directory.discard_if_empty()
    if (directory.path / "config.yaml").exists():
        rows = f"{len(found)} finished row{'' if len(found) == 1 else 's'}"
        stop.add_note(f"{rows} in {directory.path}; the same command with --out {directory.path} continues there")


def _provenance(
    config: FimDiagonalityConfig, data_hash: str, clock: Stopwatch, directory: RunDirectory
) -> dict[str, Any]:
    origin = collect(
        seeds=config.seeds, data_hash=data_hash, stages=clock.seconds, started=clock.started, device=config.device
    )
    return origin | {"continued": directory.resumed}


def _dataset(config: FimDiagonalityConfig, options: RunOptions) -> Dataset:
    dataset = load(config.data, root=options.data_root, offline=options.offline)
    if config.validation:
        dataset, _ = dataset.hold_out(config.validation)
    return dataset if config.classes == "all" else dataset.select(config.classes)


def _check(config: FimDiagonalityConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    for name, values in (("seeds", config.seeds), ("per", config.per)):
        if not values or len(set(values)) < len(values):
            raise CurvlabError(f"{name} needs one value or several different ones, not {list(values)}")
    if config.samples is not None and config.samples > len(dataset.x_train):
        raise CurvlabError(f"samples is {config.samples:,}, but there are {len(dataset.x_train):,} training samples")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise CurvlabError(f"device is cpu, cuda or cuda:N, not {config.device!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CurvlabError(f"there is no GPU {config.device!r} here (torch sees {torch.cuda.device_count()}); use cpu")
    if device.type not in ("cpu", "cuda"):
        raise CurvlabError(f"device is cpu, cuda or cuda:N, not {config.device!r}")
    problem = Problem(_model(config, dataset, config.seeds[0]), "cross_entropy", _samples(config, dataset))
    records(problem, config.quantity, per=config.per)  # the call itself checks; no row is asked for


def _model(config: FimDiagonalityConfig, dataset: Dataset, seed: int) -> nn.Module:
    model = build(
        config.model, dataset.sample_shape, dataset.num_classes, hidden=config.hidden, seed=seed, weights=config.weights
    )
    return model.to(config.device, getattr(torch, config.dtype)).eval()


def _samples(config: FimDiagonalityConfig, dataset: Dataset) -> tuple[Tensor, Tensor]:
    return dataset.x_train[: config.samples], dataset.y_train[: config.samples]


def _trained(
    config: FimDiagonalityConfig, dataset: Dataset, seed: int, directory: RunDirectory
) -> tuple[nn.Module, float | None]:
    """Return the network of a seed and its test accuracy, from its checkpoint if there is one."""
    model = _model(config, dataset, seed)
    if not config.steps:
        return model, None
    result = fit(
        model,
        (dataset.x_train, dataset.y_train),
        optimizer=config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=seed,
        evaluation=(dataset.x_test, dataset.y_test),
        evaluate_every=config.steps,
        checkpoint=directory.path / f"seed-{seed}" / "checkpoint.pt",
    )
    assert result.evaluation is not None
    return model, result.evaluation.accuracy


def _of_seed(
    config: FimDiagonalityConfig, dataset: Dataset, seed: int, directory: RunDirectory, clock: Stopwatch
) -> Iterator[Record]:
    """Yield the records of a seed, each saved as soon as it is known; those of an earlier run are taken up."""
    name = f"seed-{seed}/records.json"
    done = _saved(directory.path / name)
    yield from done
    with clock("training"):
        model, accuracy = _trained(config, dataset, seed, directory)
    problem = Problem(model, "cross_entropy", _samples(config, dataset))
    rows = records(
        problem,
        config.quantity,
        per=config.per,
        time_budget=config.time_budget,
        precision=config.precision,
        tile_memory=config.tile_memory * 1e6,
        seed=seed,
        skip=[record["parameter"] for record in done],
        progress=True,
    )
    while True:
        with clock("curvature"):
            row = next(rows, None)
        if row is None:
            return
        n = row["size"]
        record = row | {
            "paper_diag_mean": row["diag_sum"] / n**2,
            "paper_offdiag_mean": row["offdiag_abs_sum"] / n**4,
            "paper_mean_ratio": n**2 / row["sum_ratio"] if row["sum_ratio"] else None,
            "seed": seed,
            "samples": problem.num_samples,
            "test_accuracy": accuracy,
        }
        done.append(record)
        (directory.path / name).parent.mkdir(exist_ok=True)
        directory.write_json(name, done)
        yield record


def _saved(path: Path) -> list[Record]:
    with suppress(FileNotFoundError):
        saved: list[Record] = json.loads(path.read_text())
        return saved
    return []


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


def _figures(config: FimDiagonalityConfig, dataset: Dataset, directory: RunDirectory, table: Sequence[Record]) -> None:
    tensors = [row for row in table if "." in row["parameter"]]
    title = f"{_quantity(config)} of a {_net(config, dataset)} on {Path(config.data).name}"
    directory.write_figure(
        "sums_and_means",
        diagonality_bars(tensors, title, masq_table2.published()["rows"] if _is_paper(config) else None),
    )
    model, _ = _trained(config, dataset, config.seeds[0], directory)
    problem = Problem(model, "cross_entropy", _samples(config, dataset))
    try:
        part = submatrix(problem, config.quantity)
    except UnsupportedError:
        return  # the Hessian of a large network: there are no rows to take entries from
    directory.write_figure(
        "heat_map",
        block_heat_map(part.matrix.cpu().numpy(), part.names, part.counts, f"{title}\nevenly spaced parameters"),
    )


def _quantity(config: FimDiagonalityConfig) -> str:
    name, _, given = str(parse_quantity(config.quantity)).partition(":")
    words = {"fisher": "Fisher", "empirical_fisher": "Empirical Fisher", "masq": "MaSQ", "ggn": "GGN"}
    return words.get(name, name.capitalize()) + (f" ({given})" if given else "")


def _net(config: FimDiagonalityConfig, dataset: Dataset) -> str:
    if config.model != "mlp":
        return config.model
    return "-".join(map(str, (np.prod(dataset.sample_shape), *config.hidden, dataset.num_classes))) + " network"


def _print(
    console: Console,
    config: FimDiagonalityConfig,
    dataset: Dataset,
    found: Sequence[Record],
    table: Sequence[Record],
    claims: Sequence[Claim],
    directory: RunDirectory,
) -> None:
    spread = f"mean ± standard deviation over {len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    samples = config.samples or len(dataset.x_train)
    title = f"{_quantity(config)} of a {_net(config, dataset)}, {samples:,} samples of {config.data}; {spread}"
    console.print(render(table, _SUMS, title), crop=False)
    console.print(render(table, _MEANS, "Means: of the entries, and with the paper's denominators"), crop=False)
    if _is_paper(config):
        title = f"{masq_table2.published()['source']}, beside ours"
        console.print(render(masq_table2.beside_published(table), masq_table2.COLUMNS, title), crop=False)
        console.print(render_claims(claims), crop=False)
    accuracies = [record["test_accuracy"] for record in found if record["test_accuracy"] is not None]
    if accuracies:
        console.print(f"Test accuracy of the trained networks: {min(accuracies):.1%} to {max(accuracies):.1%}.")
    saved = f"Saved in {directory.path}: table (.json .csv .md .tex), claims, provenance, figures."
    console.print(saved, markup=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=FimDiagonalityConfig,
    presets=PRESETS,
    run=run,
    description="How diagonal is the Fisher? Trains a network, and measures its curvature on and off the diagonal, a "
    "row a parameter tensor, every entry counted (or sampled, with its interval, where there are too many).",
)
