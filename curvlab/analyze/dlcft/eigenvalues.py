"""The largest eigenvalue of Fisher and Hessian over a training, softmax cross-entropy against squared error.

The curves of Shon et al. (2022), "DLCFT: Deep Linear Continual Fine-Tuning for General Incremental Learning": poster,
panels (a) and (b), and supplement, Fig. 7.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab import grid
from curvlab.analyze import gridded
from curvlab.analyze.command import Analysis, GridOptions, RunOptions
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.subject import TrainedSubjectConfig
from curvlab.data import Dataset, load
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.grid import Cell, Place
from curvlab.matrices import EKFAC, Composite
from curvlab.models import build, freeze_batch_norm
from curvlab.problem import Problem
from curvlab.recorder import EigenvalueRecorder, Level
from curvlab.results import (
    Claim,
    Column,
    RunDirectory,
    Stopwatch,
    aggregate,
    render,
    render_claims,
    significant,
    write_tables,
)
from curvlab.results.curves import density_curves, eigenvalue_curves, layer_curves, normalised_curves
from curvlab.spectrum.density import SpectralDensity
from curvlab.training import FitResult, Observer, evaluate, fit
from curvlab.training.optimization import make_optimizer

Record = dict[str, Any]
Samples = tuple[Tensor, Tensor]
LossChoice = Literal["cross_entropy", "squared_error"]
Rate = Annotated[float, Field(gt=0)]

_DENSITIES = "densities.json"  # in the folder of a cell


class EigenvaluesConfig(TrainedSubjectConfig):
    """Train a network with each loss, and follow the largest eigenvalue of its curvature on the training samples."""

    titles: ClassVar[Mapping[str, str]] = {
        **TrainedSubjectConfig.titles,
        "losses": "losses",
        "quantities": "curvature",
    }

    validation: int = Field(default=200, ge=0)
    """Hold out so many training samples, random ones, to choose the learning rate of squared_error on."""
    samples: int | None = Field(default=1000, ge=1)
    """Take the curvature on so many of the training samples, random ones; none means all."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """How the network is trained."""
    lr: Rate = 0.1
    """Learning rate for cross_entropy."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum, for sgd only."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning-rate schedule; linear and cosine end at 0."""
    steps: int = Field(default=2000, ge=1)
    """Training steps (mini-batches)."""
    train_samples: int | None = Field(default=None, ge=1)
    """Train on so many samples, random ones, the same for every seed; none means all that are not held out."""
    normalize: Literal["none", "imagenet"] = "none"
    """imagenet: subtract its channels' means and divide by their deviations, as pre-trained networks expect."""
    fine_tune: bool = False
    """The weights are of a network for other classes: the last layer is a new one, and BatchNorm is frozen."""
    losses: tuple[LossChoice, ...] = ("cross_entropy", "squared_error")
    """cross_entropy (of the softmax), squared_error (to scaled one-hot vectors), or both."""
    alpha: float = Field(default=15.0, gt=0)
    """Scale of squared_error's one-hot targets."""
    lr_squared_error: tuple[Rate, ...] = (0.03, 0.01, 0.003, 0.001)
    """Learning rate for squared_error. Of several the best is taken: that with the lowest loss on the held-out samples
    after a training of the first seed."""
    quantities: tuple[str, ...] = ("fisher", "hessian")
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B, ggn or hessian; one or several."""
    every: int = Field(default=100, ge=1)
    """Steps from point to point of a curve."""
    ekfac_every: int | None = Field(default=100, ge=1)
    """Steps between two points of EK-FAC's largest eigenvalue, as published curves have it; none leaves it out."""
    per: tuple[Level, ...] = ("network",)
    """network, layer (the block of every layer), or both."""
    densities_at: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Steps after which the whole spectral density is estimated too."""
    tol: float = Field(default=1e-3, gt=0, lt=1)
    """Relative error of an eigenvalue."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """A network is trained for each; the curves have mean and range."""


_MNIST = EigenvaluesConfig(
    data="mnist",
    model="shallow_cnn",
    validation=5000,
    train_samples=5000,
    samples=500,
    batch_size=128,
    lr=1e-2,
    lr_squared_error=(3e-2, 1e-2, 3e-3, 1e-3),
    schedule="constant",  # so that a third of the published steps fits these samples
    steps=3000,
    ekfac_every=None,  # the eigenvectors of its factor of 5,409 rows take half a minute a point and more
)
_CIFAR = EigenvaluesConfig(
    data="cifar100",
    model="resnet20",
    weights=Path("weights/resnet20_cifar10-12fca82f.th"),
    fine_tune=True,
    normalize="imagenet",
    validation=500,
    train_samples=500,
    samples=250,
    batch_size=64,
    optimizer="adam",
    momentum=0.0,
    lr=1e-3,
    lr_squared_error=(1e-2, 3e-3, 1e-3),
    schedule="cosine",
    steps=300,
    every=75,
    ekfac_every=None,  # of a hundred classes it takes far more passes than all products
)
PRESETS = {
    "default": EigenvaluesConfig(),
    "cpu": _MNIST,
    "cpu-resnet20": _CIFAR,
    "paper": _MNIST.model_copy(
        update={
            "train_samples": None,
            "samples": 5000,
            "schedule": "linear",
            "steps": 10000,
            "every": 200,
            "ekfac_every": 1000,
        }
    ),
    "paper-cifar100": _CIFAR.model_copy(
        update={
            "train_samples": None,
            "samples": 5000,
            "batch_size": 128,
            "lr": 1e-4,
            "lr_squared_error": (1e-3, 1e-4),
            "steps": 16000,
            "every": 500,
        }
    ),
}

_LABELS = {"cross_entropy": "softmax cross-entropy", "squared_error": "squared error"}
_QUANTITIES = {"fisher": "Fisher", "hessian": "Hessian", "ggn": "GGN", "ekfac": "Fisher by EK-FAC"}
_SUMMARY = (
    Column("loss", "loss"),
    Column("quantity", "curvature"),
    Column("layer", "of"),
    Column("start", "at the start", spread="start_std"),
    Column("maximum", "maximum", spread="maximum_std"),
    Column("maximum_step", "at step", spread="maximum_step_std"),
    Column("end", "at the end", spread="end_std"),
    Column("end_of_maximum", "end / maximum", spread="end_of_maximum_std"),
    Column("end_of_start", "end / start", spread="end_of_start_std"),
    Column("matvecs", "products"),
)
_RATES = (
    Column("lr", "learning rate", format=lambda value: f"{value:g}"),
    Column("validation_loss", "validation loss"),
    Column("validation_accuracy", "accuracy", format=lambda value: f"{value:.1%}"),
    Column("note", ""),
)


def run(config: EigenvaluesConfig, options: GridOptions, console: Console) -> None:
    """Choose the learning rate, train and record, a cell a seed and loss, and write the run directory.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, and nothing is written; or a cell has
            failed, and what the others gave is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset, _ = _data(config, options)
        data_hash = dataset.fingerprint()
    _check(subject.locate_weights(config, options), dataset)
    with gridded.opened("eigenvalues", config, options) as directory:
        with clock("learning rate"):
            rates: list[Record] = []
            chosen = config.lr_squared_error
            if candidates := _rate_cells(config):
                rates = gridded.candidates(candidates, options, directory)
                directory.write_json("learning_rates.json", rates)
                chosen = (_best(rates),)
        cells = ANALYSIS.cells(
            config.model_copy(update={"seeds": (seed,), "losses": (loss,), "lr_squared_error": chosen})
            for seed in config.seeds
            for loss in config.losses
        )
        with clock("cells"):
            found, failed = gridded.run([*candidates, *cells], options, directory)
        records = [record for record in found if "step" in record]
        trainings = [record for record in found if "test_accuracy" in record]
        if not records:
            gridded.report_failures(console, directory)
        table, verdicts = summarise(records), claims(records)
        columns = (*_SUMMARY, gridded.SEEDS) if failed else _SUMMARY
        write_tables(directory, records, columns, summary=_readable(table))
        directory.write_json("trainings.json", trainings)
        directory.write_json("claims.json", verdicts)
        with clock("figures"):
            _figures(config, dataset, directory, records, cells)
        gridded.write_provenance(directory, config.seeds, data_hash, clock, config.device)
        _print(console, config, dataset, directory, rates, trainings, table, verdicts)
        gridded.report_failures(console, directory)


