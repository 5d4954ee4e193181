"""What each backend can and cannot do for a model, and what it would cost, before a long computation is begun."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from math import isnan, nan, prod
from operator import itemgetter
from textwrap import fill
from typing import Any
from weakref import finalize

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from curvlab.checks import shown
from curvlab.errors import CurvlabError
from curvlab.estimators.layers import Layer
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.registry import BACKENDS, able, estimate
from curvlab.estimators.seeds import fewer_seeds
from curvlab.estimators.verification import kronecker_layers
from curvlab.matrices import CurvatureMatrix
from curvlab.parameters import ParameterSpace
from curvlab.problem import Batch, Problem, is_stochastic
from curvlab.progress import progress
from curvlab.quantities import GGN, Fisher, Hessian, Quantity, parse_quantity
from curvlab.randomness import preserved_random_state
from curvlab.structures import STRUCTURES, Dense, Kronecker, Structure, parse_structure
from curvlab.text import readable

Work = Callable[[Problem], Callable[[], object]]

_FEW = 4  # samples, on which a cell is refused or not
_LIMIT = 0.25  # seconds that a larger probe may be expected to take
_LARGEST = 2.5e8  # bytes of a matrix that is still formed to see who can
_MEASURED = 1e7  # and of a matrix without structure that is formed some more times, to see how long it takes
_PATIENCE = 10.0  # seconds that measuring may take, for all cells together
_WATCHED = 5.0  # times as long takes what is watched for its memory
_QUICK, _REPEATED = 0.25, 0.05  # seconds: what takes less is measured again, until it has taken so long in all
_LINE = 120  # characters


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found; ``str()`` of it is to be read.

    Attributes:
        summary: Model, loss, data, and what a plain forward and backward pass over the data takes.
        findings: What stands in the way or is unusual about the model, a phrase each.
        cells: A row a quantity, structure and backend, with the columns ``quantity``, ``structure``, ``backend``;
            ``supported``: ``yes``; ``no``; ``absent``, where the backend has no such cell for any model; ``not tried``,
            where the matrix is too large for a probe; ``auto``: whether ``backend="auto"`` takes it;
            ``backward_passes``: over the data, as the quantity needs them;
            ``seconds``: predicted, for ``implicit`` those of a product, NaN where measuring takes long;
            ``passes``: the same in plain forward and backward passes; ``peak_bytes``: predicted, of the tensors beyond
            model and data, without what kernels use inside; ``matrix_bytes``: of the result; ``obstacle``: what stands
            in the way, and what would work.
    """

    summary: str
    findings: tuple[str, ...]
    cells: pd.DataFrame

    def __str__(self) -> str:
        """Return all of it as text."""
        return "\n".join(_lines(self))


