"""The subject of an analysis: a network and the training samples of a data set, from options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from curvlab.analyze.frame.functions import SPLIT, OwnProblem, load_own, make_network
from curvlab.commandline.config import C, Config, Readers
from curvlab.commandline.options import NO_DATA, RunOptions
from curvlab.data import Dataset, data_root, load
from curvlab.errors import CurvlabError, type_and_line
from curvlab.grid import Place
from curvlab.grid.functions import find_place, names_function
from curvlab.models import build, freeze_batch_norm, load_weights
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.quantities import parse_quantity
from curvlab.randomness import preserve_random_state
from curvlab.text import write_count
from curvlab.training import Training, fit
from curvlab.training.options import FirstOrderName, ScheduleName

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation per channel


class SubjectConfig(Config):
    """A network, and the samples for its curvature."""

    titles: ClassVar[Mapping[str, str]] = {"data": "data", "model": "network"}
    only_for: ClassVar[Mapping[str, Readers]] = {"hidden": ("model", ("mlp",))}
    #: Other default values if ``model`` or ``data`` names a function: option -> name -> value.
    with_function: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    data: str = "digits"
    """digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, the path of an .npz file or image folder, or
    module:function, a function of your own that returns the data; none if that of model returns a Problem."""
    classes: tuple[int, ...] | Literal["all"] = "all"
    """Class indices to train on, or all. The network always has one output per class of the data set."""
    validation: int = Field(default=0, ge=0)
    """Number of training samples to hold out, drawn at random."""
    samples: int | None = Field(default=None, ge=1)
    """Number of training samples for the curvature, drawn at random; none means all."""
    normalize: Literal["none", "imagenet"] = "none"
    """imagenet: subtract the channel means of ImageNet and divide by the standard deviations, as pre-trained networks
    expect."""
    model: str = "mlp"
    """mlp, cnn, shallow_cnn, resnet20, torchvision:NAME, or module:function, a function of your own that returns a
    network or a Problem. The network is used in eval mode."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (30, 30)
    """Hidden sizes of the mlp; no value gives a linear model."""
    weights: Path | None = None
    """File of initial weights, searched in the current folder and in the data root."""
    fine_tune: bool = False
    """Weights of a network for other classes: replace the last layer, and freeze BatchNorm."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network and of its curvature."""


@dataclass(frozen=True)
class Subject:
    """Description of the data of a run, for its report.

    Attributes:
        data: Name of the data set.
        sample_shape: Shape of one input.
        num_classes: Number of network outputs.
        train: Number of training samples.
        test: Number of test samples.
    """

    data: str
    sample_shape: tuple[int, ...]
    num_classes: int
    train: int
    test: int

    @classmethod
    def of(cls, dataset: Dataset | OwnProblem | None) -> "Subject":
        """Return the description of a data set; an empty one for None."""
        if dataset is None:
            return cls("", (), 0, 0, 0)
        if isinstance(dataset, OwnProblem):
            count = dataset.template.num_samples
            return cls(dataset.name, dataset.sample_shape, dataset.num_outputs, count, 0)
        shape, outputs = dataset.sample_shape, dataset.num_classes
        return cls(Path(dataset.name).name, shape, outputs, len(dataset.y_train), len(dataset.y_test))


class TrainedSubjectConfig(SubjectConfig):
    """A subject with a network that is trained first."""

    titles: ClassVar[Mapping[str, str]] = {**SubjectConfig.titles, "optimizer": "training"}

    optimizer: FirstOrderName = "adam"
    """Optimizer of the training."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum, for sgd only."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, as defined by the optimizer in torch.optim."""
    schedule: ScheduleName = "constant"
    """Learning-rate schedule; linear and cosine end at 0, step at lr / 100, exponential at lr / 10."""
    steps: int = Field(default=500, ge=0)
    """Training steps (mini-batches); 0 analyses the network without training."""
    batch_size: int = Field(default=100, ge=1)
    """Samples per training step."""


#: ``with_function`` of an analysis that takes a network as it is: it is not trained, and all samples are used.
AS_IT_IS: Mapping[str, Mapping[str, Any]] = {
    "model": {"steps": 0, "seeds": (0,)},
    "data": {"classes": "all", "samples": None},
}