def cell(config: EigenvaluesConfig, place: Place) -> list[Record]:
    """Return the records of a seed, for every loss: one of its training, and the points of its curves, with ``step``.

    Of several learning rates for squared_error the best for this seed is taken.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, or a training diverges.
    """
    dataset, held_out = _data(config, place)
    config = subject.locate_weights(config, place)
    _check(config, dataset)
    records: list[Record] = []
    densities: list[Record] = []
    for loss in config.losses:
        lr = config.lr
        if loss == "squared_error":
            (lr, *others) = config.lr_squared_error
            if others:
                lr = _best([_rate(config, dataset, held_out, lr) for lr in config.lr_squared_error])
        training, found = _training(config, dataset, loss, lr, place.folder)
        records += training
        densities += found
    if densities:
        RunDirectory(place.folder, resumed=True).write_json(_DENSITIES, densities)
    return records


# The data, the network, the losses -----------------------------------------------------------------------------------


def _data(config: EigenvaluesConfig, options: RunOptions | Place) -> tuple[Dataset, Samples | None]:
    """Return the data set, its training samples in a random order that is always the same, and what is held out.

    Files may have their samples class by class: their first ones would then be of a few classes.
    """
    data = load(config.data, root=options.data_root, offline=options.offline)
    if config.classes != "all":
        data = data.select(config.classes)
    if config.normalize == "imagenet":
        data = subject.normalise(data)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    data = replace(data, x_train=data.x_train[order], y_train=data.y_train[order])
    held_out = None
    if config.validation:
        data, held_out = data.hold_out(config.validation)
    if config.train_samples is not None:
        if config.train_samples > len(data.x_train):
            raise CurvlabError(
                f"train_samples is {config.train_samples:,}, but there are {len(data.x_train):,} training samples"
            )
        data = replace(data, x_train=data.x_train[: config.train_samples], y_train=data.y_train[: config.train_samples])
    return data, held_out


