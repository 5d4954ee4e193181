"""What a backend is: the cells of quantity and structure that it fills, and how it says no."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance
from curvlab.quantities import Quantity
from curvlab.structures import Structure


@dataclass(frozen=True)
class Computed:
    """What a backend has computed.

    Attributes:
        tensors: Those that hold the matrix (``CurvatureMatrix.tensors``), in at least float32.
        rejected: Why a faster way was not taken, by parameter: a phrase that follows its name.
    """

    tensors: Mapping[str, Tensor]
    rejected: Mapping[str, str] = field(default_factory=dict)


class Compute(Protocol):
    """From a problem to a matrix."""

    def __call__(
        self,
        problem: Problem,
        quantity: Quantity,
        structure: Structure,
        space: ParameterSpace,
        batch_size: int | None,
        advance: Advance,
    ) -> Computed:
        """Compute the matrix as a mean over samples; ``advance`` is called with the samples done."""


class Product(Protocol):
    """From a problem to the product with ``(P, K)``: an implicit matrix."""

    def __call__(
        self, problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None
    ) -> Callable[[Tensor], Tensor]:
        """Return the product; each call of it goes through the data."""


class Obstacle(Protocol):
    """What keeps a backend from a cell for this model, if anything does, before any number is computed."""

    def __call__(self, problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace) -> str | None:
        """Return None, or a clause that names the module or the loss: ``it has no rule for GELU (act)``."""


def no_obstacle(*_: object, **__: object) -> str | None:
    """Say that nothing is in the way, of any model."""
    return None


@dataclass(frozen=True)
class Backend:
    """A backend.

    Attributes:
        name: What ``estimate(..., backend=name)`` calls it.
        cells: The names of the structures that it computes, by quantity.
        compute: Stored structures. For a Kronecker structure the space holds parameters of ``kronecker_layers`` only,
            and the tensors are ``LAYER|A`` ``(d, d)`` and ``LAYER|S`` ``(o, o)``; for EK-FAC ``LAYER|U_A`` and
            ``LAYER|U_S``, eigenvectors in columns, and ``LAYER|values`` ``(o, d)``.
        obstacle: Why it cannot for the model at hand.
        product: The implicit structure, where it has that.
        library: Whether it is another library's code, whose answer on a few samples is compared with the reference
            before it is believed.
    """

    name: str
    cells: Mapping[type[Quantity], Sequence[str]]
    compute: Compute
    obstacle: Obstacle = no_obstacle
    product: Product | None = None
    library: bool = False
