"""Options of the analysis ``softmax_hessian``, and its presets."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.subject import TrainedSubjectConfig


class SoftmaxHessianConfig(TrainedSubjectConfig):
    """Compute the Hessian of the softmax loss at random logits, and the curvature of a network during training."""

    titles: ClassVar[Mapping[str, str]] = {"categories": "random logits", **TrainedSubjectConfig.titles}

    steps: int = Field(default=3000, ge=1)
    """Training steps (mini-batches)."""
    points: int = Field(default=12, ge=1)
    """Number of steps at which the network is measured, from 1 to the last, evenly spaced in their logarithm; the start
    is measured too."""
    tol: float = Field(default=1e-3, gt=0, lt=1)
    """Relative tolerance of the eigenvalues."""
    categories: int = Field(default=10, ge=2)
    """Number of classes of the random logits."""
    draws: int = Field(default=100, ge=1)
    """Number of random logits per seed and probability."""
    decades: int = Field(default=16, ge=1, le=150)
    """The probability of the label goes from 1 - 0.5 to 1 - 0.5 * 10^-decades."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Logits are drawn and one network is trained per seed; the tables have mean and standard deviation."""


PRESETS = {
    "default": Preset(SoftmaxHessianConfig(), minutes=0.6),
    "cpu": Preset(
        SoftmaxHessianConfig(data="mnist", hidden=(100,), samples=5000, steps=5000, points=16),
        minutes=1,
        needs=("mnist",),
    ),
}
