"""What the analyses are about: a network on the training samples of a data set, as the command line gives them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from curvlab.commandline.config import C, Config
from curvlab.commandline.options import RunOptions
from curvlab.data import Dataset, data_root, load
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.models import build, freeze_batch_norm
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import parse_quantity
from curvlab.training import Training, fit
from curvlab.training.options import OptimizerName, ScheduleName

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of the channels


class SubjectConfig(Config):
    """A network and the samples that its curvature is taken on."""

    titles: ClassVar[Mapping[str, str]] = {"data": "data", "model": "network"}

    data: str = "digits"
    """digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, or the path of your own .npz file or image folder."""
    classes: tuple[int, ...] | Literal["all"] = "all"
    """Class indices to train on, or all. The network keeps one output for every class of the data set."""
    validation: int = Field(default=0, ge=0)
    """Hold out so many training samples, random ones."""
    samples: int | None = Field(default=None, ge=1)
    """Take the curvature on so many training samples, random ones; none means all."""
    normalize: Literal["none", "imagenet"] = "none"
    """imagenet: subtract its channels' means and divide by their deviations, as pre-trained networks expect."""
    model: str = "mlp"
    """mlp, cnn, shallow_cnn, resnet20, or torchvision:NAME."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (30, 30)
    """Hidden sizes of the mlp; no number for a linear model."""
    weights: Path | None = None
    """Start from the weights in this file, looked for here and in the data root."""
    fine_tune: bool = False
    """The weights are of a network for other classes: the last layer is a new one, and BatchNorm is frozen."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network and of what is computed of it."""


@dataclass(frozen=True)
class Subject:
    """What a report says of the data that a run was on.

    Attributes:
        data: Name of the data set.
        sample_shape: Shape of an input.
        num_classes: Number of outputs of the network.
        train: Number of training samples.
        test: Number of test samples.
    """

    data: str
    sample_shape: tuple[int, ...]
    num_classes: int
    train: int
    test: int

    @classmethod
    def of(cls, dataset: Dataset) -> "Subject":
        """Return what there is to say of a data set."""
        shape, outputs = dataset.sample_shape, dataset.num_classes
        return cls(Path(dataset.name).name, shape, outputs, len(dataset.y_train), len(dataset.y_test))


class TrainedSubjectConfig(SubjectConfig):
    """A subject whose network is trained first."""

    titles: ClassVar[Mapping[str, str]] = {**SubjectConfig.titles, "optimizer": "training"}

    optimizer: OptimizerName = "adam"
    """How the network is trained."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum, for sgd only."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, as the optimizer of torch.optim understands it."""
    schedule: ScheduleName = "constant"
    """Learning-rate schedule; linear and cosine end at 0, step at a hundredth of lr, exponential at a tenth."""
    steps: int = Field(default=500, ge=0)
    """Training steps (mini-batches); 0 analyses the network as it is initialised or loaded."""
    batch_size: int = Field(default=100, ge=1)
    """Samples a training step."""


@dataclass(frozen=True, eq=False)
class SubjectData(Dataset):
    """A data set as the analyses have it.

    Attributes:
        held_out: Inputs and labels of the samples that are held out, if there are any.
    """

    held_out: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


def load_dataset(config: SubjectConfig, options: RunOptions | Place) -> SubjectData:
    """Return the data set of a configuration: the one rule of all analyses for which samples are taken.

    The samples are put in a random order that is always the same: files may have them class by class. The first
    ``validation`` training samples are then held out, and the classes chosen; ``samples`` takes the first of what is
    left. So a smaller subset is a part of a larger one.

    Raises:
        CurvlabError: There are no such data.
    """
    loaded, held_out = shuffle(load(config.data, root=options.data_root, offline=options.offline)), None
    if config.normalize == "imagenet":
        loaded = normalise(loaded)
    if config.validation:
        loaded, held_out = loaded.hold_out(config.validation)
    if config.classes != "all":
        loaded = loaded.select(config.classes)
        if held_out is not None:
            chosen = torch.isin(held_out[1], torch.tensor(config.classes))
            held_out = (held_out[0][chosen], held_out[1][chosen])
    return SubjectData(**vars(loaded), held_out=held_out)


def shuffle(data: Dataset) -> Dataset:
    """Return a data set with its training and its test samples in a random order, always the same."""
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randperm(len(y), generator=generator) for y in (data.y_train, data.y_test))
    return replace(
        data,
        x_train=data.x_train[train],
        y_train=data.y_train[train],
        x_test=data.x_test[test],
        y_test=data.y_test[test],
    )


def take(data: Dataset, train: int | None = None, test: int | None = None) -> Dataset:
    """Return so many training and test samples of a data set of ``load_dataset``, random ones; None means all.

    Raises:
        CurvlabError: There are fewer.
    """
    for name, count, there in (("training", train, len(data.x_train)), ("test", test, len(data.x_test))):
        if count is not None and count > there:
            raise CurvlabError(f"{count:,} {name} samples were asked for, but there are {there:,}")
    return replace(
        data,
        x_train=data.x_train[:train],
        y_train=data.y_train[:train],
        x_test=data.x_test[:test],
        y_test=data.y_test[:test],
    )


