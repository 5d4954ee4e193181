"""Eigenvalues over training: an observer of the fit loop that follows them from point to point."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.estimators.per_layer import patterns_by_module
from curvlab.losses import get_loss
from curvlab.matrices import CurvatureMatrix
from curvlab.problem import BatchSource, Pair, Problem
from curvlab.quantities import Quantity, parse_quantity
from curvlab.spectrum.arguments import choice, real, whole
from curvlab.spectrum.density import SpectralDensity, check_probes, spectral_density
from curvlab.spectrum.eigenvalues import EigenResult, Stop, Which, top_eigenvalues

CurveLevel = Literal["network", "layer"]

_FRESH_EVERY = 20  # points


class EigenvalueRecorder:
    """Records the most extreme eigenvalues of curvatures while a model trains, for ``fit(..., observers=[...])``.

    The search for the first quantity is started from its eigenvectors of the point before, that for the others from
    those of the first quantity at the same point (for ``SA`` from their own), with a random part. That takes about half
    the products of random starts. As an eigenvector that owes nothing to the old one can hide from such a start, every
    twentieth point is started at random for the first quantity, and a random start goes on until the residual is below
    the tolerance.

    The model is measured in eval mode: without dropout, and batch normalisation with its running statistics. It is
    not changed, and nothing of it is kept between points. In a loop of one's own, call ``recorder(step, model)``.

    Args:
        data: The samples that the curvature is taken on, the same at every point, as ``Problem`` takes them; or a
            function from the model to the ``Problem``.
        loss: For data; the problem of a function has its own.
        quantities: Of ``curvlab.quantities``, or their string forms.
        k: How many eigenvalues.
        which: The largest (``LA``), the smallest (``SA``), or the largest in magnitude (``LM``).
        every: Steps from point to point; there is one at step 0 and one at the end, too.
        tol: Relative error of an eigenvalue.
        max_matvecs: Products that a point may take for one quantity of one layer; None for 1,000, or ``20 k`` if that
            is more.
        params: Glob patterns of parameter names; None for all trainable ones.
        per: ``network``, or ``layer`` for the block of every module's own parameters.
        batch_size: Samples taken at once; None for the data's own batches. Never changes the result.
        warm: Whether to start from earlier eigenvectors; otherwise at random.
        densities_at: Steps at which the density of all eigenvalues is estimated too (``curvlab.spectral_density``).
        density_probes: Random vectors a density.
        density_steps: Products a probe; a density takes up to ``density_probes * density_steps`` of them.
        seed: Of the random vectors.

    Attributes:
        records: One flat record an eigenvalue: ``step``, ``quantity``, ``layer`` (``network`` for all parameters),
            ``index`` (0 for the most extreme), ``value``, ``residual``, ``converged``; ``matvecs`` and ``seconds`` are
            of all ``k`` together.
        densities: One record a density: ``step``, ``quantity``, ``layer``, ``density`` (a ``SpectralDensity``) and
            ``seconds``.

    Raises:
        CurvlabError: An option is not right; later: the model or data are not, or the run is another than before.
        UnsupportedError: A quantity cannot be computed for this model.

    Examples:
        >>> from curvlab.training import fit
        >>> _ = torch.manual_seed(0)
        >>> model, data = nn.Linear(2, 2), (torch.eye(2), torch.tensor([0, 1]))
        >>> recorder = EigenvalueRecorder(data, quantities=["hessian"], every=50)
        >>> _ = fit(model, data, lr=0.1, steps=100, observers=[recorder])
        >>> [(record["step"], round(record["value"], 3)) for record in recorder.records]
        [(0, 0.732), (50, 0.03), (100, 0.016)]
    """

    def __init__(
        self,
        data: BatchSource | Pair | Callable[[nn.Module], Problem],
        loss: str = "cross_entropy",
        *,
        quantities: Sequence[Quantity | str] = ("fisher", "hessian"),
        k: int = 1,
        which: Which = "LA",
        every: int = 100,
        tol: float = 1e-3,
        max_matvecs: int | None = None,
        params: Sequence[str] | str | None = None,
        per: CurveLevel = "network",
        batch_size: int | None = None,
        warm: bool = True,
        densities_at: Collection[int] = (),
        density_probes: int = 10,
        density_steps: int = 100,
        seed: int = 0,
    ) -> None:
        if isinstance(quantities, (str, Quantity)) or not quantities:
            raise CurvlabError("quantities is a list of one or more, such as ['fisher', 'hessian']")
        choice("which", which, get_args(Which))
        choice("per", per, get_args(CurveLevel))
        # Whole and real numbers of Python's alone, as a checkpoint takes no others.
        k, every, seed = whole("k", k, 1), whole("every", every, 1), whole("seed", seed, 0)
        tol = real("tol", tol, above=0)
        max_matvecs = None if max_matvecs is None else whole("max_matvecs", max_matvecs, 1)
        if not callable(data):
            get_loss(loss)
        density_probes, density_steps = check_probes(density_probes, density_steps)
        self._problem: Callable[[nn.Module], Problem] = (
            data if callable(data) else lambda model: Problem(model, loss, data)
        )
        self._quantities = list(dict.fromkeys(parse_quantity(quantity) for quantity in quantities))
        self._k, self._which, self._tol, self._max_matvecs = k, which, tol, max_matvecs
        self._params, self._per, self._batch_size = params, per, batch_size
        self._every, self._warm, self._seed = every, warm, seed
        self._densities_at = frozenset(densities_at)
        self._density_probes, self._density_steps = density_probes, density_steps
        #: What a checkpoint must agree in.
        self._options = {
            "data": _description(data),
            "loss": None if callable(data) else loss,
            "quantities": ", ".join(map(str, self._quantities)),
            "k": k,
            "which": which,
            "every": every,
            "tol": tol,
            "max_matvecs": max_matvecs,
            "params": None if params is None else str(params),
            "per": per,
            "warm": warm,
            "densities_at": ", ".join(map(str, sorted(self._densities_at))),
            "density_probes": density_probes,
            "density_steps": density_steps,
            "seed": seed,
        }
        self.records: list[dict[str, Any]] = []
        self.densities: list[dict[str, Any]] = []
        self._points = 0
        self._vectors: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Say whether there is a point after this many steps."""
        return step % self._every == 0 or step in self._densities_at

    def __call__(self, step: int, model: nn.Module) -> None:
        """Record the eigenvalues of the model as it is.

        Raises:
            CurvlabError: There is a record of this step or a later one: every run needs a recorder of its own.
        """
        if self.records and step <= self.records[-1]["step"]:
            raise CurvlabError(
                f"the recorder has a point at step {self.records[-1]['step']} and is called at step {step}: "
                "take a new recorder for another run"
            )
        records: list[dict[str, Any]] = []
        densities: list[dict[str, Any]] = []
        vectors: dict[str, Tensor] = {}
        earlier = {} if self._points % _FRESH_EVERY == 0 else self._vectors
        with _eval_mode(model):
            problem = self._problem(model)
            for quantity in self._quantities:
                # The largest eigenvalues of two curvatures have much to do with each other, the smallest little.
                near = quantity if self._which == "SA" else self._quantities[0]
                for layer, patterns in self._layers(problem.model).items():
                    of = {"step": step, "quantity": str(quantity), "layer": layer}
                    key = f"{near} {layer}"
                    started = time.perf_counter()
                    matrix = estimate(problem, quantity, "implicit", params=patterns, batch_size=self._batch_size)
                    top = self._top(matrix, (earlier if near == quantity else vectors).get(key), step)
                    if near == quantity:
                        vectors[key] = top.vectors
                    seconds = time.perf_counter() - started
                    records += [of | record | {"seconds": seconds} for record in _flat(top)]
                    if step in self._densities_at:
                        densities.append(of | self._density(matrix))
                    del matrix  # and the graphs that it holds, before there are those of the next
        self.records += records
        self.densities += densities
        self._vectors = vectors
        self._points += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the records and what the next point starts from."""
        return {
            "options": dict(self._options),
            "records": list(self.records),
            "densities": [record | {"density": asdict(record["density"])} for record in self.densities],
            "points": self._points,
            "vectors": dict(self._vectors),
        }

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        """Take up what ``state_dict`` returned; what was recorded here is dropped.

        Raises:
            CurvlabError: It is that of a recorder with other options or other data.
        """
        for name, value in self._options.items():
            if states["options"].get(name) != value:
                raise CurvlabError(
                    f"the recorder of the stopped run had {name} {states['options'].get(name)}, this one has {value}: "
                    "give it the same options, or begin the run again"
                )
        self.records, self._points = list(states["records"]), states["points"]
        self.densities = [record | {"density": SpectralDensity(**record["density"])} for record in states["densities"]]
        self._vectors = dict(states["vectors"])

    def _layers(self, model: nn.Module) -> dict[str, Sequence[str] | str | None]:
        """Return names and the patterns of their parameters."""
        if self._per == "network":
            return {"network": self._params}
        modules = patterns_by_module(model, self._params)
        return {name or type(model).__name__: patterns for name, patterns in modules.items()}

    def _top(self, matrix: CurvatureMatrix, near: Tensor | None, step: int) -> EigenResult:
        if near is not None and len(near) != matrix.shape[0]:  # parameters have been frozen, or unfrozen
            near = None
        start = near if self._warm else None
        # From a random start, a gap can look settled before the first eigenvector has appeared at all.
        stop: Stop = "residual" if start is None else "gap"
        # The random part of a start is another one at every step: what one hides from, the next may see.
        seed = self._seed if start is None else self._seed + step
        return top_eigenvalues(matrix, self._k, self._which, self._tol, self._max_matvecs, start, seed, stop=stop)

    def _density(self, matrix: CurvatureMatrix) -> dict[str, Any]:
        started = time.perf_counter()
        density = spectral_density(matrix, probes=self._density_probes, steps=self._density_steps, seed=self._seed)
        return {"density": density, "seconds": time.perf_counter() - started}


def _flat(top: EigenResult) -> list[dict[str, Any]]:
    of_all = {"matvecs": top.matvecs, "converged": bool(top.converged)}
    return [
        {"index": index, "value": value, "residual": residual} | of_all
        for index, (value, residual) in enumerate(zip(top.values.tolist(), top.residuals.tolist(), strict=True))
    ]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _description(data: object) -> str:
    """Return what tells data apart: of tensors their bytes, of anything else its type."""
    if not (isinstance(data, (tuple, list)) and all(isinstance(part, Tensor) for part in data)):
        return type(data).__name__
    digest = sha256()
    for part in data:
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"tensors {digest.hexdigest()[:16]}"
