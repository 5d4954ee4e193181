"""What the methods share that keep a quadratic in the parameters for the tasks of the past."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvlab.continual.options import check_whole
from curvlab.errors import CurvlabError
from curvlab.estimators import BACKENDS, estimate
from curvlab.estimators.registry import able
from curvlab.forms import unknown
from curvlab.matrices import CurvatureMatrix, Diagonal, Info, Penalty
from curvlab.parameters import ParameterSpace
from curvlab.quantities import Quantity, parse_quantity
from curvlab.structures import Structure, parse_structure

if TYPE_CHECKING:
    from curvlab.continual.learner import Learner

PROBE_SAMPLES = 4  # that show whether a method can be had of a network


def curvature_options(
    quantity: Quantity | str,
    structure: Structure | str,
    backend: str,
    params: Sequence[str] | str | None,
    samples: int | None,
    *,
    adds: bool,
) -> dict[str, Any]:
    """Return the arguments of ``curvature`` as plain values, checked as far as they can be without a model.

    Args:
        quantity: Of ``curvlab.estimate``.
        structure: Of ``curvlab.estimate``.
        backend: Of ``curvlab.estimate``.
        params: Of ``curvlab.estimate``.
        samples: At most so many training samples of a task, drawn at random; None for all.
        adds: Whether the matrices of two tasks are added to one.

    Raises:
        CurvlabError: A name or an option is unknown, no backend has the cell, or the method cannot use the structure.
    """
    quantity, structure = parse_quantity(quantity), parse_structure(structure)
    if structure.name == "implicit":
        raise CurvlabError(
            "an implicit matrix would be that of the network as it is at each product, and keep a past task's samples: "
            "take a structure that is stored, such as diag or kfac"
        )
    if adds and structure.name == "ekfac":
        raise CurvlabError(
            "matrices of two eigenbases have no sum of ekfac's structure: take kfac, whose sums are exact"
        )
    if backend not in ("auto", *BACKENDS):
        raise CurvlabError(unknown("backend", backend, ("auto", *BACKENDS)))
    able(quantity, structure, backend)
    if samples is not None:
        check_whole("samples", samples)
    params = params if params is None or isinstance(params, str) else list(params)
    return {
        "quantity": str(quantity),
        "structure": str(structure),
        "backend": backend,
        "params": params,
        "samples": samples,
    }


def curvature(
    learner: "Learner",
    quantity: str,
    structure: str,
    backend: str = "auto",
    params: Sequence[str] | str | None = None,
    samples: int | None = None,
) -> CurvatureMatrix:
    """Return the curvature of the present task at the present parameters, over the parameters of the whole network.

    Rows of the last layer whose outputs do not count for the task have none.

    Args:
        learner: The run.
        quantity: Of ``curvlab.estimate``.
        structure: Of ``curvlab.estimate``.
        backend: Of ``curvlab.estimate``.
        params: Of ``curvlab.estimate``.
        samples: At most so many training samples, drawn at random; None for all.
    """
    with learner.problem(None if samples is None else learner.samples(limit=samples)) as problem:
        return estimate(problem, quantity, structure, backend=backend, params=params)


def try_curvature(learner: "Learner", options: dict[str, Any]) -> None:
    """Compute the curvature of a few samples: what it cannot be had of is refused before the first step.

    Raises:
        CurvlabError: As ``curvlab.estimate`` raises it.
    """
    curvature(learner, **options | {"samples": PROBE_SAMPLES})


def importance(entries: Tensor, space: ParameterSpace, method: str, learner: "Learner") -> Diagonal:
    """Return the weights ``(P,)`` that a method gives to parameters as a matrix."""
    info = Info(method, "diag", learner.loss_name, method, learner.stream[learner.task].sizes["train"])
    return Diagonal(entries, space, info)


def around_here(matrix: CurvatureMatrix, learner: "Learner") -> Penalty:
    """Return ``1/2 (theta - mu)' F (theta - mu)`` with the present parameters as the centre ``mu``."""
    penalty = Penalty()
    penalty.add(matrix, learner.parameters)
    return penalty
