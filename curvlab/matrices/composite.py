"""A matrix made of others: each over parameters of its own, zero between them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.damping import Damping
from curvlab.matrices.entries import at_least_float32, frobenius
from curvlab.matrices.info import Info
from curvlab.matrices.kronecker import KFAC
from curvlab.parameters import ParameterSpace


class Composite(CurvatureMatrix):
    """A block-diagonal matrix whose blocks are matrices of any structure, such as K-FAC and a diagonal for the rest.

    Args:
        parts: Matrices of one dtype and device; every parameter of the space is in exactly one of them.
        space: The parameters, in an order of their own.
        info: Where it came from.
    """

    kind: ClassVar[str] = "composite"

    def __init__(self, parts: Sequence[CurvatureMatrix], space: ParameterSpace, info: Info) -> None:
        super().__init__(space, info)
        shapes = [item for part in parts for item in zip(part.space.names, part.space.shapes, strict=True)]
        if sorted(shapes) != sorted(zip(space.names, space.shapes, strict=True)):
            raise CurvlabError("every parameter has to be in exactly one part of a composite matrix, in its shape")
        if len({(part.dtype, part.device) for part in parts}) != 1:
            raise CurvlabError("the parts of a composite matrix differ in dtype or device: move them with to()")
        self.parts = tuple(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts' tensors, each name after its part's index: ``0/fc|A``."""
        return {f"{i}/{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:  # noqa: ARG003
        """Refuse: tensors do not tell the structures of the parts."""
        raise CurvlabError("a composite matrix is made of its parts, not of tensors: use Composite(parts, space, info)")

    def _description(self) -> dict[str, Any]:
        return super()._description() | {"parts": [part._description() for part in self.parts]}

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the entries."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.parts[0].device

    def _split(self, vectors: Tensor) -> Iterator[tuple[CurvatureMatrix, Tensor]]:
        of = dict(zip(self.space.names, vectors.split(list(self.space.sizes)), strict=True))
        return ((part, torch.cat([of[name] for name in part.space.names])) for part in self.parts)

    def _join(self, answers: Iterable[Tensor]) -> Tensor:
        of: dict[str, Tensor] = {}
        for part, answer in zip(self.parts, answers, strict=True):
            of |= zip(part.space.names, answer.split(list(part.space.sizes)), strict=True)
        return torch.cat([of[name] for name in self.space.names])

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self._join(part._matmul(v) for part, v in self._split(vectors))

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        return self._join(part._spectral(function, v, damping) for part, v in self._split(vectors))

    def _solve(self, vectors: Tensor, damping: Damping) -> Tensor:
        return self._join(part._solve(v, damping) for part, v in self._split(vectors))

    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        return chain.from_iterable(part._spectra(damping) for part in self.parts)

    def _quadratic_form(self, delta: Tensor) -> Tensor:
        return torch.stack([part._quadratic_form(d) for part, d in self._split(delta)]).sum()

    def add_product_(self, outputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * F v`` to named tensors in place; see ``CurvatureMatrix.add_product_``."""
        outputs, vectors = self._named(outputs), self._named(vectors)
        for part in self.parts:
            part.add_product_(outputs, vectors, scale)

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return self._join(part.diagonal() for part in self.parts)

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor."""
        return torch.stack([part.trace() for part in self.parts]).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return frobenius(part.frobenius_norm() for part in self.parts).to(at_least_float32(self.dtype))

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the matrix on another device or in another floating dtype."""
        return self._of([part.to(device=device, dtype=dtype) for part in self.parts])

    def _times(self, factor: float | Tensor) -> Self:
        return self._of([part._times(factor) for part in self.parts])

    def average_factors(self, weights: Sequence[float] | None = None) -> Self:
        """Return the matrix with the Kronecker parts merged; see ``KFAC.average_factors``."""
        return self._of([part.average_factors(weights) if isinstance(part, KFAC) else part for part in self.parts])

    def nearest(self) -> Self:
        """Return the matrix with the Kronecker parts merged; see ``KFAC.nearest``."""
        return self._of([part.nearest() if isinstance(part, KFAC) else part for part in self.parts])

    def _of(self, parts: Sequence[CurvatureMatrix]) -> Self:
        return type(self)(parts, self.space, self.info)

    def _plus(self, other: Self, info: Info) -> Self:
        if {part.space for part in self.parts} != {part.space for part in other.parts}:
            raise CurvlabError("the two composite matrices have parts over different parameters: add their to_dense()")
        theirs = {part.space: part for part in other.parts}
        return type(self)([part + theirs[part.space] for part in self.parts], self.space, info)
