"""Matrix-vector products of an operator: counted, checked and scaled.

Eigenvalues may be from 1e-300 to 1e300, but the computations need squares. ``Products`` therefore multiplies with
``2^-exponent A``. The exponent is zero unless the first product shows that lengths exceed a quarter of the exponent
range of the dtype. Powers of two are exact; half of them scales the vector and half the product, so that neither
underflows or overflows. ``Products.unscale`` converts results back to the unit of the matrix.
"""

from math import frexp
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.spectrum.arguments import check_whole

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Operator(Protocol):
    """A symmetric matrix that multiplies vectors; every matrix from ``curvlab.estimate`` is an operator."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of the input and output vectors."""

    @property
    def device(self) -> torch.device:
        """Device of the input and output vectors."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with ``(P,)``; the method may overwrite the vector and may reuse its output buffer."""


class Products:
    """Products of an operator with vectors, counted and checked.

    Args:
        operator: The operator.
        limit: Largest number of products; None for no limit.

    Attributes:
        size: Dimension ``P``.
        dtype: Dtype of the vectors in this package: float32 or float64.
        device: Device of the vectors.
        eps: Machine precision of the vectors of the operator.
        exponent: Products are divided by two to this power, which is even.
        count: Number of products.
        largest: Length of the longest product of a unit vector, set by callers: the scale of rounding errors.

    Raises:
        CurvlabError: The operator lacks an attribute, is not square, is empty, or is not floating-point; later: a
            product is not a floating-point tensor, has a wrong shape or device, or is not finite.
    """

    def __init__(self, operator: Operator, limit: int | None = None) -> None:
        self.size, self._given, self.device = _describe(operator)
        self._operator = operator
        self._limit = None if limit is None else check_whole("max_matvecs", limit, 1)
        self.dtype = torch.promote_types(self._given, torch.float32)
        self.eps: float = torch.finfo(self._given).eps
        self.exponent = 0
        self.count = 0
        self.largest = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether the limit of products is reached."""
        return self._limit is not None and self.count >= self._limit

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product of ``2^-exponent A`` with ``(P,)``; the first product sets the exponent."""
        if self.count:
            return self._finite(self._multiply(vector), self.count)
        product = self._multiply(vector)
        for _ in range(2):  # after an overflow, the size of the needed exponent is known only from a second product
            shift = self._misfit(vector, product)
            if not shift:
                break
            if self.exhausted:
                self._finite(product, 1)
                raise CurvlabError(
                    "the operator's products are too large or too small and must be rescaled, which takes one more "
                    "product: increase max_matvecs, or multiply the operator by a number"
                )
            self.exponent += shift
            product = self._multiply(vector)
        return self._finite(product, 1)

    def column(self, i: int) -> Tensor:
        """Return a column of the unscaled matrix ``A``, ``(P,)``."""
        unit = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        unit[i] = 1
        return self._finite(self._multiply(unit, exponent=0), self.count)

    def unscale(self, values: np.ndarray) -> np.ndarray:
        """Convert numbers from the unit of ``2^-exponent A`` to the unit of ``A``, in float64.

        Raises:
            CurvlabError: The numbers overflow.
        """
        with np.errstate(over="ignore", under="ignore"):
            restored: np.ndarray = np.ldexp(np.asarray(values, dtype=np.float64), self.exponent)
        if not np.isfinite(restored).all():
            raise self.overflow_error()
        return restored

    def unscale_tensor(self, values: np.ndarray) -> Tensor:
        """Return ``unscale`` as a tensor with the dtype and device of the vectors.

        Raises:
            CurvlabError: The numbers overflow.
        """
        restored = self.tensor(self.unscale(values))
        if not bool(restored.isfinite().all()):
            raise self.overflow_error()
        return restored

    def overflow_error(self) -> CurvlabError:
        """Return the error for numbers that overflow the dtype."""
        wider = "multiply the operator by a small number" if self.dtype == torch.float64 else "use float64"
        return CurvlabError(f"the operator's products or eigenvalues are too large for {_name(self.dtype)}: {wider}")

    def gaussian(self, generator: np.random.Generator) -> Tensor:
        """Return a vector ``(P,)`` of standard normal numbers, the same on every device."""
        return self.tensor(generator.standard_normal(self.size))

    def signs(self, generator: np.random.Generator) -> Tensor:
        """Return a vector ``(P,)`` of random signs, the same on every device."""
        return self.tensor(generator.integers(0, 2, self.size) * 2.0 - 1)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Return an array as a tensor with the dtype and device of the vectors."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def _multiply(self, vector: Tensor, exponent: int | None = None) -> Tensor:
        self.count += 1
        exponent = self.exponent if exponent is None else exponent
        half = 2.0 ** (-exponent // 2)
        # Copies, because an operator may overwrite its input and reuse its output buffer.
        sent = (vector * half if exponent else vector).to(self._given, copy=True)
        product = checked_product(self._operator, sent)
        self.eps = max(self.eps, torch.finfo(product.dtype).eps)
        product = product.to(self.dtype, copy=True)
        return product.mul_(half) if exponent else product

    def _misfit(self, vector: Tensor, product: Tensor) -> int:
        """Return the change of the exponent; 0 if lengths are well within the dtype or the product is zero."""
        room = frexp(torch.finfo(self._given).max)[1]
        longest = float(product.abs().max())
        if not longest < float("inf"):  # an overflow can also give NaN
            return 0 if self.exponent else room
        if not longest:
            return 0
        shift = frexp(longest)[1] - frexp(float(vector.abs().max()))[1]
        return 0 if abs(shift) <= room // 4 else 2 * (shift // 2)

    def _finite(self, product: Tensor, number: int) -> Tensor:
        # A sum is faster than a mask, and is not finite if an entry is not finite.
        if not bool(product.sum().isfinite()) and not bool(product.isfinite().all()):
            wider = "" if self.dtype == torch.float64 else "use float64, or "
            raise CurvlabError(
                f"product {number} of the operator is not finite: the model's outputs or derivatives overflow "
                f"or hold NaN; {wider}check the weights and inputs"
            )
        return product


def checked_product(operator: Operator, vector: Tensor) -> Tensor:
    """Return the product of an operator with a vector, checked but not copied.

    Raises:
        CurvlabError: The product is not a dense floating-point tensor, or has a wrong shape or device.
    """
    product = operator.matvec(vector)
    if not isinstance(product, Tensor):
        raise CurvlabError(f"the operator's matvec must return a tensor, not a {type(product).__name__}")
    if not product.is_floating_point() or product.layout != torch.strided:
        raise CurvlabError(
            f"the operator's matvec must return a dense tensor of real floating-point numbers, not "
            f"{_name(product.dtype)} of layout {_name(product.layout)}: convert it, for example with product.double()"
        )
    if product.shape != vector.shape:
        raise CurvlabError(f"the operator must return shape {tuple(vector.shape)}, not {tuple(product.shape)}")
    if product.device != vector.device:
        raise CurvlabError(
            f"the operator's device is {vector.device}, but its product is on {product.device}: use one device"
        )
    return product.detach()


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm, summed in float64; a float32 sum has an error of 4e-5 for a million entries."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _describe(operator: Operator) -> tuple[int, torch.dtype, torch.device]:
    """Return the size, dtype and device of an operator.

    Raises:
        CurvlabError: The object is not a valid operator.
    """
    missing = [name for name in ("shape", "dtype", "device", "matvec") if not hasattr(operator, name)]
    if missing:
        raise CurvlabError(
            f"a {type(operator).__name__} is not an operator, because it has no {missing[0]}: an operator needs shape, "
            "dtype, device and matvec, as every matrix from curvlab.estimate"
        )
    shape, dtype = operator.shape, operator.dtype
    square = isinstance(shape, (tuple, list)) and len(shape) == 2 and shape[0] == shape[1]
    if not square or not all(isinstance(length, (int, np.integer)) for length in shape) or shape[0] < 1:
        shown = tuple(shape) if isinstance(shape, (tuple, list)) else shape
        raise CurvlabError(f"an operator of shape {shown} has no eigenvalues: a square matrix is needed")
    if dtype not in _DTYPES:
        raise CurvlabError(
            f"the operator's dtype must be a real floating-point dtype, not {_name(dtype)}: use a dtype such as "
            "torch.float64, and convert in matvec"
        )
    try:
        device = torch.device(operator.device)
    except (RuntimeError, TypeError):
        raise CurvlabError(
            f"the operator's device {operator.device!r} is unknown to torch: give a torch.device"
        ) from None
    return int(shape[0]), dtype, device


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
