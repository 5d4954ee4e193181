"""Forecast the loss of a past task from its gradient and curvature, as the weights move away from its solution.

To second order ``L(w) - L(w0) = g'd + 1/2 d'C d`` with ``d = w - w0``, and the gradient ``g`` and curvature ``C`` of
the loss at ``w0``. Elastic weight consolidation minimises it without ``g'd``; Mirzadeh et al. (2020) bound forgetting
by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.files import make_writable_folder, to_path, write_whole
from curvlab.matrices import CurvatureMatrix, load
from curvlab.problem import Problem

_VECTORS = "expansion.pt"


@dataclass(frozen=True)
class LossExpansion:
    """Second-order expansions of a loss around the same weights, one for each curvature matrix.

    Attributes:
        loss: The mean loss over the samples, in nats.
        weights: The weights ``w0``, ``(P,)``.
        gradient: The gradient of the loss there, ``(P,)``, float64.
        matrices: Curvature matrices of the loss there, by name.

    Raises:
        CurvlabError: Weights, gradient and matrices are not of one size.

    Examples:
        >>> import torch
        >>> from curvlab import Problem
        >>> x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(3, 2, dtype=torch.float64)
        >>> problem = Problem(model, "squared_error", (x, x[:, :2]))
        >>> expansion = expand_loss(problem, ["dense"])
        >>> moved = expansion.weights + 1
        >>> forecast = expansion.forecast(moved)
        >>> torch.nn.utils.vector_to_parameters(moved, model.parameters())
        >>> change = loss_and_gradient(problem)[0] - expansion.loss
        >>> abs(forecast["gradient"] + forecast["dense"] - change) < 1e-10  # the loss is quadratic
        True
    """

    loss: float
    weights: Tensor
    gradient: Tensor
    matrices: Mapping[str, CurvatureMatrix]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Tensor) or self.weights.ndim != 1:
            raise CurvlabError(f"the weights of an expansion must be a tensor (P,), not {describe_value(self.weights)}")
        _check_vector(self.gradient, "the gradient", self.weights)
        for name, matrix in self.matrices.items():
            if matrix.space.total != len(self.weights):
                raise CurvlabError(
                    f"the matrix {name} is over {matrix.space.total:,} parameters, but the expansion over "
                    f"{len(self.weights):,}; take those of one model"
                )

    def forecast(self, weights: Tensor) -> dict[str, float]:
        """Return the terms of the expansions at other weights: ``g'd`` as ``gradient``, and ``1/2 d'C d`` by name.

        Args:
            weights: ``(P,)``, on the device of the expansion.

        Raises:
            CurvlabError: The weights are not such a tensor.
        """
        _check_vector(weights, "weights", self.weights)
        step = weights - self.weights
        terms = {
            name: 0.5 * float(matrix.quadratic_form(step.to(matrix.dtype))) for name, matrix in self.matrices.items()
        }
        return {"gradient": float(step.double() @ self.gradient), **terms}

    def save(self, folder: Path) -> None:
        """Write the expansion into a folder, which is created; ``load_expansion`` reads it.

        Raises:
            CurvlabError: The folder cannot be written, or a matrix is implicit.
        """
        folder = to_path(folder)
        make_writable_folder(folder)
        for name, matrix in self.matrices.items():
            matrix.save(folder / f"{name}.safetensors")
        file = BytesIO()
        vectors = {"loss": self.loss, "weights": self.weights, "gradient": self.gradient, "names": [*self.matrices]}
        torch.save(vectors, file)
        write_whole(folder / _VECTORS, file.getvalue())


def load_expansion(folder: Path) -> LossExpansion:
    """Return the expansion that ``LossExpansion.save`` wrote into a folder.

    Raises:
        CurvlabError: The folder holds no expansion, or a file is damaged.
    """
    folder = to_path(folder)
    file = folder / _VECTORS
    if not file.is_file():
        raise CurvlabError(f"there is no expansion in {folder}, which has no file {_VECTORS}; write one with save")
    try:
        vectors = torch.load(file, weights_only=True)
        loss, weights, gradient, names = (vectors[key] for key in ("loss", "weights", "gradient", "names"))
    except Exception as error:  # a broken file can make the unpickler fail in any way
        raise CurvlabError(f"{file} cannot be read (truncated, or not an expansion); write it again") from error
    return LossExpansion(loss, weights, gradient, {name: load(folder / f"{name}.safetensors") for name in names})


def _check_vector(vector: object, what: str, like: Tensor) -> None:
    if not isinstance(vector, Tensor) or (vector.shape, vector.device) != (like.shape, like.device):
        given = f"{describe_value(vector)}{f' on {vector.device}' if isinstance(vector, Tensor) else ''}"
        raise CurvlabError(
            f"{what} must be a tensor ({len(like)},) on {like.device}, as the weights of the expansion, not {given}"
        )


def expand_loss(problem: Problem, structures: Sequence[str], quantity: str = "fisher") -> LossExpansion:
    """Return the second-order expansions of a problem's loss around its present weights.

    Args:
        problem: Model, loss and data.
        structures: Structures of the curvature that ``curvlab.estimate`` stores, such as ``diag`` and ``kfac``.
        quantity: Quantity that ``curvlab.estimate`` computes.

    Raises:
        CurvlabError: ``curvlab.estimate`` cannot compute one of them, or an argument is not valid.
    """
    if isinstance(structures, str) or not isinstance(structures, Sequence):
        raise CurvlabError(f"structures must be a list, such as ['diag', 'kfac'], not {describe_value(structures)}")
    loss, gradient = loss_and_gradient(problem)
    weights = problem.space.flatten(problem.parameters()).detach().clone()
    return LossExpansion(loss, weights, gradient, {name: estimate(problem, quantity, name) for name in structures})


def loss_and_gradient(problem: Problem) -> tuple[float, Tensor]:
    """Return the mean loss of a problem in nats and its gradient, ``(P,)`` in float64.

    Raises:
        CurvlabError: It is not a problem, or the data or outputs of the model do not fit the loss.
    """
    if not isinstance(problem, Problem):
        raise CurvlabError(f"problem must be a curvlab.Problem, not {describe_value(problem)}")
    leaves = {name: value.requires_grad_() for name, value in problem.parameters().items()}
    loss, gradient = 0.0, torch.zeros(problem.space.total, dtype=torch.float64, device=problem.device)
    for inputs, targets in problem.batches():
        with torch.enable_grad():
            values = problem.loss.values(problem.forward(leaves, inputs), targets)
            slopes = torch.autograd.grad(values.sum(), list(leaves.values()), materialize_grads=True)
        loss += float(values.detach().sum(dtype=torch.float64))
        gradient += torch.cat([slope.flatten() for slope in slopes])
    return loss / problem.num_samples, gradient / problem.num_samples
