"""What every curvature matrix can do, derived from a handful of methods that each structure writes."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from safetensors.torch import save as serialise
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlab.checks import real_number, shown, whole_number
from curvlab.errors import CurvlabError, first_line
from curvlab.files import to_path, write_whole
from curvlab.matrices.damping import Damping, DampingLike
from curvlab.parameters import ParameterSpace, Vectors

V = TypeVar("V", bound=Vectors)

#: Of the files that ``save`` writes; 1 had no checksum.
FORMAT = 2

#: The dtypes in which a matrix is inverted, and all those of its entries: half precision is for products and files.
PRECISE = (torch.float32, torch.float64)
DTYPES = (torch.float16, torch.bfloat16, *PRECISE)


@dataclass(frozen=True)
class Info:
    """Where a matrix came from.

    ``seconds`` is wall time; ``samples`` and ``seed`` are those of Monte Carlo labels; ``rejected`` says what was not
    taken, a backend or the rule for a parameter, and why.
    """

    quantity: str
    structure: str
    loss: str
    backend: str
    num_samples: int
    samples: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    seconds: float = 0.0
    rejected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what a file could not give back.

        Raises:
            CurvlabError: A field is of another type, or negative, or not finite.
        """
        if not isinstance(self.rejected, (tuple, list)) or not all(isinstance(told, str) for told in self.rejected):
            raise CurvlabError(f"rejected of a matrix's info cannot be {shown(self.rejected)}")
        object.__setattr__(self, "rejected", tuple(self.rejected))  # a file gives a list
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            kind = (int, float) if field.type is float else field.type
            number = isinstance(value, (int, float))
            if (
                not isinstance(value, kind)  # type: ignore[arg-type]
                or isinstance(value, bool)
                or (number and not (value >= 0 and math.isfinite(value)))
            ):
                raise CurvlabError(f"{field.name} of a matrix's info cannot be {shown(value)}")


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
        def inverse(eigenvalues: Tensor) -> Tensor:
            if not eigenvalues.shape[-1]:  # of an empty parameter
                return eigenvalues
            smallest, largest = eigenvalues.abs().amin(dim=-1), eigenvalues.abs().amax(dim=-1)
            singular = ~(smallest > self._resolution(largest))  # also where they are NaN or infinite
            if bool(singular.any()):
                raise CurvlabError(
                    f"F + {damping} is singular: its eigenvalues reach from {smallest[singular][0].item():.2g} to "
                    f"{largest[singular][0].item():.2g} in size; raise the damping"
                )
            return eigenvalues.reciprocal()

        return self._spectral(inverse, vectors, damping)

    def logdet(self, damping: DampingLike = 0.0) -> Tensor:
        """Return ``log det (F + D)``, a scalar tensor.

        Args:
            damping: ``D``; see ``solve``.

        Raises:
            CurvlabError: The damped matrix is not positive definite, or the damping is not what this structure can add.
        """
        of = self._damping(damping)
        return torch.stack([self._positive(values, of).log().sum() for values in self._spectra(of)]).sum()

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
            lambda e: self._positive(e, of).rsqrt(), noise.to(dtype=self.dtype, device=self.device), of
        )

    def _resolution(self, largest: Tensor) -> Tensor:
        # Eigenvalues that are zero come out as a few rounding errors of the largest in their block.
        limits = torch.finfo(self.dtype)
        return (10 * limits.eps * largest).clamp(min=limits.tiny)

    def _positive(self, eigenvalues: Tensor, damping: Damping) -> Tensor:
        if not eigenvalues.shape[-1]:  # of an empty parameter
            return eigenvalues
        smallest, largest = eigenvalues.amin(dim=-1), eigenvalues.abs().amax(dim=-1)
        if not bool((smallest > self._resolution(largest)).all()):  # also where they are NaN or infinite
            raise CurvlabError(
                f"F + {damping} is not positive definite: its smallest eigenvalue is {smallest.min().item():.2g}; "
                "raise the damping"
            )
        return eigenvalues

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the matrix on another device or in another floating dtype.

        Raises:
            CurvlabError: There is no such device or floating dtype, or the entries are too large or small for it.
        """
        if dtype not in (None, *DTYPES):
            raise CurvlabError(f"a matrix is in {', '.join(map(str, DTYPES))}, not {dtype!r}")
        return self._map(lambda t: _moved(t, device, dtype))

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
        file = to_path(path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise CurvlabError("a matrix with entries that are NaN or infinite is not saved")
        description = {"format": FORMAT} | self._description()
        description["checksum"] = checksum(description, tensors)
        write_whole(file, serialise(tensors, metadata={"curvlab": json.dumps(description)}))

    def _description(self) -> dict[str, Any]:
        space = self.space
        return {"kind": self.kind, "names": space.names, "shapes": space.shapes, "info": asdict(self.info)}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self.from_tensors({name: function(t) for name, t in self.tensors().items()}, self.space, self.info)

    def __repr__(self) -> str:
        """Name the structure, the quantity and the size."""
        return f"{type(self).__name__}({self.info.quantity}, P={self.space.total:,}, {self.dtype}, {self.device})"


def checksum(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 (hex) of all that a file says and holds, on the CPU."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(tensors: Iterable[object]) -> None:
    """Require that the tensors of a matrix are dense, of one floating dtype and on one device.

    Raises:
        CurvlabError: One is not; the message says what it is.
    """
    kinds = set()
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            raise CurvlabError(
                f"a matrix is made of dense tensors in {', '.join(map(str, DTYPES))}, not {shown(tensor)}"
            )
        kinds.add((tensor.dtype, tensor.device))
    if len(kinds) > 1:
        raise CurvlabError("the tensors of a matrix differ in dtype or device: move them with to()")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of this one are added up."""
    return torch.promote_types(dtype, torch.float32)


