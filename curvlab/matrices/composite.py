"""A block-diagonal matrix whose blocks are other matrices over disjoint sets of parameters."""

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
from curvlab.matrices.kronecker import KFAC, LayerwiseMatrix
from curvlab.parameters import ParameterSpace


class Composite(CurvatureMatrix):
    """A block-diagonal matrix whose blocks are matrices of any structure, such as K-FAC and a diagonal for the rest.

    Args:
        parts: Matrices with the same dtype and device; every parameter of the space is in exactly one of them.
        space: All parameters, in any order.
        info: Provenance of the matrix.
    """

    kind: ClassVar[str] = "composite"

    def __init__(self, parts: Sequence[CurvatureMatrix], space: ParameterSpace, info: Info) -> None:
        super().__init__(space, info)
        shapes = [item for part in parts for item in zip(part.space.names, part.space.shapes, strict=True)]
        if sorted(shapes) != sorted(zip(space.names, space.shapes, strict=True)):
            raise CurvlabError("every parameter must be in exactly one part of a composite matrix, with its shape")
        if len({(part.dtype, part.device) for part in parts}) != 1:
            raise CurvlabError("the parts of a composite matrix have different dtypes or devices: move them with to()")
        self.parts = tuple(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the parts; the index of the part is a prefix of the name: ``0/fc|A``."""
        return {f"{i}/{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:  # noqa: ARG003
        """Raise an error: the structures of the parts do not follow from tensors."""
        raise CurvlabError("a composite matrix cannot be created from tensors: use Composite(parts, space, info)")

    def _description(self) -> dict[str, Any]:
        return super()._description() | {"parts": [part._description() for part in self.parts]}

    def __repr__(self) -> str:
        """Return the representation of the base class, with the structure and size of every part."""
        parts = " + ".join(f"{part.kind} {part.space.total:,}" for part in self.parts)
        return super().__repr__().replace(f"P={self.space.total:,}", f"P={self.space.total:,} ({parts})", 1)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the entries."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the entries."""
        return self.parts[0].device

    def _split(self, vectors: Tensor) -> Iterator[tuple[CurvatureMatrix, Tensor]]:
        by_name = dict(zip(self.space.names, vectors.split(list(self.space.sizes)), strict=True))
        return ((part, torch.cat([by_name[name] for name in part.space.names])) for part in self.parts)

    def _join(self, answers: Iterable[Tensor]) -> Tensor:
        by_name: dict[str, Tensor] = {}
        for part, answer in zip(self.parts, answers, strict=True):
            by_name |= zip(part.space.names, answer.split(list(part.space.sizes)), strict=True)
        return torch.cat([by_name[name] for name in self.space.names])

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self._join(part._matmul(v) for part, v in self._split(vectors))

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        return self._join(part._spectral(function, v, self._for(part, damping)) for part, v in self._split(vectors))

    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        return self._join(part._spectral_diagonal(function, self._for(part, damping)) for part in self.parts)

    def _solve(self, vectors: Tensor, damping: Damping) -> Tensor:
        return self._join(part._solve(v, self._for(part, damping)) for part, v in self._split(vectors))

    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        return chain.from_iterable(part._spectra(self._for(part, damping)) for part in self.parts)

    def _for(self, part: CurvatureMatrix, damping: Damping) -> Damping:
        """Return the damping of a part: beside K-FAC with a factored damping, other structures have an exact one."""
        kronecker = any(isinstance(other, KFAC) for other in self.parts)
        return damping.exact if kronecker and not isinstance(part, (LayerwiseMatrix, Composite)) else damping

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
        """Return the matrix on another device or in another floating-point dtype."""
        return self._with_parts([part.to(device=device, dtype=dtype) for part in self.parts])

    def _times(self, factor: float | Tensor) -> Self:
        return self._with_parts([part._times(factor) for part in self.parts])

    def average_factors(self, weights: Sequence[float] | None = None) -> Self:
        """Merge the pairs of the Kronecker parts; see ``KFAC.average_factors``."""
        return self._with_parts(
            [part.average_factors(weights) if isinstance(part, KFAC) else part for part in self.parts]
        )

    def nearest(self) -> Self:
        """Merge the pairs of the Kronecker parts; see ``KFAC.nearest``."""
        return self._with_parts([part.nearest() if isinstance(part, KFAC) else part for part in self.parts])

    def _with_parts(self, parts: Sequence[CurvatureMatrix]) -> Self:
        return type(self)(parts, self.space, self.info)

    def _plus(self, other: Self, info: Info) -> Self:
        if {part.space for part in self.parts} != {part.space for part in other.parts}:
            raise CurvlabError("the two composite matrices are split into different parts: add their to_dense()")
        theirs = {part.space: part for part in other.parts}
        return type(self)([part + theirs[part.space] for part in self.parts], self.space, info)
