"""What the analyses of training regimes share: their options, parts, tasks and networks."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field
from torch import Tensor, nn

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.continual import Task, permuted, rotated
from curvlab.continual.regimes import Regime
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.problem import Problem

Record = dict[str, Any]
RegimeName = Literal[
    "stable",
    "stable-lr",
    "stable-decay",
    "stable-batch_size",
    "stable-dropout",
    "plastic",
    "plastic+lr",
    "plastic+decay",
    "plastic+batch_size",
    "plastic+dropout",
]


class RegimesConfig(SubjectConfig):
    """Train a network on one task after another under several regimes."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "streams": "tasks",
        "regimes": "training",
        "solver": "curvature",
    }

    samples: int | None = Field(default=None, ge=1)
    """Take losses and curvature on so many training samples of a task, random ones; none means all."""
    streams: tuple[Literal["rotated", "permuted"], ...] = ("rotated", "permuted")
    """What tells tasks apart: every image is rotated, or its pixels permuted; one or both."""
    tasks: int = Field(default=3, ge=2)
    """Tasks of a stream."""
    degrees: float = 10.0
    """Rotated: from a task's angle to the next one's."""
    task_samples: int | None = Field(default=None, ge=1)
    """Training samples of a task, random ones, the same images in every task; none means all."""
    regimes: tuple[RegimeName, ...] = ("stable", "plastic", "stable-dropout", "stable-decay", "stable-batch_size")
    """stable and plastic are given below; stable-X has the X of plastic, plastic+X that of stable."""
    epochs: int = Field(default=5, ge=1)
    """Passes over the samples of each task."""
    momentum: float = Field(default=0.8, ge=0, lt=1)
    """Of stochastic gradient descent, which starts anew with each task."""
    stable_lr: float = Field(default=0.1, gt=0)
    """Learning rate, before the decay."""
    stable_decay: float = Field(default=0.4, gt=0, le=1)
    """The learning rate of task t = 1, 2, ... is lr * decay^t, at least 5e-5."""
    stable_batch_size: int = Field(default=16, ge=1)
    """Samples a training step."""
    stable_dropout: float = Field(default=0.25, ge=0, lt=1)
    """Share of the hidden units left out in training, of an mlp."""
    plastic_lr: float = Field(default=0.01, gt=0)
    """As stable_lr."""
    plastic_decay: float = Field(default=1.0, gt=0, le=1)
    """As stable_decay."""
    plastic_batch_size: int = Field(default=64, ge=1)
    """As stable_batch_size."""
    plastic_dropout: float = Field(default=0.0, ge=0, lt=1)
    """As stable_dropout."""
    solver: Literal["lanczos", "power_iteration"] = "lanczos"
    """Of the largest eigenvalue; power_iteration is that of published curves: 18 products, largest in magnitude."""
    tol: float = Field(default=1e-3, gt=0, lt=1)
    """Relative error of the largest eigenvalue, for lanczos."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Tasks are drawn and a network is trained for each; the table has mean and standard deviation."""


C = TypeVar("C", bound=RegimesConfig)


def check(config: RegimesConfig, dataset: Dataset) -> None:
    """Refuse what cannot be done, before anything is written.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable.
    """
    subject.check_distinct(streams=config.streams, regimes=config.regimes)
    subject.check_subject(config, subject.take(dataset, config.task_samples))
    if config.model != "mlp" and any(Regime.of(config, regime).dropout for regime in config.regimes):
        raise CurvlabError(f"dropout is for the mlp: with {config.model} set stable_dropout and plastic_dropout to 0")
    for regime in config.regimes:
        model = make_network(config, dataset, Regime.of(config, regime))
    for stream in config.streams:
        first = make_tasks(config, dataset, stream)[0]
        problem = Problem(model, "cross_entropy", take_samples(config, first))
        estimate(problem, "hessian", "implicit")  # checks both


def parts(config: C) -> list[C]:
    """Return the configuration of each run: a stream, seed and regime."""
    return [
        config.model_copy(update={"streams": (stream,), "seeds": (seed,), "regimes": (regime,)})
        for stream in config.streams
        for seed in config.seeds
        for regime in config.regimes
    ]


def make_tasks(config: RegimesConfig, dataset: Dataset, stream: str) -> tuple[Task, ...]:
    """Return the tasks of a stream, for the first seed.

    Raises:
        CurvlabError: The data set has no such tasks.
    """
    data = subject.take(dataset, config.task_samples)
    if stream == "rotated":
        return rotated(data, tasks=config.tasks, seed=config.seeds[0], degrees=config.degrees)
    return permuted(data, tasks=config.tasks, seed=config.seeds[0])


def make_network(config: RegimesConfig, dataset: Dataset, regime: Regime) -> nn.Module:
    """Return the network as it is initialised or loaded, with the regime's dropout, in eval mode."""
    return subject.network(config, dataset, config.seeds[0], dropout=regime.dropout)


def take_samples(config: RegimesConfig, task: Task) -> tuple[Tensor, Tensor]:
    """Return the training samples of a task that losses and curvature are taken on."""
    x, y = task.train
    return x[: config.samples], y[: config.samples]
