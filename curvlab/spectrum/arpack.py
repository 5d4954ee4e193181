"""Extreme eigenvalues by ARPACK, through SciPy's ``eigsh``."""

import numpy as np
import torch

from curvlab.errors import CurvlabError, first_line
from curvlab.spectrum.operator import Products


def arpack_eigenpairs(
    products: Products, k: int, which: str, tol: float, start: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values ``(k,)``, vectors ``(P, k)`` and residuals ``(k,)``; the residuals take ``k`` further products.

    Raises:
        CurvlabError: ARPACK needs more products than allowed, does not converge, or ``k`` is the dimension.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    if k >= products.size:
        raise CurvlabError(f"eigsh cannot compute all eigenvalues ({k} of {products.size}): use method='lanczos'")

    def multiply(vector: np.ndarray) -> np.ndarray:
        if products.exhausted:
            raise CurvlabError(
                f"eigsh needs more than {products.count} products: increase max_matvecs or tol, or use "
                "method='lanczos', which returns its unconverged result"
            )
        product: np.ndarray = products(products.tensor(vector.reshape(-1))).cpu().numpy()
        return product

    dtype = torch.empty(0, dtype=products.dtype).numpy().dtype
    operator = LinearOperator((products.size, products.size), matvec=multiply, dtype=dtype)
    try:
        values, vectors = eigsh(operator, k=k, which=which, tol=tol, v0=start.cpu().numpy())
    except ArpackError as error:
        reason = first_line(error).removeprefix("ARPACK error ")
        raise CurvlabError(
            f"eigsh fails after {products.count} products ({reason}): increase tol, or use method='lanczos'"
        ) from error
    images = np.stack([multiply(vector) for vector in vectors.T], axis=1).astype(np.float64)
    return values, vectors, np.linalg.norm(images - vectors * values, axis=0)
