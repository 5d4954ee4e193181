"""What every curvature matrix can do, derived from a handful of methods that each structure writes."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from safetensors.torch import save as serialise
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.files import write_whole
from curvlab.parameters import ParameterSpace, Vectors

V = TypeVar("V", bound=Vectors)

FORMAT = 1  # of the files that ``save`` writes


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


class CurvatureMatrix(ABC):
    """A symmetric matrix over a parameter space.

    Vectors are flat ``(P,)``, several as ``(P, K)``, or dicts of parameter-shaped tensors; an answer has its
    vector's form. A subclass writes ``tensors``, ``from_tensors``, ``_matmul``, ``_spectral``, ``_spectra``,
    ``diagonal`` and ``frobenius_norm``; everything else follows from them, and may be written again where there is
    a faster way.
    """

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
    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        """Return ``f(F) vectors`` for ``(P, K)``: the function acts on each of ``_spectra`` and keeps its shape."""

    @abstractmethod
    def _spectra(self) -> Iterable[Tensor]:
        """Return the eigenvalues, ``(..., n)``: a row holds those of one block, free of other blocks' rounding."""

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
            CurvlabError: The vector is not of this space.
        """
        return self._apply(self._matmul, vectors)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``F v`` of a flat ``(P,)``: the one method that eigenvalue solvers need."""
        return self @ vector

    def quadratic_form(self, delta: Vectors) -> Tensor:
        """Return ``delta' F delta``, a scalar, differentiable in ``delta`` (the penalty of EWC is half of it)."""
        flat = self._flat(delta)
        if flat.ndim != 1:
            raise CurvlabError(f"quadratic_form takes one vector, not a tensor of shape {tuple(flat.shape)}")
        return self._quadratic_form(flat)

    def _quadratic_form(self, delta: Tensor) -> Tensor:
        return delta @ self._matmul(delta.unsqueeze(1)).squeeze(1)

    def add_product_(self, outputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * F v`` to named tensors in place, without a graph: the gradient of a quadratic penalty.

        Args:
            outputs: By parameter name, such as gradients; other names are left alone.
            vectors: ``v``, by parameter name; other names are ignored.
            scale: A factor.

        Raises:
            CurvlabError: A parameter is missing, or a tensor's shape, dtype or device is not the matrix's.
        """
        outputs, vectors = self._named(outputs), self._named(vectors)
        with torch.no_grad():
            for name, product in (self @ vectors).items():
                outputs[name].add_(product, alpha=scale)

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of this space's parameters among these, checked."""
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
        """Return all eigenvalues in ascending order, ``(P,)``."""
        return torch.cat([values.flatten() for values in self._spectra()]).sort().values

    def to_dense(self) -> Tensor:
        """Return the matrix itself, ``(P, P)``."""
        return self._matmul(torch.eye(self.space.total, dtype=self.dtype, device=self.device))

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor."""
        return self.diagonal().sum()

    def solve(self, b: V, damping: float = 0.0) -> V:
        """Return ``(F + damping I)^-1 b``.

        Raises:
            CurvlabError: The damped matrix is singular to working precision.
        """
        return self._apply(lambda v: self._solve(v, damping), b)

    def _solve(self, vectors: Tensor, damping: float) -> Tensor:
        def inverse(eigenvalues: Tensor) -> Tensor:
            shifted = eigenvalues + damping
            smallest, largest = shifted.abs().amin(dim=-1), shifted.abs().amax(dim=-1)
            singular = smallest <= self._resolution(largest)
            if bool(singular.any()):
                raise CurvlabError(
                    f"F + {damping:g} I is singular: its eigenvalues reach from {float(smallest[singular][0]):.2g} to "
                    f"{float(largest[singular][0]):.2g} in size; raise the damping"
                )
            return shifted.reciprocal()

        return self._spectral(inverse, vectors)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det (F + damping I)``, a scalar tensor.

        Raises:
            CurvlabError: The damped matrix is not positive definite.
        """
        return torch.stack([self._positive(values, damping).log().sum() for values in self._spectra()]).sum()

    def sample(self, n: int, damping: float = 0.0, seed: int = 0) -> Tensor:
        """Draw ``n`` vectors from ``N(0, (F + damping I)^-1)``, the Laplace posterior's deviations; ``(P, n)``.

        Raises:
            CurvlabError: The damped matrix is not positive definite.
        """
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((self.space.total, n)))
        return self._spectral(
            lambda e: self._positive(e, damping).rsqrt(), noise.to(dtype=self.dtype, device=self.device)
        )

    def _resolution(self, largest: Tensor) -> Tensor:
        # Eigenvalues that are zero come out as a few rounding errors of the largest in their block.
        limits = torch.finfo(self.dtype)
        return (10 * limits.eps * largest).clamp(min=limits.tiny)

    def _positive(self, eigenvalues: Tensor, damping: float) -> Tensor:
        shifted = eigenvalues + damping
        smallest = shifted.amin(dim=-1)
        if bool((smallest <= self._resolution(shifted.abs().amax(dim=-1))).any()):
            raise CurvlabError(
                f"F + {damping:g} I is not positive definite: its smallest eigenvalue is {float(smallest.min()):.2g}; "
                "raise the damping"
            )
        return shifted

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the matrix on another device or in another floating dtype."""
        return self._map(lambda t: t.to(device=device, dtype=dtype))

    def to_scipy(self) -> LinearOperator:
        """Return a ``scipy.sparse.linalg.LinearOperator`` with the same products, in this matrix's dtype."""

        def product(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            # A contiguous copy: torch takes no negative strides.
            return (self @ torch.tensor(vectors.copy(), dtype=self.dtype, device=self.device)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=lambda v: product(v.reshape(-1)), matmat=product, rmatvec=product, dtype=dtype
        )

    def __mul__(self, factor: float) -> Self:
        """Return the matrix times a number."""
        return self._map(lambda t: factor * t)

    __rmul__ = __mul__

    def __add__(self, other: "CurvatureMatrix") -> Self:
        """Return the sum of two matrices of the same structure over the same parameters.

        Raises:
            CurvlabError: The parameter spaces or the structures differ.
        """
        if not isinstance(other, CurvatureMatrix):
            return NotImplemented
        if self.space != other.space:
            raise CurvlabError("the two matrices are over different parameters and cannot be added")
        if type(other) is not type(self):
            raise CurvlabError(
                f"a {self.kind} and a {other.kind} matrix have no sum of either structure; add their to_dense()"
            )
        quantities = dict.fromkeys([self.info.quantity, other.info.quantity])
        return self._plus(other, replace(self.info, quantity=" + ".join(quantities)))

    def _plus(self, other: Self, info: Info) -> Self:
        theirs = other.tensors()
        return self.from_tensors({n: t + theirs[n].to(t) for n, t in self.tensors().items()}, self.space, info)

    def save(self, path: str | Path) -> None:
        """Write the matrix and its ``info`` to a safetensors file, whole or not at all.

        Raises:
            CurvlabError: The file cannot be written.
        """
        description = {"format": FORMAT} | self._description()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        write_whole(Path(path), serialise(tensors, metadata={"curvlab": json.dumps(description)}))

    def _description(self) -> dict[str, Any]:
        space = self.space
        return {"kind": self.kind, "names": space.names, "shapes": space.shapes, "info": asdict(self.info)}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self.from_tensors({name: function(t) for name, t in self.tensors().items()}, self.space, self.info)

    def __repr__(self) -> str:
        """Name the structure, the quantity and the size."""
        return f"{type(self).__name__}({self.info.quantity}, P={self.space.total:,}, {self.dtype}, {self.device})"


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, computed in float64.

    In float32 LAPACK fails to converge on rank-deficient curvature, depending on batch size and threads.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
