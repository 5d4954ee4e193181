"""The interface of a backend: the combinations of quantity and structure that it computes, and what it refuses."""

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
class BackendResult:
    """Result of a backend.

    Attributes:
        tensors: The tensors of the matrix (``CurvatureMatrix.tensors``), in at least float32.
        rejected: Reason why a faster method was not used, by parameter: a phrase that follows the parameter's name.
    """

    tensors: Mapping[str, Tensor]
    rejected: Mapping[str, str] = field(default_factory=dict)


class Compute(Protocol):
    """Function that computes the matrix of a problem."""

    def __call__(
        self,
        problem: Problem,
        quantity: Quantity,
        structure: Structure,
        space: ParameterSpace,
        batch_size: int | None,
        advance: Advance,
    ) -> BackendResult:
        """Compute the matrix as a mean over samples; call ``advance`` with the number of samples done."""


class Product(Protocol):
    """Function that returns the product of a problem's matrix with vectors ``(P, K)``: an implicit matrix."""

    def __call__(
        self, problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None
    ) -> Callable[[Tensor], Tensor]:
        """Return the product; each call of it is a pass over the data."""


class Obstacle(Protocol):
    """Function that finds, before anything is computed, why a backend cannot compute a combination for this model."""

    def __call__(self, problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace) -> str | None:
        """Return None, or a clause that names the module or the loss: ``it has no rule for GELU (act)``."""


def no_obstacle(*_: object, **__: object) -> str | None:
    """Return None: the backend supports every model."""
    return None


@dataclass(frozen=True)
class Backend:
    """A backend.

    Attributes:
        name: Its name in ``estimate(..., backend=name)``.
        structures: Names of the structures that it computes, by quantity.
        compute: Computes the stored structures. For a Kronecker structure the space has parameters of
            ``kronecker_layers`` only, and the tensors are ``LAYER|A`` ``(d, d)`` and ``LAYER|S`` ``(o, o)``; for EK-FAC
            ``LAYER|U_A`` and ``LAYER|U_S``, eigenvectors in columns, and ``LAYER|values`` ``(o, d)``.
        obstacle: Finds why it does not support the model.
        product: Computes the implicit structure; None where the backend has none.
        library: Whether it is the code of another library. Its result on a few samples is then compared with the
            reference before it is used.
    """

    name: str
    structures: Mapping[type[Quantity], Sequence[str]]
    compute: Compute
    obstacle: Obstacle = no_obstacle
    product: Product | None = None
    library: bool = False
