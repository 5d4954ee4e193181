"""Compare curvlab's matrices of a case with those of plain autograd."""

import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.cases import Case
from benchmarks.peers.reference import Reference
from curvlab import Problem, estimate
from curvlab.errors import CurvlabError
from curvlab.matrices import EKFAC, KFAC
from curvlab.parameters import ParameterSpace
from curvlab.structures import parse_structure

TOLERANCE = 1e-9
FLOOR = 1e-9  # added to the largest entry: a model that is sure of all its labels has a curvature of rounding errors
SEEDS, SAMPLES, BOUND = 8, 6, 7.0  # of the Monte Carlo Fisher: draws, labels per draw, and bound on |t|
DENSE = 400  # up to this number of parameters whole matrices are compared, above it products with three vectors
FACTORS = 10_000  # parameters above which factors are left out
LARGEST = 100_000  # parameters above which there is the closed form only
INFORMATIVE = 30  # draws of another label than the most probable that a t-test needs

Products = Callable[[Reference, Tensor], Tensor]
EXACT: dict[tuple[str, str], Products] = {
    ("hessian", ""): lambda r, v: r.hessian(v),
    ("ggn", ""): lambda r, v: r.second_moment(v, empirical=False),
    ("fisher", ""): lambda r, v: r.second_moment(v, empirical=False),
    ("empirical_fisher", ""): lambda r, v: r.second_moment(v, empirical=True),
    ("fisher", "diag"): lambda r, v: r.diagonal(empirical=False).unsqueeze(1) * v,
    ("empirical_fisher", "diag"): lambda r, v: r.diagonal(empirical=True).unsqueeze(1) * v,
}


