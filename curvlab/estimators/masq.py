"""Closed form of the expectation of MaSQ over random partitions into batches."""

from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.quantities import MaSQ


def expected_masq(fim: Tensor, gradient: Tensor, samples: int, quantity: MaSQ) -> Tensor:
    """Return the expected diagonal of MaSQ over random partitions of N samples into batches of size B.

    For ``norm="mean"`` it is ``J^2 + (F - J^2) (N - B) / (B (N - 1))``: the empirical Fisher F for B = 1, the squared
    mean gradient J^2 for B = N. It follows from the variance of the mean of B of N values sampled without
    replacement. The expectation for ``sumsq`` is B times this value, for ``scaled`` 1/B times.

    Args:
        fim: Diagonal of the empirical Fisher F, ``(P,)``.
        gradient: The mean gradient J, ``(P,)``.
        samples: N.
        quantity: MaSQ with its batch size B and norm.

    Returns:
        Expected diagonal, ``(P,)``.

    Raises:
        CurvlabError: N is below 2 or not a multiple of B.

    Examples:
        >>> import torch
        >>> expected_masq(torch.tensor([4.0]), torch.tensor([1.0]), 10, MaSQ(batch_size=5, norm="mean"))
        tensor([1.3333])
    """
    size = quantity.batch_size
    if samples < 2 or samples % size:
        raise CurvlabError(
            f"the closed form needs at least 2 samples, a multiple of the batch size {size}; there are {samples}"
        )
    mean = gradient**2 + (fim - gradient**2) * (samples - size) / (size * (samples - 1))
    return mean * {"mean": 1.0, "sumsq": float(size), "scaled": 1 / size}[quantity.norm]
