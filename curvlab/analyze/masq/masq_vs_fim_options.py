"""Options of the analysis ``masq_vs_fim``, and its presets."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.masq.streams import TwoTasksConfig

Part = Literal["values", "masq", "fim", "sample_gradients", "duplicated_weights"]
Whole = Annotated[int, Field(ge=1)]


class MasqVsFimConfig(TwoTasksConfig):
    """Learn the first task of a stream, and compare MaSQ with the FIM (MaSQ with batch size 1)."""

    titles: ClassVar[dict[str, str]] = {**TwoTasksConfig.titles, "parts": "curvature"}

    parts: tuple[Part, ...] = ("values", "masq", "fim", "sample_gradients", "duplicated_weights")
    """Parts of the measurement: values, and the cost of MaSQ and of the FIM from curvlab, from per-sample gradients and
    from duplicated weights."""
    masq_batch_size: int = Field(default=100, ge=1)
    """Batch size of MaSQ."""
    points: tuple[Annotated[int, Field(ge=0)], ...] = (0, 10, 30, 100, 300)
    """Training steps at which the correlation of MaSQ and FIM is computed; later ones than `steps` are ignored."""
    batch_sizes: tuple[Whole, ...] = (1, 2, 5, 10, 20, 50, 100, 250, 500)
    """Batch sizes for the closed form; each must divide partition_samples."""
    partition_samples: int = Field(default=500, ge=2)
    """Number of samples that are partitioned into batches at random."""
    partitions: int = Field(default=30, ge=2)
    """Number of random partitions."""


PRESETS = {
    "default": Preset(MasqVsFimConfig(hidden=(50, 50), batch_sizes=(1, 5, 50, 250), partition_samples=250), minutes=1),
    "cpu": Preset(
        MasqVsFimConfig(
            data="mnist",
            hidden=(200, 200),
            validation=500,
            train_samples=20_000,
            test_samples=2000,
            steps=2000,
            masq_batch_size=1000,
            points=(0, 10, 30, 100, 300, 1000, 2000),
            batch_sizes=(1, 10, 100, 1000),
            partition_samples=1000,
            partitions=100,
        ),
        minutes=5,
        needs=("mnist",),
    ),
    "paper": Preset(
        MasqVsFimConfig(
            data="mnist",
            hidden=(800, 800),
            validation=500,
            steps=5000,
            masq_batch_size=1000,
            points=(0, 10, 100, 1000, 5000),
            batch_sizes=(1, 10, 100, 1000),
            partition_samples=1000,
            partitions=100,
        ),
        minutes=60,
        needs=("mnist",),
    ),
}
