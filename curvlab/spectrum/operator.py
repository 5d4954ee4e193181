"""What this package knows of a matrix: its products with vectors, counted, checked and of a length that can be squared.

A spectrum may be anywhere from 1e-300 to 1e300, and what is made of it holds squares. ``Products`` are therefore those of
``2^-exponent A``: the exponent is zero unless the first product shows that lengths are beyond a quarter of the dtype's
exponents. As powers of two are exact, half of them goes into the vector and half into the product, so that neither under-
nor overflows. What is found is put back into the matrix's own unit by ``Products.restored``.
"""

from math import frexp
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.arguments import whole

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Operator(Protocol):
    """A symmetric matrix by its products; every matrix of ``curvlab.estimate`` is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors that it takes and gives: a floating one."""

    @property
    def device(self) -> torch.device:
        """Of the vectors that it takes and gives."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with ``(P,)``; it may write into the vector, and return a buffer that it uses again."""


class Products:
    """The products of an operator, counted, and finite or an error.

    Args:
        operator: What is multiplied with.
        limit: How many products may be taken; None for no limit.

    Attributes:
        size: ``P``.
        dtype: Of the vectors here: float32 at least.
        device: Of the vectors.
        eps: Relative accuracy of the numbers that the operator takes and gives.
        exponent: Products are those of the matrix over two to this power, which is even.
        count: Products taken.
        largest: The longest product of a vector of length 1, set by those who take such: the scale of rounding errors.

    Raises:
        CurvlabError: It is no operator, is not square or empty, or is not of floating-point numbers; later: a product is
            not a tensor of such, has another shape or device, or is not finite.
    """

    def __init__(self, operator: Operator, limit: int | None = None) -> None:
        self.size, self._given, self.device = _described(operator)
        self._operator = operator
        self._limit = None if limit is None else whole("max_matvecs", limit, 1)
        self.dtype = torch.promote_types(self._given, torch.float32)
        self.eps: float = torch.finfo(self._given).eps
        self.exponent = 0
        self.count = 0
        self.largest = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether no product is left."""
        return self._limit is not None and self.count >= self._limit

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product of ``2^-exponent A`` with ``(P,)``; the first, of a random vector, sets the exponent."""
        if self.count:
            return self._finite(self._multiply(vector), self.count)
        product = self._multiply(vector)
        for _ in range(2):  # an overflow shows only that the exponent must be larger, not by how much
            shift = self._misfit(vector, product)
            if not shift:
                break
            if self.exhausted:
                self._finite(product, 1)
                raise CurvlabError(
                    "the operator's products are too large or too small to compute with as they are, and the scale takes "
                    "a further product: raise max_matvecs, or multiply the operator by a number"
                )
            self.exponent += shift
            product = self._multiply(vector)
        return self._finite(product, 1)

    def column(self, i: int) -> Tensor:
        """Return a column of the matrix ``A`` itself, ``(P,)``."""
        unit = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        unit[i] = 1
        return self._finite(self._multiply(unit, exponent=0), self.count)

    def restored(self, values: np.ndarray) -> np.ndarray:
        """Return numbers that are proportional to ``2^-exponent A`` in the unit of ``A``, in float64.

        Raises:
            CurvlabError: They are too large for the dtype of the vectors.
        """
        with np.errstate(over="ignore", under="ignore"):
            restored: np.ndarray = np.ldexp(np.asarray(values, dtype=np.float64), self.exponent)
        if not np.isfinite(restored).all():
            raise self.too_large()
        return restored

    def restored_tensor(self, values: np.ndarray) -> Tensor:
        """Return ``restored`` in the dtype and on the device of the vectors.

        Raises:
            CurvlabError: They are too large for it.
        """
        restored = self.tensor(self.restored(values))
        if not bool(restored.isfinite().all()):
            raise self.too_large()
        return restored

    def too_large(self) -> CurvlabError:
        """Return the error of numbers that the dtype has no room for."""
        wider = "multiply the operator by a small number" if self.dtype == torch.float64 else "take float64"
        return CurvlabError(f"the operator's products or eigenvalues are too large for {_name(self.dtype)}: {wider}")

    def gaussian(self, generator: np.random.Generator) -> Tensor:
        """Return a vector ``(P,)`` of standard normal numbers, the same on every device."""
        return self.tensor(generator.standard_normal(self.size))

    def signs(self, generator: np.random.Generator) -> Tensor:
        """Return a vector ``(P,)`` of random signs, the same on every device."""
        return self.tensor(generator.integers(0, 2, self.size) * 2.0 - 1)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return numbers in the dtype and on the device of the vectors."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def _multiply(self, vector: Tensor, exponent: int | None = None) -> Tensor:
        self.count += 1
        exponent = self.exponent if exponent is None else exponent
        half = 2.0 ** (-exponent // 2)
        # Copies, so that an operator may write into what it is given and use what it returns again.
        sent = (vector * half if exponent else vector).to(self._given, copy=True)
        product = product_of(self._operator, sent)
        self.eps = max(self.eps, torch.finfo(product.dtype).eps)
        product = product.to(self.dtype, copy=True)
        return product.mul_(half) if exponent else product

    def _misfit(self, vector: Tensor, product: Tensor) -> int:
        """Return what has to be added to the exponent; 0 where lengths are well within the dtype, or a product zero."""
        room = frexp(torch.finfo(self._given).max)[1]
        longest = float(product.abs().max())
        if not longest < float("inf"):  # NaN, too, can come of an overflow
            return 0 if self.exponent else room
        if not longest:
            return 0
        shift = frexp(longest)[1] - frexp(float(vector.abs().max()))[1]
        return 0 if abs(shift) <= room // 4 else 2 * (shift // 2)

    def _finite(self, product: Tensor, number: int) -> Tensor:
        # A sum is quicker than a mask, and is not finite where an entry is not.
        if not bool(product.sum().isfinite()) and not bool(product.isfinite().all()):
            wider = "" if self.dtype == torch.float64 else "take float64, or "
            raise CurvlabError(
                f"product {number} of the operator is not finite: the model's outputs or derivatives overflow "
                f"or hold NaN; {wider}look at the weights and inputs"
            )
        return product


def product_of(operator: Operator, vector: Tensor) -> Tensor:
    """Return what an operator gives for a vector, checked: it may be a view of the vector or of the operator's own.

    Raises:
        CurvlabError: It is not a dense tensor of floating-point numbers, or has another shape or device.
    """
    product = operator.matvec(vector)
    if not isinstance(product, Tensor):
        raise CurvlabError(f"the operator's matvec gives {_article(type(product).__name__)}, where a tensor is needed")
    if not product.is_floating_point() or product.layout != torch.strided:
        raise CurvlabError(
            f"the operator's matvec gives {_name(product.dtype)} of layout {_name(product.layout)}, where a dense tensor "
            "of real floating-point numbers is needed: convert it there, such as by product.double()"
        )
    if product.shape != vector.shape:
        raise CurvlabError(f"the operator gives shape {tuple(product.shape)} for {tuple(vector.shape)}")
    if product.device != vector.device:
        raise CurvlabError(f"the operator says that it is on {vector.device} and gives a product on {product.device}")
    return product.detach()


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm, summed in float64: torch's own, in float32, is off by 4e-5 for a million entries."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _described(operator: Operator) -> tuple[int, torch.dtype, torch.device]:
    """Return size, dtype and device.

    Raises:
        CurvlabError: It is no operator of this package.
    """
    missing = [name for name in ("shape", "dtype", "device", "matvec") if not hasattr(operator, name)]
    if missing:
        raise CurvlabError(
            f"{_article(type(operator).__name__)} is not an operator, as it has no {missing[0]}: an operator has shape, "
            "dtype, device and matvec, as every matrix of curvlab.estimate has"
        )
    shape, dtype = operator.shape, operator.dtype
    square = isinstance(shape, (tuple, list)) and len(shape) == 2 and shape[0] == shape[1]
    if not square or not all(isinstance(length, (int, np.integer)) for length in shape) or shape[0] < 1:
        shown = tuple(shape) if isinstance(shape, (tuple, list)) else shape
        raise CurvlabError(f"an operator of shape {shown} has no eigenvalues: a square matrix is needed")
    if dtype not in _DTYPES:
        raise CurvlabError(
            f"the operator's dtype is {_name(dtype)}, where vectors are of real floating-point numbers: give it a dtype "
            "such as torch.float64, and convert in its matvec"
        )
    try:
        device = torch.device(operator.device)
    except (RuntimeError, TypeError):
        raise CurvlabError(f"the operator's device is {operator.device!r}, which torch does not know") from None
    return int(shape[0]), dtype, device


def _name(of: object) -> str:
    return str(of).removeprefix("torch.")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"
