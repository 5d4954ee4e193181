"""Trials of all combinations of quantity, structure and backend on the first samples of a problem."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from math import isnan, nan
from typing import Any

import torch

from curvlab.doctor.cost import extrapolate, measure_seconds
from curvlab.errors import CurvlabError, type_and_line
from curvlab.estimators.covectors import suggest_sampling
from curvlab.estimators.layers import Layer, count_entries
from curvlab.estimators.memory import MEMORY, count_fitting, measure_peak
from curvlab.estimators.phases import ONCE, PHASES, record_phases
from curvlab.estimators.registry import BACKENDS, estimate, find_backends
from curvlab.matrices import CurvatureMatrix
from curvlab.parameters import ParameterSpace, Selection
from curvlab.problem import Pair, Problem
from curvlab.quantities import GGN, Fisher, Hessian, Quantity
from curvlab.structures import DenseStructure, Kronecker, Structure
from curvlab.text import format_bytes, format_seconds

Work = Callable[[Problem], Callable[[], object]]

_FEW = 4  # samples on which a combination is tried
_LIMIT = 0.25  # seconds that a larger trial may be expected to take
_LARGEST = 2.5e8  # bytes of the largest matrix that is tried
_MEASURED = 1e7  # bytes of the largest matrix without structure whose time is measured
_PATIENCE = 10.0  # seconds of measuring for all combinations together
_WATCHED = 5.0  # factor by which a computation is slower while its memory is measured


def summarise(problem: Problem, space: ParameterSpace) -> str:
    """Return the sentence of a summary on the model and the loss."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{type(problem.model).__name__} of {space.total:,} parameters in {dtype}, {problem.loss}."


def make_row(
    quantity: Quantity, structure: Structure | str, backend: str, supported: str, **more: Any
) -> dict[str, Any]:
    """Return a row of ``Diagnosis.combinations``; costs that are not given are NaN."""
    row = {"quantity": str(quantity), "structure": str(structure), "backend": backend, "supported": supported}
    costs = ("backward_passes", "seconds", *PHASES, "passes", "peak_bytes", *MEMORY, "matrix_bytes")
    return {**row, "auto": False, **dict.fromkeys(costs, nan), "obstacle": "", **more}


