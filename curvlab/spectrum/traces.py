"""The trace and the diagonal of a matrix from matrix-vector products.

References:
    Hutchinson (1990), Communications in Statistics 19; Bekas, Kokiopoulou and Saad (2007), Applied Numerical
    Mathematics 57; Meyer, Musco, Musco and Woodruff (2021), SOSA (Hutch++); Epperly, Tropp and Webber (2024), SIAM
    Journal on Matrix Analysis 45 (XTrace, XDiag); Efron and Stein (1981), Annals of Statistics 9 (the jackknife).
"""

from dataclasses import replace
from math import hypot, sqrt
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from curvlab.spectrum.arguments import check_choice, check_real, check_whole, make_generator
from curvlab.spectrum.density import iterate_columns
from curvlab.spectrum.estimate import Estimate
from curvlab.spectrum.operator import Operator, Products
from curvlab.spectrum.sketch import LeftOut, Sketch, as_array

TraceMethod = Literal["xtrace", "hutch++", "hutchinson"]
DiagonalMethod = Literal["xdiag", "hutchinson"]

_FEWEST = 6  # smallest number of products; fewer give no useful variance
_FIRST = 20  # number of products before the first check of the precision


def trace(
    operator: Operator,
    *,
    method: TraceMethod = "xtrace",
    precision: float | None = None,
    max_matvecs: int = 100,
    seed: int = 0,
) -> Estimate:
    """Estimate the trace.

    With ``precision``, the number of products is doubled until half of the 95 % interval is at most this fraction of
    the value. If ``max_matvecs`` allows as many products as there are parameters, the trace is computed exactly before
    the limit is reached.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        method: ``xtrace`` treats the largest eigenvalues exactly and samples the rest, and uses every vector for both;
            it keeps three vectors in memory for every two products. ``hutch++`` uses separate vectors, and keeps four
            for every three products. ``hutchinson`` is the mean of ``z' A z`` over random signs, and keeps no vectors.
        precision: Relative precision, such as 0.05 for plus or minus 5 %; None for exactly ``max_matvecs`` products.
        max_matvecs: Number of products; with ``precision``, the largest number of products.
        seed: Random seed of the random vectors.

    Returns:
        The trace with its standard error. For XTrace this is the jackknife error over its vectors, which is rather too
        large than too small (Efron and Stein, 1981). The authors of XTrace propose the spread of its terms, which is
        too small because the terms share their vectors.

    Raises:
        CurvlabError: An argument is not valid, a product is not finite, or the operator is not symmetric.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((1000,),)), Info("", "diag", "", "", 1)
        >>> matrix = Diagonal(torch.arange(1.0, 1001.0).double() ** -2, space, info)
        >>> estimate = trace(matrix, precision=0.01)
        >>> estimate.converged, bool(abs(estimate.value - matrix.trace()) < estimate.half_width), estimate.matvecs
        (True, True, 40)
    """
    methods: dict[str, type[_Method]] = {
        "xtrace": _XTrace,
        "hutch++": _HutchPlusPlus,
        "hutchinson": _Hutchinson,
    }
    check_choice("method", method, tuple(methods))
    estimator = methods[method](Products(operator), make_generator(seed))
    estimate = _estimate(estimator, precision, max_matvecs)
    value = estimate.value.sum().cpu()
    if not bool(value.isfinite()):
        raise estimator.products.overflow_error()
    return replace(estimate, value=value, standard_error=estimate.standard_error.sum().cpu())


def diagonal(
    operator: Operator,
    *,
    method: DiagonalMethod = "xdiag",
    precision: float | None = None,
    max_matvecs: int = 100,
    seed: int = 0,
) -> Estimate:
    """Estimate the diagonal.

    Like ``trace``, with one number and one standard error per entry. The precision is that of all entries together: the
    norm of the half-widths divided by the norm of the diagonal.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        method: ``xdiag`` treats the largest eigenvalues exactly and samples the rest, and keeps three vectors in memory
            for every two products; ``hutchinson`` is the mean of ``z * A z`` over random signs (Bekas et al., 2007).
        precision: Relative precision, such as 0.05 for plus or minus 5 %; None for exactly ``max_matvecs`` products.
        max_matvecs: Number of products; with ``precision``, the largest number of products.
        seed: Random seed of the random vectors.

    Raises:
        CurvlabError: An argument is not valid, a product is not finite, or the operator is not symmetric.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> space, info = ParameterSpace(("w",), ((3,),)), Info("", "diag", "", "", 1)
        >>> diagonal(Diagonal(torch.tensor([1.0, 2.0, 3.0]), space, info)).value.tolist()
        [1.0, 2.0, 3.0]
    """
    methods: dict[str, type[_Method]] = {"xdiag": _XDiag, "hutchinson": _HutchinsonDiagonal}
    check_choice("method", method, tuple(methods))
    return _estimate(methods[method](Products(operator), make_generator(seed)), precision, max_matvecs)