def doctor(
    problem: Problem,
    quantity: Quantity | str | Sequence[Quantity | str] = "fisher",
    params: Sequence[str] | str | None = None,
    *,
    progress: bool = False,
) -> Diagnosis:
    """Say what each backend can and cannot do for a model, and what it would cost.

    Every cell of structure and backend is tried on a few samples: what it refuses there is refused in the words of
    ``estimate``, which name the way out. Where it is quick, one batch and two follow, and time and memory of the
    whole are extrapolated from these, as far as ten seconds of measuring go: a cell that comes after these, or alone
    would take as long, has no prediction. Nothing of the model is changed.

    Args:
        problem: Model, loss and data. What is wrong with them is told, not raised.
        quantity: One or several of ``curvlab.quantities`` or their string forms.
        params: Glob patterns of parameter names; None for all trainable ones.
        progress: Show a progress bar on a terminal.

    Raises:
        CurvlabError: It is given no problem, a quantity is unknown, or a pattern matches nothing.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))
        >>> data = torch.zeros(4, 4), torch.tensor([0, 1, 2, 0])
        >>> print(doctor(Problem(model, "cross_entropy", data)))
        Sequential of 67 parameters in float32, cross_entropy.
        - 1 (Dropout) is in train mode, where a sample's output is random or depends on its batch: call model.eval()
        Nothing can be computed before this is mended.
        >>> cells = doctor(Problem(model.eval(), "cross_entropy", data), "empirical_fisher").cells
        >>> list(cells[cells.auto & (cells.structure == "kfac")].supported)
        ['yes']
    """
    if not isinstance(problem, Problem):
        raise CurvlabError(
            "doctor takes a problem, Problem(model, 'cross_entropy', data) with your loss and data, not "
            f"a {type(problem).__name__}"
        )
    given = [quantity] if isinstance(quantity, (str, Quantity)) else quantity
    if not isinstance(given, Sequence) or not given:
        raise CurvlabError(f"quantity is one or several, such as 'fisher' or ['fisher', 'ggn'], not {shown(quantity)}")
    quantities = [parse_quantity(q) for q in given]
    space = ParameterSpace.of(problem.model, params)
    faults, remarks = list(_faults(problem.model)), list(_remarks(problem.model))
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            preserved_random_state(),
            warnings.catch_warnings(),  # whatever a library does to the filters
        ):
            problem.check()
            layers, reasons = kronecker_layers(to_first_order(problem), space)
            probe = _Probe(problem, params, layers)
            names = list(STRUCTURES)
            if layers and reasons:
                names += [f"{name}:rest=diag" for name, kind in STRUCTURES.items() if issubclass(kind, Kronecker)]
            pairs = [(q, parse_structure(name)) for q in quantities for name in names]
            with _bar("doctor", len(pairs) * len(BACKENDS), progress) as advance:
                cells = []
                for pair in pairs:
                    for cell in probe.cells(*pair):
                        cells.append(cell)
                        advance()
    except CurvlabError as error:  # what the cells say is caught where they are tried
        cells = [_cell(q, s, b, "no", obstacle=str(error)) for q in quantities for s in STRUCTURES for b in BACKENDS]
        return Diagnosis(_summary(problem, space), (*(faults or [str(error)]), *remarks), pd.DataFrame(cells))
    findings = (*faults, *remarks, *_without_factors(reasons), *probe.many_rows(quantities))
    return Diagnosis(probe.summary(), findings, pd.DataFrame(cells))


_bar = progress  # the argument of ``doctor`` hides the function's name there


# The model -----------------------------------------------------------------------------------------------------------


