"""One training of the analysis ``eigenvalues``: targets, recorders, and the loss on held-out samples."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.analyze.dlcft.eigenvalues_options import EigenvaluesConfig
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Record, Workspace
from curvlab.analyze.frame.subject import SubjectData
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.matrices import EKFAC, Composite
from curvlab.problem import Problem
from curvlab.recorder import CurveLevel, EigenvalueRecorder
from curvlab.spectrum.density import SpectralDensity
from curvlab.training import FitResult, Observer, evaluate, fit

Samples = tuple[Tensor, Tensor]

_BANDWIDTHS = 100  # number of bandwidths in the range of the eigenvalues, for a smoothed density


def make_targets(config: EigenvaluesConfig, data: Dataset, loss: str, samples: Samples) -> Samples:
    """Return samples with the targets of the loss: labels, or scaled one-hot vectors."""
    inputs, labels = samples
    if loss == "cross_entropy":
        return inputs, labels
    return inputs, config.alpha * F.one_hot(labels, data.num_classes).to(inputs.dtype)


def learning_rate(config: EigenvaluesConfig, loss: str) -> float:
    """Return the learning rate for a loss; the first one if there are several candidates."""
    return config.lr if loss == "cross_entropy" else config.lr_squared_error[0]


def _train(
    config: EigenvaluesConfig,
    model: nn.Module,
    data: Dataset,
    loss: str,
    observers: Sequence[Observer] = (),
    checkpoint: Path | None = None,
) -> FitResult:
    return fit(
        model,
        make_targets(config, data, loss, (data.x_train, data.y_train)),
        loss=loss,
        **{**subject.fit_options(config), "lr": learning_rate(config, loss)},
        seed=config.seeds[0],
        evaluate_every=config.every,
        observers=observers,
        checkpoint=checkpoint,
        checkpoint_every=config.every,
        progress=False,
    )


def measure_candidate(config: EigenvaluesConfig, dataset: SubjectData, workspace: Workspace) -> Iterator[Record]:
    """Train with one loss and learning rate, and yield the loss on the held-out samples.

    Raises:
        CurvlabError: A loss is not finite.
    """
    del workspace  # candidates have no checkpoint
    (loss,), (seed,) = config.losses, config.seeds
    held_out, data = dataset.held_out, subject.take(dataset, train=config.train_samples)
    assert held_out is not None
    model = subject.network(config, data, seed)
    _train(config, model, data, loss)
    value = evaluate(model, *make_targets(config, data, loss, held_out), loss=loss).loss
    if not math.isfinite(value):
        raise CurvlabError(f"the loss on the held-out samples is {value}")
    yield {"validation_loss": value}


def record_training(
    config: EigenvaluesConfig, data: Dataset, loss: str, checkpoint: Path
) -> tuple[list[Record], list[Record]]:
    """Train with one loss; return the record of the training followed by those of the curves, and the densities."""
    samples = make_targets(config, data, loss, subject.samples(config, data))
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
    ekfac = [] if config.ekfac_every is None else [EkfacRecorder(samples, loss, config.ekfac_every, config.per)]
    model = subject.network(config, data, seed)
    result = _train(config, model, data, loss, [*recorders, *ekfac], checkpoint)
    losses = {point["step"]: point["train_loss"] for point in result.history}
    training = {
        "loss": loss,
        "seed": seed,
        "lr": learning_rate(config, loss),
        "test_accuracy": evaluate(model, data.x_test, data.y_test).accuracy,
        # Seconds of the last call of fit; a run that was interrupted took longer.
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


class EkfacRecorder:
    """Observer that records the largest eigenvalue of the EK-FAC of the Fisher, the largest over all layers."""

    def __init__(self, data: Samples, loss: str, every: int, per: Sequence[CurveLevel]) -> None:
        self._data, self._loss, self._every, self._per = data, loss, every, per
        self.records: list[Record] = []

    def due(self, step: int) -> bool:
        """Return whether a point is recorded after this step."""
        return step % self._every == 0

    def __call__(self, step: int, model: nn.Module) -> None:
        """Add the requested records: of the network, of every layer, or both."""
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
        """Return the records."""
        return {"every": self._every, "records": list(self.records)}

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        """Restore the records of an interrupted run."""
        self.records = list(states["records"])


def smooth(densities: Sequence[Record]) -> list[Record]:
    """Add ``grid`` and ``density`` to records of densities; equal loss and quantity share grid and bandwidth."""
    smoothed = []
    for record in densities:
        like = [r for r in densities if (r["loss"], r["quantity"]) == (record["loss"], record["quantity"])]
        all_nodes = [node for r in like for nodes in r["density"]["nodes"] for node in nodes]
        low, high = min(all_nodes), max(all_nodes)
        width = max(high - low, 1e-12) / _BANDWIDTHS
        grid = torch.linspace(low - 3 * width, high + 3 * width, 500, dtype=torch.float64)
        saved = record["density"]
        tensors = {key: torch.tensor(saved[key], dtype=torch.float64) for key in ("nodes", "weights")}
        values, _ = SpectralDensity(**{**saved, **tensors}).pdf(grid, width)
        smoothed.append({**record, "grid": grid.tolist(), "density": values.tolist()})
    return smoothed
