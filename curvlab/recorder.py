"""Observer of the fit loop that records eigenvalues over training."""

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError
from curvlab.estimators import estimate
from curvlab.estimators.per_layer import patterns_by_module
from curvlab.forms import unknown_name_message
from curvlab.likelihoods import get_likelihood
from curvlab.matrices import CurvatureMatrix
from curvlab.parameters import Selection, check_selection
from curvlab.problem import BatchSource, Pair, Problem
from curvlab.quantities import Quantity, parse_quantity
from curvlab.spectrum.arguments import check_choice, check_real, check_whole
from curvlab.spectrum.density import SpectralDensity, check_probes, spectral_density
from curvlab.spectrum.eigenvalues import EigenResult, Stop, Which, top_eigenvalues
from curvlab.stateless import restore_modes

CurveLevel = Literal["network", "layer"]

_RANDOM_START_EVERY = 20  # points


class EigenvalueChanges(TypedDict, total=False):
    """Fields of ``EigenvalueOptions`` as keywords, for type checkers and editors."""

    k: int
    which: Which
    tol: float
    max_matvecs: int | None
    params: Selection | None
    per: CurveLevel
    batch_size: int | None
    warm: bool
    density_probes: int
    density_steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class EigenvalueOptions:
    """Options of the computation at each point of an ``EigenvalueRecorder``.

    Attributes:
        k: Number of eigenvalues.
        which: The largest (``LA``), the smallest (``SA``), or the largest in magnitude (``LM``).
        tol: Relative error of an eigenvalue.
        max_matvecs: Maximum number of matrix-vector products for one quantity of one layer at one point; None for
            1,000, or ``20 k`` if that is more.
        params: Selection of parameters: glob patterns of names, compiled regular expressions, or a function of name
            and parameter (``curvlab.parameters.Selection``); None for all trainable ones. A recorder that continues
            from a checkpoint compares patterns, and of functions their names.
        per: ``network``, or ``layer`` for the block of every module's own parameters.
        batch_size: Samples per batch; None for the batches of the data. It does not change the result.
        warm: Whether to start from earlier eigenvectors; otherwise every search starts from a random vector.
        density_probes: Number of random vectors for a density.
        density_steps: Maximum number of products per random vector; a density takes at most
            ``density_probes * density_steps`` products.
        seed: Seed of the random vectors.

    Raises:
        CurvlabError: An option is out of its range.
    """

    k: int = 1
    which: Which = "LA"
    tol: float = 1e-3
    max_matvecs: int | None = None
    params: Selection | None = None
    per: CurveLevel = "network"
    batch_size: int | None = None
    warm: bool = True
    density_probes: int = 10
    density_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("which", self.which, get_args(Which))
        check_choice("per", self.per, get_args(CurveLevel))
        probes, steps = check_probes(self.density_probes, self.density_steps)
        # Checkpoints keep Python's own numbers, not NumPy's.
        checked: dict[str, Any] = {
            "k": check_whole("k", self.k, 1),
            "tol": check_real("tol", self.tol, above=0),
            "max_matvecs": None if self.max_matvecs is None else check_whole("max_matvecs", self.max_matvecs, 1),
            "density_probes": probes,
            "density_steps": steps,
            "seed": check_whole("seed", self.seed, 0),
        }
        params = check_selection(self.params)
        checked["params"] = tuple(params) if isinstance(params, list) else params
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def describe(self) -> dict[str, Any]:
        """Return the options that must be equal to continue from a checkpoint, by name."""
        options = asdict(self)
        del options["batch_size"]
        if self.params is not None:
            options["params"] = (
                str(list(map(_describe_selector, self.params)))
                if isinstance(self.params, tuple)
                else _describe_selector(self.params)
            )
        return options


_DEFAULT = EigenvalueOptions()


