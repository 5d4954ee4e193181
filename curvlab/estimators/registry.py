"""Which backend computes which quantity in which structure, and the one door to all of them."""

import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Protocol

import torch
from torch import Tensor

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.estimators import torch_func
from curvlab.matrices import CurvatureMatrix, Info
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance, progress
from curvlab.quantities import Fisher, MaSQ, Quantity, parse_quantity

STRUCTURES = ("dense", "block_diag", "diag", "kfac", "ekfac", "tkfac", "implicit")


class Estimator(Protocol):
    """What a backend offers: from a problem to the tensors that hold the matrix (``CurvatureMatrix.tensors``)."""

    def __call__(
        self,
        problem: Problem,
        quantity: Quantity,
        structure: str,
        space: ParameterSpace,
        batch_size: int | None,
        advance: Advance,
    ) -> Mapping[str, Tensor]:
        """Compute the matrix as a mean over samples; ``advance`` is called with the samples done."""


#: Backend name -> the (quantity, structure) cells that it fills, and how. The first that fills a cell is ``auto``'s.
BACKENDS: dict[str, tuple[Mapping[type[Quantity], Sequence[str]], Estimator]] = {
    "torch": (torch_func.CELLS, torch_func.compute),
}


def estimate(
    problem: Problem,
    quantity: Quantity | str,
    structure: str,
    *,
    backend: str = "auto",
    params: Sequence[str] | str | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> CurvatureMatrix:
    """Return a curvature matrix of a problem: the mean over its samples of the per-sample matrix.

    Args:
        problem: Model, loss and data.
        quantity: One of ``curvlab.quantities`` or its string form, such as ``"fisher:samples=4"``.
        structure: ``dense``, ``block_diag`` (a block a parameter tensor) or ``diag``.
        backend: ``torch`` (per-sample automatic differentiation), or ``auto``.
        params: Glob patterns of parameter names; None for all trainable ones.
        batch_size: Samples taken at once; None for the data's own batches. Never changes the result.
        progress: Show a progress bar on a terminal.

    Returns:
        A matrix over the selected parameters in the model's dtype and on its device.

    Raises:
        CurvlabError: A name is unknown, the data or weights are not finite, or targets do not fit the loss.
        UnsupportedError: No backend, or not this one, computes this right for this model.

    Examples:
        >>> import torch
        >>> problem = Problem(torch.nn.Linear(2, 3), "cross_entropy", (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> estimate(problem, "empirical_fisher", "diag")
        Diagonal(empirical_fisher, P=9, torch.float32, cpu)
    """
    quantity = parse_quantity(quantity)
    chosen = _choose(quantity, structure, backend)
    space = ParameterSpace.of(problem.model, params)
    problem.check()
    started = time.perf_counter()
    num_samples = problem.num_samples
    # Also where the caller has switched gradients off.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _bar(f"{quantity} {structure}", num_samples, progress) as advance,
    ):
        tensors = BACKENDS[chosen][1](problem, quantity, structure, space, batch_size, advance)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CurvlabError(f"the {quantity} of {name} is not finite: the model's outputs or gradients overflow")
    info = Info(
        quantity=str(quantity),
        structure=structure,
        loss=problem.loss.name,
        backend=chosen,
        num_samples=num_samples,
        samples=quantity.samples if isinstance(quantity, Fisher) else None,
        seed=quantity.seed if isinstance(quantity, Fisher) and quantity.samples else None,
        batch_size=quantity.batch_size if isinstance(quantity, MaSQ) else batch_size,
        seconds=time.perf_counter() - started,
    )
    return CurvatureMatrix.kinds[structure].from_tensors(tensors, space, info)


_bar = progress  # the argument of ``estimate`` hides the function's name there


def _choose(quantity: Quantity, structure: str, backend: str) -> str:
    if structure not in STRUCTURES:
        raise CurvlabError(_unknown("structure", structure, STRUCTURES))
    if backend not in ("auto", *BACKENDS):
        raise CurvlabError(_unknown("backend", backend, ("auto", *BACKENDS)))
    able = [name for name, (cells, _) in BACKENDS.items() if structure in cells.get(type(quantity), ())]
    if not able:
        offered = sorted({s for cells, _ in BACKENDS.values() for s in cells.get(type(quantity), ())})
        raise UnsupportedError(f"no backend computes {quantity.name} as {structure}; it is had as {', '.join(offered)}")
    if backend != "auto" and backend not in able:
        raise UnsupportedError(f"backend {backend} does not compute {quantity.name} as {structure}; {able[0]} does")
    return able[0] if backend == "auto" else backend


def _unknown(what: str, name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no {what} {name!r}; {hint}There are {', '.join(names)}"
