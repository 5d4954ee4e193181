"""A matrix that is defined by its products with vectors."""

import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Self, SupportsIndex

import torch
from torch import Tensor

from curvlab.checks import real_number, whole_number
from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix, V
from curvlab.matrices.damping import Damping, DampingLike
from curvlab.matrices.dense import Dense
from curvlab.matrices.entries import require_finite
from curvlab.matrices.info import Info
from curvlab.matrices.iterative import solve
from curvlab.parameters import ParameterSpace

Product = Callable[[Tensor], Tensor]

_LARGEST_FORMED = 5_000  # parameters; in float64 the matrix then takes 200 MB
_COLUMNS = 64  # columns of the identity per product


class Implicit(CurvatureMatrix):
    """A matrix defined by its products, such as Hessian-vector products; no entries are stored.

    ``solve`` is iterative. The methods that need the entries (``diagonal``, ``inverse_diagonal``, ``trace``,
    ``frobenius_norm``, ``eigenvalues``, ``det``, ``logdet``, ``sample``, ``to_dense``) form the matrix, up to
    5,000 parameters. An implicit matrix cannot be saved or moved to another device.

    Args:
        product: A function that returns ``F V`` for ``(P, K)``, with ``F`` symmetric.
        space: Parameters of the rows and columns.
        info: Provenance of the matrix.
        dtype: Floating-point dtype of the vectors.
        device: Device of the vectors.
    """

    kind: ClassVar[str] = "implicit"

    def __init__(
        self,
        product: Product,
        space: ParameterSpace,
        info: Info,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(space, info)
        self._product = product
        self._dtype, self._device = dtype, torch.empty(0, device=device).device  # cuda is cuda:0

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the vectors."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""
        return self._device

    # Products ----------------------------------------------------------------------------------------------------

    def _matmul(self, vectors: Tensor) -> Tensor:
        answer: Tensor = _Multiply.apply(vectors, self._product)
        if (answer.shape, answer.dtype, answer.device) != (vectors.shape, vectors.dtype, vectors.device):
            raise CurvlabError(
                f"the product must return {vectors.dtype} of shape {tuple(vectors.shape)} on {vectors.device}, not "
                f"{answer.dtype} of shape {tuple(answer.shape)} on {answer.device}"
            )
        return answer

    def _quadratic_form(self, delta: Tensor) -> Tensor:
        value: Tensor = _QuadraticForm.apply(delta, self._matmul)
        return value

    def _times(self, factor: float | Tensor) -> Self:
        return self._with(lambda v: factor * self._product(v), self.info)

    def _plus(self, other: Self, info: Info) -> Self:
        return self._with(lambda v: self._product(v) + other._product(v), info)

    def _with(self, product: Product, info: Info) -> Self:
        return type(self)(product, self.space, info, dtype=self.dtype, device=self.device)

    # Copies ------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, _: object) -> Self:
        """Return a matrix with the same product function, which is not copied."""
        return self._with(self._product, self.info)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickle the matrix if its product function can be pickled."""
        try:
            pickle.dumps(self._product)
        except Exception as error:  # the product is an arbitrary function
            raise CurvlabError(
                "an implicit matrix multiplies through a model and cannot be pickled: pickle the model and estimate "
                "the matrix again, or use Dense(matrix.to_dense(), matrix.space, matrix.info)"
            ) from error
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> Self:
        """Return a matrix with the same product function."""
        return self._with(self._product, self.info)

    # Linear systems, and methods that need the entries -----------------------------------------------------------

    def solve(self, b: V, damping: DampingLike = 0.0, *, tol: float | None = None, max_products: int = 1_000) -> V:
        """Return ``(F + D)^-1 b`` by conjugate gradients, or by MINRES if the damped matrix is indefinite.

        Args:
            b: One vector or several.
            damping: ``D``: a number, ``(P,)``, or a dict by parameter name or pattern of names.
            tol: Relative residual, the norm of ``b - (F + D) x`` over the norm of ``b``; None for 3/4 of the digits of
                the dtype.
            max_products: The largest number of products.

        Raises:
            CurvlabError: The tolerance is not reached, or an argument is not valid.
        """
        checked, products = self._damping(damping), whole_number(max_products, "max_products", 1)
        return self._apply(lambda v: self._solve(require_finite(v), checked, tol, products), b)

    def _solve(self, vectors: Tensor, damping: Damping, tol: float | None = None, max_products: int = 1_000) -> Tensor:
        tol = torch.finfo(self.dtype).eps ** 0.75 if tol is None else real_number(tol, "tol")
        shift = damping.over(self.space.names).reshape(-1, 1)
        with torch.no_grad():
            return solve(lambda v: self._matmul(v) + shift * v, vectors, tol, max_products)

    @cached_property
    def _formed(self) -> Dense:
        total = self.space.total
        if total > _LARGEST_FORMED:
            raise CurvlabError(
                f"this method needs the entries of an implicit matrix, which can be formed up to {_LARGEST_FORMED:,} "
                f"parameters, not {total:,}: estimate another structure (diag, kfac), or use @, solve and to_scipy, "
                "which need only products"
            )
        with torch.no_grad():
            columns = torch.eye(total, dtype=self.dtype, device=self.device).split(_COLUMNS, dim=1)
            matrix = torch.cat([self._matmul(some) for some in columns], dim=1)
        if not bool((matrix - matrix.mT).abs().max() <= matrix.abs().max() * torch.finfo(self.dtype).eps ** 0.5):
            raise CurvlabError("the products of this implicit matrix are not finite, or the matrix is not symmetric")
        return Dense((matrix + matrix.mT) / 2, self.space, self.info)

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        return self._formed._spectral(function, vectors, damping)

    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        return self._formed._spectral_diagonal(function, damping)

    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        return self._formed._spectra(damping)

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``, of the formed matrix."""
        return self._formed.diagonal()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor, of the formed matrix."""
        return self._formed.frobenius_norm()

    def to_dense(self) -> Tensor:
        """Return the formed matrix, ``(P, P)``."""
        return self._formed.matrix

    # Methods that need stored tensors ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Raise an error: an implicit matrix has no tensors."""
        raise CurvlabError(
            "an implicit matrix multiplies through a model and has no tensors to save or move: use "
            "Dense(matrix.to_dense(), matrix.space, matrix.info), or estimate another structure"
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:  # noqa: ARG003
        """Raise an error: an implicit matrix has no tensors."""
        raise CurvlabError("an implicit matrix cannot be created from tensors: use Implicit(product, ...)")


class _Multiply(torch.autograd.Function):
    """The product, differentiable to any order: its derivative is the product again."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, product: Product) -> Tensor:
        ctx.product = product
        with torch.enable_grad():  # needed by products that use automatic differentiation
            return product(vectors.detach()).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Multiply.apply(gradient, ctx.product), None


class _QuadraticForm(torch.autograd.Function):
    """``d' F d``, whose first derivative ``2 F d`` needs no further product."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, multiply: Product) -> Tensor:
        product = multiply(delta.unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(delta, product)
        ctx.multiply = multiply
        return delta @ product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        delta, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the derivative is requested
            product = ctx.multiply(delta.unsqueeze(1)).squeeze(1)
        return 2 * gradient * product, None