class EigenvalueRecorder:
    """Record the most extreme eigenvalues of curvature matrices during training, for ``fit(..., observers=[...])``.

    The search for the first quantity starts from its eigenvectors at the previous point. The search for another
    quantity starts from the eigenvectors of the first quantity at the same point (with ``SA``, from its own at the
    previous point). Each start has a random part. This takes about half as many products as random starts. An
    eigenvector that is orthogonal to the old ones can be missed by such a start. Therefore, at every twentieth point
    the first quantity starts from a random vector, and a search from a random vector continues until the residual is
    below the tolerance.

    The model is measured in eval mode: without dropout, and with the running statistics of batch normalisation. The
    model is not changed, and no reference to it is kept between points. In your own training loop, call
    ``recorder(step, model)``.

    Args:
        data: The samples for the curvature, the same at every point, in any form that ``Problem`` takes; or a function
            from the model to a ``Problem``.
        loss: Loss for ``data``; a function in place of ``data`` defines its own.
        quantities: Quantities of ``curvlab.quantities``, or their string forms.
        every: Number of steps between two points; step 0 and the last step are also points.
        densities_at: Steps at which the spectral density is also estimated (``curvlab.spectral_density``).
        options: Options of the computation at each point.
        **changes: Fields of ``options`` to change: ``EigenvalueRecorder(data, k=3)`` is short for
            ``EigenvalueRecorder(data, options=EigenvalueOptions(k=3))``.

    Attributes:
        records: One flat record for each eigenvalue: ``step``, ``quantity``, ``layer`` (``network`` for all
            parameters), ``index`` (0 for the most extreme), ``value``, ``residual``, ``converged``, ``matvecs`` and
            ``seconds``; the last three are for all ``k`` eigenvalues together.
        densities: One record for each density: ``step``, ``quantity``, ``layer``, ``density`` (a ``SpectralDensity``)
            and ``seconds``.

    Raises:
        CurvlabError: An option is invalid. During training: the model or the data are invalid, or the recorder is used
            for a second run.
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
        every: int = 100,
        densities_at: Collection[int] = (),
        options: EigenvalueOptions = _DEFAULT,
        **changes: Unpack[EigenvalueChanges],
    ) -> None:
        if isinstance(quantities, (str, Quantity)) or not quantities:
            raise CurvlabError("quantities must be a list of at least one, such as ['fisher', 'hessian']")
        self._options = _combine(options, changes)
        self._every = check_whole("every", every, 1)
        if not callable(data):
            get_likelihood(loss)
        self._problem: Callable[[nn.Module], Problem] = (
            data if callable(data) else lambda model: Problem(model, loss, data)
        )
        self._quantities = list(dict.fromkeys(parse_quantity(quantity) for quantity in quantities))
        self._densities_at = frozenset(densities_at)
        #: What must be equal to continue from a checkpoint.
        self._description = {
            "data": _describe_data(data),
            "loss": None if callable(data) else loss,
            "quantities": ", ".join(map(str, self._quantities)),
            "every": self._every,
            "densities_at": ", ".join(map(str, sorted(self._densities_at))),
        } | self._options.describe()
        self.records: list[dict[str, Any]] = []
        self.densities: list[dict[str, Any]] = []
        self._points = 0
        self._vectors: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Return whether there is a point after this many steps."""
        return step % self._every == 0 or step in self._densities_at

    def __call__(self, step: int, model: nn.Module) -> None:
        """Record the eigenvalues of the model at its current parameters.

        Raises:
            CurvlabError: The recorder already has a record of this step or a later one: each run needs its own
                recorder.
        """
        if self.records and step <= self.records[-1]["step"]:
            raise CurvlabError(
                f"the recorder has a point at step {self.records[-1]['step']} and is called at step {step}: "
                "create a new recorder for another run"
            )
        records: list[dict[str, Any]] = []
        densities: list[dict[str, Any]] = []
        vectors: dict[str, Tensor] = {}
        previous = {} if self._points % _RANDOM_START_EVERY == 0 else self._vectors
        with restore_modes(model):
            model.eval()
            problem = self._problem(model)
            for quantity in self._quantities:
                # The largest eigenvectors of two curvature matrices are similar, the smallest are not.
                source = quantity if self._options.which == "SA" else self._quantities[0]
                for layer, patterns in self._layers(problem.model).items():
                    labels = {"step": step, "quantity": str(quantity), "layer": layer}
                    key = f"{source} {layer}"
                    started = time.perf_counter()
                    matrix = estimate(
                        problem, quantity, "implicit", params=patterns, batch_size=self._options.batch_size
                    )
                    top = self._search(matrix, (previous if source == quantity else vectors).get(key), step)
                    if source == quantity:
                        vectors[key] = top.vectors
                    seconds = time.perf_counter() - started
                    records += [labels | record | {"seconds": seconds} for record in _make_records(top)]
                    if step in self._densities_at:
                        densities.append(labels | self._density(matrix))
                    del matrix  # and the graphs that it holds, before those of the next one are made
        self.records += records
        self.densities += densities
        self._vectors = vectors
        self._points += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the records and the eigenvectors from which the next point starts."""
        return {
            "options": dict(self._description),
            "records": list(self.records),
            "densities": [record | {"density": asdict(record["density"])} for record in self.densities],
            "points": self._points,
            "vectors": dict(self._vectors),
        }

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        """Restore what ``state_dict`` returned; records made here so far are dropped.

        Raises:
            CurvlabError: The state belongs to a recorder with other options or other data.
        """
        for name, value in self._description.items():
            if states["options"].get(name) != value:
                raise CurvlabError(
                    f"the recorder of the stopped run had {name} {states['options'].get(name)}, this one has {value}: "
                    "use the same options, or start the run again without the checkpoint"
                )
        self.records, self._points = list(states["records"]), states["points"]
        self.densities = [record | {"density": SpectralDensity(**record["density"])} for record in states["densities"]]
        self._vectors = dict(states["vectors"])

    def _layers(self, model: nn.Module) -> Mapping[str, Selection | None]:
        """Return the layer names of the records with the patterns of their parameters."""
        params = self._options.params
        if self._options.per == "network":
            return {"network": params}
        return {name or type(model).__name__: own for name, own in patterns_by_module(model, params).items()}

    def _search(self, matrix: CurvatureMatrix, near: Tensor | None, step: int) -> EigenResult:
        if near is not None and len(near) != matrix.shape[0]:  # parameters were frozen or unfrozen since
            near = None
        options = self._options
        start = near if options.warm else None
        # From a random start, a gap can look settled before the first eigenvector has appeared at all.
        stop: Stop = "residual" if start is None else "gap"
        # The random part differs from step to step, so that a vector missed at one step is found at another.
        seed = options.seed if start is None else options.seed + step
        return top_eigenvalues(
            matrix, options.k, options.which, options.tol, options.max_matvecs, start, seed, stop=stop
        )

    def _density(self, matrix: CurvatureMatrix) -> dict[str, Any]:
        options, started = self._options, time.perf_counter()
        density = spectral_density(
            matrix, probes=options.density_probes, steps=options.density_steps, seed=options.seed
        )
        return {"density": density, "seconds": time.perf_counter() - started}


def _combine(options: EigenvalueOptions, changes: EigenvalueChanges) -> EigenvalueOptions:
    """Return the options with some of them changed.

    Raises:
        CurvlabError: An option is unknown or out of its range, or ``options`` is not an ``EigenvalueOptions``.
    """
    if not isinstance(options, EigenvalueOptions):
        raise CurvlabError(f"options must be a curvlab.recorder.EigenvalueOptions, not {describe_value(options)}")
    names = tuple(field.name for field in fields(EigenvalueOptions))
    for name in changes:
        if name not in names:
            raise CurvlabError(unknown_name_message("option of the recorder", name, names))
    return replace(options, **changes)


def _describe_selector(selector: object) -> str:
    """Return a pattern as text; a function by its name, because its code cannot be compared."""
    if isinstance(selector, str):
        return selector
    if isinstance(selector, re.Pattern):
        return repr(selector)
    return f"function {getattr(selector, '__qualname__', type(selector).__qualname__)}"


def _make_records(top: EigenResult) -> list[dict[str, Any]]:
    shared = {"matvecs": top.matvecs, "converged": bool(top.converged)}
    return [
        {"index": index, "value": value, "residual": residual} | shared
        for index, (value, residual) in enumerate(zip(top.values.tolist(), top.residuals.tolist(), strict=True))
    ]


def _describe_data(data: object) -> str:
    """Return a hash of the bytes of tensors; for any other data, the name of the type."""
    if not (isinstance(data, (tuple, list)) and all(isinstance(part, Tensor) for part in data)):
        return type(data).__name__
    digest = sha256()
    for part in data:
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"tensors {digest.hexdigest()[:16]}"
