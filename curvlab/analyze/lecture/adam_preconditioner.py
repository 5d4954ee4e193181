"""Is Adam's second moment the diagonal of the Fisher? Carta's lecture on regularization priors, the slides on Adam."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from curvlab import plots
from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Analysis, Preset, Record, Report, Results, Table, Workspace
from curvlab.analyze.frame.conditions import lowest_accuracy
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.values import list_by_seed, number, rank_correlation, where
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.parameters import ParameterSpace
from curvlab.results import Claim, Column, aggregate, mean_column, require_direction
from curvlab.text import write_count
from curvlab.training import Training, evaluate, fit

LABELS = {"masq": "batched", "empirical_fisher": "empirical", "fisher": "exact"}
_DRAWN = 3000  # parameters of the scatter plot


class AdamPreconditionerConfig(subject.SubjectConfig):
    """Train a network with Adam, and compare its second moment with three diagonals during the training."""

    titles: ClassVar[Mapping[str, str]] = {**subject.SubjectConfig.titles, "lr": "training"}

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of Adam."""
    steps: int = Field(default=500, ge=1)
    """Number of training steps (mini-batches)."""
    batch_size: int = Field(default=100, ge=1)
    """Samples per training step, and per batch of the batched empirical Fisher."""
    every: int = Field(default=50, ge=1)
    """Steps between two comparisons."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """One network is trained per seed; the table has mean and standard deviation."""


PRESETS = {
    "default": Preset(AdamPreconditionerConfig(), minutes=0.5),
    "cpu": Preset(
        AdamPreconditionerConfig(data="mnist", samples=10_000, hidden=(100, 100), steps=2000, every=200),
        minutes=1,
        needs=("mnist",),
    ),
}


class MomentRecorder:
    """Observer of ``fit`` that compares Adam's bias-corrected second moment with diagonals at the same weights.

    Args:
        config: Configuration with ``batch_size``, ``every`` and ``samples``.
        data: Data set whose training samples the diagonals are computed on.

    Attributes:
        records: One record per step and diagonal.
        entries: The second moment and the diagonals at the last step, by name, each ``(P,)``.
    """

    def __init__(self, config: AdamPreconditionerConfig, data: Dataset) -> None:
        self._config, self._data = config, data
        self._optimizer: Optimizer | None = None
        self.records: list[Record] = []
        self.entries: dict[str, np.ndarray] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep a reference to the optimizer that steps inside the block."""

        def see(optimizer: Optimizer, *_: Any) -> None:
            self._optimizer = optimizer

        handle = register_optimizer_step_post_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def due(self, step: int) -> bool:
        """Return whether there is a comparison after this step."""
        return step % self._config.every == 0

    def __call__(self, step: int, model: nn.Module) -> None:
        """Add the records of this step; before the first step there is no second moment."""
        if self._optimizer is None:
            return
        problem = subject.problem(self._config, self._data, model)
        moment = second_moment(self._optimizer, model)
        self.entries = {"second_moment": moment}
        quantities = {"masq": f"masq:batch_size={self._config.batch_size},norm=mean"}
        for name in LABELS:
            diagonal = estimate(problem, quantities.get(name, name), "diag").diagonal().double().cpu().numpy()
            self.entries[name] = diagonal
            self.records.append({"step": step, "quantity": name, **compare(moment, diagonal)})

    def state_dict(self) -> dict[str, Any]:
        """Return no state: the training has no checkpoint."""
        return {}

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        """Restore no state."""


def second_moment(optimizer: Optimizer, model: nn.Module) -> np.ndarray:
    r"""Return Adam's ``v / (1 - beta2^t)`` of the trainable parameters, ``(P,)`` in the order of ``ParameterSpace``.

    Args:
        optimizer: ``torch.optim.Adam`` or ``AdamW``, after a step at least.
        model: What it trains.
    """
    named, (_, beta) = dict(model.named_parameters()), optimizer.param_groups[0]["betas"]
    parts = []
    for name in ParameterSpace.of(model).names:
        state = optimizer.state[named[name]]
        parts.append((state["exp_avg_sq"].double() / (1 - beta ** float(state["step"]))).flatten().cpu())
    moment: np.ndarray = torch.cat(parts).numpy()
    return moment