class Probe:
    """Trials and measurements on the first samples of a problem.

    The rungs are problems with increasing numbers of samples: parts of a batch, one batch, two batches.
    """

    def __init__(self, problem: Problem, params: Selection | None, layers: Mapping[str, Layer]) -> None:
        self.problem, self.params, self.layers = problem, params, layers
        self.space = ParameterSpace.of(problem.model, params)
        self.few = self._on([next(problem.batches(_FEW))])
        with torch.no_grad():
            self.outputs = problem.forward({}, next(self.few.batches())[0]).shape[1]
        self.left = _PATIENCE  # seconds left for measuring
        batches = list(islice(problem.batches(), 2 * _FEW))
        x, y = batches[0]
        self.batch_size = len(x)
        ladder: list[list[Pair]] = [[(x[:k], y[:k])] for k in (_FEW, 2 * _FEW, 32, 128)]
        if len(x) < _FEW:  # for small batches, the number of batches determines the cost
            ladder = [batches[:1], batches[:_FEW], batches]
        self.rungs: list[Problem] = []
        for rung in map(self._on, [*ladder, batches[:1], batches[:2]]):
            if not self.rungs or rung.num_samples > self.rungs[-1].num_samples:
                self.rungs.append(rung)
        _plain_pass(self.few, self.space)  # the first call includes one-time initialisation
        self.plain = self._predict(self._measure(lambda part: lambda: _plain_pass(part, self.space))[0])

    def _on(self, batches: Sequence[Pair]) -> Problem:
        return self.problem.with_data(batches)

    def summary(self) -> str:
        """Return a summary of model, loss and data, with the time of a plain pass."""
        n = self.problem.num_samples
        batches = "in one batch" if n == self.batch_size else f"in batches of {self.batch_size:,}"
        return (
            f"{summarise(self.problem, self.space)[:-1]}, {n:,} {'sample' if n == 1 else 'samples'} {batches}. "
            f"A plain forward and backward pass over the data takes {format_seconds(self.plain)}."
        )

    def suggest_sampling(self, quantities: Sequence[Quantity]) -> Iterator[str]:
        """Yield a phrase for each quantity that is expensive because of the number of classes."""
        for quantity in quantities:
            if suggestion := suggest_sampling(self.problem.loss, quantity, self.outputs):
                yield suggestion

    def try_backends(self, quantity: Quantity, structure: Structure) -> list[dict[str, Any]]:
        """Return one row per backend."""
        stored = self._matrix_bytes(structure)
        # The reference, with which others are compared, forms the whole Hessian for every stored structure.
        formed = self._matrix_bytes(DenseStructure()) if isinstance(quantity, Hessian) and stored else stored
        rows = {}
        for backend in BACKENDS:
            row = partial(make_row, quantity, structure, backend)
            if structure.name not in BACKENDS[backend].structures.get(type(quantity), ()):
                rows[backend] = row("absent", obstacle=f"it does not compute {quantity.name} as {structure.name}")
                continue
            if formed > _LARGEST:
                rows[backend] = row("not tried", matrix_bytes=stored, obstacle=_too_large(formed))
                continue
            try:
                measured = formed <= _MEASURED or isinstance(structure, Kronecker)
                costs = self._costs(quantity, structure, backend, measured)
                rows[backend] = row("yes", matrix_bytes=stored, **costs)
            except CurvlabError as error:
                rows[backend] = row("no", obstacle=str(error))
            except Exception as error:  # a library can raise anything
                rows[backend] = row("no", obstacle=f"backend {backend} fails: {type_and_line(error)}")
        capable = [name for name in rows if rows[name]["supported"] == "yes"]
        for backend in self._find_automatic(quantity, structure, capable):
            rows[backend]["auto"] = True
        return list(rows.values())

    def _find_automatic(self, quantity: Quantity, structure: Structure, capable: Sequence[str]) -> list[str]:
        """Return the capable backends that ``auto`` uses: the first, or one per part of a structure with a rest."""
        if isinstance(structure, Kronecker) and structure.rest is not None:
            with suppress(Exception):  # the rows of the backends already give the reason
                chosen = estimate(self.few, quantity, structure, params=self.params).info.backend.split(", ")
                return [name for name in chosen if name in capable]
            return []
        return [b.name for b in find_backends(quantity, structure) if b.name in capable][:1] if capable else []

    def _costs(self, quantity: Quantity, structure: Structure, backend: str, measured: bool) -> dict[str, float]:
        def work(part: Problem) -> Callable[[], object]:
            def make_matrix() -> CurvatureMatrix:
                return estimate(part, quantity, structure, backend=backend, params=self.params)

            return make_matrix if structure.name != "implicit" else self._make_product(make_matrix())

        backward_passes = self._backward_passes(quantity, structure)
        columns = 1
        if isinstance(quantity, Hessian) and structure.name != "implicit" and not BACKENDS[backend].library:
            # The reference computes the matrix column by column with products: one product is enough as a trial.
            columns = self.space.total
            trial = self._make_product(estimate(self.few, quantity, "implicit", backend=backend, params=self.params))
        else:
            trial = work(self.few)
        started = time.perf_counter()
        trial()  # raises an error if it is not supported; the first call also includes one-time initialisation
        if not measured or columns * (time.perf_counter() - started) > self.left:
            return {"backward_passes": backward_passes}
        points, shares = self._measure(work)
        if len(points) < min(2, len(self.rungs)):
            return {"backward_passes": backward_passes}
        seconds, peak, own = self._predict(points), self._peak(work, points), self.batch_size
        return {
            "backward_passes": backward_passes,
            "seconds": seconds,
            **self._phases(*points[-1], shares),
            "passes": seconds / self.plain,
            "peak_bytes": peak,
            **{name: nan if isnan(peak) else count_fitting(own, peak, limit, own) for name, limit in MEMORY.items()},
        }

    def _phases(self, rung: Problem, seconds: float, shares: Mapping[str, float]) -> dict[str, float]:
        """Return the predicted seconds of the phases, from their shares on a rung; empty for a product."""
        if not shares:
            return {}
        factor = self.problem.num_samples / rung.num_samples
        phases = {name: seconds * share * (1 if name in ONCE else factor) for name, share in shares.items()}
        return phases | {"sums": seconds * factor * (1 - sum(shares.values()))}

    def _make_product(self, matrix: CurvatureMatrix) -> Callable[[], object]:
        vector = torch.ones(self.space.total, dtype=matrix.dtype, device=matrix.device)
        matrix.matvec(vector)  # the first product includes checks
        return lambda: matrix.matvec(vector)

    def _measure(self, work: Work) -> tuple[list[tuple[Problem, float]], dict[str, float]]:
        """Return the seconds on the affordable rungs, and the shares of the phases on the last of them.

        The rungs are the first two, then the largest that is affordable.
        """
        points: list[tuple[Problem, float]] = []
        shares: dict[str, float] = {}

        def affordable(rung: Problem) -> bool:
            if points and points[-1][1] * rung.num_samples / points[-1][0].num_samples > self.left:
                return False
            # If the time is long on any number of samples, more samples add little.
            return len(points) < 2 or self._extrapolate(points, rung.num_samples) <= max(_LIMIT, 2 * points[0][1])

        left = self.rungs
        while reached := [rung for rung in left if affordable(rung)]:
            rung = reached[0] if len(points) < 2 else reached[-1]
            started = time.perf_counter()
            run = work(rung)
            measuring = time.perf_counter()
            with record_phases() as phases:
                points.append((rung, measure_seconds(run)))
            ended = time.perf_counter()
            shares = {name: seconds / (ended - measuring) for name, seconds in phases.items()}
            self.left -= ended - started
            left = [other for other in left if other.num_samples > rung.num_samples]
        return points, shares

    def _predict(self, points: Sequence[tuple[Problem, float]]) -> float:
        """Return the value for all samples."""
        return self._extrapolate(points, self.problem.num_samples)

    def _extrapolate(self, points: Sequence[tuple[Problem, float]], n: int) -> float:
        return extrapolate([(rung.num_samples, value) for rung, value in points], n)

    def _peak(self, work: Work, points: Sequence[tuple[Problem, float]]) -> float:
        """Return the bytes on one batch; NaN if measuring even the first rungs takes too long."""
        watched = [rung for rung in self.rungs if rung.num_samples == self.batch_size]  # more batches add no memory
        if _WATCHED * self._extrapolate(points, self.batch_size) > min(_LIMIT, self.left):
            watched = [rung for rung, _ in points[:2]]
            if _WATCHED * sum(seconds for _, seconds in points[:2]) > self.left:
                return nan
        started = time.perf_counter()
        peaks = [(rung, float(measure_peak(work(rung)))) for rung in watched]
        self.left -= time.perf_counter() - started
        return self._extrapolate(peaks, self.batch_size)

    def _backward_passes(self, quantity: Quantity, structure: Structure) -> float:
        if structure.name == "implicit":
            return nan
        if isinstance(quantity, Hessian):
            return self.space.total
        rows = self._rows(quantity)
        return 2 * rows if structure.name == "ekfac" else rows

    def _rows(self, quantity: Quantity) -> int:
        if isinstance(quantity, Fisher) and quantity.samples is not None:
            return quantity.samples
        if isinstance(quantity, (Fisher, GGN)):
            return self.problem.loss.num_factors(self.outputs)
        return 1

    def _matrix_bytes(self, structure: Structure) -> int:
        entries = count_entries(structure, self.space, self.layers)
        return entries * torch.promote_types(self.problem.dtype, torch.float32).itemsize


def _too_large(size: int) -> str:
    return (
        f"it needs {format_bytes(size)}, too much to try; use diag, kfac or implicit, or select parameters with "
        "params=[...]"
    )


def _plain_pass(problem: Problem, space: ParameterSpace) -> None:
    for inputs, targets in problem.batches():
        parameters = {name: p.requires_grad_() for name, p in problem.parameters().items() if name in space.names}
        value = problem.loss.values(problem.forward(parameters, inputs), targets).mean()
        if value.requires_grad:
            torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
