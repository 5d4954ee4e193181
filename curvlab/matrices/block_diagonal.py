"""One dense block per parameter tensor, zero between tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.damping import Damping
from curvlab.matrices.eigen import damped_eigh, symmetric_eigh
from curvlab.matrices.entries import at_least_float32, check_tensors, frobenius
from curvlab.matrices.info import Info
from curvlab.parameters import ParameterSpace


class BlockDiagonal(CurvatureMatrix):
    """A block-diagonal matrix with one block per parameter tensor.

    Args:
        blocks: Symmetric blocks ``(p, p)`` by parameter name.
        space: Parameters of the rows and columns.
        info: Provenance of the matrix.
    """

    kind: ClassVar[str] = "block_diag"

    def __init__(self, blocks: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> None:
        super().__init__(space, info)
        check_tensors(blocks.values())
        expected = {name: (size, size) for name, size in zip(space.names, space.sizes, strict=True)}
        if {name: tuple(block.shape) for name, block in blocks.items()} != expected:
            raise CurvlabError("the names and shapes of the blocks do not match the parameters")
        self.blocks = {name: blocks[name] for name in space.names}

    @cached_property
    def _eigh(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: symmetric_eigh(block) for name, block in self.blocks.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the blocks by parameter name."""
        return self.blocks

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:
        """Create a matrix from the result of ``tensors()``."""
        return cls(tensors, space, info)

    def _by_block(self, vectors: Tensor, products: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
        parts = vectors.split(list(self.space.sizes))
        return torch.cat([product(part) for product, part in zip(products, parts, strict=True)])

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self._by_block(vectors, (block.__matmul__ for block in self.blocks.values()))

    def _damped(self, damping: Damping) -> Iterator[tuple[Tensor, Tensor]]:
        for name, block in self.blocks.items():
            yield damped_eigh(block, partial(self._eigh.__getitem__, name), damping.over([name]))

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        def product(values: Tensor, basis: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda part: basis @ (function(values).unsqueeze(1) * (basis.mT @ part))

        return self._by_block(vectors, (product(*eigh) for eigh in self._damped(damping)))

    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        return torch.cat([basis.square() @ function(values) for values, basis in self._damped(damping)])

    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        return [values for values, _ in self._damped(damping)]

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return torch.cat([block.diagonal() for block in self.blocks.values()])

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return frobenius(self.blocks.values()).to(at_least_float32(self.dtype))

    def to_dense(self) -> Tensor:
        """Return the dense matrix, ``(P, P)``, zero between tensors."""
        dense: Tensor = torch.block_diag(*self.blocks.values())
        return dense