@dataclass(frozen=True, eq=False)
class SubjectData(Dataset):
    """A data set with held-out samples.

    Attributes:
        held_out: Inputs and labels of the held-out samples; None if there are none.
    """

    held_out: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


def no_data(config: Config, options: RunOptions | Place) -> None:
    """Return None: the analysis has no data set."""
    del config, options


def load_dataset(config: SubjectConfig, options: RunOptions | Place) -> SubjectData:
    """Return the data set of a configuration; all analyses choose their samples by this function.

    The samples are shuffled in a fixed random order, since files may store them class by class. The first
    ``validation`` training samples are then held out, and the classes are selected; ``samples`` takes the first of the
    remaining ones, so that a smaller subset is part of a larger one.

    Raises:
        CurvlabError: The data cannot be loaded.
    """
    return select_samples(config, read_dataset(config, options))


def load_subject(config: SubjectConfig, options: RunOptions | Place) -> SubjectData | OwnProblem:
    """Return the data of a configuration as ``load_dataset`` does, or data of a function without a split.

    For an analysis that can do without a training.

    Raises:
        CurvlabError: The data cannot be loaded.
    """
    found = _read(config, options)
    return found if isinstance(found, OwnProblem) else select_samples(config, found)


def read_dataset(config: SubjectConfig, options: RunOptions | Place) -> Dataset:
    """Return all samples of the data set of a configuration, shuffled and normalised.

    Raises:
        CurvlabError: The data cannot be loaded.
    """
    found = _read(config, options)
    if isinstance(found, OwnProblem):
        also = "the network from it, and " if config.data == NO_DATA else ""
        raise CurvlabError(
            f"this analysis trains and tests the network, and the data of {found.name} have no split into training and "
            f"test samples: return {also}{SPLIT} from the function of --data"
        )
    return found


def _read(config: SubjectConfig, options: RunOptions | Place) -> Dataset | OwnProblem:
    if config.data == NO_DATA or names_function(config.data):
        found = load_own(config.model, config.data, lambda model: _place(config, model))
        if isinstance(found, OwnProblem):
            return found
    else:
        found = load(config.data, root=options.data_root, offline=options.offline)
    shuffled = shuffle(found)
    return normalise(shuffled) if config.normalize == "imagenet" else shuffled


def select_samples(config: SubjectConfig, loaded: Dataset) -> SubjectData:
    """Return a data set of ``read_dataset`` with the held-out samples apart, and the classes of a configuration."""
    held_out = None
    if config.validation:
        loaded, held_out = loaded.hold_out(config.validation)
    if config.classes != "all":
        loaded = loaded.select(config.classes)
        if held_out is not None:
            chosen = torch.isin(held_out[1], torch.tensor(config.classes))
            held_out = (held_out[0][chosen], held_out[1][chosen])
    return SubjectData(**vars(loaded), held_out=held_out)


def load_whole(config: SubjectConfig, options: RunOptions | Place) -> SubjectData:
    """Return the data set of a configuration without held-out samples, for streams whose tasks hold out their own.

    Raises:
        CurvlabError: The data cannot be loaded.
    """
    return load_dataset(config.model_copy(update={"validation": 0}), options)


def shuffle(data: Dataset) -> Dataset:
    """Return a data set with its training and test samples in a fixed random order."""
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
    """Return the first training and test samples of a data set from ``load_dataset``, which is shuffled.

    Args:
        data: The data set.
        train: Number of training samples; None means all.
        test: Number of test samples; None means all.

    Raises:
        CurvlabError: The data set has fewer samples.
    """
    for name, count, available in (("training", train, len(data.x_train)), ("test", test, len(data.x_test))):
        if count is not None and count > available:
            raise CurvlabError(
                f"{write_count(count, f'{name} sample')} requested, but the data set has {available:,}; choose fewer"
            )
    return replace(
        data,
        x_train=data.x_train[:train],
        y_train=data.y_train[:train],
        x_test=data.x_test[:test],
        y_test=data.y_test[:test],
    )