def _network(config: EigenvaluesConfig, data: Dataset, seed: int) -> nn.Module:
    model = build(
        config.model,
        data.sample_shape,
        data.num_classes,
        hidden=config.hidden,
        seed=seed,
        weights=config.weights,
        new_head=config.fine_tune,
    )
    if config.fine_tune:
        freeze_batch_norm(model)
    return model.to(config.device, getattr(torch, config.dtype))


def _with_targets(config: EigenvaluesConfig, data: Dataset, loss: str, samples: Samples) -> Samples:
    """Return samples with the targets that the loss takes: labels, or scaled one-hot vectors."""
    inputs, labels = samples
    if loss == "cross_entropy":
        return inputs, labels
    return inputs, config.alpha * F.one_hot(labels, data.num_classes).to(inputs.dtype)


def _check(config: EigenvaluesConfig, data: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    subject.check_distinct(seeds=config.seeds, losses=config.losses, per=config.per)
    subject.check_distinct(lr_squared_error=config.lr_squared_error)
    if config.densities_at:
        subject.check_distinct(densities_at=config.densities_at)
        if max(config.densities_at) > config.steps:
            raise CurvlabError(f"densities_at has {max(config.densities_at)}, but there are {config.steps} steps")
    if off := [step for step in config.densities_at if step % config.every]:
        raise CurvlabError(
            f"densities_at has {off[0]}, which is no point of the curves: they have one every {config.every}"
        )
    if "squared_error" in config.losses and len(config.lr_squared_error) > 1 and not config.validation:
        raise CurvlabError(
            "a learning rate is chosen on held-out samples: set validation, or give lr_squared_error a single one"
        )
    if config.fine_tune and config.weights is None:
        raise CurvlabError("fine_tune is for weights from a file: set weights")
    subject.check_subject(config, data)
    model = _network(config, data, config.seeds[0])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make_optimizer(config.optimizer, trained, config.lr, config.momentum, config.weight_decay)  # it checks
    for loss in config.losses:
        few = (data.x_train[:2], data.y_train[:2])
        problem = Problem(model.eval(), loss, _with_targets(config, data, loss, few))
        subject.check_curvature(problem, config.quantities, None)
        for quantity in config.quantities:
            matrix = estimate(problem, quantity, "implicit")
            matrix.matvec(torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device))
        if config.ekfac_every is not None:
            estimate(problem, "fisher", "kfac:rest=diag")  # of the same layers, without the eigendecompositions