class _Method(Protocol):
    """An estimator that can be extended by further products."""

    products: Products

    def __init__(self, products: Products, generator: np.random.Generator) -> None:
        """Initialise without a product."""

    def extend(self, matvecs: int) -> None:
        """Compute ``matvecs`` further products, or one fewer."""

    def estimate(self) -> Estimate:
        """Return the estimate from all products so far."""


def _estimate(method: _Method, precision: float | None, max_matvecs: int) -> Estimate:
    """Run a method until the precision or the limit of products is reached; an exact result is the diagonal."""
    products, size = method.products, method.products.size
    precision = None if precision is None else check_real("precision", precision, above=0)
    max_matvecs = check_whole("max_matvecs", max_matvecs, min(_FEWEST, size))
    batch = max_matvecs if precision is None else min(_FIRST, max_matvecs)
    while True:
        left = max_matvecs - products.count
        # Compute the exact value while the limit still allows it.
        if size <= left and (size <= batch or left - batch < size):
            entries = torch.stack([column[i].double() for i, column in enumerate(iterate_columns(products))])
            return Estimate(entries, torch.zeros_like(entries), products.count, True, size)
        method.extend(batch)
        estimate = method.estimate()
        if precision is None or estimate.precision <= precision:
            return _unscale(estimate, products)
        # Doubled: if the precision were checked after each product, it would often be reached by chance.
        batch = min(products.count, max_matvecs - products.count)
        if batch < _FEWEST:
            return _unscale(replace(estimate, converged=False), products)


def _unscale(estimate: Estimate, products: Products) -> Estimate:
    """Convert an estimate to the unit of the matrix."""
    value, error = (
        torch.as_tensor(products.unscale(of.cpu().numpy()), device=of.device)
        for of in (estimate.value, estimate.standard_error)
    )
    return replace(estimate, value=value, standard_error=error)


class _Hutchinson:
    """The mean of ``z' A z`` over vectors of random signs."""

    def __init__(self, products: Products, generator: np.random.Generator) -> None:
        self.products, self._generator = products, generator
        self._values: list[float] = []

    def extend(self, matvecs: int) -> None:
        for _ in range(matvecs):
            z = self.products.signs(self._generator)
            self._values.append(float((z * self.products(z)).sum(dtype=torch.float64)))

    def estimate(self) -> Estimate:
        values, n = np.array(self._values), len(self._values)
        return _scalar(self.products, values.mean(), values.std(ddof=1) / sqrt(n), 0.0, n)


