"""Deflated power iteration, for comparison with published curves that were computed with it."""

from math import isfinite

import numpy as np
import torch
from torch import Tensor

from curvlab.spectrum.arguments import check_whole, make_generator
from curvlab.spectrum.eigenvalues import EigenResult, check_eigenvalue_count
from curvlab.spectrum.operator import Operator, Products, norm


def deflated_power_iteration(operator: Operator, k: int = 3, steps: int = 18, seed: int = 0) -> EigenResult:
    """Estimate the ``k`` eigenvalues of largest magnitude by power iteration with a fixed number of products each.

    The eigenvalues are computed one after another, and each vector is kept orthogonal to the previous ones. An
    iteration ends early if the relative change of the estimate is below 1e-5. Mirzadeh et al. (2020) computed the
    spectra in their figures with this method and these defaults. ``top_eigenvalues`` needs fewer products and estimates
    its error.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        k: Number of eigenvalues.
        steps: Largest number of products per eigenvalue.
        seed: Random seed of the start vectors.

    Returns:
        The eigenvalues in the order of their computation. ``converged`` is True if every iteration ended early, which
        does not imply a small error; the residuals bound the distance to the nearest eigenvalue.

    Raises:
        CurvlabError: An argument is not valid, or a product is not finite.
    """
    products, generator = Products(operator), make_generator(seed)
    k, steps = check_eigenvalue_count(k, products.size), check_whole("steps", steps, 1)
    rows = torch.zeros(k, products.size, dtype=products.dtype, device=products.device)
    values, residuals = np.zeros(k), np.zeros(k)
    largest, ended = 0.0, 0
    for i in range(k):
        found = rows[:i]
        following = products.gaussian(generator)
        for step in range(steps):
            left = _orthogonalise(following, found)
            length = norm(left)
            # If only rounding errors remain, the matrix is zero on the complement of the vectors found so far.
            if step and length <= 10 * torch.finfo(products.dtype).eps * largest:
                values[i], residuals[i] = 0.0, length
                ended += 1
                break
            rows[i] = left / length
            before = values[i]
            following = products(rows[i])
            if not isfinite(norm(following)):
                raise products.overflow_error()
            values[i] = float(rows[i] @ following)
            residuals[i] = norm(following - values[i] * rows[i])
            largest = max(largest, norm(following))
            if step and abs(values[i] - before) <= 1e-5 * abs(values[i]):
                ended += 1
                break
    errors = products.unscale_tensor(residuals)
    return EigenResult(products.unscale_tensor(values), rows.mT, errors, products.count, ended == k, "residual")


def _orthogonalise(vector: Tensor, found: Tensor) -> Tensor:
    for _ in range(2):  # twice, because rounding errors of the first pass are large compared with a small remainder
        vector = vector - found.mT @ (found @ vector)
    return vector
