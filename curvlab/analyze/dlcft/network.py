"""What the analysis ``dlcft`` fine-tunes, and on what: a network that is pre-trained on other classes or data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from curvlab.analyze.command import RunOptions
from curvlab.analyze.dlcft.methods import last_linear
from curvlab.analyze.frame import subject
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.models import build, freeze_batch_norm, merge_batch_norm
from curvlab.training import fit

if TYPE_CHECKING:
    from curvlab.analyze.dlcft.options import DlcftConfig


def data(config: "DlcftConfig", options: RunOptions | Place) -> tuple[Dataset | None, Dataset]:
    """Return what the network is pre-trained on, and what the streams are made of, its labels counted from 0.

    Raises:
        CurvlabError: There are no such data, or nothing to pre-train on.
    """
    whole = subject.load_dataset(config.model_copy(update={"validation": 0, "classes": "all"}), options)
    if config.normalize == "imagenet":
        whole = subject.normalise(whole)
    source = whole.select(config.source_classes) if config.source_classes else None
    if source is None and config.weights is None:
        raise CurvlabError("fine-tuning needs a pre-trained network: give weights, or source_classes to pre-train on")
    if source is not None and config.weights is not None:
        raise CurvlabError("the weights are those of a pre-trained network: leave source_classes empty")
    streamed = range(whole.num_classes) if config.classes == "all" else config.classes
    if both := sorted({*config.source_classes} & {*streamed}):
        raise CurvlabError(
            f"the network would be pre-trained on class {both[0]}, which is then to be learnt as new: give "
            "source_classes and classes no value in common"
        )
    target = whole if config.classes == "all" else _relabelled(whole, config.classes)
    generator = torch.Generator().manual_seed(0)  # files may have samples class by class
    train = _some(target.y_train, config.stream_samples, "stream_samples", generator)
    test = _some(target.y_test, config.test_samples, "test_samples", generator)
    return source, replace(
        target,
        x_train=target.x_train[train],
        y_train=target.y_train[train],
        x_test=target.x_test[test],
        y_test=target.y_test[test],
    )


def _relabelled(whole: Dataset, classes: Sequence[int]) -> Dataset:
    chosen = whole.select(classes)
    number = torch.full((whole.num_classes,), -1)
    number[list(classes)] = torch.arange(len(classes))
    names = tuple(whole.classes[label] for label in classes)
    return replace(chosen, y_train=number[chosen.y_train], y_test=number[chosen.y_test], classes=names)


def _some(y: Tensor, count: int | None, name: str, generator: torch.Generator) -> Tensor:
    if count is not None and count > len(y):
        raise CurvlabError(f"{name} is {count:,}, but there are {len(y):,} samples")
    return torch.randperm(len(y), generator=generator)[:count]


def pretrained(
    config: "DlcftConfig", source: Dataset | None, target: Dataset, seed: int, *, trained: bool = True
) -> nn.Module:
    """Return a network with a new last layer, the others pre-trained, and batch normalisation out of the way.

    Args:
        config: Which network.
        source: What it is pre-trained on; None where its weights are from a file.
        target: What its outputs are for.
        seed: Of its initialisation and of the pre-training.
        trained: False leaves the pre-training out, such as to see whether the network fits.

    Raises:
        CurvlabError: There is no such network, or it or its weights do not fit.
    """

    def built(outputs: int, weights: Path | None) -> nn.Module:
        model = build(
            config.model,
            target.sample_shape,
            outputs,
            hidden=config.hidden,
            seed=seed,
            weights=weights,
            new_head=weights is not None,
        )
        for name, module in list(model.named_modules()) if config.slope else ():
            if type(module) is nn.ReLU:
                model.set_submodule(name, nn.LeakyReLU(config.slope))
        return model.to(config.device, getattr(torch, config.dtype))

    model = built(target.num_classes, config.weights)
    if source is not None and trained:
        before = built(source.num_classes, None)
        samples = source.x_train, source.y_train
        fit(
            before, samples, steps=config.source_steps, batch_size=config.batch_size, lr=1e-3, seed=seed, progress=False
        )
        head = last_linear(model) + "."
        own = model.state_dict()
        model.load_state_dict({key: own[key] if key.startswith(head) else t for key, t in before.state_dict().items()})
    if config.batch_norm == "merged":
        return merge_batch_norm(model.eval()).train()
    freeze_batch_norm(model)
    return model
