"""Options, runs, tasks and networks of the analyses of training regimes."""

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
    """Train a network on a sequence of tasks under several regimes."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "streams": "tasks",
        "regimes": "training",
        "solver": "curvature",
    }

    samples: int | None = Field(default=None, ge=1)
    """Number of training samples per task for losses and curvature, drawn at random; none means all."""
    streams: tuple[Literal["rotated", "permuted"], ...] = ("rotated", "permuted")
    """Streams of tasks: rotated (an angle per task), permuted (a permutation of the pixels per task), or both."""
    tasks: int = Field(default=3, ge=2)
    """Number of tasks per stream."""
    degrees: float = 10.0
    """rotated: difference of the angles of consecutive tasks, in degrees."""
    task_samples: int | None = Field(default=None, ge=1)
    """Number of training samples per task, drawn at random, the same images in every task; none means all."""
    regimes: tuple[RegimeName, ...] = ("stable", "plastic", "stable-dropout", "stable-decay", "stable-batch_size")
    """stable and plastic are defined by the options below; stable-X is stable with the X of plastic, plastic+X is
    plastic with the X of stable."""
    epochs: int = Field(default=5, ge=1)
    """Passes over the samples of each task."""
    momentum: float = Field(default=0.8, ge=0, lt=1)
    """Momentum of SGD, which is reset at each task."""
    stable_lr: float = Field(default=0.1, gt=0)
    """Learning rate, before the decay."""
    stable_decay: float = Field(default=0.4, gt=0, le=1)
    """The learning rate of task t = 1, 2, ... is lr * decay^t, at least 5e-5."""
    stable_batch_size: int = Field(default=16, ge=1)
    """Samples per training step."""
    stable_dropout: float = Field(default=0.25, ge=0, lt=1)
    """Dropout rate of the hidden units, for the mlp."""
    plastic_lr: float = Field(default=0.01, gt=0)
    """See stable_lr."""
    plastic_decay: float = Field(default=1.0, gt=0, le=1)
    """See stable_decay."""
    plastic_batch_size: int = Field(default=64, ge=1)
    """See stable_batch_size."""
    plastic_dropout: float = Field(default=0.0, ge=0, lt=1)
    """See stable_dropout."""
    solver: Literal["lanczos", "power_iteration"] = "lanczos"
    """Method for the largest eigenvalue; power_iteration is the published one: 18 products, largest in magnitude."""
    tol: float = Field(default=1e-3, gt=0, lt=1)
    """Relative tolerance of the largest eigenvalue, for lanczos."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Tasks are drawn and one network is trained per seed; the table has mean and standard deviation."""


C = TypeVar("C", bound=RegimesConfig)


def check(config: RegimesConfig, dataset: Dataset) -> None:
    """Check the configuration, the data and the weights.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_distinct(streams=config.streams, regimes=config.regimes)
    subject.check_subject(config, subject.take(dataset, config.task_samples))
    if config.model != "mlp" and any(Regime.of(config, regime).dropout for regime in config.regimes):
        raise CurvlabError(f"only the mlp has dropout: with {config.model} set stable_dropout and plastic_dropout to 0")
    for regime in config.regimes:
        model = make_network(config, dataset, Regime.of(config, regime))
    for stream in config.streams:
        first = make_tasks(config, dataset, stream)[0]
        problem = Problem(model, "cross_entropy", take_samples(config, first))
        estimate(problem, "hessian", "implicit")  # checks model and samples


def parts(config: C) -> list[C]:
    """Return the configuration of each run: one per stream, seed and regime."""
    return [
        config.model_copy(update={"streams": (stream,), "seeds": (seed,), "regimes": (regime,)})
        for stream in config.streams
        for seed in config.seeds
        for regime in config.regimes
    ]


def make_tasks(config: RegimesConfig, dataset: Dataset, stream: str) -> tuple[Task, ...]:
    """Return the tasks of a stream, for the first seed.

    Raises:
        CurvlabError: The data set cannot be split into these tasks.
    """
    data = subject.take(dataset, config.task_samples)
    if stream == "rotated":
        return rotated(data, tasks=config.tasks, seed=config.seeds[0], degrees=config.degrees)
    return permuted(data, tasks=config.tasks, seed=config.seeds[0])


def make_network(config: RegimesConfig, dataset: Dataset, regime: Regime) -> nn.Module:
    """Return the network with initial or loaded weights and the dropout of the regime, in eval mode."""
    return subject.network(config, dataset, config.seeds[0], dropout=regime.dropout)


def take_samples(config: RegimesConfig, task: Task) -> tuple[Tensor, Tensor]:
    """Return the training samples of a task for losses and curvature."""
    x, y = task.train
    return x[: config.samples], y[: config.samples]
