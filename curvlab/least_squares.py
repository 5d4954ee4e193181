"""Linear least squares: loss, gradient, Fisher and empirical Fisher in closed form, and descents along fields."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: A direction ``(..., P)`` for every point ``(..., P)`` of the parameters.
Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The loss ``1/(2N) sum_n (x_n . theta - y_n)^2 + precision/(2N) |theta|^2``, for batches of parameter vectors.

    The first term is the mean negative log-likelihood of targets with unit noise, up to a constant.

    Attributes:
        x: Features ``(N, P)``, float64; a column of ones for an intercept.
        y: Targets ``(N,)``, float64.
        precision: Precision of a Gaussian prior on the parameters; 0 for no prior.
    """

    x: Tensor
    y: Tensor
    precision: float = 0.0

    @property
    def fisher(self) -> Tensor:
        """Fisher ``(P, P)`` of the mean log-likelihood, ``X'X / N``, which does not depend on the parameters."""
        return self.x.T @ self.x / len(self.x)

    @property
    def hessian(self) -> Tensor:
        """Hessian ``(P, P)`` of the loss: the sum of the Fisher and the term of the prior."""
        return self.fisher + self.precision / len(self.x) * torch.eye(self.x.shape[1], dtype=self.x.dtype)

    @property
    def solution(self) -> Tensor:
        """Parameters ``(P,)`` with the smallest loss."""
        solved: Tensor = torch.linalg.solve(self.hessian, self.x.T @ self.y / len(self.x))
        return solved

    def loss(self, theta: Tensor) -> Tensor:
        """Return the loss ``(...)`` at parameters ``(..., P)``."""
        prior = self.precision / (2 * len(self.x)) * theta.square().sum(-1)
        return self._residuals(theta).square().mean(-1) / 2 + prior

    def excess(self, theta: Tensor) -> Tensor:
        """Return the loss ``(...)`` above the smallest loss, computed without cancellation."""
        off = theta - self.solution
        return ((off @ self.hessian) * off).sum(-1) / 2

    def gradient(self, theta: Tensor) -> Tensor:
        """Return the gradient ``(..., P)`` of the loss at parameters ``(..., P)``."""
        return (self._residuals(theta) @ self.x + self.precision * theta) / len(self.x)

    def empirical_fisher(self, theta: Tensor) -> Tensor:
        """Return the mean outer product ``(..., P, P)`` of the gradients of the samples, without the prior."""
        gradients = self._residuals(theta)[..., None] * self.x
        return gradients.mT @ gradients / len(self.x)

    def _residuals(self, theta: Tensor) -> Tensor:
        return theta @ self.x.T - self.y


def descend(field: Field, starts: Tensor, step: float, steps: int) -> Tensor:
    """Follow a field from several points by ``theta <- theta + step * field(theta)``.

    This is Euler's method for ``dtheta/dt = field(theta)``; with the field ``-gradient`` it is gradient descent.

    Args:
        field: The vector field.
        starts: Points ``(S, P)``.
        step: Step size.
        steps: Number of steps.

    Returns:
        The points ``(steps + 1, S, P)``, including the starts.
    """
    points = [starts]
    for _ in range(steps):
        points.append(points[-1] + step * field(points[-1]))
    return torch.stack(points)


def angles(vectors: Tensor, others: Tensor) -> Tensor:
    """Return the angles ``(...)`` between vectors ``(..., P)`` in degrees; NaN if one of the two is zero."""
    cosine = (vectors * others).sum(-1) / (vectors.norm(dim=-1) * others.norm(dim=-1))
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
