"""The largest eigenvalue of Fisher and Hessian during training, with softmax cross-entropy and squared error.

Reproduces the curves of Shon et al. (2022), "DLCFT: Deep Linear Continual Fine-Tuning for General Incremental
Learning": poster, panels (a) and (b), and supplement, Fig. 7.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from curvlab import plots
from curvlab.analyze.dlcft import eigenvalues_claims as published
from curvlab.analyze.dlcft.eigenvalues_options import PRESETS, EigenvaluesConfig
from curvlab.analyze.dlcft.eigenvalues_training import (
    make_targets,
    measure_candidate,
    record_training,
    smooth,
)
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.search import Candidate, Choice, Group, Search
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.problem import Problem
from curvlab.results import format_number
from curvlab.text import write_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The runs -------------------------------------------------------------------------------------------------------------


def check(config: EigenvaluesConfig, dataset: Dataset) -> None:
    """Check the configuration and the data.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_distinct(losses=config.losses, per=config.per, lr_squared_error=config.lr_squared_error)
    if config.densities_at:
        subject.check_distinct(densities_at=config.densities_at)
        if max(config.densities_at) > config.steps:
            raise CurvlabError(
                f"densities_at contains {max(config.densities_at)}, but the training has "
                f"{write_count(config.steps, 'step')}"
            )
    if off := [step for step in config.densities_at if step % config.every]:
        raise CurvlabError(f"densities_at contains {off[0]}, which is not a multiple of every={config.every}")
    if "squared_error" in config.losses and len(config.lr_squared_error) > 1 and not config.validation:
        raise CurvlabError(
            "the learning rate is chosen on held-out samples: set validation, or give lr_squared_error a single value"
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
            estimate(problem, "fisher", "kfac:rest=diag")  # covers the same layers, without the eigendecompositions


def measure(config: EigenvaluesConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train with each loss; yield one record of the training, and one per point of its curves, with ``step``."""
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


def report(results: Results[EigenvaluesConfig]) -> Report:
    """Return the summary of the curves, the claims of the paper, and the figures."""
    records, config = results.records["table"], results.config
    conditions = published.conditions(config, results.subject, results.records["trainings"])
    name = f"{subject.describe_network(config, results.subject)} on {results.subject.data}"
    samples = config.samples or published.count_training_samples(config, results.subject)
    steps = write_count(config.steps, "step")
    title = f"Largest eigenvalue over {steps}: {name}, {write_count(samples, 'sample')}; {results.spread}"
    notes = [_describe_trainings(results, loss) for loss in config.losses]
    notes.append(published.describe_early_peaks(records))
    return Report(
        Table(title, published.COLUMNS, _with_labels(published.summarise(records))),
        claims=published.claims(records, conditions),
        figures=_figures(results, name),
        deviations=published.deviations(conditions),
        notes=[note for note in notes if note],
    )


def _figures(results: Results[EigenvaluesConfig], title: str) -> dict[str, Any]:
    records = results.records["table"]
    network = [record for record in records if record["layer"] == "network"]
    layers = [record for record in records if record["layer"] != "network"]
    densities = [
        record
        for kept in results.artifacts["densities"]
        for record in kept
        if record["seed"] == results.config.seeds[0]
    ]

    def draw_densities() -> "Figure":
        return plots.density_curves(smooth(densities), f"{title}, seed {results.config.seeds[0]}")

    figures: dict[str, Any] = {}
    if network:
        figures["eigenvalues"] = lambda: plots.eigenvalue_curves(network, title)
        figures["normalised"] = lambda: plots.normalised_curves(network, title)
    if layers:
        figures["layers"] = lambda: plots.layer_curves(layers, title)
    if densities:
        figures["densities"] = draw_densities
    return figures


def _describe_trainings(results: Results[EigenvaluesConfig], loss: str) -> str:
    """Return a sentence about the trainings with a loss; an empty string if there are none."""
    trainings = [training for training in results.records["trainings"] if training["loss"] == loss]
    if not trainings:
        return ""
    accuracies = [training["test_accuracy"] for training in trainings]
    trained, recorded = (sum(one[key] for one in trainings) for key in ("training_seconds", "observer_seconds"))
    return (
        f"{published.LOSSES[loss]}: learning rate {trainings[0]['lr']:g}; test accuracy {min(accuracies):.1%} to "
        f"{max(accuracies):.1%}; {format_number(trained, 3)} s of training and {format_number(recorded, 3)} s of "
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
    question="Does the curvature vanish during training? Trains a network with softmax cross-entropy and with squared "
    "error, and records the largest eigenvalue of Fisher and Hessian, by the Lanczos method and by EK-FAC.",
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
)
