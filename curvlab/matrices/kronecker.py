"""Kronecker factors: a block ``S (x) A`` per layer, and sums of such blocks."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property, reduce
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from curvlab.checks import describe_value, real_number
from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.damping import Damping
from curvlab.matrices.eigen import symmetric_eigh
from curvlab.matrices.entries import at_least_float32, check_tensors, frobenius
from curvlab.matrices.info import Info
from curvlab.matrices.layers import HomogeneousWeight, group_layers
from curvlab.parameters import ParameterSpace

_LARGEST_DENSE_BLOCK = 5_000  # rows; its eigenvectors in float64 take 200 MB and minutes


class LayerwiseMatrix(CurvatureMatrix):
    """Base class of the structures with one block per layer, over the homogeneous weight ``(o, d)`` of the layer.

    The keys of the blocks determine the layers; the bias is the last column (``curvlab.matrices.layers``).
    """

    def __init__(self, space: ParameterSpace, info: Info, keys: Collection[str]) -> None:
        super().__init__(space, info)
        self.layers = group_layers(space, keys)

    @abstractmethod
    def _product(self, name: str, homogeneous: Tensor) -> Tensor:
        """Return the product of a layer's block with ``(K, o, d)``."""

    @abstractmethod
    def _layer_diagonal(self, name: str) -> Tensor:
        """Return the diagonal of a layer's block, ``(o, d)``."""

    def _number(self, name: str, damping: Damping) -> Tensor:
        """Return the damping of a layer, ``()``; only a single number leaves the eigenvectors unchanged.

        Raises:
            CurvlabError: The damping differs within the layer.
        """
        layer = self.layers[name]
        number = damping.over([n for n in (layer.weight, layer.bias) if n is not None])
        if number.ndim:
            raise CurvlabError(
                f"{self.kind} needs one damping per layer, the same for its weight and bias, but that of "
                f"{name or 'the model'} is not one number (one tensor, if it requires a gradient): give one, or use "
                "another structure (dense, block_diag, diag), or Dense(F.to_dense(), F.space, F.info)"
            )
        return number

    def _by_layer(self, vectors: Tensor, product: Callable[[str, Tensor], Tensor]) -> Tensor:
        parts = dict(zip(self.space.names, vectors.split(list(self.space.sizes)), strict=True))
        return self._assemble({name: product(name, layer.join(parts)) for name, layer in self.layers.items()})

    def _assemble(self, homogeneous: Mapping[str, Tensor]) -> Tensor:
        products: dict[str, list[Tensor]] = {}  # one per group
        for name, layer in self.layers.items():
            for parameter, part in layer.split(homogeneous[name]).items():
                products.setdefault(parameter, []).append(part)
        return torch.cat([part for name in self.space.names for part in products[name]])

    def _matmul(self, vectors: Tensor) -> Tensor:
        return self._by_layer(vectors, self._product)

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``(P,)``."""
        return self._assemble_diagonal(self._layer_diagonal)

    def _assemble_diagonal(self, layer: Callable[[str], Tensor]) -> Tensor:
        return self._assemble({name: layer(name).unsqueeze(0) for name in self.layers}).squeeze(1)


class Eigenbasis(NamedTuple):
    """A layer's block ``(U_S (x) U_A) diag(values) (U_S (x) U_A)'``: eigenvectors in columns, ``values`` ``(o, d)``.

    If ``A`` is diagonal, ``U_A`` is the identity, which is stored as its diagonal ``(d,)``.
    """

    U_A: Tensor
    U_S: Tensor
    values: Tensor

    def spectral(self, function: Callable[[Tensor], Tensor], homogeneous: Tensor) -> Tensor:
        """Return ``f(F) V`` for ``(K, o, d)``; the eigenvalues of the layer are one block."""
        values = function(self.values.flatten()).view_as(self.values)
        products = self.U_S @ (values * times(self.U_S.mT @ homogeneous, self.U_A))
        return products @ self.U_A.mT if self.U_A.ndim > 1 else products

    def spectral_diagonal(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the diagonal of ``f(F)``, ``(o, d)``."""
        values = function(self.values.flatten()).view_as(self.values)
        diagonal = self.U_S.square() @ values
        return diagonal @ self.U_A.square().mT if self.U_A.ndim > 1 else diagonal


