"""Quadratic penalties: what a training loop keeps of past tasks."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.checks import real_number, shown
from curvlab.errors import CurvlabError
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.entries import PRECISE
from curvlab.parameters import Vectors


@dataclass(frozen=True)
class _Term:
    """``1/2 d' F d - pull' d + constant``, where ``d`` is the way from the anchor."""

    matrix: CurvatureMatrix
    anchor: Tensor
    pull: Tensor | None = None  # which is zero
    constant: Tensor | float = 0.0

    def plus(self, matrix: CurvatureMatrix, anchor: Tensor) -> "_Term":
        """Return the sum with another task's penalty, written around that task's anchor.

        Training goes on from there, so that differences are small and few digits cancel.

        Raises:
            CurvlabError: The matrices have no sum.
        """
        together = self.matrix + matrix  # first of all: whether there is one
        anchor = anchor.to(self.anchor)
        way = anchor - self.anchor
        product = self.matrix @ way
        pull = product.neg() if self.pull is None else self.pull - product
        constant = self.constant + way @ product / 2 - (0.0 if self.pull is None else self.pull @ way)
        return _Term(together, anchor, pull, constant)


class Penalty:
    """``1/2 sum_t (theta - mu_t)' F_t (theta - mu_t)``: what elastic weight consolidation and its kin add to the loss.

    Tasks whose matrices can be added become one, with a linear term: any number of diagonals costs what one does. So
    do all structures but K-FAC, whose sum is exact and keeps a pair of factors a task (merge them before, with
    ``average_factors`` or ``nearest``), and matrices that have no sum (EK-FAC), which are kept apart.

    Of a network in half precision curvature is in float32, and so is the penalty; its gradient is then rounded.

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
            anchor: ``mu_t``, which is copied: flat, or by parameter name, where other names are ignored.

        Raises:
            CurvlabError: The anchor is not of the matrix's space, dtype and device, or not finite.
        """
        if not isinstance(matrix, CurvatureMatrix):
            raise CurvlabError(f"a penalty is of a curvature matrix, not of {shown(matrix)}")
        vector = matrix._flat(_widened(matrix, anchor) if isinstance(anchor, Tensor) else _named(matrix, anchor))
        vector = vector.detach().clone()
        if vector.ndim != 1:
            raise CurvlabError(f"an anchor is one vector, not a tensor of shape {tuple(vector.shape)}")
        if not bool(vector.isfinite().all()):
            raise CurvlabError("the anchor holds NaN or infinity")
        for i, term in enumerate(self._terms):
            with suppress(CurvlabError):  # they have no sum
                self._terms[i] = term.plus(matrix, vector)
                return
        self._terms.append(_Term(matrix, vector))

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty, a scalar, differentiable in the parameters.

        Args:
            parameters: By name, such as ``dict(model.named_parameters())``; other names are ignored.

        Raises:
            CurvlabError: A parameter is missing, or its shape, dtype or device is not the matrix's.
        """
        value = torch.zeros(())
        for term in self._terms:
            way = term.matrix._flat(_named(term.matrix, parameters)) - term.anchor
            linear = 0.0 if term.pull is None else term.pull @ way
            value = value.to(way) + term.matrix.quadratic_form(way) / 2 - linear + term.constant
        return value

    def add_gradient_(self, parameters: Mapping[str, Tensor], strength: float = 1.0) -> None:
        """Add ``strength`` times the gradient to the parameters' ``grad``, in place and without a graph.

        It is what ``backward`` of ``strength * value(parameters)`` does, at a fraction of the time.

        Args:
            parameters: By name, such as ``dict(model.named_parameters())``; other names are ignored.
            strength: A factor.

        Raises:
            CurvlabError: A parameter is missing or asks for no gradient, its shape, dtype or device is not the
                matrix's, or the strength is no finite number.
        """
        strength = real_number(strength, "strength")
        with torch.no_grad():
            for term in self._terms:
                of_term = _named(term.matrix, parameters)
                for name in of_term:
                    if not parameters[name].requires_grad:
                        raise CurvlabError(
                            f"{name} asks for no gradient (requires_grad is False), so that none can be added: give "
                            "dict(model.named_parameters()), and a penalty of what is trained"
                        )
                gradients = {
                    name: _gradient(parameters[name]).to(parameter.dtype) for name, parameter in of_term.items()
                }
                anchors = term.matrix.space.unflatten(term.anchor)
                way = {name: parameter - anchors[name] for name, parameter in of_term.items()}
                term.matrix.add_product_(gradients, way, strength)
                if term.pull is not None:
                    for name, pull in term.matrix.space.unflatten(term.pull).items():
                        gradients[name].add_(pull, alpha=-strength)
                for name, gradient in gradients.items():
                    if gradient is not parameters[name].grad:  # the parameter is in half precision
                        _gradient(parameters[name]).copy_(gradient)


#: The types of which a penalty consists, besides tensors and matrices: what a file that holds one may be read with.
STORED = (Penalty, _Term)


def _named(matrix: CurvatureMatrix, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a matrix's parameters among these, checked; those in half precision in its dtype, as curvature is.

    Raises:
        CurvlabError: They are no tensors by name, or one is missing or of another shape, dtype or device.
    """
    if isinstance(parameters, Mapping):
        names = set(matrix.space.names)
        parameters = {n: _widened(matrix, value) if n in names else value for n, value in parameters.items()}
    return matrix._named(parameters)


def _widened(matrix: CurvatureMatrix, tensor: Tensor) -> Tensor:
    half = isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(matrix.dtype) if half and matrix.dtype in PRECISE else tensor


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
