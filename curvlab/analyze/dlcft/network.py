"""The pre-trained network that the analysis ``dlcft`` fine-tunes, and the data of pre-training and streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from curvlab.analyze.dlcft.methods import last_linear
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
    """The data of the streams, labels counted from 0, with those of the pre-training.

    Attributes:
        source: The data that the network is pre-trained on; None if its weights are from a file.
    """

    source: Dataset | None = field(default=None, repr=False)


def load_data(config: DlcftConfig, options: RunOptions | Place) -> TransferData:
    """Return the data of the streams and of the pre-training.

    Raises:
        CurvlabError: There are no such data, classes or samples.
    """
    whole = subject.load_dataset(config.model_copy(update={"validation": 0, "classes": "all"}), options)
    source = whole.select(config.source_classes) if config.source_classes else None
    target = whole if config.classes == "all" else _relabel(whole, config.classes)
    target = subject.take(target, config.stream_samples, config.test_samples)
    return TransferData(
        target.name, target.x_train, target.y_train, target.x_test, target.y_test, target.classes, source
    )


def check_source(config: DlcftConfig, dataset: TransferData) -> None:
    """Refuse a network that is not pre-trained or in two ways, and classes that are in pre-training and streams.

    Raises:
        CurvlabError: One of these.
    """
    if dataset.source is None and config.weights is None:
        raise CurvlabError("fine-tuning needs a pre-trained network: give weights, or source_classes to pre-train on")
    if dataset.source is not None and config.weights is not None:
        raise CurvlabError("the weights are those of a pre-trained network: leave source_classes empty")
    streamed = range(dataset.num_classes) if config.classes == "all" else config.classes
    if both := sorted({*config.source_classes} & {*streamed}):
        raise CurvlabError(
            f"class {both[0]} is both in source_classes, for pre-training, and in classes, for the streams: "
            "remove it from one of them"
        )


def _relabel(whole: Dataset, classes: Sequence[int]) -> Dataset:
    """Return the samples of some classes, whose labels are then their places among these."""
    chosen = whole.select(classes)
    number = torch.full((whole.num_classes,), -1)
    number[list(classes)] = torch.arange(len(classes))
    names = tuple(whole.classes[label] for label in classes)
    return replace(chosen, y_train=number[chosen.y_train], y_test=number[chosen.y_test], classes=names)


def pretrain(config: DlcftConfig, dataset: TransferData, seed: int, *, steps: int | None = None) -> nn.Module:
    """Return a network with a new last layer and the others pre-trained, without batch normalisation in training mode.

    Args:
        config: The configuration.
        dataset: What the outputs are for, and what the network is pre-trained on unless its weights are from a file.
        seed: Of the initialisation and of the pre-training.
        steps: Steps of the pre-training; None for those of the configuration, 0 to see whether the network fits.

    Raises:
        CurvlabError: There is no such network, or it or its weights do not fit.
    """
    source, steps = dataset.source, config.source_steps if steps is None else steps
    model = _build(config, dataset, seed)
    if source is not None and steps:
        before = _build(config, source, seed)
        samples = source.x_train, source.y_train
        fit(before, samples, steps=steps, batch_size=config.batch_size, lr=1e-3, seed=seed, progress=False)
        head = f"{last_linear(model)}."
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
