"""What this package knows of a matrix: its products with vectors, counted and checked."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError


class Operator(Protocol):
    """A symmetric matrix by its products; every matrix of ``curvlab.estimate`` is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors that it takes and gives."""

    @property
    def device(self) -> torch.device:
        """Of the vectors that it takes and gives."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with ``(P,)``."""


class Products:
    """The products of an operator, counted, and finite or an error.

    Args:
        operator: What is multiplied with.
        limit: How many products may be taken; None for no limit.

    Raises:
        CurvlabError: It is not a square matrix, or is empty; later: a product has another shape or is not finite.
    """

    def __init__(self, operator: Operator, limit: int | None = None) -> None:
        shape = tuple(operator.shape)
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
            raise CurvlabError(f"an operator of shape {shape} has no eigenvalues: a square matrix is needed")
        if limit is not None and limit < 1:
            raise CurvlabError(f"max_matvecs must be at least 1, not {limit}")
        self._operator = operator
        self._limit = limit
        self.size = shape[0]
        #: Of the vectors here: float32 at least.
        self.dtype = torch.promote_types(operator.dtype, torch.float32)
        self.device = operator.device
        self.count = 0
        #: The longest product of a vector of length 1, set by those who take such: the scale of rounding errors.
        self.largest = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether no product is left."""
        return self._limit is not None and self.count >= self._limit

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with ``(P,)``."""
        self.count += 1
        # Copies, so that an operator may write into what it is given and use what it returns again.
        product = self._operator.matvec(vector.to(self._operator.dtype, copy=True)).detach().to(self.dtype, copy=True)
        if product.shape != vector.shape:
            raise CurvlabError(f"the operator gives shape {tuple(product.shape)} for {tuple(vector.shape)}")
        # A sum is quicker than a mask, and is not finite where an entry is not.
        if not bool(product.sum().isfinite()) and not bool(product.isfinite().all()):
            raise CurvlabError(
                f"product {self.count} of the operator is not finite: the model's outputs or derivatives overflow "
                "or hold NaN; take float64, or look at the weights and inputs"
            )
        return product

    def gaussian(self, generator: np.random.Generator) -> Tensor:
        """Return a vector ``(P,)`` of standard normal numbers, the same on every device."""
        return self.tensor(generator.standard_normal(self.size))

    def signs(self, generator: np.random.Generator) -> Tensor:
        """Return a vector ``(P,)`` of random signs, the same on every device."""
        return self.tensor(generator.integers(0, 2, self.size) * 2.0 - 1)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return numbers in the dtype and on the device of the vectors."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm, summed in float64: torch's own, in float32, is off by 4e-5 for a million entries."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
