"""Options, tasks and training shared by the analyses of two-task streams of Gepperth and Wiech (2019)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field
from torch import nn

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.subject import Subject, SubjectConfig
from curvlab.analyze.frame.values import split_config
from curvlab.commandline.options import RunOptions
from curvlab.continual import Task, disjoint, permuted
from curvlab.continual.task import Part
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.problem import Problem
from curvlab.training import Training, fit
from curvlab.training.samples import reference, take

Stream = Literal["D5-5", "D9-1", "DP10-10"]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

ALL: tuple[Stream, ...] = ("D5-5", "D9-1", "DP10-10")


class TwoTasksConfig(SubjectConfig):
    """Learn two tasks, D1 and D2, one after the other."""

    titles: ClassVar[Mapping[str, str]] = {**SubjectConfig.titles, "streams": "tasks", "lr": "training"}

    validation: int = Field(default=20, ge=1)
    """Number of training samples of each task held out to select hyper-parameters."""
    samples: int | None = Field(default=None, ge=1)
    """Number of random training samples of D1 used for the curvature; none means all."""
    streams: tuple[Stream, ...] = ALL
    """D5-5: the first half of the classes, then the others; D9-1: all but the last class, then the last; DP10-10: the
    data, then the data with permuted pixels."""
    train_samples: int | None = Field(default=None, ge=1)
    """Number of random training samples the tasks are made from; none means all."""
    test_samples: int | None = Field(default=None, ge=1)
    """Number of random test samples the tasks are made from; none means all."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of Adam for D1."""
    steps: int = Field(default=300, ge=1)
    """Training steps of each task."""
    batch_size: int = Field(default=100, ge=1)
    """Samples per training step."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """One network is trained per seed; tables show mean and standard deviation."""


C = TypeVar("C", bound=TwoTasksConfig)


def load_dataset(config: TwoTasksConfig, options: RunOptions | Place) -> Dataset:
    """Return the data set the tasks are made from; each task holds out its own validation samples."""
    return subject.take(subject.load_whole(config, options), config.train_samples, config.test_samples)


def check(config: TwoTasksConfig, dataset: Dataset) -> None:
    """Raise an error if the configuration cannot be run.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable.
    """
    subject.check_distinct(streams=config.streams)
    subject.check_network(config, dataset)
    for stream in config.streams:
        first = make_tasks(config, dataset, stream, config.seeds[0])[0]
        if config.samples is not None and config.samples > first.sizes["train"]:
            raise CurvlabError(
                f"samples is {config.samples:,}, but the first task of {stream} has {first.sizes['train']:,}"
            )


def parts(config: C) -> list[C]:
    """Return one configuration per run: a stream and a seed."""
    return split_config(config, "streams", "seeds")


def make_tasks(config: TwoTasksConfig, dataset: Dataset, stream: str, seed: int) -> tuple[Task, Task]:
    """Return the two tasks of a stream; the seed determines the permutation of the pixels.

    Raises:
        CurvlabError: The data set has no such tasks.
    """
    if stream == "DP10-10":
        first, second = permuted(dataset, tasks=2, seed=seed, validation=config.validation)
        return first, second
    classes = first_classes(stream, dataset.num_classes)
    others = range(len(classes), dataset.num_classes)
    first, second = disjoint(dataset, classes=[classes, others], validation=config.validation)
    return first, second


def first_classes(stream: str, count: int) -> range:
    """Return the classes of the first task of a stream over ``count`` classes.

    Examples:
        >>> first_classes("D9-1", 10)
        range(0, 9)
    """
    return range({"D5-5": count // 2, "D9-1": count - 1, "DP10-10": count}[stream])


def pool(tasks: Sequence[Task], accuracies: Sequence[Any]) -> Any:
    """Return the pooled accuracy: the mean of the accuracies on each task, weighted by numbers of test samples.

    Validation accuracies get the same weights, as each task has equally many validation samples.
    """
    sizes = [task.sizes["test"] for task in tasks]
    return sum(size * accuracy for size, accuracy in zip(sizes, accuracies, strict=True)) / sum(sizes)


def named_samples(tasks: Sequence[Task], parts: Sequence[Part]) -> dict[str, tuple[Any, Any]]:
    """Return samples by part and task: ``test1`` are the test samples of the first task."""
    return {f"{part}{i}": getattr(task, part) for part in parts for i, task in enumerate(tasks, start=1)}


def train_first(
    config: TwoTasksConfig, dataset: Dataset, task: Task, seed: int, checkpoint: Path | None = None
) -> nn.Module:
    """Return the network trained on the first task."""
    model = subject.network(config, dataset, seed)
    training = Training(optimizer="adam", lr=config.lr, steps=config.steps, batch_size=config.batch_size, seed=seed)
    fit(model, task.train, training=training, checkpoint=checkpoint, progress=False)
    return model


def take_problem(config: TwoTasksConfig, model: nn.Module, task: Task) -> Problem:
    """Return the problem on which curvatures are computed, with samples in the dtype and on the device of the model."""
    return Problem(model, "cross_entropy", take(task.train, slice(config.samples), reference(model)))


def conditions(config: TwoTasksConfig, data: Subject) -> dict[str, Any]:
    """Return the conditions of a run, with the names used in ``published.yaml``."""
    return {
        "data": data.data,
        "training samples": data.train,
        "test samples": data.test,
        "learning rate of the first task": config.lr,
        "steps per task": config.steps,
        "batch size": config.batch_size,
        "seeds": len(config.seeds),
    }
