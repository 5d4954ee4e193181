"""EK-FAC: a Kronecker-factored eigenbasis with corrected eigenvalues."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices.damping import Damping
from curvlab.matrices.entries import at_least_float32, check_tensors, frobenius
from curvlab.matrices.info import Info
from curvlab.matrices.kronecker import Eigenbasis, LayerwiseMatrix
from curvlab.parameters import ParameterSpace


class EKFAC(LayerwiseMatrix):
    """Eigenvalue-corrected K-FAC: ``(U_S (x) U_A) diag(values) (U_S (x) U_A)'`` per layer (George et al., 2018).

    Args:
        bases: By layer name, or another key (see ``curvlab.matrices.layers``): column eigenvectors ``U_A`` ``(d, d)``
            and ``U_S`` ``(o, o)``, and ``values`` ``(o, d)``. The ``U_A`` of an embedding is the identity, given as its
            diagonal ``(d,)``.
        space: Parameters: weights and biases of the layers.
        info: Provenance of the matrix.
    """

    kind: ClassVar[str] = "ekfac"

    def __init__(self, bases: Mapping[str, Eigenbasis], space: ParameterSpace, info: Info) -> None:
        super().__init__(space, info, bases)
        check_tensors(tensor for basis in bases.values() for tensor in basis)
        shapes = {}
        for name, layer in self.layers.items():
            o, d = layer.shape
            shapes[name] = ((d,) if layer.diagonal else (d, d), (o, o), (o, d))
        if {name: tuple(tuple(t.shape) for t in basis) for name, basis in bases.items()} != shapes:
            raise CurvlabError("the layers and the shapes of the bases and values do not match the parameters")
        self.bases = {name: bases[name] for name in self.layers}

    def tensors(self) -> dict[str, Tensor]:
        """Return ``LAYER|U_A``, ``(d, d)``, ``LAYER|U_S``, ``(o, o)``, and ``LAYER|values``, ``(o, d)``."""
        return {f"{name}|{key}": t for name, basis in self.bases.items() for key, t in basis._asdict().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:
        """Create a matrix from the result of ``tensors()``."""
        layers = dict.fromkeys(name.rpartition("|")[0] for name in tensors)
        return cls(
            {n: Eigenbasis(tensors[f"{n}|U_A"], tensors[f"{n}|U_S"], tensors[f"{n}|values"]) for n in layers},
            space,
            info,
        )

    def _product(self, name: str, homogeneous: Tensor) -> Tensor:
        return self.bases[name].spectral(lambda values: values, homogeneous)

    @cached_property
    def _orthonormal(self) -> Mapping[str, Eigenbasis]:
        """The bases, after checking that they are orthonormal, which inverses and eigenvalues need."""
        for name, basis in self.bases.items():
            for u in (basis.U_A, basis.U_S):
                if u.ndim == 1:  # a diagonal matrix
                    off = torch.linalg.vector_norm(u.square() - 1)
                else:
                    off = torch.linalg.matrix_norm(u.mT @ u - torch.eye(len(u), dtype=u.dtype, device=u.device))
                if not bool(off <= 1e-4 * len(u) ** 0.5):
                    raise CurvlabError(
                        f"the eigenbasis of {name or 'the model'} is not orthonormal, for example after half "
                        "precision, so that its values are not the eigenvalues: estimate it in float32"
                    )
        return self.bases

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        def product(name: str, homogeneous: Tensor) -> Tensor:
            shift = self._number(name, damping)
            return self._orthonormal[name].spectral(lambda values: function(values + shift), homogeneous)

        return self._by_layer(vectors, product)

    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        def layer(name: str) -> Tensor:
            shift = self._number(name, damping)
            return self._orthonormal[name].spectral_diagonal(lambda values: function(values + shift))

        return self._assemble_diagonal(layer)

    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        return [basis.values.flatten() + self._number(name, damping) for name, basis in self._orthonormal.items()]

    def _layer_diagonal(self, name: str) -> Tensor:
        return self.bases[name].spectral_diagonal(lambda values: values)

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor."""
        return torch.stack(
            [basis.values.sum(dtype=at_least_float32(self.dtype)) for basis in self.bases.values()]
        ).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor."""
        return frobenius(basis.values for basis in self.bases.values()).to(at_least_float32(self.dtype))

    def _times(self, factor: float | Tensor) -> Self:
        bases = {name: basis._replace(values=factor * basis.values) for name, basis in self.bases.items()}
        return type(self)(bases, self.space, self.info)

    def _plus(self, other: Self, info: Info) -> Self:
        pairs = {
            name: (basis, Eigenbasis(*(t.to(basis.values) for t in other.bases[name])))
            for name, basis in self.bases.items()
        }
        for name, (mine, theirs) in pairs.items():
            if not (torch.equal(mine.U_A, theirs.U_A) and torch.equal(mine.U_S, theirs.U_S)):
                raise CurvlabError(
                    f"the two ekfac matrices have different eigenbases for {name or 'the model'}, so that their sum "
                    "is not an ekfac matrix: estimate kfac, whose sums are exact, or add their to_dense()"
                )
        bases = {name: mine._replace(values=mine.values + theirs.values) for name, (mine, theirs) in pairs.items()}
        return type(self)(bases, self.space, info)