def _faults(model: nn.Module) -> Iterator[str]:
    """Yield what ``Problem.check`` refuses about a model: all of it, where that raises the first."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # An attention mask, a buffer, is minus infinity by design.
        bad = ~tensor.isfinite() if isinstance(tensor, nn.Parameter) else tensor.isnan()
        if bool(bad.any()):
            yield f"the model's {name} holds {int(bad.sum())} NaN or infinite values"
    unsettled, training = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            unsettled.append(_label(name, module))
        elif module.training and is_stochastic(module):
            training.append(_label(name, module))
    if unsettled:
        yield (
            f"{_listed(unsettled)} {_be(unsettled)} without running statistics, so that a sample's output always "
            "depends on its batch: make it with track_running_stats=True"
        )
    if training:
        yield (
            f"{_listed(training)} {_be(training)} in train mode, where a sample's output is random or depends on its "
            "batch: call model.eval()"
        )


def _remarks(model: nn.Module) -> Iterator[str]:
    in_place = [_label(name, m) for name, m in model.named_modules() if getattr(m, "inplace", False) is True]
    if in_place:
        yield f"in place: {_listed(in_place)}"
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        if others:
            yield f"tied: {first} is also {_listed(others)}, and counted once"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        yield f"frozen (requires_grad=False) and left out: {_listed(frozen)}"


def _without_factors(reasons: Mapping[str, str]) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for parameter, reason in reasons.items():
        by_reason.setdefault(reason, []).append(parameter)
    for reason, parameters in by_reason.items():
        yield f"no Kronecker factors: {_listed(parameters)} {reason}"


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _listed(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _summary(problem: Problem, space: ParameterSpace) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{type(problem.model).__name__} of {space.total:,} parameters in {dtype}, {problem.loss.name}."


# The cells -----------------------------------------------------------------------------------------------------------


def _cell(quantity: Quantity, structure: Structure | str, backend: str, supported: str, **more: Any) -> dict[str, Any]:
    cell = {"quantity": str(quantity), "structure": str(structure), "backend": backend, "supported": supported}
    costs = dict.fromkeys(("backward_passes", "seconds", "passes", "peak_bytes", "matrix_bytes"), nan)
    return {**cell, "auto": False, **costs, "obstacle": "", **more}


class _Probe:
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
        ladder: list[list[Batch]] = [[(x[:k], y[:k])] for k in (_FEW, 2 * _FEW, 32, 128)]
        if len(x) < _FEW:  # of small batches, it is the number that counts
            ladder = [batches[:1], batches[:_FEW], batches]
        self.rungs: list[Problem] = []
        for rung in map(self._on, [*ladder, batches[:1], batches[:2]]):
            if not self.rungs or rung.num_samples > self.rungs[-1].num_samples:
                self.rungs.append(rung)
        _plain_pass(self.few, self.space)  # what is set up at a first call is set up
        self.plain = self._whole(self._points(lambda some: lambda: _plain_pass(some, self.space)))

    def _on(self, batches: Sequence[Batch]) -> Problem:
        return Problem(self.problem.model, self.problem.loss.name, batches)

    def summary(self) -> str:
        n = self.problem.num_samples
        batches = "in one batch" if n == self.batch_size else f"in batches of {self.batch_size:,}"
        return (
            f"{_summary(self.problem, self.space)[:-1]}, {n:,} {'sample' if n == 1 else 'samples'} {batches}. "
            f"A plain forward and backward pass over the data takes {_time(self.plain)}."
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
        formed = self._matrix_bytes(Dense()) if isinstance(quantity, Hessian) and stored else stored
        rows = {}
        for backend in BACKENDS:
            row = partial(_cell, quantity, structure, backend)
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
                told = f"backend {backend} fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
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
            points.append((rung, _seconds(work(rung))))
            self.left -= time.perf_counter() - started
            left = [other for other in left if other.num_samples > rung.num_samples]
        return points

    def _whole(self, points: Sequence[tuple[Problem, float]]) -> float:
        return self._at(points, self.problem.num_samples)

    def _at(self, points: Sequence[tuple[Problem, float]], n: int) -> float:
        return _extrapolated([(rung.num_samples, value) for rung, value in points], n)

    def _peak(self, work: Work, points: Sequence[tuple[Problem, float]]) -> float:
        """Return the bytes on a batch; NaN where it takes long to watch even the first rungs."""
        watched = [rung for rung in self.rungs if rung.num_samples == self.batch_size]  # further batches add nothing
        if _WATCHED * self._at(points, self.batch_size) > min(_LIMIT, self.left):
            watched = [rung for rung, _ in points[:2]]
            if _WATCHED * sum(seconds for _, seconds in points[:2]) > self.left:
                return nan
        started = time.perf_counter()
        peaks = [(rung, float(_peak_bytes(work(rung)))) for rung in watched]
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
        space = self.space
        if isinstance(structure, Kronecker):
            shape_of = dict(zip(space.names, space.shapes, strict=True))
            entries = sum(_factor_entries(layer, shape_of, structure) for layer in self.layers.values())
            inside = {name for layer in self.layers.values() for name in layer.parameters}
            entries += sum(size for name, size in zip(space.names, space.sizes, strict=True) if name not in inside)
        else:
            squares = sum(size**2 for size in space.sizes)
            entries = {"dense": space.total**2, "block_diag": squares, "diag": space.total, "implicit": 0}[
                structure.name
            ]
        return entries * torch.promote_types(self.problem.dtype, torch.float32).itemsize


def _factor_entries(layer: Layer, shape_of: Mapping[str, tuple[int, ...]], structure: Kronecker) -> int:
    outputs = shape_of[layer.parameters[0]][0]
    columns = (prod(shape_of[layer.weight][1:]) if layer.weight else 0) + bool(layer.bias)
    return columns**2 + outputs**2 + (columns * outputs if structure.name == "ekfac" else 0)


def _too_large(size: int) -> str:
    return f"it takes {_bytes(size)}, too much to try; diag, kfac and implicit take less, and params=[...] selects"


def _plain_pass(problem: Problem, space: ParameterSpace) -> None:
    for inputs, targets in problem.batches():
        parameters = {name: p.requires_grad_() for name, p in problem.parameters().items() if name in space.names}
        value = problem.loss.values(problem.forward(parameters, inputs), targets).mean()
        if value.requires_grad:
            torch.autograd.grad(value, list(parameters.values()), allow_unused=True)


# Time and memory -----------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], object]) -> float:
    """Return the least of some measurements: what else the machine does only adds to it."""
    taken: list[float] = []
    while not taken or (len(taken) < 5 and min(taken) < _QUICK and sum(taken) < _REPEATED):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _extrapolated(points: Sequence[tuple[int, float]], n: int) -> float:
    """Return the value at ``n`` of the line through the last two points, between constant and proportional."""
    (after, high), (before, low) = points[-1], points[max(len(points) - 2, 0)]
    slope = (high - low) / (after - before) if after > before else 0.0
    return high + min(max(slope, 0.0), high / after) * (n - after)


def _peak_bytes(work: Callable[[], object]) -> int:
    with _Allocations() as allocations:
        work()
    return int(allocations.peak)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that come and go, on any device; those that were there before do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self.known[storage] = True
        answer = func(*args, **(kwargs or {}))
        for storage in _storages(answer):
            if storage not in self.known:
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                finalize(storage, self._free, storage.nbytes())
        return answer

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


# The text ------------------------------------------------------------------------------------------------------------


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield _wrapped(diagnosis.summary, "")
    for finding in diagnosis.findings:
        yield _wrapped(f"- {finding}", "  ")
    cells: list[dict[str, Any]] = diagnosis.cells.to_dict("records")  # type: ignore[assignment]
    if {cell["supported"] for cell in cells} == {"no"} and len({cell["obstacle"] for cell in cells}) == 1:
        yield "Nothing can be computed before this is mended."
        return
    for quantity, of_quantity in groupby(cells, itemgetter("quantity")):
        yield f"\n{quantity:<28} {'seconds':>9} {'passes':>8} {'peak':>9} {'matrix':>9}"
        for structure, rows in groupby(of_quantity, itemgetter("structure")):
            yield f"  {structure}"
            yield from _rows(list(rows))
    yield (
        "\n* what auto takes. seconds: predicted for all samples, for implicit those of a product; passes: the same in "
        "plain\nforward and backward passes; peak: memory beyond model and data; matrix: of the result"
    )


def _rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    told: dict[str, list[str]] = {}
    for row in rows:
        if row["supported"] == "yes":
            name = f"{row['backend']} *" if row["auto"] else row["backend"]
            passes = "-" if isnan(row["passes"]) else _three_digits(row["passes"])
            seconds, peak, matrix = _time(row["seconds"]), _bytes(row["peak_bytes"]), _bytes(row["matrix_bytes"])
            yield f"    {name:<24} {seconds:>9} {passes:>8} {peak:>9} {matrix:>9}"
        else:
            told.setdefault("has none" if row["supported"] == "absent" else row["obstacle"], []).append(row["backend"])
    for obstacle, backends in told.items():
        yield _wrapped(f"    {', '.join(backends)}: {obstacle}", "      ")


def _wrapped(text: str, indent: str) -> str:
    return fill(readable(text), _LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _time(seconds: float) -> str:
    if isnan(seconds):
        return "-"
    return f"{_three_digits(1e3 * seconds)} ms" if seconds < 1 else f"{_three_digits(seconds)} s"


def _bytes(size: float) -> str:
    if isnan(size):
        return "-"
    unit, name = next((u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1, "B"))
    return f"{_three_digits(size / unit)} {name}"


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
