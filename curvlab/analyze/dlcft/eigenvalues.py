"""The largest eigenvalue of Fisher and Hessian over a training, softmax cross-entropy against squared error.

The curves of Shon et al. (2022), "DLCFT: Deep Linear Continual Fine-Tuning for General Incremental Learning": poster,
panels (a) and (b), and supplement, Fig. 7.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from matplotlib.figure import Figure
from pydantic import Field

from curvlab.analyze.dlcft import eigenvalues_claims as published
from curvlab.analyze.dlcft.eigenvalues_training import (
    make_targets,
    measure_candidate,
    record_training,
    smooth,
)
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.search import Candidate, Choice, Group, Search
from curvlab.analyze.frame.subject import TrainedSubjectConfig
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.plots import density_curves, eigenvalue_curves, layer_curves, normalised_curves
from curvlab.problem import Problem
from curvlab.recorder import CurveLevel
from curvlab.results import significant

LossChoice = Literal["cross_entropy", "squared_error"]
Rate = Annotated[float, Field(gt=0)]


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
    per: tuple[CurveLevel, ...] = ("network",)
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
    "default": Preset(EigenvaluesConfig(), minutes=2),
    "cpu": Preset(_MNIST, needs=("mnist",)),
    "cpu-resnet20": Preset(_CIFAR, needs=("cifar100", "weights")),
    "paper": Preset(
        _MNIST.model_copy(
            update={
                "train_samples": None,
                "samples": 5000,
                "schedule": "linear",
                "steps": 10000,
                "every": 200,
                "ekfac_every": 1000,
            }
        ),
        needs=("mnist",),
    ),
    "paper-cifar100": Preset(
        _CIFAR.model_copy(
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
        needs=("cifar100", "weights", "gpu"),
    ),
}


# The runs -------------------------------------------------------------------------------------------------------------


def check(config: EigenvaluesConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written."""
    subject.check_distinct(losses=config.losses, per=config.per, lr_squared_error=config.lr_squared_error)
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
    data = subject.take(dataset, train=config.train_samples)
    subject.check_subject(config, data)
    model = subject.network(config, data, config.seeds[0])
    for loss in config.losses:
        few = (data.x_train[:2], data.y_train[:2])
        problem = Problem(model, loss, make_targets(config, data, loss, few))
        subject.check_curvature(problem, config.quantities, None)
        for quantity in config.quantities:
            matrix = estimate(problem, quantity, "implicit")
            matrix.matvec(torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device))
        if config.ekfac_every is not None:
            estimate(problem, "fisher", "kfac:rest=diag")  # of the same layers, without the eigendecompositions


def measure(config: EigenvaluesConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train with each loss; yield a record of the training, and those of the points of its curves, with ``step``."""
    data = subject.take(dataset, train=config.train_samples)
    densities: list[Record] = []
    for loss in config.losses:
        records, found = record_training(config, data, loss, workspace.folder / f"{loss}.pt")
        yield from records
        densities += found
    if densities:
        workspace.save("densities", densities)


def _candidates(config: EigenvaluesConfig) -> Sequence[tuple[Group, Sequence[Candidate]]]:
    rates = {"cross_entropy": (config.lr,), "squared_error": config.lr_squared_error}
    return [({"loss": loss}, [{"lr": lr} for lr in rates[loss]]) for loss in config.losses]


def _with_candidate(config: EigenvaluesConfig, group: Group, candidate: Candidate, seed: int) -> EigenvaluesConfig:
    rate = {"lr_squared_error": (candidate["lr"],)} if group["loss"] == "squared_error" else {}
    return config.model_copy(update={"losses": (group["loss"],), "seeds": (seed,), **rate})


def _runs(config: EigenvaluesConfig, chosen: Sequence[Choice]) -> list[EigenvaluesConfig]:
    return [_with_candidate(config, choice.group, choice.candidate, seed) for seed in config.seeds for choice in chosen]


# The report -----------------------------------------------------------------------------------------------------------


def report(run: Results[EigenvaluesConfig]) -> Report:
    """Return the summary of the curves, the claims of the paper, and the figures."""
    records, config = run.records["table"], run.config
    conditions = published.conditions(config, run.subject)
    name = f"{subject.describe_network(config, run.subject)} on {run.subject.data}"
    samples = config.samples or published.count_training_samples(config, run.subject)
    title = f"Largest eigenvalue over {config.steps:,} steps: {name}, {samples:,} samples; {run.spread}"
    notes = [_describe_trainings(run, loss) for loss in config.losses]
    notes.append(published.describe_early_peaks(records))
    return Report(
        Table(title, published.COLUMNS, _with_labels(published.summarise(records))),
        claims=published.claims(records, conditions),
        figures=_figures(run, name),
        deviations=published.deviations(conditions),
        notes=[note for note in notes if note],
    )


def _figures(run: Results[EigenvaluesConfig], title: str) -> dict[str, Any]:
    records = run.records["table"]
    network = [record for record in records if record["layer"] == "network"]
    layers = [record for record in records if record["layer"] != "network"]
    densities = [
        record for kept in run.artifacts["densities"] for record in kept if record["seed"] == run.config.seeds[0]
    ]

    def draw_densities() -> Figure:
        return density_curves(smooth(densities), f"{title}, seed {run.config.seeds[0]}")

    figures: dict[str, Any] = {}
    if network:
        figures["eigenvalues"] = lambda: eigenvalue_curves(network, title)
        figures["normalised"] = lambda: normalised_curves(network, title)
    if layers:
        figures["layers"] = lambda: layer_curves(layers, title)
    if densities:
        figures["densities"] = draw_densities
    return figures


def _describe_trainings(run: Results[EigenvaluesConfig], loss: str) -> str:
    """Return a sentence about the trainings with a loss; an empty one where none is done."""
    trainings = [training for training in run.records["trainings"] if training["loss"] == loss]
    if not trainings:
        return ""
    accuracies = [training["test_accuracy"] for training in trainings]
    trained, recorded = (sum(one[key] for one in trainings) for key in ("training_seconds", "observer_seconds"))
    return (
        f"{published.LOSSES[loss]}: learning rate {trainings[0]['lr']:g}; test accuracy {min(accuracies):.1%} to "
        f"{max(accuracies):.1%}; {significant(trained, 3)} s of training and {significant(recorded, 3)} s of "
        f"recording ({recorded / trained:.1f} times the training)."
    )


def _with_labels(table: Sequence[Record]) -> list[Record]:
    return [
        {
            **row,
            "loss": published.LOSSES[row["loss"]],
            "quantity": published.QUANTITIES.get(row["quantity"], row["quantity"]),
        }
        for row in table
    ]


ANALYSIS = Analysis(
    config=EigenvaluesConfig,
    question="Does the curvature vanish in training? Trains a network with softmax cross-entropy and with squared "
    "error, and follows the largest eigenvalue of Fisher and Hessian, by Lanczos' method and by EK-FAC.",
    presets=PRESETS,
    check=check,
    measure=measure,
    report=report,
    search=Search(
        candidates=_candidates,
        config=_with_candidate,
        runs=_runs,
        seeds=lambda config: config.seeds[:1],
        value="validation_loss",
        largest=False,
        measure=measure_candidate,
        advice="give lower ones with --lr-squared-error",
        label=lambda loss: published.LOSSES.get(loss, loss),
    ),
    kinds={"table": "step", "trainings": "test_accuracy"},
    artifacts=("densities",),
    items=("poster (a) and (b)", "supplement Fig. 7"),
)
