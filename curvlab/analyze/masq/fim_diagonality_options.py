"""Options of the analysis ``fim_diagonality``, and its presets."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.frame.subject import AS_IT_IS, TrainedSubjectConfig
from curvlab.analyze.masq.streams import ALL, Stream
from curvlab.commandline.config import Readers
from curvlab.diagonality import Level


class FimDiagonalityConfig(TrainedSubjectConfig):
    """Train a network on some classes of a data set, and measure how diagonal its curvature is."""

    titles: ClassVar[dict[str, str]] = {**TrainedSubjectConfig.titles, "quantity": "curvature"}
    only_for: ClassVar[Mapping[str, Readers]] = {
        **TrainedSubjectConfig.only_for,
        "classes": ("streams", ((),)),
    }
    with_function: ClassVar[Mapping[str, Mapping[str, Any]]] = AS_IT_IS

    steps: int = Field(default=500, ge=0)
    """Training steps (mini-batches); 0 analyses the network without training, the default for a network of yours."""
    classes: tuple[int, ...] | Literal["all"] = (0, 1, 2, 3, 4)
    """Class indices to train on, or all. The network always has one output per class of the data set."""
    streams: tuple[Stream, ...] = ()
    """Train one network per stream on the classes of its first task, instead of classes: D5-5 (first half of the
    classes), D9-1 (all but the last), DP10-10 (all)."""
    quantity: str = "empirical_fisher"
    """fisher, fisher:samples=K, empirical_fisher, masq:batch_size=B,norm=sumsq, ggn or hessian."""
    per: tuple[Level, ...] = ("tensor",)
    """Rows of the table: tensor (one per parameter tensor), layer, network; one or several."""
    time_budget: float = Field(default=60.0, gt=0)
    """Time limit of a row in seconds at 100 Gflop/s; rows with more operations are sampled."""
    precision: float = Field(default=0.005, gt=0)
    """Sampled rows: half-width of the 95 % interval of the off-diagonal sum, relative to the sum."""
    tile_memory: float = Field(default=200.0, gt=0)
    """Memory limit of the tiles of one pass, in megabytes."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """One network is trained and measured per seed; the table has mean and standard deviation."""


PRESETS = {
    "default": Preset(FimDiagonalityConfig(), minutes=0.2),
    "cpu": Preset(
        FimDiagonalityConfig(data="mnist", validation=5000, steps=1000, samples=5000), minutes=1, needs=("mnist",)
    ),
    "paper": Preset(FimDiagonalityConfig(data="mnist", validation=5000, steps=5000), minutes=8, needs=("mnist",)),
    "streams": Preset(
        FimDiagonalityConfig(data="mnist", validation=5000, steps=5000, streams=ALL), minutes=30, needs=("mnist",)
    ),
}