# The learning rate ---------------------------------------------------------------------------------------------------


def _rate_cells(config: EigenvaluesConfig) -> list[Cell]:
    """Return a cell for each candidate, a training of the first seed; none for a single one."""
    if "squared_error" not in config.losses or len(config.lr_squared_error) == 1:
        return []
    common = {"seeds": config.seeds[:1], "losses": ("squared_error",)}
    return [
        Cell(
            f"{__name__}:rate_cell",
            config.model_copy(update={**common, "lr_squared_error": (lr,)}).model_dump(mode="json"),
            "eigenvalues-rate",
            ANALYSIS.version,
            ANALYSIS.seed,
        )
        for lr in config.lr_squared_error
    ]


def rate_cell(values: Mapping[str, Any], place: Place) -> list[Record]:
    """Return what becomes of a training with squared_error, at one learning rate, on the held-out samples."""
    config = subject.locate_weights(EigenvaluesConfig(**values), place)
    (lr,) = config.lr_squared_error
    return [_rate(config, *_data(config, place), lr)]


def _rate(config: EigenvaluesConfig, data: Dataset, held_out: Samples | None, lr: float) -> Record:
    assert held_out is not None
    model = _network(config, data, config.seeds[0])
    rate: Record = {"loss": "squared_error", "lr": lr, "validation_loss": None, "validation_accuracy": None}
    try:
        _train(config, model, data, "squared_error", lr)
        inputs, targets = _with_targets(config, data, "squared_error", held_out)
        validation_loss = evaluate(model, inputs, targets, loss="squared_error").loss
        if not math.isfinite(validation_loss):
            raise CurvlabError(f"the loss on the held-out samples is {validation_loss}")
        rate["validation_loss"] = validation_loss
        rate["validation_accuracy"] = evaluate(model, *held_out).accuracy
        rate["note"] = ""
    except CurvlabError as error:
        # The options have been checked and nothing is written: what is left is a loss that is not finite.
        rate["note"] = str(error)
    return rate


def _best(rates: Sequence[Record]) -> float:
    finite = [rate for rate in rates if rate["validation_loss"] is not None]
    if not finite:
        tried = ", ".join(f"{rate['lr']:g}" for rate in rates)
        raise CurvlabError(
            f"the training with squared_error fails at every learning rate of {tried} ({rates[-1]['note']}); "
            "give lower ones with --lr-squared-error"
        )
    return float(min(finite, key=lambda rate: rate["validation_loss"])["lr"])


# A training ----------------------------------------------------------------------------------------------------------


def _train(
    config: EigenvaluesConfig,
    model: nn.Module,
    data: Dataset,
    loss: str,
    lr: float,
    observers: Sequence[Observer] = (),
    checkpoint: Path | None = None,
) -> FitResult:
    return fit(
        model,
        _with_targets(config, data, loss, (data.x_train, data.y_train)),
        loss=loss,
        optimizer=config.optimizer,
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seeds[0],
        evaluate_every=config.every,
        observers=observers,
        checkpoint=checkpoint,
        checkpoint_every=config.every,
        progress=False,
    )


