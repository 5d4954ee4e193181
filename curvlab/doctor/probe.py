"""Every quantity, structure and backend tried on the first samples of a problem, and what the whole would cost."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from math import nan, prod
from typing import Any

import torch

from curvlab.doctor.cost import extrapolate, measure_peak, measure_seconds
from curvlab.doctor.text import format_bytes, format_seconds
from curvlab.errors import CurvlabError, type_and_line
from curvlab.estimators.layers import Layer
from curvlab.estimators.registry import BACKENDS, able, estimate
from curvlab.estimators.seeds import fewer_seeds
from curvlab.matrices import CurvatureMatrix
from curvlab.parameters import ParameterSpace
from curvlab.problem import Pair, Problem
from curvlab.quantities import GGN, Fisher, Hessian, Quantity
from curvlab.structures import DenseStructure, Kronecker, Structure

Work = Callable[[Problem], Callable[[], object]]

_FEW = 4  # samples, on which a cell is refused or not
_LIMIT = 0.25  # seconds that a larger probe may be expected to take
_LARGEST = 2.5e8  # bytes of a matrix that is still formed to see who can
_MEASURED = 1e7  # and of a matrix without structure that is formed some more times, to see how long it takes
_PATIENCE = 10.0  # seconds that measuring may take, for all cells together
_WATCHED = 5.0  # times as long takes what is watched for its memory


def summarise(problem: Problem, space: ParameterSpace) -> str:
    """Return what a summary says of the model and the loss."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{type(problem.model).__name__} of {space.total:,} parameters in {dtype}, {problem.loss.name}."


def make_cell(
    quantity: Quantity, structure: Structure | str, backend: str, supported: str, **more: Any
) -> dict[str, Any]:
    """Return a row of ``Diagnosis.cells``; what is not given is unknown."""
    cell = {"quantity": str(quantity), "structure": str(structure), "backend": backend, "supported": supported}
    costs = dict.fromkeys(("backward_passes", "seconds", "passes", "peak_bytes", "matrix_bytes"), nan)
    return {**cell, "auto": False, **costs, "obstacle": "", **more}


