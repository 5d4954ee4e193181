"""Linear least squares in closed form: loss, gradient, Fisher and empirical Fisher, and descents along fields."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: A direction ``(..., P)`` for every point ``(..., P)`` of the parameters.
Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The loss ``1/(2N) sum_n (x_n . theta - y_n)^2 + precision/(2N) |theta|^2``, at many parameters at a time.

    The first term is the mean negative log-likelihood of targets with unit noise, up to a constant.

    Attributes:
        x: Features ``(N, P)``, float64; a column of ones for an intercept.
        y: Targets ``(N,)``, float64.
        precision: Of a Gaussian prior on the parameters; 0 for none.
    """

    x: Tensor
    y: Tensor
    precision: float = 0.0

    @property
    def fisher(self) -> Tensor:
        """The Fisher ``(P, P)`` of the mean likelihood, which does not depend on the parameters: ``X'X / N``."""
        return self.x.T @ self.x / len(self.x)

    @property
    def hessian(self) -> Tensor:
        """The Hessian ``(P, P)`` of the loss: the Fisher and the prior's part."""
        return self.fisher + self.precision / len(self.x) * torch.eye(self.x.shape[1], dtype=self.x.dtype)

    @property
    def solution(self) -> Tensor:
        """The parameters ``(P,)`` at which the loss is least."""
        solved: Tensor = torch.linalg.solve(self.hessian, self.x.T @ self.y / len(self.x))
        return solved

    def loss(self, theta: Tensor) -> Tensor:
        """Return the loss ``(...)`` at parameters ``(..., P)``."""
        prior = self.precision / (2 * len(self.x)) * theta.square().sum(-1)
        return self._residuals(theta).square().mean(-1) / 2 + prior

    def excess(self, theta: Tensor) -> Tensor:
        """Return the loss ``(...)`` above the smallest one, from the distance to the solution: without cancellation."""
        off = theta - self.solution
        return ((off @ self.hessian) * off).sum(-1) / 2

    def gradient(self, theta: Tensor) -> Tensor:
        """Return the gradient ``(..., P)`` of the loss at parameters ``(..., P)``."""
        return (self._residuals(theta) @ self.x + self.precision * theta) / len(self.x)

    def empirical_fisher(self, theta: Tensor) -> Tensor:
        """Return the mean outer product ``(..., P, P)`` of the samples' gradients, without the prior's part."""
        gradients = self._residuals(theta)[..., None] * self.x
        return gradients.mT @ gradients / len(self.x)

    def _residuals(self, theta: Tensor) -> Tensor:
        return theta @ self.x.T - self.y


def descend(field: Field, starts: Tensor, step: float, steps: int) -> Tensor:
    """Follow a field from several points: ``theta <- theta + step * field(theta)``.

    It is Euler's method for ``dtheta/dt = field(theta)``, and with a field of ``-gradient`` it is gradient descent.

    Args:
        field: The field.
        starts: Points ``(S, P)``.
        step: Length of a step.
        steps: Their number.

    Returns:
        The points ``(steps + 1, S, P)``, the starts among them.
    """
    points = [starts]
    for _ in range(steps):
        points.append(points[-1] + step * field(points[-1]))
    return torch.stack(points)


def angles(vectors: Tensor, others: Tensor) -> Tensor:
    """Return the angles ``(...)`` between vectors ``(..., P)`` in degrees; NaN where one of the two is zero."""
    cosine = (vectors * others).sum(-1) / (vectors.norm(dim=-1) * others.norm(dim=-1))
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
