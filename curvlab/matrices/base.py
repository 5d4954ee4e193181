"""The base class of all curvature matrices: their common methods, derived from a few methods of each structure."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from curvlab.checks import describe_value, real_number, whole_number
from curvlab.errors import CurvlabError
from curvlab.files import to_path
from curvlab.matrices.damping import Damping, DampingLike
from curvlab.matrices.eigen import invert, require_invertible, require_positive
from curvlab.matrices.entries import DTYPES, PRECISE, at_least_float32, move, require_finite
from curvlab.matrices.file_format import write_file
from curvlab.matrices.info import Info
from curvlab.parameters import ParameterSpace, Vectors

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

V = TypeVar("V", bound=Vectors)


class CurvatureMatrix(ABC):
    """A symmetric matrix over a parameter space.

    A vector is a flat tensor ``(P,)`` or a dict of parameter-shaped tensors; several vectors are ``(P, K)``. The result
    has the form of the vector, and is not finite if the vector is not finite.

    ``solve``, ``inverse_diagonal``, ``det``, ``logdet`` and ``sample`` add a diagonal matrix ``D`` to the matrix. Their
    ``damping`` is a number, a flat ``(P,)``, or a dict of numbers and tensors with the shapes of the parameters, by
    parameter name or pattern of names. Kronecker structures accept one number per layer, such as a prior precision, or
    a ``FactoredDamping``; an implicit matrix accepts any diagonal matrix.
    These methods and ``eigenvalues`` need float32 or float64; in half precision they raise an error.

    A subclass implements ``tensors``, ``from_tensors``, ``_matmul``, ``_spectral``, ``_spectral_diagonal``,
    ``_spectra``, ``diagonal`` and ``frobenius_norm``; and ``_times`` and ``_plus`` unless its tensors can be scaled and
    added entry by entry. The other methods are derived from these; a subclass may override them with a faster version.
    """

    __array_ufunc__ = None  # NumPy must leave ``array @ matrix`` and ``array * matrix`` to this class

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type["CurvatureMatrix"]]] = {}

    def __init_subclass__(cls) -> None:
        """Register the structure under its ``kind``, which files contain."""
        if "kind" in vars(cls):  # a base class of several structures has no kind
            CurvatureMatrix.kinds[cls.kind] = cls

    def __init__(self, space: ParameterSpace, info: Info) -> None:
        self.space = space
        self.info = info

    # Methods that a structure implements -------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the matrix by name; ``save`` writes and ``to`` moves these."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:
        """Create a matrix from tensors with the names of ``tensors()``."""

    @abstractmethod
    def _matmul(self, vectors: Tensor) -> Tensor:
        """Return the product with vectors ``(P, K)``."""

    @abstractmethod
    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        """Return ``f(F + D) vectors`` for ``(P, K)``; the function keeps the shape of each tensor of ``_spectra``."""

    @abstractmethod
    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        """Return the diagonal of ``f(F + D)``, ``(P,)``; the function is as in ``_spectral``."""

    @abstractmethod
    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        """Return the eigenvalues of ``F + D``, ``(..., n)``: one row per block, with the rounding of that block."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""

    # Derived methods ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return self.space.total, self.space.total

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the entries."""
        return next(iter(self.tensors().values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the entries."""
        return next(iter(self.tensors().values())).device

    def _apply(self, function: Callable[[Tensor], Tensor], vectors: V) -> V:
        flat = self._flat(vectors)
        answer = function(flat if flat.ndim == 2 else flat.unsqueeze(1))
        answer = answer if flat.ndim == 2 else answer.squeeze(1)
        return answer if isinstance(vectors, Tensor) else self.space.unflatten(answer)  # type: ignore[return-value]

    def _flat(self, vectors: Vectors) -> Tensor:
        tensors = vectors.values() if isinstance(vectors, Mapping) else [vectors]
        if not all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in tensors):
            raise CurvlabError(
                "a vector must be a dense tensor or a dict of dense tensors by parameter name, not "
                f"{describe_value(vectors)}"
            )
        if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            raise CurvlabError("the tensors of the vector have different dtypes or devices: move them with to()")
        flat = self.space.flatten(vectors)
        if (flat.dtype, flat.device) != (self.dtype, self.device):
            raise CurvlabError(
                f"the vector is {flat.dtype} on {flat.device}, but the matrix is {self.dtype} on {self.device}: "
                "move one of them with to()"
            )
        return flat

    def __matmul__(self, vectors: V) -> V:
        """Return ``F v``.

        Raises:
            CurvlabError: The vector has another parameter space, dtype or device.
        """
        return self._apply(self._matmul, vectors)

    def __rmatmul__(self, vectors: object) -> Self:
        """Raise an error for ``v @ F``, which must be written ``F @ v``."""
        raise CurvlabError(
            "vector @ matrix is not supported: the matrix is symmetric, so write matrix @ vector, with a tensor"
        )

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``F v`` for a flat ``(P,)``; this is the method that eigenvalue solvers use."""
        return self @ vector

    def quadratic_form(self, delta: Vectors) -> Tensor:
        """Return ``delta' F delta``, a scalar, differentiable in ``delta`` (the EWC penalty is half of it).

        Raises:
            CurvlabError: ``delta`` is not a vector of this space, or the result is not finite for a finite ``delta``.
        """
        flat = self._flat(delta)
        if flat.ndim != 1:
            raise CurvlabError(f"quadratic_form takes one vector, not a tensor of shape {tuple(flat.shape)}")
        value = self._quadratic_form(flat)
        with suppress(RuntimeError):  # under torch.func.vmap the values are unknown
            if not bool(value.isfinite()) and bool(flat.isfinite().all()):
                wider = "" if self.dtype == torch.float64 else ", or move matrix and vector to torch.float64"
                raise CurvlabError(
                    f"delta' F delta overflows {self.dtype}, or the matrix is not finite: make delta smaller{wider}"
                )
        return value

    def _quadratic_form(self, delta: Tensor) -> Tensor:
        return delta @ self._matmul(delta.unsqueeze(1)).squeeze(1)

    def add_product_(self, outputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * F v`` to named tensors in place and without a graph: the gradient of a quadratic penalty.

        Args:
            outputs: Tensors by parameter name, such as gradients; tensors with other names are not changed.
            vectors: ``v`` by parameter name; other names are ignored.
            scale: A finite factor.

        Raises:
            CurvlabError: A parameter is missing, a tensor has a wrong shape, dtype or device, or the scale is not a
                finite number.
        """
        outputs, vectors, scale = self._named(outputs), self._named(vectors), real_number(scale, "scale")
        with torch.no_grad():
            for name, product in (self @ vectors).items():
                outputs[name].add_(product, alpha=scale)

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the parameters of this space, checked."""
        if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise CurvlabError(f"expected a dict of tensors by parameter name, not {describe_value(tensors)}")
        missing = [name for name in self.space.names if name not in tensors]
        if missing:
            raise CurvlabError(f"tensors are missing for parameters of the matrix: {', '.join(missing)}")
        named = {name: tensors[name] for name in self.space.names}
        dtype, device = self.dtype, self.device
        for (name, tensor), shape in zip(named.items(), self.space.shapes, strict=True):
            if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
                raise CurvlabError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, but in the matrix it "
                    f"is {dtype} of shape {shape} on {device}"
                )
        return named

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues in ascending order, ``(P,)``.

        Raises:
            CurvlabError: The matrix is in half precision, or not finite.
        """
        values = torch.cat([values.flatten() for values in self._spectra(self._damping(0.0))]).sort().values
        if not bool(values.isfinite().all()):
            raise CurvlabError("the matrix holds NaN or infinity, so that it has no eigenvalues")
        return values

    def to_dense(self) -> Tensor:
        """Return the dense matrix, ``(P, P)``."""
        return self._matmul(torch.eye(self.space.total, dtype=self.dtype, device=self.device))

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor in float32 or float64."""
        return self.diagonal().sum(dtype=at_least_float32(self.dtype))

    def _damping(self, damping: DampingLike) -> Damping:
        """Check and convert the ``damping`` of a user; raise an error for a matrix in half precision."""
        if self.dtype not in PRECISE:
            raise CurvlabError(
                f"eigenvalues, inverses and determinants are not accurate in {self.dtype}: compute them from "
                "matrix.to(dtype=torch.float32)"
            )
        return Damping.of(damping, self.space, self.dtype, self.device)

    def solve(self, b: V, damping: DampingLike = 0.0) -> V:
        """Return ``(F + D)^-1 b``.

        Args:
            b: One vector or several.
            damping: ``D``: a number, ``(P,)``, or a dict by parameter name or pattern of names, such as
                ``{"fc1.*": 0.1, "fc2.*": 1.0}``; for K-FAC also a ``FactoredDamping``.

        Raises:
            CurvlabError: The damped matrix is singular to working precision, ``b`` is not finite, or this structure
                does not support the damping.
        """
        checked = self._damping(damping)
        return self._apply(lambda v: self._solve(require_finite(v), checked), b)

    def _solve(self, vectors: Tensor, damping: Damping) -> Tensor:
        return self._spectral(lambda values: invert(values, damping), vectors, damping)

    def inverse_diagonal(self, damping: DampingLike = 0.0) -> Tensor:
        """Return the diagonal of ``(F + D)^-1``, ``(P,)``: the variances of the parameters in a Laplace posterior.

        An implicit matrix is formed, up to 5,000 parameters.

        Args:
            damping: ``D``, the precision of the prior; see ``solve``.

        Raises:
            CurvlabError: The damped matrix is singular to working precision, or this structure does not support the
                damping.

        Examples:
            >>> from curvlab.matrices import Dense, Info
            >>> space, info = ParameterSpace(("w",), ((2,),)), Info("fisher", "dense", "cross_entropy", "torch", 10)
            >>> Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), space, info).inverse_diagonal(damping=1.0)
            tensor([0.6667, 0.6667])
        """
        checked = self._damping(damping)
        return self._spectral_diagonal(lambda values: invert(values, checked), checked)

    def det(self, damping: DampingLike = 0.0) -> Tensor:
        """Return ``det (F + D)``, a scalar tensor; it may be negative if the matrix is not positive definite.

        The determinant of many parameters is often outside the range of the dtype. Then the result is infinite (with
        its sign) or zero; use ``logdet``.

        Args:
            damping: ``D``; see ``solve``.

        Raises:
            CurvlabError: The damped matrix is singular to working precision, so that its determinant is zero or a
                rounding error; or this structure does not support the damping.
        """
        checked = self._damping(damping)
        spectra = [require_invertible(values, checked).double() for values in self._spectra(checked)]
        magnitude = torch.stack([values.abs().log().sum() for values in spectra]).sum().exp()
        sign = torch.stack([values.detach().sign().prod() for values in spectra]).prod()
        return (sign * magnitude).to(self.dtype)

    def logdet(self, damping: DampingLike = 0.0) -> Tensor:
        """Return ``log det (F + D)``, a scalar tensor.

        Args:
            damping: ``D``; see ``solve``.

        Raises:
            CurvlabError: The damped matrix is not positive definite, or this structure does not support the damping.
        """
        checked = self._damping(damping)
        return torch.stack([require_positive(values, checked).log().sum() for values in self._spectra(checked)]).sum()

    def sample(self, n: int, damping: DampingLike = 0.0, seed: int = 0) -> Tensor:
        """Draw ``n`` vectors from ``N(0, (F + D)^-1)``, ``(P, n)``: deviations of a Laplace posterior from its mean.

        Args:
            n: The number of vectors, from 1.
            damping: ``D``, the precision of the prior; see ``solve``.
            seed: Random seed, a whole number from 0.

        Raises:
            CurvlabError: The damped matrix is not positive definite, or an argument is not valid.
        """
        n, seed, checked = whole_number(n, "n", 1), whole_number(seed, "seed"), self._damping(damping)
        try:
            noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((self.space.total, n)))
        except (MemoryError, ValueError) as error:
            raise CurvlabError(
                f"{n:,} vectors of {self.space.total:,} numbers do not fit into memory: draw fewer at a time"
            ) from error
        return self._spectral(
            lambda e: require_positive(e, checked).rsqrt(), noise.to(dtype=self.dtype, device=self.device), checked
        )

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the matrix on another device or in another floating-point dtype.

        Raises:
            CurvlabError: The device or dtype is not available, or the entries are too large or too small for the dtype.
        """
        if dtype not in (None, *DTYPES):
            raise CurvlabError(f"the dtype of a matrix must be one of {', '.join(map(str, DTYPES))}, not {dtype!r}")
        return self._map(lambda t: move(t, device, dtype))

    def to_scipy(self) -> "LinearOperator":
        """Return a ``scipy.sparse.linalg.LinearOperator`` with the same products, in this matrix's dtype.

        Raises:
            CurvlabError: The matrix is in half precision, which SciPy does not support.
        """
        if self.dtype not in PRECISE:
            raise CurvlabError(f"SciPy does not support {self.dtype}: use matrix.to(dtype=torch.float32)")

        def product(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if np.iscomplexobj(vectors):
                return product(vectors.real) + 1j * product(vectors.imag)
            # A contiguous copy, because torch does not support negative strides.
            return (self @ torch.tensor(vectors.copy(), dtype=self.dtype, device=self.device)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(
            self.shape, matvec=lambda v: product(v.reshape(-1)), matmat=product, rmatvec=product, dtype=dtype
        )

    def __mul__(self, factor: float) -> Self:
        """Return the matrix times a number.

        Raises:
            CurvlabError: The factor is not a finite real number, or is outside the range of this dtype.
        """
        number, limits = real_number(factor, "the factor of a matrix"), torch.finfo(self.dtype)
        if number and self.dtype != torch.float64 and not limits.tiny <= abs(number) <= limits.max:
            raise CurvlabError(
                f"the factor {number:g} is outside the range of {self.dtype}: use matrix.to(dtype=torch.float64)"
            )
        return self._times(factor if isinstance(factor, Tensor) else number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        """Return the matrix divided by a number.

        Raises:
            CurvlabError: The divisor is zero or not a finite real number, or its reciprocal is outside the range of
                this dtype.
        """
        if not real_number(divisor, "the divisor of a matrix"):
            raise CurvlabError("a matrix cannot be divided by zero")
        return self * (1 / divisor)

    def __rtruediv__(self, dividend: object) -> Self:
        """Raise an error for ``b / F``."""
        raise CurvlabError("division by a matrix is not supported: use matrix.solve(b, damping)")

    def __neg__(self) -> Self:
        """Return the negative matrix."""
        return self * -1.0

    def __sub__(self, other: "CurvatureMatrix") -> Self:
        """Return the difference of two matrices of the same structure over the same parameters.

        Raises:
            CurvlabError: The parameter spaces or the structures differ.
        """
        return self._sum(other, "-")

    __rsub__ = __sub__  # called only if the other operand is not a matrix

    def _times(self, factor: float | Tensor) -> Self:
        """Return the matrix times a number that has been checked."""
        return self._map(lambda t: factor * t)

    def __add__(self, other: "CurvatureMatrix") -> Self:
        """Return the sum of two matrices of the same structure over the same parameters.

        Raises:
            CurvlabError: The parameter spaces or the structures differ.
        """
        return self._sum(other, "+")

    __radd__ = __add__  # called only if the other operand is not a matrix

    def _sum(self, other: "CurvatureMatrix", sign: str) -> Self:
        if not isinstance(other, CurvatureMatrix):
            raise CurvlabError(
                f"a matrix can be added to a matrix only, not to {describe_value(other)}: use the damping of solve for "
                "the diagonal, and sum(matrices[1:], matrices[0]) for a sum of matrices"
            )
        if self.space != other.space:
            raise CurvlabError("the two matrices have different parameter spaces and cannot be added")
        if type(other) is not type(self):
            raise CurvlabError(
                f"the sum of a {self.kind} and a {other.kind} matrix has neither structure; add their to_dense()"
            )
        quantities = dict.fromkeys([self.info.quantity, other.info.quantity])
        info = replace(self.info, quantity=f" {sign} ".join(quantities))
        return self._plus(other if sign == "+" else -other, info)

    def _plus(self, other: Self, info: Info) -> Self:
        theirs = other.tensors()
        return self.from_tensors({n: t + theirs[n].to(t) for n, t in self.tensors().items()}, self.space, info)

    def save(self, path: str | Path) -> None:
        """Write the matrix and its ``info`` to a safetensors file; the file is complete or not written at all.

        Args:
            path: An existing file is replaced; for a symbolic link, the target of the link is replaced.

        Raises:
            CurvlabError: The entries are not finite, or the file cannot be written: its folder is missing, the disk is
                full, or the path is a folder, a device or a pipe.
        """
        write_file(to_path(path), self._description(), self.tensors())

    def _description(self) -> dict[str, Any]:
        space = self.space
        return {"kind": self.kind, "names": space.names, "shapes": space.shapes, "info": asdict(self.info)}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self.from_tensors({name: function(t) for name, t in self.tensors().items()}, self.space, self.info)

    def __repr__(self) -> str:
        """Return the structure, the quantity, the size, the dtype and the device."""
        return f"{type(self).__name__}({self.info.quantity}, P={self.space.total:,}, {self.dtype}, {self.device})"