class Probe:
    """The first samples of a problem, and what its cells cost on them.

    The rungs are problems of more and more samples: parts of a batch, a batch, two batches.
    """

    def __init__(self, problem: Problem, params: Sequence[str] | str | None, layers: Mapping[str, Layer]) -> None:
        self.problem, self.params, self.layers = problem, params, layers
        self.space = ParameterSpace.of(problem.model, params)
        self.few = self._on([next(problem.batches(_FEW))])
        with torch.no_grad():
            self.outputs = problem.forward({}, next(self.few.batches())[0]).shape[1]
        self.left = _PATIENCE  # seconds of measuring
        batches = list(islice(problem.batches(), 2 * _FEW))
        x, y = batches[0]
        self.batch_size = len(x)
        ladder: list[list[Pair]] = [[(x[:k], y[:k])] for k in (_FEW, 2 * _FEW, 32, 128)]
        if len(x) < _FEW:  # of small batches, it is the number that counts
            ladder = [batches[:1], batches[:_FEW], batches]
        self.rungs: list[Problem] = []
        for rung in map(self._on, [*ladder, batches[:1], batches[:2]]):
            if not self.rungs or rung.num_samples > self.rungs[-1].num_samples:
                self.rungs.append(rung)
        _plain_pass(self.few, self.space)  # what is set up at a first call is set up
        self.plain = self._whole(self._points(lambda some: lambda: _plain_pass(some, self.space)))

    def _on(self, batches: Sequence[Pair]) -> Problem:
        return Problem(self.problem.model, self.problem.loss.name, batches)

    def summary(self) -> str:
        """Return what there is to say of model, loss and data, and what a plain pass takes."""
        n = self.problem.num_samples
        batches = "in one batch" if n == self.batch_size else f"in batches of {self.batch_size:,}"
        return (
            f"{summarise(self.problem, self.space)[:-1]}, {n:,} {'sample' if n == 1 else 'samples'} {batches}. "
            f"A plain forward and backward pass over the data takes {format_seconds(self.plain)}."
        )

    def many_rows(self, quantities: Sequence[Quantity]) -> Iterator[str]:
        """Yield what there is to say about quantities whose cost grows with the classes, where these are many."""
        for quantity in quantities:
            if told := fewer_seeds(self.problem.loss, quantity, self.outputs):
                yield told

    def cells(self, quantity: Quantity, structure: Structure) -> list[dict[str, Any]]:
        """Return a row a backend."""
        stored = self._matrix_bytes(structure)
        # The stored Hessian is formed whole by the reference, which others are compared with.
        formed = self._matrix_bytes(DenseStructure()) if isinstance(quantity, Hessian) and stored else stored
        rows = {}
        for backend in BACKENDS:
            row = partial(make_cell, quantity, structure, backend)
            if structure.name not in BACKENDS[backend].cells.get(type(quantity), ()):
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
            except Exception as error:  # a library can fail in any way, and that is then what there is to say
                told = f"backend {backend} fails: {type_and_line(error)}"
                rows[backend] = row("no", obstacle=told)
        for backend in self._chosen(quantity, structure, [name for name in rows if rows[name]["supported"] == "yes"]):
            rows[backend]["auto"] = True
        return list(rows.values())

    def _chosen(self, quantity: Quantity, structure: Structure, able_here: Sequence[str]) -> list[str]:
        """Return which of the backends that can ``auto`` takes: the first, or one a part of a structure with a rest."""
        if isinstance(structure, Kronecker) and structure.rest is not None:
            with suppress(Exception):  # why, the backends have said one by one
                chosen = estimate(self.few, quantity, structure, params=self.params).info.backend.split(", ")
                return [name for name in chosen if name in able_here]
            return []
        return [b.name for b in able(quantity, structure) if b.name in able_here][:1] if able_here else []

    def _costs(self, quantity: Quantity, structure: Structure, backend: str, measured: bool) -> dict[str, float]:
        def work(some: Problem) -> Callable[[], object]:
            def matrix() -> CurvatureMatrix:
                return estimate(some, quantity, structure, backend=backend, params=self.params)

            return matrix if structure.name != "implicit" else self._multiplied(matrix())

        backward_passes = self._backward_passes(quantity, structure)
        columns = 1
        if isinstance(quantity, Hessian) and structure.name != "implicit" and not BACKENDS[backend].library:
            # The reference makes its matrix of products, a column each: one shows whether it can.
            columns = self.space.total
            trial = self._multiplied(estimate(self.few, quantity, "implicit", backend=backend, params=self.params))
        else:
            trial = work(self.few)
        started = time.perf_counter()
        trial()  # refused before anything is measured; and what is loaded at a first call is loaded
        if not measured or columns * (time.perf_counter() - started) > self.left:
            return {"backward_passes": backward_passes}
        points = self._points(work)
        if len(points) < min(2, len(self.rungs)):
            return {"backward_passes": backward_passes}
        seconds = self._whole(points)
        return {
            "backward_passes": backward_passes,
            "seconds": seconds,
            "passes": seconds / self.plain,
            "peak_bytes": self._peak(work, points),
        }

    def _multiplied(self, matrix: CurvatureMatrix) -> Callable[[], object]:
        vector = torch.ones(self.space.total, dtype=matrix.dtype, device=matrix.device)
        matrix.matvec(vector)  # the first product comes with checks
        return lambda: matrix.matvec(vector)

    def _points(self, work: Work) -> list[tuple[Problem, float]]:
        """Return seconds on the rungs that can be afforded: the first two, and from there as far as it goes."""
        points: list[tuple[Problem, float]] = []

        def affordable(rung: Problem) -> bool:
            if points and points[-1][1] * rung.num_samples / points[-1][0].num_samples > self.left:
                return False
            # A cell may take long on any number of samples: then further ones cost little.
            return len(points) < 2 or self._at(points, rung.num_samples) <= max(_LIMIT, 2 * points[0][1])

        left = self.rungs
        while reached := [rung for rung in left if affordable(rung)]:
            rung = reached[0] if len(points) < 2 else reached[-1]
            started = time.perf_counter()
            points.append((rung, measure_seconds(work(rung))))
            self.left -= time.perf_counter() - started
            left = [other for other in left if other.num_samples > rung.num_samples]
        return points

    def _whole(self, points: Sequence[tuple[Problem, float]]) -> float:
        return self._at(points, self.problem.num_samples)

    def _at(self, points: Sequence[tuple[Problem, float]], n: int) -> float:
        return extrapolate([(rung.num_samples, value) for rung, value in points], n)

    def _peak(self, work: Work, points: Sequence[tuple[Problem, float]]) -> float:
        """Return the bytes on a batch; NaN where it takes long to watch even the first rungs."""
        watched = [rung for rung in self.rungs if rung.num_samples == self.batch_size]  # further batches add nothing
        if _WATCHED * self._at(points, self.batch_size) > min(_LIMIT, self.left):
            watched = [rung for rung, _ in points[:2]]
            if _WATCHED * sum(seconds for _, seconds in points[:2]) > self.left:
                return nan
        started = time.perf_counter()
        peaks = [(rung, float(measure_peak(work(rung)))) for rung in watched]
        self.left -= time.perf_counter() - started
        return self._at(peaks, self.batch_size)

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
        size_of = dict(zip(self.space.names, self.space.sizes, strict=True))
        entries = 0
        if isinstance(structure, Kronecker):
            shape_of = dict(zip(self.space.names, self.space.shapes, strict=True))
            for layer in self.layers.values():
                columns = (prod(shape_of[layer.weight][1:]) if layer.weight else 0) + bool(layer.bias)
                entries += structure.factor_entries(shape_of[layer.parameters[0]][0], columns)
                for name in layer.parameters:
                    size_of.pop(name)
        entries += structure.entries(list(size_of.values()))
        return entries * torch.promote_types(self.problem.dtype, torch.float32).itemsize


def _too_large(size: int) -> str:
    return (
        f"it takes {format_bytes(size)}, too much to try; diag, kfac and implicit take less, and params=[...] selects"
    )


def _plain_pass(problem: Problem, space: ParameterSpace) -> None:
    for inputs, targets in problem.batches():
        parameters = {name: p.requires_grad_() for name, p in problem.parameters().items() if name in space.names}
        value = problem.loss.values(problem.forward(parameters, inputs), targets).mean()
        if value.requires_grad:
            torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