def normalise(data: Dataset) -> Dataset:
    """Return images less the means of ImageNet's channels and over their deviations, as pre-trained networks expect.

    Raises:
        CurvlabError: They are no images with three channels.
    """
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in _IMAGENET)
    if len(data.sample_shape) != 3 or data.sample_shape[0] != 3:
        raise CurvlabError(
            f"normalize=imagenet is for images with three channels, not for samples of shape {data.sample_shape}"
        )
    return replace(data, x_train=(data.x_train - mean) / deviation, x_test=(data.x_test - mean) / deviation)


def locate_weights(config: C, options: RunOptions | Place) -> C:
    """Return the configuration with the file of the weights where it is: as it was given, or in the data root.

    Raises:
        CurvlabError: It is in neither place.
    """
    weights = getattr(config, "weights", None)
    if weights is None or weights.expanduser().exists():
        return config
    root = data_root(options.data_root)
    if not (root / weights).is_file():
        raise CurvlabError(f"{weights}: there is no such file of weights, here or in the data root {root}")
    return config.model_copy(update={"weights": root / weights})


def samples(config: SubjectConfig, data: Dataset) -> tuple[Tensor, Tensor]:
    """Return the samples that the curvature is taken on."""
    return data.x_train[: config.samples], data.y_train[: config.samples]


def check_subject(config: SubjectConfig, data: Dataset) -> None:
    """Refuse more samples than there are, an unavailable device, and an optimizer with options that it does not have.

    Raises:
        CurvlabError: One of these.
    """
    if config.samples is not None and config.samples > len(data.x_train):
        raise CurvlabError(f"samples is {config.samples:,}, but there are {len(data.x_train):,} training samples")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise CurvlabError(f"device is cpu, cuda or cuda:N, not {config.device!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CurvlabError(f"there is no GPU {config.device!r} here (torch sees {torch.cuda.device_count()}); use cpu")
    if device.type not in ("cpu", "cuda"):
        raise CurvlabError(f"device is cpu, cuda or cuda:N, not {config.device!r}")
    if config.fine_tune and config.weights is None:
        raise CurvlabError("fine_tune is for weights from a file: set weights")
    if isinstance(config, TrainedSubjectConfig) and config.steps:
        Training(**fit_options(config))


def check_distinct(**values: Sequence[object]) -> None:
    """Refuse an option without a value, or with one twice.

    Raises:
        CurvlabError: One of these.
    """
    for name, given in values.items():
        if not given or len(set(given)) < len(given):
            raise CurvlabError(f"{name} needs one value or several different ones, not {list(given)}")


def check_curvature(problem: Problem, quantities: Sequence[str], params: Sequence[str] | None) -> None:
    """Refuse quantities that there are not, or one twice, and patterns that match no parameter.

    Raises:
        CurvlabError: One of these.
    """
    check_distinct(quantities=[str(parse_quantity(quantity)) for quantity in quantities])
    ParameterSpace.of(problem.model, params)


def network(config: SubjectConfig, data: Dataset, seed: int, dropout: float = 0.0) -> nn.Module:
    """Return the network as it is initialised or loaded, in eval mode.

    Raises:
        CurvlabError: There is no such network, or it or its weights do not fit.
    """
    model = build(
        config.model,
        data.sample_shape,
        data.num_classes,
        hidden=config.hidden,
        dropout=dropout,
        seed=seed,
        weights=config.weights,
        new_head=config.fine_tune,
    )
    if config.fine_tune:
        freeze_batch_norm(model)
    return model.to(config.device, getattr(torch, config.dtype)).eval()


def problem(config: SubjectConfig, data: Dataset, model: nn.Module) -> Problem:
    """Return the network on the samples."""
    return Problem(model, "cross_entropy", samples(config, data))


def fit_options(config: TrainedSubjectConfig) -> dict[str, Any]:
    """Return the options of a ``curvlab.training.Training`` that a config has."""
    names = ("optimizer", "lr", "momentum", "weight_decay", "schedule", "steps", "batch_size")
    return {name: getattr(config, name) for name in names}


def train_network(
    config: TrainedSubjectConfig, data: Dataset, seed: int, checkpoint: Path | None = None
) -> tuple[nn.Module, float | None]:
    """Return the network and its test accuracy, None without training; from its checkpoint if there is one.

    Raises:
        CurvlabError: It cannot be made (see ``network``) or trained.
    """
    model = network(config, data, seed)
    if not config.steps:
        return model, None
    result = fit(
        model,
        (data.x_train, data.y_train),
        training=Training(**fit_options(config), seed=seed),
        evaluation=(data.x_test, data.y_test),
        evaluate_every=config.steps,
        checkpoint=checkpoint,
    )
    assert result.evaluation is not None
    return model, result.evaluation.accuracy


def describe_network(config: SubjectConfig, data: Dataset | Subject) -> str:
    """Return what a title calls the network, the widths of an mlp."""
    if config.model != "mlp":
        return config.model
    return "-".join(map(str, (prod(data.sample_shape), *config.hidden, data.num_classes))) + " network"


def describe(config: SubjectConfig, data: Dataset | Subject, quantity: str) -> str:
    """Return what a title says: the quantity of a network."""
    name, _, given = str(parse_quantity(quantity)).partition(":")
    words = {"fisher": "Fisher", "empirical_fisher": "Empirical Fisher", "masq": "MaSQ", "ggn": "GGN"}
    which = f" ({given})" if given else ""
    return f"{words.get(name, name.capitalize())}{which} of a {describe_network(config, data)}"
