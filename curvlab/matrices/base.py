"""What every curvature matrix can do, derived from a handful of methods that each structure writes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlab.checks import real_number, shown, whole_number
from curvlab.errors import CurvlabError
from curvlab.files import to_path
from curvlab.matrices.damping import Damping, DampingLike
from curvlab.matrices.eigen import invert, require_positive
from curvlab.matrices.entries import DTYPES, PRECISE, at_least_float32, move, require_finite
from curvlab.matrices.file_format import write_file
from curvlab.matrices.info import Info
from curvlab.parameters import ParameterSpace, Vectors

V = TypeVar("V", bound=Vectors)


class CurvatureMatrix(ABC):
    """A symmetric matrix over a parameter space.

    Vectors are flat ``(P,)``, several as ``(P, K)``, or dicts of parameter-shaped tensors; an answer has its
    vector's form, and is not finite where the vector is not.

    ``solve``, ``logdet`` and ``sample`` add ``D``, a diagonal, to the matrix: their ``damping`` is a number, a flat
    ``(P,)``, or a dictionary of numbers and tensors of the parameters' shapes. Kronecker factors take one number a
    layer, such as the prior precision of each; an implicit matrix takes any. They and ``eigenvalues`` are in float32
    at least: a matrix in half precision is refused.

    A subclass writes ``tensors``, ``from_tensors``, ``_matmul``, ``_spectral``, ``_spectra``, ``diagonal``, ``_times``
    and ``frobenius_norm``; everything else follows from them, and may be written again where there is a faster way.
    """

    __array_ufunc__ = None  # ``array @ matrix`` and ``array * matrix`` are ours to answer, not NumPy's

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type["CurvatureMatrix"]]] = {}

    def __init_subclass__(cls) -> None:
        """Register the structure under its ``kind``, by which a file names it."""
        if "kind" in vars(cls):  # a base that several structures share has none
            CurvatureMatrix.kinds[cls.kind] = cls

    def __init__(self, space: ParameterSpace, info: Info) -> None:
        self.space = space
        self.info = info

    # What a structure writes -------------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold the matrix, by name: what ``save`` writes and ``to`` moves."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:
        """Return the matrix that these tensors, named as ``tensors()`` names them, hold."""

    @abstractmethod
    def _matmul(self, vectors: Tensor) -> Tensor:
        """Return the product with ``(P, K)``."""

    @abstractmethod
    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        """Return ``f(F + D) vectors`` for ``(P, K)``: the function acts on each of ``_spectra`` and keeps its shape."""

    @abstractmethod
    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        """Return the eigenvalues of ``F + D``, ``(..., n)``: a row is one block's, free of other blocks' rounding."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""

    # What follows ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return self.space.total, self.space.total

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the entries."""
        return next(iter(self.tensors().values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return next(iter(self.tensors().values())).device

    def _apply(self, function: Callable[[Tensor], Tensor], vectors: V) -> V:
        flat = self._flat(vectors)
        answer = function(flat if flat.ndim == 2 else flat.unsqueeze(1))
        answer = answer if flat.ndim == 2 else answer.squeeze(1)
        return answer if isinstance(vectors, Tensor) else self.space.unflatten(answer)  # type: ignore[return-value]

    def _flat(self, vectors: Vectors) -> Tensor:
        of = vectors.values() if isinstance(vectors, Mapping) else [vectors]
        if not all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in of):
            raise CurvlabError(
                f"a vector is a dense tensor or a dictionary of such by parameter name, not {shown(vectors)}"
            )
        if len({(tensor.dtype, tensor.device) for tensor in of}) > 1:
            raise CurvlabError("the tensors of the vector differ in dtype or device: move them with to()")
        flat = self.space.flatten(vectors)
        if (flat.dtype, flat.device) != (self.dtype, self.device):
            raise CurvlabError(
                f"the vector is {flat.dtype} on {flat.device}, the matrix {self.dtype} on {self.device}: "
                "move one of them with to()"
            )
        return flat

    def __matmul__(self, vectors: V) -> V:
        """Return ``F v``.

        Raises:
            CurvlabError: The vector is not of this space, dtype and device.
        """
        return self._apply(self._matmul, vectors)

    def __rmatmul__(self, vectors: object) -> Self:
        """Refuse ``v @ F``, which is ``F @ v``."""
        raise CurvlabError("the matrix is symmetric and stands on the left: write matrix @ vector, with a tensor")

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``F v`` of a flat ``(P,)``: the one method that eigenvalue solvers need."""
        return self @ vector

    def quadratic_form(self, delta: Vectors) -> Tensor:
        """Return ``delta' F delta``, a scalar, differentiable in ``delta`` (the penalty of EWC is half of it).

        Raises:
            CurvlabError: ``delta`` is no vector of this space, or is finite where the number is not.
        """
        flat = self._flat(delta)
        if flat.ndim != 1:
            raise CurvlabError(f"quadratic_form takes one vector, not a tensor of shape {tuple(flat.shape)}")
        value = self._quadratic_form(flat)
        with suppress(RuntimeError):  # under torch.func.vmap values are not known
            if not bool(value.isfinite()) and bool(flat.isfinite().all()):
                wider = "" if self.dtype == torch.float64 else ", or take matrix and vector to torch.float64"
                raise CurvlabError(
                    f"delta' F delta is beyond {self.dtype}, or the matrix is not finite: make delta smaller{wider}"
                )
        return value

    def _quadratic_form(self, delta: Tensor) -> Tensor:
        return delta @ self._matmul(delta.unsqueeze(1)).squeeze(1)

    def add_product_(self, outputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * F v`` to named tensors in place, without a graph: the gradient of a quadratic penalty.

        Args:
            outputs: By parameter name, such as gradients; other names are left alone.
            vectors: ``v``, by parameter name; other names are ignored.
            scale: A factor.

        Raises:
            CurvlabError: A parameter is missing, a tensor's shape, dtype or device is not the matrix's, or the scale
                is no finite number.
        """
        outputs, vectors, scale = self._named(outputs), self._named(vectors), real_number(scale, "scale")
        with torch.no_grad():
            for name, product in (self @ vectors).items():
                outputs[name].add_(product, alpha=scale)

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of this space's parameters among these, checked."""
        if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise CurvlabError(f"tensors by parameter name are needed, not {shown(tensors)}")
        missing = [name for name in self.space.names if name not in tensors]
        if missing:
            raise CurvlabError(f"the matrix is over parameters that are not among those given: {', '.join(missing)}")
        named = {name: tensors[name] for name in self.space.names}
        dtype, device = self.dtype, self.device
        for (name, tensor), shape in zip(named.items(), self.space.shapes, strict=True):
            if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
                raise CurvlabError(
                    f"{name} is a {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; in the matrix it "
                    f"is a {dtype} of shape {shape} on {device}"
                )
        return named

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues in ascending order, ``(P,)``.

        Raises:
            CurvlabError: The matrix is in half precision, or not finite.
        """
        values = torch.cat([values.flatten() for values in self._spectra(self._damping(0.0))]).sort().values
        if not bool(values.isfinite().all()):
            raise CurvlabError("the matrix holds NaN or infinity and has no eigenvalues")
        return values

    def to_dense(self) -> Tensor:
        """Return the matrix itself, ``(P, P)``."""
        return self._matmul(torch.eye(self.space.total, dtype=self.dtype, device=self.device))

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor, in float32 at least."""
        return self.diagonal().sum(dtype=at_least_float32(self.dtype))

    def _damping(self, damping: DampingLike) -> Damping:
        """Return a user's damping, checked, for a matrix that can be inverted in its dtype."""
        if self.dtype not in PRECISE:
            raise CurvlabError(
                f"eigenvalues, solve, logdet and sample have too few digits in {self.dtype}: take them of "
                "matrix.to(dtype=torch.float32)"
            )
        return Damping.of(damping, self.space, self.dtype, self.device)

    def solve(self, b: V, damping: DampingLike = 0.0) -> V:
        """Return ``(F + D)^-1 b``.

        Args:
            b: One vector or several.
            damping: ``D``, the damping: a number, ``(P,)``, or a dictionary by parameter name.

        Raises:
            CurvlabError: The damped matrix is singular to working precision, ``b`` is not finite, or the damping is
                not what this structure can add.
        """
        of = self._damping(damping)
        return self._apply(lambda v: self._solve(require_finite(v), of), b)

    def _solve(self, vectors: Tensor, damping: Damping) -> Tensor:
        return self._spectral(lambda values: invert(values, damping), vectors, damping)

    def logdet(self, damping: DampingLike = 0.0) -> Tensor:
        """Return ``log det (F + D)``, a scalar tensor.

        Args:
            damping: ``D``; see ``solve``.

        Raises:
            CurvlabError: The damped matrix is not positive definite, or the damping is not what this structure can add.
        """
        of = self._damping(damping)
        return torch.stack([require_positive(values, of).log().sum() for values in self._spectra(of)]).sum()

    def sample(self, n: int, damping: DampingLike = 0.0, seed: int = 0) -> Tensor:
        """Draw ``n`` vectors from ``N(0, (F + D)^-1)``, the Laplace posterior's deviations; ``(P, n)``.

        Args:
            n: How many, from 1.
            damping: ``D``, the prior's precision; see ``solve``.
            seed: A whole number from 0: of one seed the draws are the same.

        Raises:
            CurvlabError: The damped matrix is not positive definite, or an argument is not as said.
        """
        n, seed, of = whole_number(n, "n", 1), whole_number(seed, "seed"), self._damping(damping)
        try:
            noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((self.space.total, n)))
        except (MemoryError, ValueError) as error:
            raise CurvlabError(f"{n:,} vectors of {self.space.total:,} numbers do not fit into memory") from error
        return self._spectral(
            lambda e: require_positive(e, of).rsqrt(), noise.to(dtype=self.dtype, device=self.device), of
        )

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the matrix on another device or in another floating dtype.

        Raises:
            CurvlabError: There is no such device or floating dtype, or the entries are too large or small for it.
        """
        if dtype not in (None, *DTYPES):
            raise CurvlabError(f"a matrix is in {', '.join(map(str, DTYPES))}, not {dtype!r}")
        return self._map(lambda t: move(t, device, dtype))

    def to_scipy(self) -> LinearOperator:
        """Return a ``scipy.sparse.linalg.LinearOperator`` with the same products, in this matrix's dtype.

        Raises:
            CurvlabError: The matrix is in half precision, which SciPy does not compute in.
        """
        if self.dtype not in PRECISE:
            raise CurvlabError(f"SciPy does not compute in {self.dtype}: take matrix.to(dtype=torch.float32)")

        def product(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if np.iscomplexobj(vectors):
                return product(vectors.real) + 1j * product(vectors.imag)
            # A contiguous copy: torch takes no negative strides.
            return (self @ torch.tensor(vectors.copy(), dtype=self.dtype, device=self.device)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=lambda v: product(v.reshape(-1)), matmat=product, rmatvec=product, dtype=dtype
        )

    def __mul__(self, factor: float) -> Self:
        """Return the matrix times a number.

        Raises:
            CurvlabError: It is no finite real number, or beyond this dtype.
        """
        number, limits = real_number(factor, "the factor of a matrix"), torch.finfo(self.dtype)
        if number and self.dtype != torch.float64 and not limits.tiny <= abs(number) <= limits.max:
            raise CurvlabError(f"the factor {number:g} is beyond {self.dtype}: take matrix.to(dtype=torch.float64)")
        return self._times(factor if isinstance(factor, Tensor) else number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        """Return the matrix divided by a number.

        Raises:
            CurvlabError: It is no finite real number, or zero, or its reciprocal is beyond this dtype.
        """
        if not real_number(divisor, "what a matrix is divided by"):
            raise CurvlabError("a matrix cannot be divided by zero")
        return self * (1 / divisor)

    def __rtruediv__(self, dividend: object) -> Self:
        """Refuse ``b / F``."""
        raise CurvlabError("nothing is divided by a matrix: solve(b, damping) gives its inverse times b")

    def __neg__(self) -> Self:
        """Return minus the matrix."""
        return self * -1.0

    def __sub__(self, other: "CurvatureMatrix") -> Self:
        """Return the difference of two matrices of the same structure over the same parameters.

        Raises:
            CurvlabError: The parameter spaces or the structures differ.
        """
        return self._sum(other, "-")

    __rsub__ = __sub__  # only of what is no matrix

    def _times(self, factor: float | Tensor) -> Self:
        """Return the matrix times a number, which is checked."""
        return self._map(lambda t: factor * t)

    def __add__(self, other: "CurvatureMatrix") -> Self:
        """Return the sum of two matrices of the same structure over the same parameters.

        Raises:
            CurvlabError: The parameter spaces or the structures differ.
        """
        return self._sum(other, "+")

    __radd__ = __add__  # only of what is no matrix

    def _sum(self, other: "CurvatureMatrix", sign: str) -> Self:
        if not isinstance(other, CurvatureMatrix):
            raise CurvlabError(
                f"a matrix is added to a matrix, not to {shown(other)}: the damping of solve adds to the diagonal, "
                "and sum() of matrices begins with one of them, sum(matrices[1:], matrices[0])"
            )
        if self.space != other.space:
            raise CurvlabError("the two matrices are over different parameters and cannot be added")
        if type(other) is not type(self):
            raise CurvlabError(
                f"a {self.kind} and a {other.kind} matrix have no sum of either structure; add their to_dense()"
            )
        quantities = dict.fromkeys([self.info.quantity, other.info.quantity])
        info = replace(self.info, quantity=f" {sign} ".join(quantities))
        return self._plus(other if sign == "+" else -other, info)

    def _plus(self, other: Self, info: Info) -> Self:
        theirs = other.tensors()
        return self.from_tensors({n: t + theirs[n].to(t) for n, t in self.tensors().items()}, self.space, info)

    def save(self, path: str | Path) -> None:
        """Write the matrix and its ``info`` to a safetensors file, whole or not at all.

        Args:
            path: A file of another content is replaced; of a symbolic link, the file that it leads to.

        Raises:
            CurvlabError: The entries are not finite, or the file cannot be written: its folder is missing or full, or
                the path is a folder, a device or a pipe.
        """
        write_file(to_path(path), self._description(), self.tensors())

    def _description(self) -> dict[str, Any]:
        space = self.space
        return {"kind": self.kind, "names": space.names, "shapes": space.shapes, "info": asdict(self.info)}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self.from_tensors({name: function(t) for name, t in self.tensors().items()}, self.space, self.info)

    def __repr__(self) -> str:
        """Name the structure, the quantity and the size."""
        return f"{type(self).__name__}({self.info.quantity}, P={self.space.total:,}, {self.dtype}, {self.device})"