def compare(moment: np.ndarray, diagonal: np.ndarray) -> Record:
    """Compare a second moment with a diagonal, over the parameters whose second moment is not zero.

    Keys: ``rank_correlation``, Spearman's; ``log_scale``, the median of ``log10(moment / diagonal)`` where the diagonal
    is positive; ``share``, the fraction of these parameters. A value that does not exist is None.
    """
    moved = moment > 0
    both = moved & (diagonal > 0)
    ratios = np.log10(moment[both] / diagonal[both])
    return {
        "rank_correlation": rank_correlation(moment[moved].tolist(), diagonal[moved].tolist()),
        "log_scale": float(np.median(ratios)) if len(ratios) else None,
        "share": float(moved.mean()),
    }


def measure(config: AdamPreconditionerConfig, dataset: Dataset, workspace: Workspace) -> Iterator[Record]:
    """Train the network, and yield the comparisons with each diagonal."""
    (seed,) = config.seeds
    model, recorder = subject.network(config, dataset, seed), MomentRecorder(config, dataset)
    training = Training(optimizer="adam", lr=config.lr, batch_size=config.batch_size, steps=config.steps, seed=seed)
    with recorder.watching():
        fit(model, (dataset.x_train, dataset.y_train), training=training, observers=[recorder], progress=False)
    if not recorder.entries["second_moment"].any():
        raise CurvlabError("Adam's second moment is zero: every gradient of the training was zero")
    accuracy = evaluate(model, dataset.x_test, dataset.y_test).accuracy
    yield from ({"seed": seed, **record, "test_accuracy": accuracy} for record in recorder.records)
    total = len(recorder.entries["second_moment"])
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:_DRAWN].numpy()
    workspace.save("entries", {"seed": seed, **{name: values[drawn] for name, values in recorder.entries.items()}})


_COLUMNS = (
    Column("label", "diagonal"),
    mean_column("rank_correlation", "rank correlation"),
    mean_column("log_scale", "log10(v / diagonal), median"),
    mean_column("share", "share of nonzero v"),
    mean_column("test_accuracy", "test accuracy"),
)
_VALUES = ("rank_correlation", "log_scale", "share", "test_accuracy")


def report(run: Results[AdamPreconditionerConfig]) -> Report:
    """Return the comparisons after the last step, the claims, and the figures."""
    config, records, slide = run.config, run.records["table"], read_published("lecture")["adam_preconditioner"]
    ours = {"data": run.subject.data, "steps": config.steps, "test accuracy": lowest_accuracy(records)}
    gate = require_direction(ours, slide["conditions"], slide["direction"])
    ends = where(records, step=max(record["step"] for record in records))

    def values(quantity: str, key: str) -> list[float]:
        return list_by_seed(ends, run.seeds, lambda seed: number(where(ends, seed=seed, quantity=quantity)[0][key]))

    def correlation(text: str, quantity: str) -> Claim:
        return Claim.of(text, slide["source"], values(quantity, "rank_correlation"), lambda x: x >= 0.5, None, gate)

    nearer = [
        abs(batched) - abs(exact)
        for batched, exact in zip(values("masq", "log_scale"), values("fisher", "log_scale"), strict=True)
    ]
    rows = [{**row, "label": LABELS[row["quantity"]]} for row in aggregate(ends, ["quantity"], _VALUES)]
    title = (
        f"Adam's second moment v against diagonals of a {subject.describe_network(config, run.subject)} on "
        f"{run.subject.data}, after {write_count(config.steps, 'step')} of {config.batch_size:,}; {run.spread}"
    )
    entries = run.artifacts.get("entries", ())
    return Report(
        Table(title, _COLUMNS, rows),
        claims=[
            correlation(
                "v approximates the diagonal of the batched empirical Fisher: rank correlation 0.5 or more", "masq"
            ),
            correlation("v approximates the diagonal of the Fisher: rank correlation 0.5 or more", "fisher"),
            Claim.of(
                "The scale of v is that of the batched empirical Fisher, not of the Fisher: "
                "|log10 ratio| to the first less that to the second is below 0",
                "ours",
                nearer,
                lambda difference: difference < 0,
                None,
                gate,
            ),
        ],
        figures={"over_training": lambda: plots.moment_curves(records, LABELS)}
        | ({"entries": lambda: plots.moment_scatter(entries[0], LABELS)} if entries else {}),
    )


ANALYSIS = Analysis(
    config=AdamPreconditionerConfig,
    question="Is Adam's second moment the diagonal of the Fisher? Rank correlation and scale over training, against "
    "the batched empirical, the empirical and the exact diagonal.",
    presets=PRESETS,
    check=subject.check_network,
    measure=measure,
    report=report,
    kinds={"table": "quantity"},
    artifacts=("entries",),
)