def _training(
    config: EigenvaluesConfig, data: Dataset, loss: str, lr: float, folder: Path
) -> tuple[list[Record], list[Record]]:
    """Return what was recorded over a training: records, that of the training itself first, and densities."""
    samples = _with_targets(config, data, loss, subject.samples(config, data))
    (seed,) = config.seeds
    recorders = [
        EigenvalueRecorder(
            samples,
            loss,
            quantities=config.quantities,
            every=config.every,
            tol=config.tol,
            per=level,
            densities_at=config.densities_at if level == config.per[0] else (),
            seed=seed,
        )
        for level in config.per
    ]
    ekfac = [] if config.ekfac_every is None else [_EkfacRecorder(samples, loss, config.ekfac_every, config.per)]
    model = _network(config, data, seed)
    result = _train(config, model, data, loss, lr, [*recorders, *ekfac], folder / f"{loss}.pt")
    losses = {point["step"]: point["train_loss"] for point in result.history}
    training = {
        "loss": loss,
        "seed": seed,
        "lr": lr,
        "test_accuracy": evaluate(model, data.x_test, data.y_test).accuracy,
        # Of the call that ended the training: one that was stopped before has taken more.
        "training_seconds": result.seconds - result.observer_seconds,
        "observer_seconds": result.observer_seconds,
    }
    points = [record for recorder in recorders for record in recorder.records]
    points += [record for recorder in ekfac for record in recorder.records]
    return (
        [training]
        + [{"loss": loss, "seed": seed, **point, "train_loss": losses.get(point["step"])} for point in points],
        [{"loss": loss, "seed": seed, **found} for recorder in recorders for found in recorder.densities],
    )


def _drawn(densities: Sequence[Record]) -> list[Record]:
    """Return densities with ``grid`` and ``density``: those of one loss and quantity on one grid, equally smooth."""
    drawn = []
    for record in densities:
        like = [r for r in densities if (r["loss"], r["quantity"]) == (record["loss"], record["quantity"])]
        low = min(node for r in like for nodes in r["density"]["nodes"] for node in nodes)
        high = max(node for r in like for nodes in r["density"]["nodes"] for node in nodes)
        width = max(high - low, 1e-12) / 100
        grid = torch.linspace(low - 3 * width, high + 3 * width, 500, dtype=torch.float64)
        saved = record["density"]
        tensors = {key: torch.tensor(saved[key], dtype=torch.float64) for key in ("nodes", "weights")}
        values, _ = SpectralDensity(**{**saved, **tensors}).pdf(grid, width)
        drawn.append({**record, "grid": grid.tolist(), "density": values.tolist()})
    return drawn


class _EkfacRecorder:
    """Records the largest eigenvalue of the Fisher's EK-FAC, which is the largest over the layers."""

    def __init__(self, data: Samples, loss: str, every: int, per: Sequence[Level]) -> None:
        self._data, self._loss, self._every, self._per = data, loss, every, per
        self.records: list[Record] = []

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def __call__(self, step: int, model: nn.Module) -> None:
        started = time.perf_counter()
        matrix = estimate(Problem(model, self._loss, self._data), "fisher", "ekfac:rest=diag")
        values = {"network": float(matrix.eigenvalues().max())} if "network" in self._per else {}
        if "layer" in self._per:
            for part in matrix.parts if isinstance(matrix, Composite) else (matrix,):
                if isinstance(part, EKFAC):
                    values |= {layer: float(basis.values.max()) for layer, basis in part.bases.items()}
        seconds = time.perf_counter() - started
        self.records += [
            {
                "step": step,
                "quantity": "ekfac",
                "layer": layer,
                "index": 0,
                "value": value,
                "residual": None,
                "matvecs": None,
                "converged": True,
                "seconds": seconds,
            }
            for layer, value in values.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"every": self._every, "records": list(self.records)}

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        self.records = list(states["records"])


# What is made of the curves ------------------------------------------------------------------------------------------


