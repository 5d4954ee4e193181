"""Curvature matrices of the layers of a model."""

from glob import escape

from torch import nn

from curvlab.estimators.registry import estimate
from curvlab.matrices import CurvatureMatrix
from curvlab.parameters import ParameterSpace, Selection
from curvlab.problem import Problem
from curvlab.quantities import Quantity
from curvlab.structures import Structure


def per_layer(
    problem: Problem,
    quantity: Quantity | str,
    structure: Structure | str = "implicit",
    *,
    backend: str = "auto",
    params: Selection | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict[str, CurvatureMatrix]:
    """Return a curvature matrix for each module with parameters of its own: the diagonal blocks, layer by layer.

    Args:
        problem: Model, loss and data.
        quantity: As for ``estimate``, like all further arguments.
        structure: Structure of every matrix.
        backend: Backend that computes them.
        params: Selection of parameters: glob patterns of names, compiled regular expressions, or a function of name
            and parameter (``curvlab.parameters.Selection``); None for all trainable ones.
        batch_size: Samples processed at once.
        progress: Show a progress bar on a terminal.

    Returns:
        Matrices by the name of the module, in the model's order; the name of the model itself is empty. A parameter
        that several modules share belongs to the first of them. An implicit matrix keeps graphs of up to 1 GB from its
        first product on.

    Raises:
        CurvlabError: As ``estimate``.
        UnsupportedError: As ``estimate``, for example for the Kronecker factors of a layer that has none.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> matrices = per_layer(Problem(model, data=(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))), "ggn")
        >>> [(name, matrix.shape) for name, matrix in matrices.items()]
        [('0', (9, 9)), ('2', (8, 8))]
    """
    return {
        layer: estimate(
            problem,
            quantity,
            structure,
            backend=backend,
            params=names,
            batch_size=batch_size,
            progress=progress,
        )
        for layer, names in patterns_by_module(problem.model, params).items()
    }


def patterns_by_module(model: nn.Module, params: Selection | None) -> dict[str, list[str]]:
    """Return, by module name, patterns that match exactly the module's own selected parameters."""
    modules: dict[str, list[str]] = {}
    for name in ParameterSpace.of(model, params).names:
        modules.setdefault(name.rpartition(".")[0], []).append(escape(name))
    return modules
