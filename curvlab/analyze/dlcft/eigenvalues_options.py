"""Options of the analysis ``eigenvalues``, and its presets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.subject import TrainedSubjectConfig
from curvlab.recorder import CurveLevel

LossChoice = Literal["cross_entropy", "squared_error"]
Rate = Annotated[float, Field(gt=0)]


class EigenvaluesConfig(TrainedSubjectConfig):
    """Train a network with each loss, and record the largest eigenvalue of its curvature."""

    titles: ClassVar[Mapping[str, str]] = {
        **TrainedSubjectConfig.titles,
        "losses": "losses",
        "quantities": "curvature",
    }

    with_function: ClassVar[Mapping[str, Mapping[str, Any]]] = {"data": {"samples": None}}

    validation: int = Field(default=200, ge=0)
    """Number of training samples to hold out, drawn at random, to choose the learning rate of squared_error."""
    samples: int | None = Field(default=1000, ge=1)
    """Number of training samples for the curvature, drawn at random; none means all."""
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    """Optimizer of the training."""
    lr: Rate = 0.1
    """Learning rate for cross_entropy."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum, for sgd only."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning-rate schedule; linear and cosine end at 0."""
    steps: int = Field(default=2000, ge=1)
    """Training steps (mini-batches)."""
    train_samples: int | None = Field(default=None, ge=1)
    """Number of training samples, drawn at random, the same for every seed; none means all that are not held out."""
    losses: tuple[LossChoice, ...] = ("cross_entropy", "squared_error")
    """cross_entropy (with softmax), squared_error (to scaled one-hot vectors), or both."""
    alpha: float = Field(default=15.0, gt=0)
    """Scale of the one-hot targets of squared_error."""
    lr_squared_error: tuple[Rate, ...] = (0.03, 0.01, 0.003, 0.001)
    """Learning rates for squared_error. Of several, the one with the lowest loss on the held-out samples after training
    with the first seed is chosen."""
    quantities: tuple[str, ...] = ("fisher", "hessian")
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B, ggn or hessian; one or several."""
    every: int = Field(default=100, ge=1)
    """Training steps between two points of a curve."""
    ekfac_every: int | None = Field(default=100, ge=1)
    """Training steps between two values of the largest EK-FAC eigenvalue, the published quantity; none omits it."""
    per: tuple[CurveLevel, ...] = ("network",)
    """network, layer (one block per layer), or both."""
    densities_at: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Training steps after which the spectral density is estimated."""
    tol: float = Field(default=1e-3, gt=0, lt=1)
    """Relative tolerance of the eigenvalues."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """One network is trained per seed; the curves have mean and range."""


_MNIST = EigenvaluesConfig(
    data="mnist",
    model="shallow_cnn",
    validation=5000,
    train_samples=5000,
    samples=500,
    batch_size=128,
    lr=1e-2,
    lr_squared_error=(3e-2, 1e-2, 3e-3, 1e-3),
    schedule="constant",  # fits these samples in a third of the published steps
    steps=3000,
    ekfac_every=None,  # one point takes over 30 s: a factor has 5,409 rows
)
_CIFAR = EigenvaluesConfig(
    data="cifar100",
    model="resnet20",
    weights=Path("weights/resnet20_cifar10-12fca82f.th"),
    fine_tune=True,
    normalize="imagenet",
    validation=500,
    train_samples=500,
    samples=250,
    batch_size=64,
    optimizer="adam",
    momentum=0.0,
    lr=1e-3,
    lr_squared_error=(1e-2, 3e-3, 1e-3),
    schedule="cosine",
    steps=300,
    every=75,
    ekfac_every=None,  # with a hundred classes it needs far more passes than the Lanczos products
)
PRESETS = {
    "default": Preset(EigenvaluesConfig(), minutes=2),
    "cpu": Preset(_MNIST, minutes=12, needs=("mnist",)),
    "cpu-resnet20": Preset(_CIFAR, needs=("cifar100", "weights")),
    "paper": Preset(
        _MNIST.model_copy(
            update={
                "train_samples": None,
                "samples": 5000,
                "schedule": "linear",
                "steps": 10000,
                "every": 200,
                "ekfac_every": 1000,
            }
        ),
        needs=("mnist",),
    ),
    "paper-cifar100": Preset(
        _CIFAR.model_copy(
            update={
                "train_samples": None,
                "samples": 5000,
                "batch_size": 128,
                "lr": 1e-4,
                "lr_squared_error": (1e-3, 1e-4),
                "steps": 16000,
                "every": 500,
            }
        ),
        needs=("cifar100", "weights", "gpu"),
    ),
}
