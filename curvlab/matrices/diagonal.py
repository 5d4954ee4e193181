"""The diagonal only."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from curvlab.checks import real_number
from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.damping import Damping
from curvlab.matrices.entries import at_least_float32, check_tensors, frobenius
from curvlab.matrices.info import Info
from curvlab.parameters import ParameterSpace


class Diagonal(CurvatureMatrix):
    """A diagonal matrix.

    Args:
        entries: ``(P,)``.
        space: Parameters of the entries.
        info: Provenance of the matrix.
    """

    kind: ClassVar[str] = "diag"

    def __init__(self, entries: Tensor, space: ParameterSpace, info: Info) -> None:
        super().__init__(space, info)
        check_tensors([entries])
        if entries.shape != (space.total,):
            raise CurvlabError(
                f"a diagonal over {space.total} parameters must have shape {(space.total,)}, not {tuple(entries.shape)}"
            )
        self.entries = entries

    def tensors(self) -> dict[str, Tensor]:
        """Return ``{"entries": (P,)}``."""
        return {"entries": self.entries}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:
        """Create a matrix from the result of ``tensors()``."""
        return cls(tensors["entries"], space, info)

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self.entries.unsqueeze(1) * vectors

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        return function(*self._spectra(damping)) * vectors

    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        return function(*self._spectra(damping)).squeeze(1)

    def _spectra(self, damping: Damping) -> list[Tensor]:
        return [(self.entries + damping.over(self.space.names)).unsqueeze(1)]  # every entry is a block

    def add_product_(self, outputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * F v`` to named tensors in place; see ``CurvatureMatrix.add_product_``."""
        outputs, vectors, scale = self._named(outputs), self._named(vectors), real_number(scale, "scale")
        with torch.no_grad():
            for name, entries in self.space.unflatten(self.entries).items():
                outputs[name].addcmul_(entries, vectors[name], value=scale)

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return self.entries

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return frobenius([self.entries]).to(at_least_float32(self.dtype))

    def to_dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``, zero off the diagonal."""
        return self.entries.diag()