def summarise(records: Sequence[Record]) -> list[Record]:
    """Return what the curves come to, one record a loss, quantity and layer: mean and deviation over the seeds.

    Args:
        records: Points as ``table.json`` has them.

    Returns:
        As ``curvlab.results.aggregate`` makes them: ``start``, ``maximum``, ``maximum_step``, ``end``,
        ``end_of_maximum``, ``end_of_start``; with ``points``, how many a curve has, and ``matvecs``, the median over
        points and seeds.
    """
    curves: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        curves.setdefault(tuple(record[key] for key in ("loss", "quantity", "layer", "seed")), []).append(record)
    ends = []
    for (loss, quantity, layer, seed), points in curves.items():
        points = sorted(points, key=lambda point: int(point["step"]))
        start, end = points[0]["value"], points[-1]["value"]
        top = max(points, key=lambda point: float(point["value"]))
        maximum = top["value"]
        ends.append(
            {
                "loss": loss,
                "quantity": quantity,
                "layer": layer,
                "seed": seed,
                "start": start,
                "maximum": maximum,
                "maximum_step": top["step"],
                "end": end,
                "end_of_maximum": end / maximum if maximum > 0 else None,
                "end_of_start": end / start if start > 0 else None,
                "points": len(points),
            }
        )
    by = ["loss", "quantity", "layer", "points"]
    numbers = ["start", "maximum", "maximum_step", "end", "end_of_maximum", "end_of_start"]
    table = aggregate(ends, by, numbers)
    for row in table:
        taken = [
            r["matvecs"] for r in records if all(r[key] == row[key] for key in by[:3]) and r["matvecs"] is not None
        ]
        row["matvecs"] = median(taken) if taken else None
    return table


def claims(records: Sequence[Record]) -> list[Claim]:
    """Return the published claims with their verdicts.

    One is tested where the losses that it is about were trained, and one about a curve's maximum only of curves with
    the most points. The publications have curves only: the numbers in the claims are ours, fixed before the runs.

    Args:
        records: Points as ``table.json`` has them.
    """
    of_network = [record for record in records if record["layer"] == "network"]
    seeds = sorted({record["seed"] for record in of_network})
    rows = {
        (row["loss"], row["quantity"], seed): row
        for seed in seeds
        for row in summarise([record for record in of_network if record["seed"] == seed])
    }
    most = max((row["points"] for row in rows.values()), default=0)
    for row in rows.values():
        if row["points"] < most:  # the maximum may lie between its points
            row["end_of_maximum"] = None

    def values(quantity: str, number: Callable[[Record, Record], float | None]) -> list[float]:
        found = []
        for seed in seeds:
            softmax, squared = (rows.get((loss, quantity, seed), {}) for loss in ("cross_entropy", "squared_error"))
            value = number(softmax, squared)
            found.append(math.nan if value is None else value)
        return found

    def claim(quantity: str, text: str, published: str, measured: list[float], test: Callable[[float], bool]) -> Claim:
        if quantity not in ("fisher", "ekfac"):  # of which alone the publication's caption speaks
            return Claim.of(f"{_QUANTITIES.get(quantity, quantity)}: {text}", "ours, as for the Fisher", measured, test)
        source = "Shon et al. (2022): poster, panels (a), (b); supplement, Fig. 7"
        return Claim.of(f"{_QUANTITIES[quantity]}: {text}", source, measured, test, published)

    def ratio(softmax: Record, squared: Record) -> float | None:
        mine, other = softmax.get("end_of_maximum"), squared.get("end_of_maximum")
        return None if mine is None or other is None or mine <= 0 else float(other / mine)

    answers = []
    for quantity in dict.fromkeys(record["quantity"] for record in of_network):
        answers += [
            claim(
                quantity,
                "softmax cross-entropy's largest eigenvalue vanishes: at the end at most 0.2 of its maximum",
                "→ 0",
                values(quantity, lambda softmax, _: softmax.get("end_of_maximum")),
                lambda value: value <= 0.2,
            ),
            claim(
                quantity,
                "squared error's does not: at the end at least 0.5 of that at the start",
                "curve",
                values(quantity, lambda _, squared: squared.get("end_of_start")),
                lambda value: value >= 0.5,
            ),
            claim(
                quantity,
                "at the end, each over its own maximum, squared error's is at least 3 times as large",
                "curve",
                values(quantity, ratio),
                lambda value: value >= 3,
            ),
        ]
    return answers


