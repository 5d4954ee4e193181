"""Options, runs, tasks and networks of the analyses of training regimes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import Field
from torch import Tensor, nn

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.analyze.frame.values import split_config
from curvlab.commandline.config import Readers
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
    "stable+shrinking",
    "plastic+shrinking",
]


def _list_readers(kind: str, value: str) -> tuple[str, ...]:
    """Return the regimes that have a value, such as the dropout, of the stable or of the plastic regime."""
    changed = {"stable": f"stable-{value}", "plastic": f"plastic+{value}"}
    of_other = next(name for base, name in changed.items() if base != kind)
    own = [name for name in get_args(RegimeName) if name.startswith(kind) and name != changed[kind]]
    return (*own, of_other)


class StreamsConfig(SubjectConfig):
    """Train a network on streams of tasks, with the options of a stable and of a plastic regime."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "streams": "tasks",
        "epochs": "training",
        "seeds": "seeds",
    }
    only_for: ClassVar[Mapping[str, Readers]] = {
        **SubjectConfig.only_for,
        "degrees": ("streams", ("rotated",)),
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
    epochs: int = Field(default=5, ge=1)
    """Passes over the samples of each task."""
    momentum: float = Field(default=0.8, ge=0, lt=1)
    """Momentum of SGD, which is reset at each task."""
    stable_lr: float = Field(default=0.1, gt=0)
    """Learning rate of the stable regime, before the decay."""
    stable_decay: float = Field(default=0.4, gt=0, le=1)
    """Decay of the stable regime: the learning rate of task t = 1, 2, ... is lr * decay^t, at least 5e-5."""
    stable_batch_size: int = Field(default=16, ge=1)
    """Samples per training step of the stable regime."""
    stable_dropout: float = Field(default=0.25, ge=0, lt=1)
    """Dropout rate of the hidden units in the stable regime, for the mlp."""
    plastic_lr: float = Field(default=0.01, gt=0)
    """Learning rate of the plastic regime, before the decay."""
    plastic_decay: float = Field(default=1.0, gt=0, le=1)
    """Decay of the plastic regime: the learning rate of task t = 1, 2, ... is lr * decay^t, at least 5e-5."""
    plastic_batch_size: int = Field(default=64, ge=1)
    """Samples per training step of the plastic regime."""
    plastic_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate of the hidden units in the plastic regime, for the mlp."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Tasks are drawn and one network is trained per seed; the table has mean and standard deviation."""


class RegimesConfig(StreamsConfig):
    """Train a network on a sequence of tasks under several regimes."""

    titles: ClassVar[Mapping[str, str]] = {**StreamsConfig.titles, "regimes": "regimes", "solver": "curvature"}
    only_for: ClassVar[Mapping[str, Readers]] = {
        **StreamsConfig.only_for,
        "batch_decay": ("regimes", ("stable+shrinking", "plastic+shrinking")),
        **{
            f"{kind}_{value}": ("regimes", _list_readers(kind, value))
            for kind in ("stable", "plastic")
            for value in ("lr", "decay", "batch_size", "dropout")
        },
        "tol": ("solver", ("lanczos",)),
    }

    regimes: tuple[RegimeName, ...] = ("stable", "plastic", "stable-dropout", "stable-decay", "stable-batch_size")
    """stable and plastic are defined by the options above; stable-X is stable with the X of plastic, plastic+X is
    plastic with the X of stable; stable+shrinking and plastic+shrinking decrease the batch size from task to task."""
    batch_decay: float = Field(default=0.7, gt=0, le=1)
    """Factor on the batch size of a shrinking regime from one task to the next; a batch has at least one sample."""
    solver: Literal["lanczos", "power_iteration"] = "lanczos"
    """Method for the largest eigenvalue; power_iteration is the published one: 18 products, largest in magnitude."""
    tol: float = Field(default=1e-3, gt=0, lt=1)
    """Relative tolerance of the largest eigenvalue, for lanczos."""


class ObservedConfig(RegimesConfig):
    """Train a network under several regimes, and measure curvature and weight change from task to task."""

    regimes: tuple[RegimeName, ...] = (*RegimesConfig.model_fields["regimes"].default, "stable+shrinking")
    """stable and plastic are defined by the options above; stable-X is stable with the X of plastic, plastic+X is
    plastic with the X of stable; stable+shrinking and plastic+shrinking decrease the batch size from task to task."""
    top: int = Field(default=3, ge=1)
    """Number of the largest eigenvalues that are computed after each task."""
    fixed_step: float = Field(default=1.0, gt=0)
    """Distance from the solution of a task towards the next one at which the regimes' losses are compared."""


C = TypeVar("C", bound=RegimesConfig)


def check(config: RegimesConfig, dataset: Dataset) -> None:
    """Check the configuration, the data and the weights.

    Raises:
        CurvlabError: One of them is invalid.
    """
    subject.check_distinct(regimes=config.regimes)
    check_streams(config, dataset, config.regimes)


def check_streams(config: StreamsConfig, dataset: Dataset, names: Sequence[str]) -> None:
    """Check the data, the network and the streams.

    Args:
        config: The configuration.
        dataset: The data.
        names: Names of the regimes.

    Raises:
        CurvlabError: One of them is invalid, or a network without dropout has a regime with it.
    """
    subject.check_distinct(streams=config.streams)
    subject.check_subject(config, subject.take(dataset, config.task_samples))
    if config.model != "mlp" and any(Regime.of(config, name).dropout for name in names):
        raise CurvlabError(f"only the mlp has dropout: with {config.model} set stable_dropout and plastic_dropout to 0")
    for name in names:
        model = make_network(config, dataset, Regime.of(config, name))
    for stream in config.streams:
        first = make_tasks(config, dataset, stream)[0]
        problem = Problem(model, "cross_entropy", take_samples(config, first))
        estimate(problem, "hessian", "implicit")  # checks model and samples


def parts(config: C) -> list[C]:
    """Return the configuration of each run: one per stream, seed and regime."""
    return split_config(config, "streams", "seeds", "regimes")


def make_tasks(config: StreamsConfig, dataset: Dataset, stream: str) -> tuple[Task, ...]:
    """Return the tasks of a stream, for the first seed.

    Raises:
        CurvlabError: The data set cannot be split into these tasks.
    """
    data = subject.take(dataset, config.task_samples)
    if stream == "rotated":
        return rotated(data, tasks=config.tasks, seed=config.seeds[0], degrees=config.degrees)
    return permuted(data, tasks=config.tasks, seed=config.seeds[0])


def make_network(config: StreamsConfig, dataset: Dataset, regime: Regime) -> nn.Module:
    """Return the network with initial or loaded weights and the dropout of the regime, in eval mode."""
    return subject.network(config, dataset, config.seeds[0], dropout=regime.dropout)


def take_samples(config: StreamsConfig, task: Task) -> tuple[Tensor, Tensor]:
    """Return the training samples of a task for losses and curvature."""
    x, y = task.train
    return x[: config.samples], y[: config.samples]
