"""The full matrix."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import ClassVar, Self

from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.damping import Damping
from curvlab.matrices.eigen import damped_eigh, symmetric_eigh
from curvlab.matrices.entries import at_least_float32, check_tensors, frobenius
from curvlab.matrices.info import Info
from curvlab.parameters import ParameterSpace


class Dense(CurvatureMatrix):
    """A matrix that stores every entry.

    Args:
        matrix: ``(P, P)``, symmetric.
        space: Parameters of the rows and columns.
        info: Provenance of the matrix.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, matrix: Tensor, space: ParameterSpace, info: Info) -> None:
        super().__init__(space, info)
        check_tensors([matrix])
        if matrix.shape != self.shape:
            raise CurvlabError(
                f"a dense matrix over {space.total} parameters must have shape {self.shape}, not {tuple(matrix.shape)}"
            )
        self.matrix = matrix

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return symmetric_eigh(self.matrix)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``{"matrix": (P, P)}``."""
        return {"matrix": self.matrix}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:
        """Create a matrix from the result of ``tensors()``."""
        return cls(tensors["matrix"], space, info)

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors

    def _damped(self, damping: Damping) -> tuple[Tensor, Tensor]:
        return damped_eigh(self.matrix, lambda: self._eigh, damping.over(self.space.names))

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        values, basis = self._damped(damping)
        return basis @ (function(values).unsqueeze(1) * (basis.mT @ vectors))

    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        values, basis = self._damped(damping)
        return basis.square() @ function(values)

    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        return [self._damped(damping)[0]]

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return self.matrix.diagonal()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return frobenius([self.matrix]).to(at_least_float32(self.dtype))

    def to_dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``."""
        return self.matrix