class Factors(NamedTuple):
    """A layer's block ``sum_k S_k (x) A_k``: ``A`` ``(K, d, d)``, if diagonal ``(K, d)``, and ``S`` ``(K, o, o)``."""

    A: Tensor
    S: Tensor

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the pairs ``(A_k, S_k)``."""
        return zip(self.A, self.S, strict=True)


class KFAC(LayerwiseMatrix):
    """Kronecker-factored curvature: a block ``sum_k S_k (x) A_k`` per layer (Martens and Grosse, 2015).

    An estimate has one pair of factors. A sum of two matrices keeps both pairs, because a sum of Kronecker products is
    not a Kronecker product. So online Laplace with ``+`` is exact, at a cost that grows with the number of pairs.
    ``average_factors`` and ``nearest`` merge the pairs into one. With several pairs, ``solve``, ``sample``, ``logdet``
    and ``eigenvalues`` form the block of each layer, up to 5,000 rows. (A congruence could diagonalise two pairs at
    once, but not with damping or with singular factors.)

    Args:
        factors: By layer name, or another key (see ``curvlab.matrices.layers``): ``A`` from the inputs of the layer and
            ``S`` from its output gradients. The ``A`` of an embedding is diagonal and has the shape ``(K, d)``.
        space: Parameters: weights and biases of the layers.
        info: Provenance of the matrix.

    Examples:
        >>> space = ParameterSpace(("fc.weight",), ((2, 3),))
        >>> info = Info("fisher", "kfac", "cross_entropy", "torch", 10)
        >>> matrix = KFAC({"fc": Factors(torch.ones(1, 3, 3), torch.eye(2).unsqueeze(0))}, space, info)
        >>> matrix @ torch.arange(6.0)
        tensor([ 3.,  3.,  3., 12., 12., 12.])
    """

    kind: ClassVar[str] = "kfac"

    def __init__(self, factors: Mapping[str, Factors], space: ParameterSpace, info: Info) -> None:
        super().__init__(space, info, factors)
        check_tensors(tensor for of_layer in factors.values() for tensor in of_layer)
        for name, (a, s) in factors.items():
            o, d = self.layers[name].shape
            sizes = (d,) if self.layers[name].diagonal else (d, d)
            if tuple(a.shape) != (len(s), *sizes) or tuple(s.shape) != (len(a), o, o) or not len(a):
                raise CurvlabError(
                    f"the factors of {name or 'the model'} must have shapes (K, {', '.join(map(str, sizes))}) and "
                    f"(K, {o}, {o}), not "
                    f"{tuple(a.shape)} and {tuple(s.shape)}"
                )
        self.factors = {name: factors[name] for name in self.layers}

    def tensors(self) -> dict[str, Tensor]:
        """Return ``LAYER|A``, ``(K, d, d)`` or ``(K, d)``, and ``LAYER|S``, ``(K, o, o)``, for every layer."""
        return {f"{name}|{key}": t for name, f in self.factors.items() for key, t in f._asdict().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], space: ParameterSpace, info: Info) -> Self:
        """Create a matrix from the result of ``tensors()``; ``(d, d)`` and ``(o, o)`` are one pair."""
        keys = dict.fromkeys(name.rpartition("|")[0] for name in tensors)
        layers = group_layers(space, keys)
        single = {f"{key}|A": 1 if layer.diagonal else 2 for key, layer in layers.items()}  # dimensions of one pair
        stacked = {name: t.unsqueeze(0) if t.ndim == single.get(name, 2) else t for name, t in tensors.items()}
        return cls({key: Factors(stacked[f"{key}|A"], stacked[f"{key}|S"]) for key in keys}, space, info)

    # Algebra -----------------------------------------------------------------------------------------------------

    def _product(self, name: str, homogeneous: Tensor) -> Tensor:
        return reduce(torch.add, (times(s @ homogeneous, a) for a, s in self.factors[name].pairs()))

    def add_product_(self, outputs: Mapping[str, Tensor], vectors: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * F v`` to named tensors in place; see ``CurvatureMatrix.add_product_``."""
        outputs, vectors, scale = self._named(outputs), self._named(vectors), real_number(scale, "scale")
        with torch.no_grad():
            for name, layer in self.layers.items():
                if not layer.is_plain:
                    names = [n for n in (layer.weight, layer.bias) if n is not None]
                    product = self._product(name, layer.join({n: vectors[n].reshape(-1, 1) for n in names}))
                    for n, part in layer.split(product).items():
                        output = outputs[n].chunk(layer.groups)[layer.group]
                        output.add_(part.reshape(output.shape), alpha=scale)
                    continue
                for a, s in self.factors[name].pairs():
                    _add_pair_(layer, a, s, outputs, vectors, scale)

    @cached_property
    def _factor_eigh(self) -> dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """The eigenvalues and eigenvectors of ``A`` and of ``S``, for the layers with one pair."""
        pairs = {name: next(f.pairs()) for name, f in self.factors.items() if len(f.A) == 1}
        return {name: (symmetric_eigh(a), symmetric_eigh(s)) for name, (a, s) in pairs.items()}

    @cached_property
    def _bases(self) -> dict[str, Eigenbasis | tuple[Tensor, Tensor]]:
        return {name: self._basis(name) for name in self.layers}

    def _basis(self, name: str) -> Eigenbasis | tuple[Tensor, Tensor]:
        pairs = len(self.factors[name].A)
        if pairs == 1:
            (a_values, a_basis), (s_values, s_basis) = self._factor_eigh[name]
            return Eigenbasis(a_basis, s_basis, s_values.outer(a_values))
        o, d = self.layers[name].shape
        if o * d > _LARGEST_DENSE_BLOCK:
            raise CurvlabError(
                f"{name or 'the model'} has {pairs} pairs of Kronecker factors over {o * d:,} parameters, but "
                f"their eigenvectors can be computed only up to {_LARGEST_DENSE_BLOCK:,}; merge the pairs with "
                "average_factors() or nearest()"
            )
        return symmetric_eigh(
            reduce(torch.add, (torch.kron(s, a if a.ndim > 1 else a.diag()) for a, s in self.factors[name].pairs()))
        )

    def _damped(self, name: str, damping: Damping) -> Eigenbasis | tuple[Tensor, Tensor]:
        """Return the eigenvectors and the damped eigenvalues of a layer's block."""
        shift = self._number(name, damping.exact)
        if damping.factored:
            return self._damp_factors(name, shift)
        basis = self._bases[name]
        if isinstance(basis, Eigenbasis):
            return basis._replace(values=basis.values + shift)
        values, vectors = basis
        return values + shift, vectors

    def _damp_factors(self, name: str, number: Tensor) -> Eigenbasis:
        a, s = self.factors[name]
        layer = name or "the model"
        if len(a) > 1:
            raise UnsupportedError(
                f"a factored damping needs one pair of Kronecker factors per layer, but {layer} has {len(a)}: merge "
                "them with average_factors() or nearest(), or give the number of the damping, which is exact"
            )
        if bool(number < 0):
            raise CurvlabError(f"a factored damping must be at least 0, but that of {layer} is {number.item():g}")
        (a_values, a_basis), (s_values, s_basis) = self._factor_eigh[name]
        if not (bool(a.any()) and bool(s.any())):
            return Eigenbasis(a_basis, s_basis, number.expand(len(s_values), len(a_values)))
        a_mean, s_mean = (values.mean(dtype=torch.float64) for values in (a_values, s_values))
        if not (bool(a_mean > 0) and bool(s_mean > 0)):
            raise UnsupportedError(
                f"a factored damping needs factors with positive traces, unlike those of {layer}: give the number of "
                "the damping, which is exact"
            )
        pi, root = (a_mean / s_mean).sqrt(), number.sqrt()
        return Eigenbasis(a_basis, s_basis, (s_values + (root / pi).to(root)).outer(a_values + (root * pi).to(root)))

    def _spectral(self, function: Callable[[Tensor], Tensor], vectors: Tensor, damping: Damping) -> Tensor:
        def product(name: str, homogeneous: Tensor) -> Tensor:
            basis = self._damped(name, damping)
            if isinstance(basis, Eigenbasis):
                return basis.spectral(function, homogeneous)
            values, vectors = basis
            return (homogeneous.flatten(1) @ vectors * function(values) @ vectors.mT).view_as(homogeneous)

        return self._by_layer(vectors, product)

    def _spectral_diagonal(self, function: Callable[[Tensor], Tensor], damping: Damping) -> Tensor:
        def layer(name: str) -> Tensor:
            basis = self._damped(name, damping)
            if isinstance(basis, Eigenbasis):
                return basis.spectral_diagonal(function)
            values, vectors = basis
            return (vectors.square() @ function(values)).view(self.layers[name].shape)

        return self._assemble_diagonal(layer)

    def _spectra(self, damping: Damping) -> Iterable[Tensor]:
        for name in self.layers:
            basis = self._damped(name, damping)
            yield basis.values.flatten() if isinstance(basis, Eigenbasis) else basis[0]

    def _layer_diagonal(self, name: str) -> Tensor:
        a, s = map(_diagonals, self.factors[name])
        return s.mT @ a

    def trace(self) -> Tensor:
        """Return the trace, a scalar tensor."""
        return torch.stack([_traces(f.A) @ _traces(f.S) for f in self.factors.values()]).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm, a scalar tensor, through ``tr(S_k S_l) tr(A_k A_l)``."""
        return frobenius(map(_norm, self.factors.values())).to(at_least_float32(self.dtype))

    def _times(self, factor: float | Tensor) -> Self:
        # Scale S only.
        return self._with({name: Factors(a, factor * s) for name, (a, s) in self.factors.items()})

    def _plus(self, other: Self, info: Info) -> Self:
        return type(self)(
            {
                name: Factors(torch.cat([a, other.factors[name].A.to(a)]), torch.cat([s, other.factors[name].S.to(s)]))
                for name, (a, s) in self.factors.items()
            },
            self.space,
            info,
        )

    def _with(self, factors: Mapping[str, Factors]) -> Self:
        return type(self)(factors, self.space, self.info)

    # Merges ------------------------------------------------------------------------------------------------------

    def average_factors(self, weights: Sequence[float] | None = None) -> Self:
        """Merge the pairs of each layer into the one pair ``(sum S) (x) (mean A)``.

        This is exact if all ``A`` or all ``S`` are equal. The result is K times the product of the mean factors, which
        continual-learning methods with running means of both factors accumulate (DLCFT, Shon et al., 2022). It depends
        on how the scale of a product is split between its factors. The product of the sums (Ritter et al., 2018) is K
        times as large.

        Args:
            weights: Weight of each pair in the mean; None for equal weights. With ``(K, 1)``, one more pair is added to
                a matrix that already is the merge of K pairs, which gives the average of all.

        Raises:
            CurvlabError: The number of weights is not the number of pairs, or the weights do not define a mean.
        """

        def merge(factors: Factors) -> Factors:
            a, s = factors
            if weights is not None and not isinstance(weights, Sized):
                raise CurvlabError(f"weights must be a sequence of numbers, not {describe_value(weights)}")
            if weights is not None and len(weights) != len(a):
                raise CurvlabError(
                    f"weights must have one number for each of the {len(a)} pairs of factors, not {len(weights)}"
                )
            of_pairs = [1.0] * len(a) if weights is None else [real_number(w, "a weight of a pair") for w in weights]
            if min(of_pairs) < 0 or not sum(of_pairs):
                raise CurvlabError(
                    f"weights must not be negative, and not all zero; these are {describe_value(weights)}"
                )
            shares = a.new_tensor(of_pairs)
            mean = torch.tensordot(shares / shares.sum(), a, dims=1)
            return Factors(mean.unsqueeze(0), s.sum(dim=0, keepdim=True))

        return self._merge_pairs(merge)

    def nearest(self) -> Self:
        """Merge the pairs of each layer into the one pair that is nearest to their sum in Frobenius norm.

        This is the leading singular pair of the rearranged sum ``sum_k vec(S_k) vec(A_k)'`` (Van Loan and Pitsianis,
        1993), computed from the ``K x K`` Gram matrices of the factors. The pair is positive semi-definite if all
        factors are. Some continual-learning papers use the same name for another rule, which adds the factors of two
        products, balanced by their traces.
        """
        return self._merge_pairs(_nearest)

    def _merge_pairs(self, merge: Callable[[Factors], Factors]) -> Self:
        return self._with({name: f if len(f.A) == 1 else merge(f) for name, f in self.factors.items()})


class TKFAC(KFAC):
    """Trace-restricted K-FAC: one pair per layer with the trace of the exact block (Gao et al., 2021).

    The estimator computes the restricted factors; here, a merge of pairs keeps the trace of every layer.
    """

    kind: ClassVar[str] = "tkfac"

    def _merge_pairs(self, merge: Callable[[Factors], Factors]) -> Self:
        def merge_with_trace(factors: Factors) -> Factors:
            a, s = merge(factors)
            merged = _traces(a) @ _traces(s)
            ratio = _traces(factors.A) @ _traces(factors.S) / merged if bool(merged) else merged
            return Factors(a, s * ratio)

        return super()._merge_pairs(merge_with_trace)


def _add_pair_(
    layer: HomogeneousWeight,
    a: Tensor,
    s: Tensor,
    outputs: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
    scale: float,
) -> None:
    """Add ``scale * S V A`` to the weight and bias of a layer.

    Weight and bias are multiplied separately with the blocks of ``A``: this avoids a copy that joins them, and products
    with the width of the weight are faster than products with one more column.
    """
    outs, i = layer.shape[0], layer.inputs
    blocks = {layer.weight: slice(0, i), layer.bias: slice(i, None)}
    columns = {name: columns for name, columns in blocks.items() if name is not None}
    for name, of_output in columns.items():
        output = outputs[name]
        right = a.new_zeros(outs, output.numel() // outs)
        for other, of_input in columns.items():
            right.addmm_(vectors[other].reshape(outs, -1), a[of_input, of_output])
        if output.is_contiguous():
            output.view(outs, -1).addmm_(s, right, alpha=scale)
        else:
            output.add_((s @ right).view_as(output), alpha=scale)


def times(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Return ``vectors @ matrix``; a diagonal matrix is given as its diagonal, ``(d,)``."""
    return vectors @ matrix if matrix.ndim > 1 else vectors * matrix


