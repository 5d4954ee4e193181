"""The curvature quantities as frozen dataclasses: what to compute, not how.

Each has a string form, which the command line also accepts: ``fisher``, ``fisher:samples=4,seed=0``,
``empirical_fisher``, ``masq:batch_size=1000,norm=mean``, ``ggn``, ``hessian``.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from curvlab.checks import whole_number
from curvlab.errors import CurvlabError
from curvlab.forms import parse_form, string_form


@dataclass(frozen=True)
class Quantity:
    """Base class of the quantities; ``str(quantity)`` is its string form."""

    name: ClassVar[str]

    def __str__(self) -> str:
        """Return the string form; options with their default values are left out."""
        return string_form(self)


@dataclass(frozen=True)
class Fisher(Quantity):
    """The Fisher information: labels from the model's own predictions (Amari 1998).

    Args:
        samples: None for the exact expectation over all classes or output directions; an int for the number of labels
            drawn per data point (Monte Carlo).
        seed: Random seed of the drawn labels, from 0.

    Raises:
        CurvlabError: ``samples`` is not a whole number from 1, or ``seed`` not one from 0.
    """

    samples: int | None = None
    seed: int = 0
    name: ClassVar[str] = "fisher"

    def __post_init__(self) -> None:
        """Check that ``samples`` and ``seed`` are whole numbers in range."""
        if self.samples is not None:
            object.__setattr__(self, "samples", whole_number(self.samples, "samples of fisher", 1))
        object.__setattr__(self, "seed", whole_number(self.seed, "seed of fisher"))


@dataclass(frozen=True)
class EmpiricalFisher(Quantity):
    """The empirical Fisher: the second moment of per-sample gradients at the data's own labels."""

    name: ClassVar[str] = "empirical_fisher"


@dataclass(frozen=True)
class MaSQ(Quantity):
    """The Matrix of Squares: squared gradients of mini-batches (Gepperth and Wiech, 2019, section 2.5).

    The data are split in their order into ``M`` batches of ``batch_size`` samples (the last may be smaller).

    Args:
        batch_size: Number of samples ``B`` per batch. ``B = 1`` gives the empirical Fisher, ``B = N`` the squared full
            gradient.
        norm: ``sumsq``: ``1/N sum_m (sum_n g_n)^2``, the reading that fits the paper's figures;
            ``mean``: ``1/M sum_m (mean_n g_n)^2``; ``scaled``: ``1/N sum_m (mean_n g_n)^2``.

    Raises:
        CurvlabError: ``batch_size`` is not a whole number from 1, or ``norm`` is unknown.
    """

    batch_size: int = 1000
    norm: Literal["sumsq", "mean", "scaled"] = "sumsq"
    name: ClassVar[str] = "masq"

    def __post_init__(self) -> None:
        """Check ``batch_size`` and ``norm``."""
        object.__setattr__(self, "batch_size", whole_number(self.batch_size, "batch_size of masq", 1))
        if self.norm not in ("sumsq", "mean", "scaled"):
            raise CurvlabError(f"norm of masq must be sumsq, mean or scaled, not {self.norm!r}")


@dataclass(frozen=True)
class GGN(Quantity):
    """The generalised Gauss-Newton matrix ``mean J' (d2l/df2) J`` (Schraudolph 2002)."""

    name: ClassVar[str] = "ggn"


@dataclass(frozen=True)
class Hessian(Quantity):
    """The Hessian of the mean loss."""

    name: ClassVar[str] = "hessian"


QUANTITIES: dict[str, type[Quantity]] = {q.name: q for q in (Fisher, EmpiricalFisher, MaSQ, GGN, Hessian)}


def parse_quantity(text: str | Quantity) -> Quantity:
    """Parse the string form of a quantity; return a quantity unchanged.

    Raises:
        CurvlabError: The name or an option is unknown, or a value is not valid.

    Examples:
        >>> parse_quantity("masq:batch_size=100,norm=mean")
        MaSQ(batch_size=100, norm='mean')
        >>> str(Fisher(samples=4))
        'fisher:samples=4'
    """
    return text if isinstance(text, Quantity) else parse_form(text, "quantity", QUANTITIES)
