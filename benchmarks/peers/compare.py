"""Compare curvlab's matrices of a case with those of plain autograd."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from reference import Reference
from torch import Tensor

from curvlab import Problem, estimate
from curvlab.errors import CurvlabError
from curvlab.matrices import EKFAC, KFAC
from curvlab.structures import KFACStructure

TOLERANCE = 1e-9
SEEDS, SAMPLES, BOUND = 12, 4, 6.0  # of the Monte Carlo Fisher: draws, labels per draw, and bound on |t|
DENSE = 400  # up to this number of parameters whole matrices are compared, above it products with three vectors

Products = Callable[[Reference, Tensor], Tensor]

#: By quantity and structure, the same by plain autograd.
SECOND: dict[tuple[str, str], Products] = {
    ("fisher", "kfac:rest=diag"): lambda r, v: r.kronecker(v, empirical=False),
    ("fisher", "kfac:sharing=reduce,rest=diag"): lambda r, v: r.kronecker(v, empirical=False, sharing="reduce"),
    ("empirical_fisher", "kfac:rest=diag"): lambda r, v: r.kronecker(v, empirical=True),
    ("fisher", "ekfac:rest=diag"): lambda r, v: r.kronecker(v, empirical=False, corrected=True),
    ("empirical_fisher", "ekfac:rest=diag"): lambda r, v: r.kronecker(v, empirical=True, corrected=True),
}
if "bias" in KFACStructure.__dataclass_fields__:
    SECOND["fisher", "kfac:bias=separate,rest=diag"] = lambda r, v: r.kronecker(v, empirical=False, separate=True)
EXACT: dict[str, Products] = {
    "hessian": lambda r, v: r.hessian(v),
    "ggn": lambda r, v: r.second_moment(v, empirical=False),
    "fisher": lambda r, v: r.second_moment(v, empirical=False),
    "empirical_fisher": lambda r, v: r.second_moment(v, empirical=True),
}


def run(case: Case) -> dict[str, Any]:
    """Return the record of a case: what is right, refused and wrong, with the messages."""
    started = time.perf_counter()
    record: dict[str, Any] = {"case": case.name, "way": case.way}
    try:
        model, loss, data = case.make()
    except ImportError as error:
        return record | {"not_run": f"{error}"}
    right: list[str] = []
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    try:
        problem = Problem(model, loss, data, **case.options)
        problem.check()
    except CurvlabError as error:
        refused["problem"] = str(error)
        return record | {"right": right, "refused": refused, "wrong": wrong}
    space = problem.space if case.params is None else type(problem.space).of(model, case.params)
    p = space.total
    # What shuffles its samples is compared on the samples that curvlab took.
    batches = list(problem.batches()) if case.refused_by_peer else list(data)
    reference = Reference(model, loss, batches, space.names, case.call)
    generator = torch.Generator().manual_seed(1)
    small = p <= DENSE
    vectors = torch.eye(p).double() if small else torch.randn(p, 3, generator=generator, dtype=torch.float64)
    scale = 1 if reference.mean else reference.num_samples

    def compare(label: str, quantity: str, structure: str, products: Products) -> None:
        try:
            matrix = estimate(problem, quantity, structure, params=case.params)
            found, given = scale * (matrix @ vectors), vectors
            expected = products(reference, given)
            outside = _only_here(matrix, reference) if structure.partition(":")[0] in ("kfac", "ekfac") else []
            for name in outside:  # factors of a kind that the reference lacks: not compared
                expected[space.slices[name]] = found[space.slices[name]] = 0
        except CurvlabError as error:
            refused[label] = str(error)
            return
        size = float(expected.abs().max()) + 1e-12
        difference = float((found - expected).abs().max()) / size
        if outside:
            record.setdefault("not_compared", {})[label] = outside
        if difference <= TOLERANCE:
            right.append(label)
        else:
            wrong[label] = f"relative difference {difference:.2g}"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for quantity, products in EXACT.items():
            compare(quantity, quantity, "dense" if small else "implicit", products)
        for (quantity, structure), products in SECOND.items():
            compare(f"{quantity}, {structure}", quantity, structure, products)
        _compare_drawn(problem, case, reference, scale, right, refused, wrong)
    return record | {
        "parameters": p,
        "right": right,
        "refused": refused,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _only_here(matrix: Any, reference: Reference) -> list[str]:
    """Return the parameters with Kronecker factors in curvlab that have none in the reference."""
    parts = getattr(matrix, "parts", (matrix,))
    factors = {name for part in parts if isinstance(part, (KFAC, EKFAC)) for name in part.space.names}
    here = {name for layer in reference.layers for name in reference._own(layer)}
    return sorted(factors - here)


def _compare_drawn(
    problem: Problem,
    case: Case,
    reference: Reference,
    scale: float,
    right: list[str],
    refused: dict[str, str],
    wrong: dict[str, str],
) -> None:
    """Compare the mean of Monte Carlo Fishers with the exact one: their traces, and a part of the diagonal, by t."""
    label = "fisher, Monte Carlo"
    exact = reference.diagonal(empirical=False)
    weights = torch.rand(len(exact), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[:, 0] = 1
    try:
        drawn = torch.stack(
            [
                scale
                * estimate(problem, f"fisher:samples={SAMPLES},seed={seed}", "diag", params=case.params).diagonal()
                @ weights
                for seed in range(SEEDS)
            ]
        )
    except CurvlabError as error:
        refused[label] = str(error)
        return
    difference = (drawn.mean(dim=0) - exact @ weights).abs()
    error = drawn.std(dim=0) / SEEDS**0.5
    t = float(((difference - TOLERANCE * (exact @ weights).abs()).clamp(min=0) / error.clamp(min=1e-300)).max())
    if t <= BOUND:
        right.append(label)
    else:
        wrong[label] = f"t = {t:.1f}"
