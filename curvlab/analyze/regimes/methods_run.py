"""One cell of the analysis of methods: a stream of tasks, learnt by a method with one candidate of its options."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvlab.analyze.command import RunOptions
from curvlab.analyze.frame import subject
from curvlab.analyze.regimes.methods_options import TUNED, Candidate, MethodsConfig
from curvlab.continual import Task, metrics, permuted, rotated, run, split_classes
from curvlab.continual.outputs import Head
from curvlab.continual.regimes import Regime
from curvlab.continual.strategies import AGEM, ER, EWC, Joint, Naive, Strategy
from curvlab.data import Dataset
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.models import build, freeze_batch_norm

Record = dict[str, Any]


def dataset_of(config: MethodsConfig, options: RunOptions | Place) -> Dataset:
    """Return the data set with its samples in a random order, always the same: files may have them class by class."""
    data = subject.load_dataset(config.model_copy(update={"validation": 0}), options)
    if config.normalize == "imagenet":
        data = subject.normalise(data)
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randperm(len(y), generator=generator) for y in (data.y_train, data.y_test))
    if config.test_samples is not None:
        if config.test_samples > len(test):
            raise CurvlabError(f"test_samples is {config.test_samples:,}, but there are {len(test):,} test samples")
        test = test[: config.test_samples]
    return replace(
        data,
        x_train=data.x_train[train],
        y_train=data.y_train[train],
        x_test=data.x_test[test],
        y_test=data.y_test[test],
    )


def tasks_of(config: MethodsConfig, dataset: Dataset, stream: str, seed: int) -> tuple[Task, ...]:
    """Return the tasks of a stream."""
    common: Any = {"tasks": config.tasks, "seed": seed, "validation": config.validation}
    common["samples"] = config.task_samples
    if stream == "rotated":
        return rotated(dataset, **common, degrees=config.degrees)
    return (permuted if stream == "permuted" else split_classes)(dataset, **common)


def head_of(stream: str) -> Head:
    """Return which outputs count in a stream."""
    return "masked" if stream == "split" else "single"


def network_of(config: MethodsConfig, dataset: Dataset, seed: int, dropout: float) -> nn.Module:
    """Return the network as it is initialised or loaded."""
    model = build(
        config.model,
        dataset.sample_shape,
        dataset.num_classes,
        hidden=config.hidden,
        dropout=dropout,
        seed=seed,
        weights=config.weights,
        new_head=config.fine_tune,
    )
    if config.fine_tune:
        freeze_batch_norm(model)
    return model.to(config.device, getattr(torch, config.dtype))


def strategy_of(config: MethodsConfig, method: str, candidate: Candidate, tasks: Sequence[Task]) -> Strategy:
    """Return a method with a candidate of its options."""
    if method == "ewc":
        return EWC(
            candidate["strength"],
            quantity=config.quantity,
            structure=config.structure,
            samples=config.samples,
            mode=config.ewc_mode,
        )
    if method == "agem":
        return AGEM(config.per_class, batch_size=config.replay_batch_size)
    if method == "er":
        classes = sum(task.dataset.num_classes if task.classes is None else len(task.classes) for task in tasks)
        return ER(config.per_class * classes, batch_size=config.replay_batch_size)
    return Joint() if method == "joint" else Naive()


def learnt(config: MethodsConfig, dataset: Dataset, candidate: Candidate, checkpoint: Path) -> list[Record]:
    """Learn a stream by a method, and return what came of it; of a candidate that diverges, that it did."""
    (stream,), (method,), (seed,) = config.streams, config.methods, config.seeds
    names: Record = {"stream": stream, "method": method, "seed": seed, "evaluation": config.evaluation}
    names |= {name: candidate.get(name) for name in TUNED}
    tasks = tasks_of(config, dataset, stream, seed)
    regime = Regime(
        candidate["lr"], candidate.get("decay", 1.0), int(candidate["batch_size"]), candidate.get("dropout", 0.0)
    )
    try:
        result = run(
            tasks,
            network_of(config, dataset, seed, regime.dropout),
            strategy_of(config, method, candidate, tasks),
            head=head_of(stream),
            **regime.options(),
            momentum=config.momentum,
            epochs=config.epochs,
            seed=seed,
            evaluation=config.evaluation,
            checkpoint=checkpoint,
            progress=False,
        )
    except CurvlabError as error:
        if config.evaluation == "test":
            raise
        # The options have been checked: what is left is a loss that is not finite.
        checkpoint.unlink(missing_ok=True)
        return [{**names, "acc": None, "forgetting": None, "note": str(error)}]
    checkpoint.unlink(missing_ok=True)  # all that is wanted of it is in the records
    summary = {
        **names,
        **metrics.summary(result.accuracy),
        "bytes": result.tasks[-1]["bytes"],
        "seconds": sum(task["seconds"] + task["strategy_seconds"] for task in result.tasks),
        "note": "",
    }
    records = [{key: None if value != value else value for key, value in summary.items()}]
    for after, row in enumerate(result.accuracy.tolist(), start=1):
        for task, accuracy in enumerate(row[:after], start=1):
            if not math.isnan(accuracy):
                records.append(
                    {"stream": stream, "method": method, "seed": seed}
                    | {"after": after, "task": task, "accuracy": accuracy}
                )
    return records