def frobenius(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of all the entries together, a scalar tensor in float32 at least.

    In float64 and scaled: squares of small entries vanish, and those of large ones overflow.
    """
    tensors = [tensor.double() for tensor in tensors]
    largest = torch.stack([t.detach().abs().amax() if t.numel() else t.new_zeros(()) for t in tensors]).amax()
    scale = torch.where(largest > 0, largest, 1)
    norms = torch.stack([torch.linalg.vector_norm(tensor / scale) for tensor in tensors])
    norm: Tensor = scale * torch.linalg.vector_norm(norms)
    return norm


def damped_eigh(matrix: Tensor, undamped: Callable[[], tuple[Tensor, Tensor]], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of a block plus its damping.

    Args:
        matrix: ``(p, p)``.
        undamped: Its own, which serve every damping that is one number.
        shift: ``()`` or ``(p,)``.
    """
    if shift.ndim:
        return symmetric_eigh(matrix + shift.diag())
    values, vectors = undamped()
    return values + shift, vectors


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, computed in float64.

    In float32 LAPACK fails to converge on rank-deficient curvature, depending on batch size and threads.

    Raises:
        CurvlabError: The matrix is not finite or not symmetric.
    """
    wide = matrix.double()
    if wide.numel():
        off = (wide - wide.mT).detach().abs().max()
        if not bool(off <= wide.detach().abs().max() * torch.finfo(matrix.dtype).eps ** 0.5):
            raise CurvlabError("a matrix, or a block or factor of one, is not finite or not symmetric")
    values, vectors = torch.linalg.eigh(wide)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _moved(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor elsewhere, in which its largest entry keeps its digits."""
    try:
        moved = tensor.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = first_line(error)
        raise CurvlabError(f"the matrix cannot be moved to {device!r}: {reason}") from error
    if moved.is_meta:
        raise CurvlabError("the matrix cannot be moved to 'meta', where tensors have no entries")
    limits = torch.finfo(moved.dtype)
    if moved.dtype != tensor.dtype and limits.smallest_normal > torch.finfo(tensor.dtype).smallest_normal:
        largest = float(tensor.detach().abs().amax()) if tensor.numel() else 0.0
        if math.isfinite(largest) and largest and not limits.smallest_normal <= largest <= limits.max:
            raise CurvlabError(
                f"entries of the matrix reach {largest:.2g}, which is beyond {moved.dtype}: scale it first"
            )
    return moved


def require_finite(vectors: Tensor) -> Tensor:
    """Return right-hand sides, of which a system has no solution that is right unless they are finite.

    Raises:
        CurvlabError: One is not.
    """
    with suppress(RuntimeError):  # under torch.func.vmap values are not known
        if not bool(vectors.isfinite().all()):
            raise CurvlabError("the right-hand side of solve holds NaN or infinity")
    return vectors
