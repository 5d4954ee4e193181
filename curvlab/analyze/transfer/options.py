"""The options of the analysis of schedules, its presets, and the data and network that it transfers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, get_args

import torch
from pydantic import Field
from torch import nn

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.subject import SubjectConfig, SubjectData
from curvlab.commandline.options import RunOptions
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.randomness import preserve_random_state
from curvlab.training import fit
from curvlab.training.options import ScheduleName

#: Schedules that have a decay factor.
DECAYING = ("step", "exponential")


class LrSchedulesConfig(SubjectConfig):
    """Fine-tune a pre-trained network with every schedule, initial rate and decay, and follow speed and curvature."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "source_classes": "pre-training",
        "schedules": "fine-tuning",
        "target": "measurement",
    }

    classes: tuple[int, ...] = (5, 6, 7, 8, 9)
    """Class indices that the network is fine-tuned on."""
    validation: int = Field(default=100, ge=1)
    """Number of training samples held out to choose rate and decay, drawn at random."""
    samples: int | None = Field(default=None, ge=1)
    """Number of training samples for the curvature, drawn at random; none means all."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (64, 64)
    """Hidden sizes of the mlp; no number for a linear model."""
    source_classes: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Class indices that the network is pre-trained on; none for a network with weights from a file."""
    source_steps: int = Field(default=300, ge=1)
    """Steps of the pre-training, with adam at 0.001."""
    train_samples: int | None = Field(default=None, ge=1)
    """Number of training samples for the fine-tuning, drawn at random; none means all."""
    test_samples: int | None = Field(default=None, ge=1)
    """Number of test samples, drawn at random; none means all."""
    schedules: tuple[ScheduleName, ...] = get_args(ScheduleName)
    """Schedules of the learning rate."""
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Initial learning rates; of one_cycle the largest one."""
    decays: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.3, 0.1)
    """Factors of step (at 0.5 and at 0.75 of the steps) and of exponential (over all steps)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of stochastic gradient descent."""
    steps: int = Field(default=200, ge=1)
    """Steps of the fine-tuning."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per training step."""
    every: int = Field(default=10, ge=1)
    """Steps between two tests."""
    target: float = Field(default=0.9, gt=0, le=1)
    """Test accuracy whose first step counts as the speed."""
    tol: float = Field(default=1e-2, gt=0, lt=1)
    """Relative error of the largest eigenvalue."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """A network is pre-trained and fine-tuned for each; the table has mean and standard deviation."""


PRESETS = {
    "default": Preset(LrSchedulesConfig(lrs=(0.003, 0.03, 0.3), decays=(0.1,), steps=150), minutes=1),
    "cpu": Preset(
        LrSchedulesConfig(
            data="mnist",
            hidden=(100, 100),
            source_steps=1000,
            validation=1000,
            train_samples=2000,
            samples=2000,
            steps=400,
            every=20,
            target=0.95,
        ),
        minutes=2,
        needs=("mnist",),
    ),
    "cpu-cifar100": Preset(
        LrSchedulesConfig(
            data="cifar100",
            classes=tuple(range(10)),
            model="resnet20",
            weights=Path("weights/resnet20_cifar10-12fca82f.th"),
            fine_tune=True,
            normalize="imagenet",
            source_classes=(),
            validation=500,
            train_samples=2000,
            test_samples=500,
            samples=200,
            lrs=(0.001, 0.01, 0.1),
            decays=(0.1,),
            steps=200,
            every=20,
            target=0.6,
        ),
        minutes=30,
        needs=("cifar100", "weights"),
    ),
    "paper": Preset(
        LrSchedulesConfig(
            data="cifar100",
            classes=tuple(range(100)),
            model="resnet20",
            weights=Path("weights/resnet20_cifar10-12fca82f.th"),
            fine_tune=True,
            normalize="imagenet",
            source_classes=(),
            validation=5000,
            samples=1000,
            lrs=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
            steps=8000,
            batch_size=64,
            every=400,
            target=0.5,
            seeds=(0, 1, 2, 3, 4),
        ),
        needs=("cifar100", "weights", "gpu"),
    ),
}


@dataclass(frozen=True, eq=False)
class FineTuningData(SubjectData):
    """The data set of the fine-tuning.

    Attributes:
        source: The data set of the pre-training; None for weights from a file.
    """

    source: Dataset | None = field(default=None, repr=False)


def load_data(config: LrSchedulesConfig, options: RunOptions | Place) -> FineTuningData:
    """Return the data sets of fine-tuning and pre-training.

    Raises:
        CurvlabError: There are no such data, classes or samples.
    """
    whole = subject.read_dataset(config, options)
    target = subject.select_samples(config, whole)
    source = whole.select(config.source_classes) if config.source_classes else None
    return FineTuningData(**vars(subject.take(target, config.train_samples, config.test_samples)), source=source)


def check(config: LrSchedulesConfig, dataset: Dataset) -> None:
    """Refuse an unusable configuration before anything is written.

    Raises:
        CurvlabError: The network is not pre-trained, or in two ways; classes are in both parts; values repeat.
    """
    assert isinstance(dataset, FineTuningData)
    subject.check_distinct(schedules=config.schedules, lrs=config.lrs, decays=config.decays)
    subject.check_subject(config, dataset)
    if (dataset.source is None) == (config.weights is None):
        raise CurvlabError("fine-tuning needs one pre-trained network: set either weights or source_classes")
    if both := sorted({*config.source_classes} & {*config.classes}):
        raise CurvlabError(f"class {both[0]} is both in source_classes and in classes: remove it from one of them")
    if dataset.held_out is None or not len(dataset.held_out[1]):
        raise CurvlabError("no held-out sample is of the chosen classes: raise validation")
    pretrain(config, dataset, config.seeds[0], steps=0)


def pretrain(config: LrSchedulesConfig, dataset: FineTuningData, seed: int, *, steps: int | None = None) -> nn.Module:
    """Return the pre-trained network with a new last layer, in eval mode.

    Args:
        config: The configuration.
        dataset: The data sets.
        seed: Random seed of the initialisation and of the pre-training.
        steps: Steps of the pre-training; None for those of the configuration.

    Raises:
        CurvlabError: The network or its weights do not fit.
    """
    model = subject.network(config, dataset, seed)
    steps = config.source_steps if steps is None else steps
    if dataset.source is None or not steps:
        return model  # fine_tune has given it a new last layer
    samples = dataset.source.x_train, dataset.source.y_train
    fit(model, samples, lr=1e-3, batch_size=config.batch_size, steps=steps, seed=seed, progress=False)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with preserve_random_state():
        torch.manual_seed(seed)
        head.reset_parameters()
    return model.eval()
