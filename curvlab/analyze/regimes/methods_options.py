"""Options of the analysis ``methods``, its presets, and the candidates of each method."""

from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.search import Candidate, Group
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.analyze.regimes.method_list import METHODS, OPTIONS, PAPER, list_methods
from curvlab.commandline.config import Readers

StreamName = Literal["permuted", "rotated", "split"]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class MethodsConfig(SubjectConfig):
    """Learn streams of tasks by several methods, each with hyper-parameters chosen on held-out samples."""

    titles: ClassVar[Mapping[str, str]] = {
        **SubjectConfig.titles,
        "streams": "tasks",
        "methods": "methods",
        "trials": "hyper-parameters",
        "evaluation": "evaluation",
    }
    only_for: ClassVar[Mapping[str, Readers]] = {
        **SubjectConfig.only_for,
        "degrees": ("streams", ("rotated",)),
        **{option: ("methods", partial(list_methods, option)) for option in OPTIONS},
    }

    validation: int = Field(default=200, ge=0)
    """Number of training samples per task to hold out, to choose hyper-parameters; no method trains on them."""
    samples: int | None = Field(default=None, ge=1)
    """EWC, MAS and IMM: number of training samples per task for the curvature, drawn at random; none means all."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (100, 100)
    """Hidden sizes of the mlp; no value gives a linear model."""
    streams: tuple[StreamName, ...] = ("permuted", "rotated")
    """Streams of tasks: permuted (a permutation of the pixels per task), rotated (an angle per task), split (some
    classes per task; only the outputs of the task's classes are used)."""
    tasks: int = Field(default=5, ge=2)
    """Number of tasks per stream."""
    degrees: float = 40.0
    """rotated: difference of the angles of consecutive tasks, in degrees."""
    task_samples: int | None = Field(default=None, ge=1)
    """Number of training samples per task, drawn at random, the same for all seeds; none means all."""
    test_samples: int | None = Field(default=None, ge=1)
    """Number of test samples of the data set, drawn at random, the same for all seeds; none means all."""
    methods: tuple[str, ...] = Field(
        default=PAPER,
        description=", ".join(
            f"{name} ({': '.join(filter(None, (method.label, method.help)))})" for name, method in METHODS.items()
        )
        + ".",
    )
    epochs: int = Field(default=3, ge=1)
    """Passes over the samples of each task."""
    momentum: float = Field(default=0.8, ge=0, lt=1)
    """Momentum of SGD, which is reset at each task."""
    quantity: str = "empirical_fisher"
    """EWC and IMM: fisher, fisher:samples=K, empirical_fisher, or masq:batch_size=B,norm=sumsq."""
    structure: str = "diag"
    """EWC and IMM: diag, kfac, tkfac or another structure."""
    ewc_mode: Literal["separate", "online"] = "separate"
    """EWC: separate (one penalty per task, around its solution) or online (one penalty around the last solution)."""
    per_class: int = Field(default=1, ge=1)
    """Samples that A-GEM keeps per class and task; ER keeps the same total number."""
    replay_batch_size: int = Field(default=64, ge=1)
    """Kept samples that A-GEM and ER draw per step."""
    trials: int = Field(default=6, ge=1)
    """Number of candidates per method, drawn at random from the combinations of its lists below (all if there are
    fewer)."""
    lrs: tuple[Positive, ...] = (0.1, 0.03, 0.01)
    """Learning rates of all methods except ewc, si, mas and stable."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (10, 64)
    """New samples per step, for every method."""
    ewc_strengths: tuple[Positive, ...] = (1.0, 10.0, 100.0)
    """Strengths of the EWC penalty."""
    ewc_lrs: tuple[Positive, ...] = (0.1,)
    """Learning rates of ewc, si and mas."""
    si_strengths: tuple[Positive, ...] = (0.1, 0.3, 1.0)
    """Strengths of the SI penalty."""
    mas_strengths: tuple[Positive, ...] = (0.01, 0.03, 0.1)
    """Strengths of the MAS penalty."""
    stable_lrs: tuple[Positive, ...] = (0.1,)
    """Learning rates of stable, before the decay."""
    decays: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.7, 0.5, 0.3)
    """stable: the learning rate of task t = 1, 2, ... is lr * decay^t, at least 5e-5."""
    dropouts: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.25,)
    """stable: dropout rates of the hidden units, for the mlp."""
    selection_seeds: tuple[Seed, ...] = (1000,)
    """Seeds of the search; candidates are compared by their mean accuracy on held-out samples after the last task."""
    evaluation: Literal["test", "validation"] = "test"
    """Samples for the accuracies of the table."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Tasks are drawn and one network is trained per seed; the table has mean and standard deviation."""


_MNIST = MethodsConfig(
    data="mnist",
    hidden=(256, 256),
    tasks=20,
    degrees=10.0,
    task_samples=10_000,
    validation=1000,
    test_samples=2000,
    samples=1000,
    epochs=1,
    trials=12,
    lrs=(0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
    batch_sizes=(32, 64),  # batches of 10 take most of the time
    ewc_strengths=(3.0, 30.0, 100.0),
    ewc_lrs=(0.03, 0.01),
    stable_lrs=(0.1, 0.05),
    decays=(0.9, 0.8, 0.65),
)
_CIFAR = MethodsConfig(
    data="cifar100",
    model="resnet20",
    weights=Path("weights/resnet20_cifar10-12fca82f.th"),
    fine_tune=True,
    normalize="imagenet",
    streams=("split",),
    tasks=20,
    task_samples=200,
    validation=50,
    test_samples=2000,
    samples=100,
    epochs=3,
    trials=6,
    lrs=(0.03, 0.01, 0.003),
    ewc_strengths=(1.0, 10.0, 100.0),
    ewc_lrs=(0.01,),
    stable_lrs=(0.01,),
    decays=(0.95, 0.9, 0.8),
    dropouts=(0.0,),  # the network has none
)
PRESETS = {
    # The best values of most methods are inside these lists, and no candidate diverges.
    "default": Preset(
        MethodsConfig(
            trials=6,
            lrs=(0.2, 0.1, 0.05, 0.02, 0.01, 0.005),
            batch_sizes=(16,),
            ewc_strengths=(3.0, 10.0, 30.0),
            ewc_lrs=(0.1, 0.05),
            stable_lrs=(0.4, 0.2, 0.1),
            decays=(0.5, 0.4),
        ),
        minutes=1.5,
    ),
    "cpu": Preset(_MNIST, minutes=45, needs=("mnist",)),
    "cpu-cifar100": Preset(_CIFAR, needs=("cifar100", "weights")),
    "paper": Preset(
        _MNIST.model_copy(
            update={
                "task_samples": None,
                "validation": 5000,
                "test_samples": None,
                "trials": 18,
                "seeds": (0, 1, 2, 3, 4),
                "batch_sizes": (10, 32, 64),
            }
        ),
        needs=("mnist", "gpu"),
    ),
    "paper-cifar100": Preset(
        _CIFAR.model_copy(
            update={
                "task_samples": None,
                "validation": 250,
                "test_samples": None,
                "samples": 1000,
                "epochs": 1,
                "trials": 8,
                "lrs": (0.1, 0.03, 0.01, 0.003),
                "ewc_strengths": (10.0, 100.0),
                "si_strengths": (0.1, 1.0),
                "mas_strengths": (0.01, 0.1),
                "ewc_lrs": (0.03, 0.01),
                "stable_lrs": (0.03, 0.01),
                "decays": (0.95, 0.85),
                "seeds": (0, 1, 2, 3, 4),
            }
        ),
        needs=("cifar100", "weights", "gpu"),
    ),
}


def candidates(config: MethodsConfig, method: str) -> list[Candidate]:
    """Return the candidates of a method: all combinations of its lists, or ``trials`` of them, drawn at random.

    A larger number of trials includes the candidates of a smaller one.
    """
    lists = METHODS[method].hyper_parameters
    combinations = list(product(*(getattr(config, option) for option in lists.values())))
    order = np.arange(len(combinations))
    if len(combinations) > config.trials:
        order = np.sort(np.random.default_rng(0).permutation(order)[: config.trials])
    return [dict(zip(lists, combinations[i], strict=True)) for i in order]


def single_run(config: MethodsConfig, group: Group, candidate: Candidate) -> MethodsConfig:
    """Return the configuration of one stream, method and candidate, with unused options reset to their defaults."""
    stream, method = group["stream"], group["method"]
    lists: dict[str, tuple[float, ...]] = {
        option: () for other in METHODS.values() for option in other.hyper_parameters.values()
    }
    lists |= {option: (candidate[name],) for name, option in METHODS[method].hyper_parameters.items()}
    unused = {option for other in METHODS.values() for option in other.options} - {*METHODS[method].options}
    unused |= {"trials", "selection_seeds"} | (set() if stream == "rotated" else {"degrees"})
    return config.model_copy(
        update={name: MethodsConfig.model_fields[name].default for name in unused}
        | lists
        | {"streams": (stream,), "methods": (method,)}
    )
