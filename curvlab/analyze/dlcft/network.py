"""The pre-trained network of the analysis ``dlcft``, and the data of the pre-training and the streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from curvlab.analyze.dlcft.methods import find_last_linear
from curvlab.analyze.dlcft.options import DlcftConfig
from curvlab.analyze.frame import subject
from curvlab.commandline.options import RunOptions
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.models import freeze_batch_norm, merge_batch_norm
from curvlab.training import fit


@dataclass(frozen=True, eq=False)
class TransferData(Dataset):
    """The data of the streams, with labels from 0, and the data of the pre-training.

    Attributes:
        source: The data of the pre-training; None if the weights come from a file.
    """

    source: Dataset | None = field(default=None, repr=False)


def load_data(config: DlcftConfig, options: RunOptions | Place) -> TransferData:
    """Return the data of the streams and of the pre-training.

    Raises:
        CurvlabError: The data cannot be loaded, or lack the classes or samples.
    """
    whole = subject.load_whole(config.model_copy(update={"classes": "all"}), options)
    source = whole.select(config.source_classes) if config.source_classes else None
    target = whole if config.classes == "all" else _relabel(whole, config.classes)
    target = subject.take(target, config.stream_samples, config.test_samples)
    return TransferData(
        target.name, target.x_train, target.y_train, target.x_test, target.y_test, target.classes, source
    )


def check_source(config: DlcftConfig, dataset: TransferData) -> None:
    """Check that the network is pre-trained in one way, on classes that are not in the streams.

    Raises:
        CurvlabError: Neither weights nor source classes are given, or both, or a class is used twice.
    """
    if dataset.source is None and config.weights is None:
        raise CurvlabError("fine-tuning needs a pre-trained network: set weights, or source_classes for pre-training")
    if dataset.source is not None and config.weights is not None:
        raise CurvlabError("weights and source_classes exclude each other: with weights, leave source_classes empty")
    streamed = range(dataset.num_classes) if config.classes == "all" else config.classes
    if both := sorted({*config.source_classes} & {*streamed}):
        raise CurvlabError(
            f"class {both[0]} is both in source_classes, for pre-training, and in classes, for the streams: "
            "remove it from one of them"
        )


def _relabel(whole: Dataset, classes: Sequence[int]) -> Dataset:
    """Return the samples of some classes, with labels 0, 1, ... in the order of ``classes``."""
    chosen = whole.select(classes)
    number = torch.full((whole.num_classes,), -1)
    number[list(classes)] = torch.arange(len(classes))
    names = tuple(whole.classes[label] for label in classes)
    return replace(chosen, y_train=number[chosen.y_train], y_test=number[chosen.y_test], classes=names)


def pretrain(config: DlcftConfig, dataset: TransferData, seed: int, *, steps: int | None = None) -> nn.Module:
    """Return a pre-trained network with a new last layer; batch normalisation is merged or frozen.

    Args:
        config: The configuration.
        dataset: The data of the streams, and of the pre-training unless the weights come from a file.
        seed: Seed of the initialisation and of the pre-training.
        steps: Steps of the pre-training; None for those of the configuration, 0 to check that the network can be built.

    Raises:
        CurvlabError: The network is unknown, or it or its weights do not fit the data.
    """
    source, steps = dataset.source, config.source_steps if steps is None else steps
    model = _build(config, dataset, seed)
    if source is not None and steps:
        before = _build(config, source, seed)
        samples = source.x_train, source.y_train
        fit(before, samples, steps=steps, batch_size=config.batch_size, lr=1e-3, seed=seed, progress=False)
        head = f"{find_last_linear(model)}."
        own = model.state_dict()
        model.load_state_dict({key: own[key] if key.startswith(head) else t for key, t in before.state_dict().items()})
    if config.batch_norm == "merged":
        return merge_batch_norm(model.eval()).train()
    freeze_batch_norm(model)
    return model.train()


def _build(config: DlcftConfig, dataset: Dataset, seed: int) -> nn.Module:
    model = subject.network(config.model_copy(update={"fine_tune": config.weights is not None}), dataset, seed)
    for name, module in list(model.named_modules()) if config.slope else ():
        if type(module) is nn.ReLU:
            model.set_submodule(name, nn.LeakyReLU(config.slope))
    return model.train()
