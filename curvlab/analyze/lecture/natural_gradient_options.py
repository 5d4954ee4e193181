"""Options, presets and hyper-parameter search of the analysis ``natural_gradient``."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from curvlab.analyze.frame import subject
from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.search import Candidate, Choice, Group, Search
from curvlab.commandline.config import Readers
from curvlab.errors import CurvlabError

Problem = Literal["regression", "network"]
Method = Literal["sgd", "adam", "exact", "kfac", "diag"]

#: Structures of the Fisher, by method that uses natural gradients.
STRUCTURES = {"exact": "implicit", "kfac": "kfac", "diag": "diag"}
LABELS = {
    "gd": "gradient descent",
    "ngd": "natural gradient",
    "sgd": "SGD",
    "adam": "Adam",
    "exact": "natural gradient, exact Fisher",
    "kfac": "natural gradient, K-FAC",
    "diag": "natural gradient, diagonal",
}
_OF_NETWORK = (
    *("data", "classes", "validation", "samples", "normalize", "model", "weights", "fine_tune"),
    *("methods", "steps", "every", "batch_size"),
)


class NaturalGradientConfig(subject.SubjectConfig):
    """Compare natural gradients with gradient descent on a linear regression, and with SGD and Adam on a network."""

    titles: ClassVar[Mapping[str, str]] = {
        **subject.SubjectConfig.titles,
        "problems": "linear regression",
        "methods": "training",
    }
    only_for: ClassVar[Mapping[str, Readers]] = {
        **subject.SubjectConfig.only_for,
        **dict.fromkeys(_OF_NETWORK, ("problems", ("network",))),
        "sgd_lrs": ("methods", ("sgd",)),
        "adam_lrs": ("methods", ("adam",)),
        "natural_lrs": ("methods", tuple(STRUCTURES)),
        "dampings": ("methods", tuple(STRUCTURES)),
        **dict.fromkeys(("regression_samples", "regression_steps", "rates"), ("problems", ("regression",))),
    }

    validation: int = Field(default=300, ge=0)
    """Number of random training samples to hold out; the hyper-parameters are chosen on them."""
    samples: int | None = Field(default=None, ge=1)
    """Number of random training samples to train on; none means all."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (30,)
    """Hidden sizes of the mlp; no value gives a linear model."""
    problems: tuple[Problem, ...] = ("regression", "network")
    """Problems to run."""
    regression_samples: int = Field(default=1000, ge=3)
    """Number of samples of the linear regression."""
    regression_steps: int = Field(default=20, ge=1)
    """Number of steps on the linear regression."""
    rates: tuple[Annotated[float, Field(gt=0)], ...] = (0.15, 0.5)
    """Learning rates on the linear regression."""
    methods: tuple[Method, ...] = ("sgd", "adam", "exact", "kfac", "diag")
    """Optimizers of the network; exact, kfac and diag are natural gradients with this Fisher."""
    steps: int = Field(default=100, ge=1)
    """Training steps of the network (mini-batches)."""
    every: int = Field(default=5, ge=1)
    """Steps between two evaluations of the training loss."""
    batch_size: int = Field(default=200, ge=1)
    """Samples per training step; the Fisher is that of these samples."""
    sgd_lrs: tuple[Annotated[float, Field(gt=0)], ...] = (0.1, 0.3, 1.0, 3.0)
    """Learning rates to try for sgd."""
    adam_lrs: tuple[Annotated[float, Field(gt=0)], ...] = (0.003, 0.01, 0.03, 0.1)
    """Learning rates to try for adam."""
    natural_lrs: tuple[Annotated[float, Field(gt=0)], ...] = (0.03, 0.1, 0.3)
    """Learning rates to try for natural gradients."""
    dampings: tuple[Annotated[float, Field(gt=0)], ...] = (0.001, 0.01, 0.1)
    """Dampings of the Fisher to try for natural gradients."""
    selection_seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (100,)
    """Seeds of the trials of the hyper-parameter search."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Seeds of the samples of the regression, and of the network; the table has mean and standard deviation."""


_MNIST = NaturalGradientConfig(data="mnist", validation=5000, samples=10_000, steps=200, every=10, batch_size=500)
PRESETS = {
    "default": Preset(
        NaturalGradientConfig(
            sgd_lrs=(0.3, 1.0, 3.0), adam_lrs=(0.01, 0.03, 0.1), natural_lrs=(0.1, 0.3), dampings=(0.01, 0.1)
        ),
        minutes=1.5,
    ),
    "cpu": Preset(_MNIST, minutes=15, needs=("mnist",)),
}


def candidates(config: NaturalGradientConfig, method: str) -> list[Candidate]:
    """Return the learning rates of a method, combined with the dampings for natural gradients."""
    if method in STRUCTURES:
        return [{"lr": lr, "damping": damping} for lr in config.natural_lrs for damping in config.dampings]
    return [{"lr": lr} for lr in (config.sgd_lrs if method == "sgd" else config.adam_lrs)]


def _single_run(
    config: NaturalGradientConfig, method: str, candidate: Candidate, seeds: Sequence[int]
) -> NaturalGradientConfig:
    lrs = {"sgd": "sgd_lrs", "adam": "adam_lrs"}.get(method, "natural_lrs")
    values: dict[str, object] = {"problems": ("network",), "methods": (method,), "seeds": tuple(seeds)}
    values[lrs] = (candidate["lr"],)
    if "damping" in candidate:
        values["dampings"] = (candidate["damping"],)
    return config.model_copy(update=values)


def _runs(config: NaturalGradientConfig, chosen: Sequence[Choice]) -> list[NaturalGradientConfig]:
    trained = [_single_run(config, one.group["method"], one.candidate, config.seeds) for one in chosen]
    regression = [config.model_copy(update={"problems": ("regression",)})] if "regression" in config.problems else []
    return [*regression, *trained]


def _groups(config: NaturalGradientConfig) -> list[tuple[Group, list[Candidate]]]:
    methods = config.methods if "network" in config.problems else ()
    return [({"method": method}, candidates(config, method)) for method in methods]


def _trial(config: NaturalGradientConfig, group: Group, candidate: Candidate, seed: int) -> NaturalGradientConfig:
    return _single_run(config, group["method"], candidate, (seed,))


SEARCH = Search(
    candidates=_groups,
    config=_trial,
    runs=_runs,
    seeds=lambda config: config.selection_seeds,
    value="validation_loss",
    largest=False,
    advice="give lower learning rates or higher dampings",
    label=lambda name: LABELS.get(name, name),
)


def check(config: NaturalGradientConfig, data: subject.SubjectData) -> None:
    """Check the configuration before anything is written.

    Raises:
        CurvlabError: The configuration, the data or the weights are invalid.
    """
    subject.check_network(config, data)
    subject.check_distinct(
        problems=config.problems,
        rates=config.rates,
        methods=config.methods,
        sgd_lrs=config.sgd_lrs,
        adam_lrs=config.adam_lrs,
        natural_lrs=config.natural_lrs,
        dampings=config.dampings,
        selection_seeds=config.selection_seeds,
    )
    if data.held_out is None and any(len(candidates) > 1 for _, candidates in _groups(config)):
        raise CurvlabError(
            "hyper-parameters are chosen on held-out samples: set validation, or give a single value for each learning "
            "rate and damping"
        )