class _HutchPlusPlus:
    """The exact trace on the range of a sketch, plus Hutchinson's estimate on its complement with separate vectors.

    The projection of such a vector onto the complement is scaled to its expected length.
    """

    def __init__(self, products: Products, generator: np.random.Generator) -> None:
        self.products, self._generator = products, generator
        self._sketch = Sketch(products, products.gaussian, generator)
        self._vectors: list[Tensor] = []
        self._forms: list[float] = []

    def extend(self, matvecs: int) -> None:
        self._sketch.extend(matvecs // 3)
        for _ in range(matvecs - 2 * (matvecs // 3)):
            z = self.products.gaussian(self._generator)
            self._vectors.append(z)
            self._forms.append(float((z * self.products(z)).sum(dtype=torch.float64)))

    def estimate(self) -> Estimate:
        basis, images = self._sketch.basis, self._sketch.images
        vectors = torch.stack(self._vectors)
        inside, images_inside, core = _gram(basis, vectors), _gram(images, vectors), _gram(basis, images)
        forms = np.array(self._forms) + (inside * (core @ inside - 2 * images_inside)).sum(axis=0)
        m, n = len(basis), len(vectors)
        terms = forms * (self.products.size - m) / (_squares(vectors) - (inside**2).sum(axis=0))
        value = np.trace(core) + terms.mean()
        return _scalar(self.products, value, terms.std(ddof=1) / sqrt(n), m * self._sketch.noise(), n)


class _XTrace:
    """Hutch++ in which every vector in turn is left out of the sketch and used as the sample on the complement."""

    def __init__(self, products: Products, generator: np.random.Generator) -> None:
        self.products = products
        self._sketch = Sketch(products, products.gaussian, generator)

    def extend(self, matvecs: int) -> None:
        self._sketch.extend(matvecs // 2)

    def estimate(self) -> Estimate:
        sketch = self._sketch
        m, size = sketch.tests.shape
        triangle, left = sketch.triangle, LeftOut.of(sketch.triangle)
        inside, core = _gram(sketch.basis, sketch.tests), _gram(sketch.basis, sketch.images)
        core = (core + core.T) / 2
        # Forms of the s_i (rows) with each other and with the vectors (columns) of coefficients ``inside``.
        s_s = left.directions.T @ core @ left.directions
        s_w, s_aw = left.directions.T @ inside, left.directions.T @ core @ inside
        own, own_s, own_w, own_aw = left.own, np.diag(s_s), np.diag(s_w), np.diag(s_aw)
        # w'Aw - 2 w'AQQ'w, where the product Aw lies in the basis, with the coefficients of the triangle.
        start = (inside * (core @ inside - triangle)).sum(axis=0)
        squares, whole = _squares(sketch.tests), (inside**2).sum(axis=0)

        forms = start + 2 * own_w * own - 2 * own_w * own_aw + own_w**2 * own_s
        lengths = squares - whole + own_w**2
        value = (np.trace(core) - own_s + (size - m + 1) * forms / lengths).mean()

        # The same with two vectors left out: ``i`` by the jackknife, ``j`` as the sample.
        first, second = left.diag * s_w + left.off * own_w, left.off * s_w + left.diag * own_w
        forms = start + 2 * second * own - 2 * (first * s_aw + second * own_aw)
        forms += first**2 * own_s[:, None] + 2 * first * second * s_s + second**2 * own_s
        lengths = squares - whole + first * s_w + second * own_w
        lost = left.diag * (own_s[:, None] + own_s) + 2 * left.off * s_s
        terms = np.trace(core) - lost + (size - m + left.lost) * forms / lengths
        np.fill_diagonal(terms, 0.0)
        without = terms.sum(axis=1) / (m - 1)
        return _scalar(self.products, value, sqrt(m - 1) * without.std(), m * sketch.noise(), m)


class _HutchinsonDiagonal:
    """The mean of ``z * A z`` over vectors of random signs, entry by entry."""

    def __init__(self, products: Products, generator: np.random.Generator) -> None:
        self.products, self._generator = products, generator
        self._n = 0
        self._mean = torch.zeros(products.size, dtype=torch.float64, device=products.device)
        self._deviations = torch.zeros_like(self._mean)  # root of the sum of squared deviations

    def extend(self, matvecs: int) -> None:
        for _ in range(matvecs):
            z = self.products.signs(self._generator)
            term = (z * self.products(z)).double()
            self._n += 1
            before = term - self._mean
            self._mean += before / self._n
            # Roots, because the squares of small entries may underflow.
            self._deviations = self._deviations.hypot(before.abs().sqrt() * (term - self._mean).abs().sqrt())

    def estimate(self) -> Estimate:
        error = self._deviations / sqrt(self._n * (self._n - 1))
        error = error.hypot(self.products.eps * self._mean.abs())
        return Estimate(self._mean.clone(), error, self.products.count, True, self._n)


class _XDiag:
    """The exact diagonal on the range of a sketch, plus Hutchinson's estimate with every vector left out in turn."""

    def __init__(self, products: Products, generator: np.random.Generator) -> None:
        self.products = products
        self._sketch = Sketch(products, products.signs, generator)

    def extend(self, matvecs: int) -> None:
        self._sketch.extend(matvecs // 2)

    def estimate(self) -> Estimate:
        sketch, left, noise = self._sketch, LeftOut.of(self._sketch.triangle), self._sketch.noise()
        m = len(sketch)
        directions, own, diag, off = (
            torch.from_numpy(array).to(sketch.basis.device)
            for array in (left.directions, left.own, left.diag, left.off)
        )
        diag, off = (pairs.clone().fill_diagonal_(0.0) for pairs in (diag, off))
        values, errors = [], []
        for part in _slices(sketch.basis):
            q, aq, z = (rows[:, part].double() for rows in (sketch.basis, sketch.images, sketch.tests))
            s, a_s = directions.mT @ q, directions.mT @ aq
            inside = (q * aq).sum(dim=0)
            value = inside + (own[:, None] * z * s - s * a_s).mean(dim=0)
            # The same with two vectors left out: one row per vector left out by the jackknife, a mean over all others.
            lost = diag.sum(dim=1)[:, None] * s * a_s + diag @ (s * a_s) + s * (off @ a_s) + a_s * (off @ s)
            sampled = s * ((off * own) @ z) + (diag * own) @ (z * s)
            without = inside + (sampled - lost) / (m - 1)
            error = (m - 1) ** 0.5 * without.std(dim=0, correction=0)
            values.append(value)
            errors.append(error.hypot(noise * q.square().sum(dim=0).sqrt() + self.products.eps * value.abs()))
        return Estimate(torch.cat(values), torch.cat(errors), self.products.count, True, m)


def _scalar(products: Products, value: float, error: float, rounding: float, samples: int) -> Estimate:
    """Return an estimate whose error combines sampling and rounding."""
    rounding += 2 * products.eps * abs(value)
    total = torch.tensor(hypot(error, rounding), dtype=torch.float64)
    return Estimate(torch.tensor(float(value), dtype=torch.float64), total, products.count, True, samples)


def _slices(rows: Tensor) -> list[slice]:
    """Return slices of the columns of ``(m, P)``, so that each part is small in float64."""
    return [slice(i, i + 2**16) for i in range(0, rows.shape[1], 2**16)]


def _gram(a: Tensor, b: Tensor) -> np.ndarray:
    """Return ``a b'`` for rows, summed in float64."""
    return as_array(torch.stack([a[:, part].double() @ b[:, part].double().mT for part in _slices(a)]).sum(dim=0))


def _squares(rows: Tensor) -> np.ndarray:
    return as_array(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)) ** 2
