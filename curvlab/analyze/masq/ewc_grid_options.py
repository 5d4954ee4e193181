"""Options of the analysis ``ewc_grid``, and its presets."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from curvlab.analyze.frame.analysis import Preset
from curvlab.analyze.masq.streams import Positive, TwoTasksConfig


def _check_net(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", text, re.ASCII):
        raise PydanticCustomError("net", "should be hidden sizes joined by hyphens, such as 200-200-100")
    return text


Net = Annotated[str, AfterValidator(_check_net)]


class EwcGridConfig(TwoTasksConfig):
    """Learn task D1 once, then D2 with EWC at every point of a grid of rates, strengths and importances."""

    titles: ClassVar[Mapping[str, str]] = {**TwoTasksConfig.titles, "nets": "grid"}
    unread: ClassVar[Mapping[str, str]] = {"hidden": "the networks are those of nets"}

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Not read: the networks are those of nets."""
    every: int = Field(default=25, ge=1)
    """Training steps between evaluations."""
    nets: tuple[Net, ...] = ("50-50", "50-50-50")
    """Hidden sizes of the networks, such as 200-200-100."""
    rates: tuple[Positive, ...] = (1e-3, 1e-4)
    """Learning rates of Adam for D2."""
    strengths: tuple[Positive, ...] = (100.0, 1000.0, 10_000.0)
    """Strengths lambda of the penalty lambda/2 sum F (theta - theta1)^2; lambda = 0 is always included."""
    masq_batch_size: int = Field(default=1000, ge=1)
    """Batch size of MaSQ (norm=sumsq)."""


def every_net(sizes: Sequence[int]) -> tuple[str, ...]:
    """Return all networks with two or three hidden layers of these sizes.

    Examples:
        >>> len(every_net((200, 400, 800)))
        36
    """
    return tuple("-".join(map(str, net)) for layers in (2, 3) for net in product(sizes, repeat=layers))


_RATES = (1e-3, 1e-4, 1e-5, 1e-6)
PRESETS = {
    "default": Preset(EwcGridConfig(), minutes=1),
    "cpu": Preset(
        EwcGridConfig(
            data="mnist",
            validation=500,
            train_samples=20_000,
            test_samples=2000,
            steps=1000,
            every=50,
            nets=("50-50", "100-50", "100-100", "200-200", "50-50-50", "100-50-50", "100-100-50", "100-100-100"),
            rates=_RATES,
        ),
        minutes=25,
        needs=("mnist",),
    ),
    "paper": Preset(
        EwcGridConfig(
            data="mnist", validation=500, steps=5000, every=50, nets=every_net((200, 400, 800)), rates=_RATES
        ),
        minutes=5000,
        needs=("mnist",),
    ),
}
