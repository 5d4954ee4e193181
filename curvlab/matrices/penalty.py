"""Quadratic penalties for past tasks."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.checks import describe_value, real_number
from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.entries import PRECISE
from curvlab.parameters import Vectors


@dataclass(frozen=True)
class _Term:
    """``1/2 d' F d - pull' d + constant``, where ``d`` is the displacement from the anchor."""

    matrix: CurvatureMatrix
    anchor: Tensor
    pull: Tensor | None = None  # None stands for zero
    constant: Tensor | float = 0.0

    def plus(self, matrix: CurvatureMatrix, anchor: Tensor) -> "_Term":
        """Return the sum with the penalty of another task, expanded around the anchor of that task.

        Training continues from the newer anchor, so that displacements are small and little precision is lost.

        Raises:
            CurvlabError: The matrices cannot be added.
        """
        together = self.matrix + matrix  # first, because this may raise an error
        anchor = anchor.to(self.anchor)
        way = anchor - self.anchor
        product = self.matrix @ way
        pull = product.neg() if self.pull is None else self.pull - product
        constant = self.constant + way @ product / 2 - (0.0 if self.pull is None else self.pull @ way)
        return _Term(together, anchor, pull, constant)


class Penalty:
    """The penalty ``1/2 sum_t (theta - mu_t)' F_t (theta - mu_t)`` of EWC and related methods.

    Tasks whose matrices can be added are merged into one quadratic with a linear term, so that any number of tasks
    costs as much as one. There are two exceptions: a sum of K-FAC matrices keeps one pair of factors per task (merge
    the pairs first with ``average_factors`` or ``nearest``), and matrices that cannot be added (EK-FAC) are kept
    separately.

    For a network in half precision, the curvature and the penalty are in float32, and the gradient is rounded.

    Examples:
        >>> from curvlab.matrices import Diagonal, Info
        >>> from curvlab.parameters import ParameterSpace
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> space = ParameterSpace.of(model)
        >>> penalty = Penalty()
        >>> info = Info("fisher", "diag", "cross_entropy", "torch", 10)
        >>> penalty.add(Diagonal(torch.tensor([1.0, 3.0]), space, info), {"weight": torch.zeros(1, 2)})
        >>> penalty.value({"weight": torch.ones(1, 2)})
        tensor(2.)
        >>> parameters = dict(model.named_parameters())
        >>> penalty.add_gradient_(parameters, strength=100.0)  # after loss.backward(), before optimizer.step()
        >>> torch.equal(model.weight.grad, 100.0 * torch.tensor([[1.0, 3.0]]) * model.weight)
        True
    """

    def __init__(self) -> None:
        self._terms: list[_Term] = []

    def add(self, matrix: CurvatureMatrix, anchor: Vectors) -> None:
        """Add a task.

        Args:
            matrix: ``F_t``.
            anchor: ``mu_t``, flat or by parameter name (other names are ignored). It is copied.

        Raises:
            CurvlabError: The anchor does not have the space, dtype and device of the matrix, or is not finite.
        """
        if not isinstance(matrix, CurvatureMatrix):
            raise CurvlabError(f"a penalty needs a curvature matrix, not {describe_value(matrix)}")
        vector = matrix._flat(
            to_matrix_dtype(matrix, anchor) if isinstance(anchor, Tensor) else select_parameters(matrix, anchor)
        )
        vector = vector.detach().clone()
        if vector.ndim != 1:
            raise CurvlabError(f"an anchor must be one vector, not a tensor of shape {tuple(vector.shape)}")
        if not bool(vector.isfinite().all()):
            raise CurvlabError("the anchor holds NaN or infinity: check the parameters after training")
        for i, term in enumerate(self._terms):
            with suppress(CurvlabError):  # they cannot be added
                self._terms[i] = term.plus(matrix, vector)
                return
        self._terms.append(_Term(matrix, vector))

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty, a scalar, differentiable in the parameters.

        Args:
            parameters: Parameters by name, such as ``dict(model.named_parameters())``; other names are ignored.

        Raises:
            CurvlabError: A parameter is missing, or has another shape, dtype or device than in the matrix.
        """
        value = torch.zeros(())
        for term in self._terms:
            way = term.matrix._flat(select_parameters(term.matrix, parameters)) - term.anchor
            linear = 0.0 if term.pull is None else term.pull @ way
            value = value.to(way) + term.matrix.quadratic_form(way) / 2 - linear + term.constant
        return value

    def add_gradient_(self, parameters: Mapping[str, Tensor], strength: float = 1.0) -> None:
        """Add ``strength`` times the gradient to ``grad`` of the parameters, in place and without a graph.

        The result is that of ``(strength * value(parameters)).backward()``, but computed much faster.

        Args:
            parameters: Parameters by name, such as ``dict(model.named_parameters())``; other names are ignored.
            strength: A finite factor.

        Raises:
            CurvlabError: A parameter is missing, does not require a gradient, or has another shape, dtype or device
                than in the matrix; or the strength is not a finite number.
        """
        strength = real_number(strength, "strength")
        with torch.no_grad():
            for term in self._terms:
                term_parameters = select_parameters(term.matrix, parameters)
                for name in term_parameters:
                    if not parameters[name].requires_grad:
                        raise CurvlabError(
                            f"{name} does not require a gradient (requires_grad is False): give "
                            "dict(model.named_parameters()), and a penalty on trainable parameters only"
                        )
                gradients = {
                    name: _gradient(parameters[name]).to(parameter.dtype) for name, parameter in term_parameters.items()
                }
                anchors = term.matrix.space.unflatten(term.anchor)
                way = {name: parameter - anchors[name] for name, parameter in term_parameters.items()}
                term.matrix.add_product_(gradients, way, strength)
                if term.pull is not None:
                    for name, pull in term.matrix.space.unflatten(term.pull).items():
                        gradients[name].add_(pull, alpha=-strength)
                for name, gradient in gradients.items():
                    if gradient is not parameters[name].grad:  # the parameter is in half precision
                        _gradient(parameters[name]).copy_(gradient)


#: The types of a penalty besides tensors and matrices, which must be allowed when a file with a penalty is read.
STORED = (Penalty, _Term)


def select_parameters(matrix: CurvatureMatrix, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a matrix, checked; parameters in half precision are converted to its dtype.

    Raises:
        CurvlabError: It is not a dict of tensors, or a parameter is missing or has another shape, dtype or device.
    """
    if isinstance(parameters, Mapping):
        names = set(matrix.space.names)
        parameters = {n: to_matrix_dtype(matrix, value) if n in names else value for n, value in parameters.items()}
    return matrix._named(parameters)


def to_matrix_dtype(matrix: CurvatureMatrix, tensor: Tensor) -> Tensor:
    """Return a tensor in half precision in the dtype of the matrix; other tensors are returned unchanged."""
    half = isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(matrix.dtype) if half and matrix.dtype in PRECISE else tensor


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