def _diagonals(factors: Tensor) -> Tensor:
    return factors.diagonal(dim1=1, dim2=2) if factors.ndim > 2 else factors


def _traces(factors: Tensor) -> Tensor:
    return _diagonals(factors).sum(dim=1, dtype=at_least_float32(factors.dtype))


def _norm(factors: Factors) -> Tensor:
    """Return the Frobenius norm of a layer's block in float64; scaling avoids underflow of fourth powers."""
    scales = [torch.where((largest := t.detach().double().abs().amax()) > 0, largest, 1) for t in factors]
    grams = [_gram(t.double() / scale) for t, scale in zip(factors, scales, strict=True)]
    return (grams[0] * grams[1]).sum().clamp(min=0).sqrt() * scales[0] * scales[1]


def _gram(factors: Tensor) -> Tensor:
    """Return ``tr(F_k F_l)``, ``(K, K)``, in float64, because squares of small float32 factors underflow."""
    flat = factors.flatten(1).double()
    return flat @ flat.mT


def _nearest(factors: Factors) -> Factors:
    gram_a, gram_s = map(_gram, factors)
    values, basis = torch.linalg.eigh(gram_s)
    root = basis * values.clamp(min=0).sqrt() @ basis.mT
    # The rearranged sum is Q root A with an orthonormal Q, so its left singular vectors are Q times these.
    values, basis = torch.linalg.eigh(root @ gram_a @ root)
    leading = basis[:, values >= values[-1] * (1 - 1e-9)]
    # Among equally near products, take the projection of the sum of the S, which is positive semi-definite if they are.
    weights = root @ (leading @ (leading.mT @ root.sum(dim=1)))
    if not bool(weights.any()):
        weights = root @ leading[:, -1]
    weights = weights / weights.abs().max().clamp(min=torch.finfo(weights.dtype).tiny)
    a = torch.tensordot(weights.to(factors.A), factors.A, dims=1)
    # Given A, least squares gives the best S.
    size = weights @ gram_a @ weights
    best = gram_a @ weights / size if bool(size) else torch.zeros_like(weights)
    return Factors(a.unsqueeze(0), torch.tensordot(best.to(factors.S), factors.S, dims=1).unsqueeze(0))
