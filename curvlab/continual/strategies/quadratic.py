"""Functions shared by the methods with a quadratic penalty for past tasks."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvlab.continual.options import check_whole
from curvlab.errors import CurvlabError
from curvlab.estimators import BACKENDS, estimate
from curvlab.estimators.registry import find_backends
from curvlab.forms import unknown_name_message
from curvlab.matrices import CurvatureMatrix, Diagonal, Info, Penalty
from curvlab.parameters import ParameterSpace, Selection, check_selection
from curvlab.quantities import Quantity, parse_quantity
from curvlab.structures import Structure, parse_structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner

PROBE_SAMPLES = 4  # samples for the check that the curvature can be computed


def curvature_options(
    quantity: Quantity | str,
    structure: Structure | str,
    backend: str,
    params: Selection | None,
    samples: int | None,
    *,
    adds: bool,
) -> dict[str, Any]:
    """Return the arguments of ``estimate_curvature`` as plain values, after the checks that need no model.

    Args:
        quantity: Quantity of ``curvlab.estimate``.
        structure: Structure of ``curvlab.estimate``.
        backend: Backend of ``curvlab.estimate``.
        params: Selection of parameters of ``curvlab.estimate``.
        samples: Maximum number of training samples of a task, drawn at random; None for all.
        adds: Whether the method adds the matrices of several tasks.

    Raises:
        CurvlabError: A name or an option is unknown, no backend computes the combination of quantity and structure, or
            the method cannot use the structure.
    """
    quantity, structure = parse_quantity(quantity), parse_structure(structure)
    if structure.name == "implicit":
        raise CurvlabError(
            "an implicit matrix keeps a copy of the network and the samples of each past task: "
            "use a structure that is stored, such as diag or kfac"
        )
    if adds and structure.name == "ekfac":
        raise CurvlabError("the sum of two ekfac matrices is not an ekfac matrix: use kfac, whose sums are exact")
    if backend not in ("auto", *BACKENDS):
        raise CurvlabError(unknown_name_message("backend", backend, ("auto", *BACKENDS)))
    find_backends(quantity, structure, backend)
    if samples is not None:
        check_whole("samples", samples)
    params = check_selection(params)
    return {
        "quantity": str(quantity),
        "structure": str(structure),
        "backend": backend,
        "params": params,
        "samples": samples,
    }


def estimate_curvature(
    learner: "Learner",
    quantity: str,
    structure: str,
    backend: str = "auto",
    params: Selection | None = None,
    samples: int | None = None,
) -> CurvatureMatrix:
    """Return the curvature of the current task at the current parameters of the network.

    The curvature is zero in rows of the last layer whose outputs are inactive for the task.

    Args:
        learner: State of the run.
        quantity: Quantity of ``curvlab.estimate``.
        structure: Structure of ``curvlab.estimate``.
        backend: Backend of ``curvlab.estimate``.
        params: Selection of parameters of ``curvlab.estimate``.
        samples: Maximum number of training samples, drawn at random; None for all.
    """
    with learner.problem(None if samples is None else learner.samples(limit=samples)) as problem:
        return estimate(problem, quantity, structure, backend=backend, params=params)


def try_curvature(learner: "Learner", options: dict[str, Any]) -> None:
    """Compute the curvature of a few samples, so that unsupported models raise an error before the first step.

    Raises:
        CurvlabError: ``curvlab.estimate`` cannot compute the curvature.
    """
    estimate_curvature(learner, **options | {"samples": PROBE_SAMPLES})


def make_importance_matrix(entries: Tensor, space: ParameterSpace, method: str, learner: "Learner") -> Diagonal:
    """Return the importance weights ``(P,)`` of a method as a diagonal matrix."""
    info = Info(method, "diag", learner.loss_name, method, learner.stream[learner.task].sizes["train"])
    return Diagonal(entries, space, info)


def add_pull_(learner: "Learner", centre: Tensor, space: ParameterSpace, factor: float) -> None:
    """Add ``factor * (theta - centre)`` to the gradients: the gradient of ``factor/2 ||theta - centre||^2``.

    Args:
        learner: The run, after ``backward``.
        centre: ``(P,)``.
        space: Space of these parameters.
        factor: A number.
    """
    parameters, last = learner.parameters, space.unflatten(centre)
    for name in space.names:
        pull = factor * (parameters[name].detach() - last[name])
        gradient = parameters[name].grad
        parameters[name].grad = pull if gradient is None else gradient.add_(pull)


def make_penalty(matrix: CurvatureMatrix, learner: "Learner") -> Penalty:
    """Return the penalty ``1/2 (theta - mu)' F (theta - mu)`` with the current parameters as the centre ``mu``."""
    penalty = Penalty()
    penalty.add(matrix, learner.parameters)
    return penalty