def normalise(data: Dataset) -> Dataset:
    """Return images normalised with the channel means and standard deviations of ImageNet.

    Raises:
        CurvlabError: The samples are not images with three channels.
    """
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in _IMAGENET)
    if len(data.sample_shape) != 3 or data.sample_shape[0] != 3:
        raise CurvlabError(
            f"normalize=imagenet needs images with three channels, not samples of shape {data.sample_shape}"
        )
    return replace(data, x_train=(data.x_train - mean) / deviation, x_test=(data.x_test - mean) / deviation)


def locate_weights(config: C, options: RunOptions | Place) -> C:
    """Return the configuration with the path of the weights, searched as given and in the data root.

    Raises:
        CurvlabError: The file is in neither place.
    """
    weights = getattr(config, "weights", None)
    if weights is None or weights.expanduser().exists():
        return config
    root = data_root(options.data_root)
    if not (root / weights).is_file():
        raise CurvlabError(f"weights file {weights} not found, neither here nor in the data root {root}")
    return config.model_copy(update={"weights": root / weights})


def samples(config: SubjectConfig, data: Dataset) -> tuple[Tensor, Tensor]:
    """Return inputs and labels for the curvature."""
    return data.x_train[: config.samples], data.y_train[: config.samples]


def check_subject(config: SubjectConfig, data: Dataset | OwnProblem) -> None:
    """Check the number of samples, the device, and the training options.

    Raises:
        CurvlabError: There are fewer samples, the device is not available, the optimizer lacks an option, or an option
            cannot apply to data without a split.
    """
    if isinstance(data, OwnProblem):
        _check_own(config, data)
    elif config.samples is not None and config.samples > len(data.x_train):
        raise CurvlabError(f"samples is {config.samples:,}, but there are only {len(data.x_train):,} training samples")
    check_device(config)
    if config.fine_tune and config.weights is None:
        raise CurvlabError("fine_tune needs weights from a file: set weights")
    if isinstance(config, TrainedSubjectConfig) and config.steps:
        Training(**fit_options(config))


def _check_own(config: SubjectConfig, data: OwnProblem) -> None:
    if getattr(config, "steps", 0):
        raise CurvlabError(
            f"steps is {config.steps:,}, but the data of {data.name} have no split into training and test samples: "  # type: ignore[attr-defined]
            f"set steps to 0, or return {SPLIT}"
        )
    if config.data != NO_DATA:
        data.check_targets()
    for name, neutral in (("classes", "all"), ("validation", 0), ("normalize", "none")):
        if getattr(config, name) != neutral:
            raise CurvlabError(
                f"{name} is {getattr(config, name)}, but it applies to data with a split, and the data of {data.name} "
                f"have none: set it to {neutral}, or return {SPLIT}"
            )


