"""The options of the analysis ``laplace_posterior``."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from curvlab.analyze.frame import subject

ModelName = Literal["logistic", "network"]
#: Names of the approximations.
LABELS = {"diag": "diagonal", "kfac": "K-FAC", "full": "full", "at_once": "full, all data at once"}


class LaplacePosteriorConfig(subject.SubjectConfig):
    """Approximate the posterior of a small model chunk by chunk, and compare it with the exact one."""

    titles: ClassVar[Mapping[str, str]] = {**subject.SubjectConfig.titles, "models": "posterior", "draws": "sampling"}
    unread: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("model", "weights", "fine_tune"), "the models are those of models and hidden"),
        "samples": "there are chunks times chunk_samples",
        "device": "the models are computed on the cpu",
        "dtype": "the models are computed in float64",
    }

    classes: tuple[int, ...] = (3, 8)
    """The two classes; inputs are the first two principal components of the images."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (4,)
    """Hidden sizes of the network, with tanh."""
    models: tuple[ModelName, ...] = ("logistic", "network")
    """logistic: two weights, exact posterior on a grid; network: exact posterior by Hamiltonian Monte Carlo."""
    chunks: int = Field(default=5, ge=2)
    """Number of chunks of data."""
    chunk_samples: int = Field(default=20, ge=1)
    """Number of samples of a chunk."""
    prior_precision: float = Field(default=0.5, gt=0)
    """Prior precision of every parameter; the prior mean is zero."""
    draws: int = Field(default=300, ge=4)
    """Number of draws of each chain."""
    warmup: int = Field(default=200, ge=1)
    """Number of warm-up draws of each chain, which are dropped."""
    chains: int = Field(default=16, ge=2)
    """Number of chains."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    """Samples are drawn for each; the table has mean and standard deviation."""