def curves_figures(records: Sequence[Record], title: str) -> dict[str, Any]:
    """Return the figures of the curves by name.

    Args:
        records: Points as ``table.json`` has them.
        title: What stands above.
    """
    figures = {}
    of_network = [record for record in records if record["layer"] == "network"]
    of_layers = [record for record in records if record["layer"] != "network"]
    if of_network:
        figures["eigenvalues"] = eigenvalue_curves(of_network, title)
        figures["normalised"] = normalised_curves(of_network, title)
    if of_layers:
        figures["layers"] = layer_curves(of_layers, title)
    return figures


def _readable(table: Sequence[Record]) -> list[Record]:
    return [
        {
            **row,
            "loss": _LABELS.get(row["loss"], row["loss"]),
            "quantity": _QUANTITIES.get(row["quantity"], row["quantity"]),
        }
        for row in table
    ]


def describe(config: EigenvaluesConfig, data: Dataset) -> str:
    """Return the title of the figures: the network and its data."""
    network = config.model
    if network == "mlp":
        network = "-".join(map(str, (prod(data.sample_shape), *config.hidden, data.num_classes)))
    return f"{network} on {Path(config.data).name}"


def _figures(
    config: EigenvaluesConfig, data: Dataset, directory: RunDirectory, records: Sequence[Record], cells: Sequence[Cell]
) -> None:
    title = describe(config, data)
    for name, figure in curves_figures(records, title).items():
        directory.write_figure(name, gridded.marked(figure, directory.path))
    densities: list[Record] = []
    for one in cells:
        if one.config["seeds"] == [config.seeds[0]]:
            # None of a cell that has failed, or was run on a machine of a cluster that does not share the folder.
            with suppress(FileNotFoundError):
                folder = grid.folder_of(directory.path / gridded.STORE, one.key)
                densities += json.loads((folder / _DENSITIES).read_text())
    if densities:
        directory.write_figure("densities", density_curves(_drawn(densities), title))


def _print(
    console: Console,
    config: EigenvaluesConfig,
    data: Dataset,
    directory: RunDirectory,
    rates: Sequence[Record],
    trainings: Sequence[Record],
    table: Sequence[Record],
    found: Sequence[Claim],
) -> None:
    if rates:
        title = f"Squared error: learning rate chosen on {config.validation:,} held-out samples"
        best = _best(rates)
        marked = [{**rate, "note": "taken" if rate["lr"] == best else rate["note"]} for rate in rates]
        console.print(render(marked, _RATES, title), crop=False)
    seeds = () if all(row["seeds"] == len(config.seeds) for row in table) else (gridded.SEEDS,)
    number = "the seeds that did not fail" if seeds else f"{len(config.seeds)} seeds"
    spread = f"mean ± standard deviation over {number}" if len(config.seeds) > 1 else "one seed"
    samples = len(subject.samples(config, data)[0])
    title = f"Largest eigenvalue over {config.steps:,} steps: {describe(config, data)}, {samples:,} samples; {spread}"
    console.print(render(_readable(table), (*_SUMMARY, *seeds), title), crop=False)
    console.print(render_claims(found), crop=False)
    notes = []
    for loss in config.losses:
        of_loss = [training for training in trainings if training["loss"] == loss]
        if not of_loss:
            continue
        accuracies = [training["test_accuracy"] for training in of_loss]
        trained, watched = (
            sum(training[key] for training in of_loss) for key in ("training_seconds", "observer_seconds")
        )
        notes.append(
            f"{_LABELS[loss]}: learning rate {of_loss[0]['lr']:g}; test accuracy {min(accuracies):.1%} to "
            f"{max(accuracies):.1%}; {significant(trained, 3)} s of training and {significant(watched, 3)} s of "
            f"recording ({watched / trained:.1f} times the training)."
        )
    notes.append(
        f"Saved in {directory.path}: table (.json .csv .md .tex), trainings, claims, provenance, figures, "
        f"{gridded.STORE}."
    )
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


ANALYSIS = Analysis(
    config=EigenvaluesConfig,
    presets=PRESETS,
    run=run,
    description="Does the curvature vanish in training? Trains a network with softmax cross-entropy and with squared "
    "error, and follows the largest eigenvalue of Fisher and Hessian, by Lanczos' method and by EK-FAC.",
    cell=cell,
)