def check_device(config: SubjectConfig) -> None:
    """Check that the device is available.

    Raises:
        CurvlabError: It is not.
    """
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise CurvlabError(f"device must be cpu, cuda or cuda:N, not {config.device!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CurvlabError(
            f"device {config.device!r} is not available (torch finds "
            f"{write_count(torch.cuda.device_count(), 'GPU')}); use cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise CurvlabError(f"device must be cpu, cuda or cuda:N, not {config.device!r}")


def check_network(config: SubjectConfig, data: Dataset) -> None:
    """Check what ``check_subject`` checks, and that the network and its weights fit the data.

    Raises:
        CurvlabError: One of them does not.
    """
    check_subject(config, data)
    network(config, data, 0)


def check_distinct(**values: Sequence[object]) -> None:
    """Check that each option has at least one value, and no value twice.

    Raises:
        CurvlabError: An option has no value, or has one twice.
    """
    for name, given in values.items():
        if not given or len(set(given)) < len(given):
            raise CurvlabError(f"{name} needs one or more different values, not {list(given)}")


def check_curvature(problem: Problem, quantities: Sequence[str], params: Sequence[str] | None) -> None:
    """Check the names of quantities and the patterns of parameters.

    Raises:
        CurvlabError: A quantity is unknown or given twice, or a pattern matches no parameter.
    """
    check_distinct(quantities=[str(parse_quantity(quantity)) for quantity in quantities])
    ParameterSpace.of(problem.model, params)


def network(config: SubjectConfig, data: Dataset | OwnProblem, seed: int, dropout: float = 0.0) -> nn.Module:
    """Return the network with initial or loaded weights, in eval mode.

    Raises:
        CurvlabError: The network is unknown, or it or its weights do not fit the data.
    """
    if isinstance(data, OwnProblem) or names_function(config.model):
        return _own_network(config, data, seed, dropout)
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
    return _place(config, model)


def _place(config: SubjectConfig, model: nn.Module) -> nn.Module:
    """Return a network on the device and in the dtype of a configuration, in eval mode."""
    check_device(config)
    return model.to(config.device, getattr(torch, config.dtype)).eval()


def _own_network(config: SubjectConfig, data: Dataset | OwnProblem, seed: int, dropout: float) -> nn.Module:
    if dropout:
        raise CurvlabError(f"dropout belongs to mlp, not to {config.model}; leave dropout at 0")
    model, own = make_network(config.model, seed)
    if own is not None and config.data != NO_DATA:
        raise CurvlabError(f"{config.model} returns a curvlab.Problem, which contains the data: leave out --data")
    if config.weights is not None:
        load_weights(model, config.weights, new_head=config.fine_tune)
    if config.fine_tune:
        freeze_batch_norm(model)
    model = _place(config, model)
    if isinstance(data, Dataset):
        _check_outputs(config, model, data)
    return model


def _check_outputs(config: SubjectConfig, model: nn.Module, data: Dataset) -> None:
    """Check that a network of the user takes the samples of a data set and has an output for each of its classes."""
    inputs = data.x_train[:2].to(config.device, getattr(torch, config.dtype))
    try:
        with torch.no_grad(), preserve_random_state():
            out = model(inputs)
    except Exception as error:  # it is the user's code, which may raise anything
        raise CurvlabError(
            f"{config.model} fails on samples of {data.name} of shape {data.sample_shape}: {type_and_line(error)}"
            f"{find_place(error)}"
        ) from error
    if not isinstance(out, Tensor) or out.shape != (len(inputs), data.num_classes):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise CurvlabError(
            f"{config.model} returns {got} for {write_count(len(inputs), 'sample')} of {data.name}, which has "
            f"{data.num_classes} classes: it must return a tensor of shape {(len(inputs), data.num_classes)}"
        )


def problem(config: SubjectConfig, data: Dataset | OwnProblem, model: nn.Module) -> Problem:
    """Return the problem: the network, cross-entropy, and the samples for the curvature.

    For data without a split, it is that of the user, and the samples are the first ones.
    """
    if isinstance(data, OwnProblem):
        return data.make_problem(model, config.samples)
    return Problem(model, "cross_entropy", samples(config, data))


def fit_options(config: TrainedSubjectConfig) -> dict[str, Any]:
    """Return the options of ``curvlab.training.Training`` from a config."""
    names = ("optimizer", "lr", "momentum", "weight_decay", "schedule", "steps", "batch_size")
    return {name: getattr(config, name) for name in names}


def train_network(
    config: TrainedSubjectConfig, data: Dataset | OwnProblem, seed: int, checkpoint: Path | None = None
) -> tuple[nn.Module, float | None]:
    """Return the trained network and its test accuracy, which is None without training.

    The training continues from the checkpoint if there is one.

    Raises:
        CurvlabError: The network cannot be built (see ``network``) or trained.
    """
    model = network(config, data, seed)
    if not config.steps:
        return model, None
    assert isinstance(data, Dataset)  # by check_subject
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
    """Return the name of the network for a title; for an mlp, its layer widths."""
    if config.model != "mlp":
        return config.model
    return "-".join(map(str, (prod(data.sample_shape), *config.hidden, data.num_classes))) + " network"


def describe(config: SubjectConfig, data: Dataset | Subject, quantity: str) -> str:
    """Return the text for a title: the quantity and the network."""
    name, _, given = str(parse_quantity(quantity)).partition(":")
    words = {"fisher": "Fisher", "empirical_fisher": "Empirical Fisher", "masq": "MaSQ", "ggn": "GGN"}
    which = f" ({given})" if given else ""
    network = config.model if names_function(config.model) else f"a {describe_network(config, data)}"
    return f"{words.get(name, name.capitalize())}{which} of {network}"
