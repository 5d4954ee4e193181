"""Deflated power iteration: for comparison with published curves that were made with it."""

from math import isfinite

import numpy as np
import torch
from torch import Tensor

from curvlab.spectrum.arguments import generator_of, whole
from curvlab.spectrum.eigenvalues import EigenResult, number_of
from curvlab.spectrum.operator import Operator, Products, norm


def deflated_power_iteration(operator: Operator, k: int = 3, steps: int = 18, seed: int = 0) -> EigenResult:
    """Return the ``k`` eigenvalues of largest magnitude as power iteration sees them after so many products each.

    Eigenvalues are found one after another, each vector kept orthogonal to those before it. An iteration ends early
    when the estimate changes by less than 1e-5 of itself. This is how Mirzadeh et al. (2020) computed the spectra of
    their figures, with the defaults here; ``top_eigenvalues`` needs fewer products and says how accurate it is.

    Args:
        operator: Any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``matvec``.
        k: How many.
        steps: Products an eigenvalue.
        seed: Of the vectors from which it starts.

    Returns:
        The eigenvalues in the order in which they were found. ``converged`` is what this method takes for it: that
        every iteration ended early. The residuals tell how far off the values may be.

    Raises:
        CurvlabError: An argument is not right; a product is not finite.
    """
    products, generator = Products(operator), generator_of(seed)
    k, steps = number_of(k, products.size), whole("steps", steps, 1)
    rows = torch.zeros(k, products.size, dtype=products.dtype, device=products.device)
    values, residuals = np.zeros(k), np.zeros(k)
    largest, ended = 0.0, 0
    for i in range(k):
        found = rows[:i]
        following = products.gaussian(generator)
        for step in range(steps):
            left = _without(following, found)
            length = norm(left)
            # What rounding leaves of those found before is no direction: on all that is left the matrix is zero.
            if step and length <= 10 * torch.finfo(products.dtype).eps * largest:
                values[i], residuals[i] = 0.0, length
                ended += 1
                break
            rows[i] = left / length
            before = values[i]
            following = products(rows[i])
            if not isfinite(norm(following)):
                raise products.too_large()
            values[i] = float(rows[i] @ following)
            residuals[i] = norm(following - values[i] * rows[i])
            largest = max(largest, norm(following))
            if step and abs(values[i] - before) <= 1e-5 * abs(values[i]):
                ended += 1
                break
    errors = products.restored_tensor(residuals)
    return EigenResult(products.restored_tensor(values), rows.mT, errors, products.count, ended == k, "residual")


def _without(vector: Tensor, found: Tensor) -> Tensor:
    for _ in range(2):  # once leaves rounding errors that are large beside a small rest
        vector = vector - found.mT @ (found @ vector)
    return vector