class Comparison:
    """The comparison of one case.

    Args:
        case: The case.
        kronecker: Quantities and Kronecker structures that the peer has.

    Attributes:
        right: Labels of what agrees.
        refused: By label, why curvlab does not compute it, or how it differs from what the peer has.
        wrong: By label, how far curvlab is from the reference.
        not_compared: By label, parameters with factors for which the reference has none.
        parameters: Number of selected parameters.
    """

    def __init__(self, case: Case, kronecker: Iterable[tuple[str, str]]) -> None:
        self.case, self.kronecker = case, tuple(kronecker)
        self.right: list[str] = []
        self.refused: dict[str, str] = {}
        self.wrong: dict[str, str] = {}
        self.not_compared: dict[str, str] = {}
        self.parameters = 0

    def run(self) -> None:
        """Compare everything.

        Raises:
            ImportError: The case needs a package that is not installed.
        """
        case = self.case
        model, loss, data = case.make()
        try:
            self.problem = Problem(model, loss, data, **case.options)
            self.problem.check()
        except CurvlabError as error:
            if case.refused_by_peer:
                self.right.append("refused, as by the peer")
            else:
                self.refused["problem"] = str(error)
            return
        self.space = self.problem.space if case.params is None else ParameterSpace.of(model, case.params)
        self.parameters = self.space.total
        # What shuffles its samples is compared on the samples that curvlab took.
        self.batches = list(self.problem.batches() if case.refused_by_peer else data)
        # The scale of the loss: a mean over terms, or a sum, of which curvlab has the mean over its units.
        self.scale = 1.0 if loss.reduction == "mean" else self.problem.num_units
        self.small = self.parameters <= DENSE
        random = torch.randn(self.parameters, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.vectors = torch.eye(self.parameters).double() if self.small else random
        if case.closed_form is not None:
            products = partial(case.closed_form, model, self.batches, self.vectors)
            for quantity in ("hessian", "ggn"):
                self._compare(quantity, "", products, label=f"{quantity}, closed form")
            if self.parameters > LARGEST:
                return
        unit = self.problem.loss.unit
        self.reference = Reference(model, loss, self.batches, self.space.names, case.call, unit)
        for (quantity, structure), of_reference in EXACT.items():
            self._compare(quantity, structure, partial(of_reference, self.reference, self.vectors))
        for quantity, structure in self.kronecker if self.parameters <= FACTORS else ():
            self._compare_factors(quantity, structure)
        for structure in case.exact:
            self._compare("fisher", structure, self._block_diagonal_ggn, label=f"{structure} is the GGN's blocks")
        if self.reference.spread() * SEEDS * SAMPLES >= INFORMATIVE:
            self._compare_drawn()
        else:
            self.not_compared["fisher, Monte Carlo"] = "the model is so sure that other labels are rarely drawn"

    def _matrix(self, quantity: str, structure: str) -> Any:
        plain = "dense" if self.small else "implicit"
        return estimate(self.problem, quantity, structure or plain, params=self.case.params)

    def _compare(
        self,
        quantity: str,
        structure: str,
        expected: Callable[[], Tensor],
        label: str = "",
        keep: Any = slice(None),
        scale: float | None = None,
    ) -> None:
        label = label or ", ".join(filter(None, (quantity, structure)))
        try:
            scale = self.scale if scale is None else scale
            found = scale * (self._matrix(quantity, structure) @ self.vectors)
        except CurvlabError as error:
            self.refused[label] = str(error)
            return
        wanted = expected()[keep]
        size = float(wanted.abs().max()) + FLOOR if wanted.numel() else 1.0
        difference = float((found[keep] - wanted).abs().max()) / size if wanted.numel() else 0.0
        if difference <= TOLERANCE:
            self.right.append(label)
        else:
            self.wrong[label] = f"relative difference {difference:.2g}"

    def _compare_factors(self, quantity: str, structure: str) -> None:
        """Compare a Kronecker structure: with factors where curvlab has them, and all that the reference knows."""
        label = f"{quantity}, {structure}"
        try:
            parsed = parse_structure(structure)
            with_factors = _names_with_factors(self._matrix(quantity, structure))
        except CurvlabError as error:
            self.refused[label] = str(error)
            return
        layers = [layer for layer in self.reference.layers if set(self.reference.own(layer)) <= with_factors]
        missing = [layer for layer in self.reference.layers if layer not in layers]
        known = {name for layer in layers for name in self.reference.own(layer)}
        keep = torch.ones(self.space.total, dtype=torch.bool)
        for name in with_factors - known:  # factors of a kind that the reference lacks
            keep[self.space.slices[name]] = False
        only_inputs = getattr(parsed, "factors", "") == "inputs"
        self.reference.unique = True
        expected = partial(
            self.reference.kronecker,
            self.vectors,
            layers,
            empirical=quantity == "empirical_fisher",
            sharing=getattr(parsed, "sharing", ""),
            corrected=parsed.name == "ekfac",
            separate=getattr(parsed, "bias", "") == "separate",
            only_inputs=only_inputs,
        )
        # Factors of the inputs have the scale of the inputs for every loss.
        self._compare(quantity, structure, expected, keep=keep, scale=1.0 if only_inputs else None)
        if not self.reference.unique and label in self.wrong:
            self.not_compared[label] = (
                "a factor has equal eigenvalues, so that EK-FAC is not unique: " + self.wrong.pop(label)
            )
        if with_factors - known:
            self.not_compared[label] = ", ".join(sorted(with_factors - known))
        if missing and label in self.right:
            self.right.remove(label)
            modules = ", ".join(f"{layer} ({type(self.reference.layers[layer]).__name__})" for layer in missing)
            self.refused[label] = f"{modules}: the diagonal in place of factors"

    def _block_diagonal_ggn(self) -> Tensor:
        """Return the product of the GGN's blocks, one a layer, with the vectors."""
        product = torch.zeros_like(self.vectors)
        for layer in self.reference.layers:
            keep = torch.zeros(self.space.total, 1, dtype=torch.float64)
            for name in self.reference.own(layer):
                keep[self.space.slices[name]] = 1
            product += keep * self.reference.second_moment(keep * self.vectors, empirical=False)
        return product

    def _compare_drawn(self) -> None:
        """Compare the mean of Monte Carlo Fishers with the exact one: the trace, and a part of the diagonal, by t."""
        label = "fisher, Monte Carlo"
        exact = self.reference.diagonal(empirical=False)
        weights = torch.rand(len(exact), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        weights[:, 0] = 1
        try:
            drawn = torch.stack(
                [
                    self.scale * self._matrix(f"fisher:samples={SAMPLES},seed={seed}", "diag").diagonal() @ weights
                    for seed in range(SEEDS)
                ]
            )
        except CurvlabError as error:
            self.refused[label] = str(error)
            return
        difference = (drawn.mean(dim=0) - exact @ weights).abs()
        error_of_mean = drawn.std(dim=0) / SEEDS**0.5
        difference = (difference - TOLERANCE * (exact @ weights).abs()).clamp(min=0)
        t = float((difference / error_of_mean.clamp(min=1e-300)).max())
        if t <= BOUND:
            self.right.append(label)
        else:
            self.wrong[label] = f"t = {t:.1f}"


def _names_with_factors(matrix: Any) -> set[str]:
    parts: Iterable[Any] = getattr(matrix, "parts", (matrix,))
    return {name for part in parts if isinstance(part, (KFAC, EKFAC)) for name in part.space.names}


def run(case: Case, kronecker: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the record of a case: how it is expressed, and what is right, refused and wrong, with the messages."""
    started = time.perf_counter()
    comparison = Comparison(case, kronecker)
    record: dict[str, Any] = {"case": case.name, "way": case.way}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            comparison.run()
        except ImportError as error:
            return record | {"not_run": f"{error}"}
    record |= {"parameters": comparison.parameters, "right": len(comparison.right)}
    for key in ("refused", "wrong", "not_compared"):
        if found := getattr(comparison, key):
            by_text: dict[str, list[str]] = {}
            for label, text in found.items():
                by_text.setdefault(text, []).append(label)
            record[key] = by_text
    return record | {"seconds": round(time.perf_counter() - started, 2)}
