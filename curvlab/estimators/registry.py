"""Selection of a backend for a quantity, a structure and a model, and ``estimate``, the interface to all backends."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from curvlab.checks import whole_number
from curvlab.errors import CurvlabError, UnsupportedError, first_line, type_and_line
from curvlab.estimators import backpack, curvlinops, hooks, nngeometry, torch_func
from curvlab.estimators.backend import Backend
from curvlab.estimators.capture import ignore_torch_warnings, working_dtype
from curvlab.estimators.covectors import suggest_sampling
from curvlab.estimators.layers import count_entries
from curvlab.estimators.linearized import to_first_order
from curvlab.estimators.memory import check_fits, fit_batch_size, limited, parse_memory
from curvlab.estimators.phases import phase
from curvlab.estimators.products import kept_bytes
from curvlab.estimators.rules import random_like
from curvlab.estimators.verification import (
    ChangedUseError,
    Verification,
    cache_verification,
    describe_parameters_without_factors,
    kronecker_layers,
    verify_rules,
)
from curvlab.forms import unknown_name_message
from curvlab.intake import is_finite
from curvlab.matrices import Composite, CurvatureMatrix, Implicit, Info
from curvlab.parameters import ParameterSpace, Selection
from curvlab.problem import Problem
from curvlab.progress import Advance, no_progress, progress
from curvlab.quantities import Fisher, Hessian, MaSQ, Quantity, parse_quantity
from curvlab.stateless import disable_parametrization_cache, restore_attributes, restore_gradients
from curvlab.structures import STRUCTURES, EKFACStructure, Kronecker, Structure, is_forward_only, parse_structure

#: Backends by name, the fastest first (measured by benchmarks/estimators.py): ``auto`` uses the first that can.
BACKENDS: Mapping[str, Backend] = {
    module.BACKEND.name: module.BACKEND for module in (hooks, curvlinops, nngeometry, backpack, torch_func)
}


def estimate(
    problem: Problem,
    quantity: Quantity | str,
    structure: Structure | str,
    *,
    backend: str = "auto",
    params: Selection | None = None,
    batch_size: int | None = None,
    memory: str | float | None = None,
    progress: bool = False,
) -> CurvatureMatrix:
    """Return a curvature matrix of a problem: the mean over its samples of the per-sample matrix.

    Args:
        problem: Model, loss and data.
        quantity: One of ``curvlab.quantities`` or its string form, such as ``"fisher:samples=4"``.
        structure: ``dense``, ``block_diag`` (one block per parameter tensor), ``diag``, ``kfac``, ``ekfac``, ``tkfac``
            or ``implicit``, with options such as ``"kfac:sharing=reduce"`` (see ``curvlab.structures``). A Kronecker
            structure has factors for Linear layers, convolutions, embeddings and the projections of attention. The
            other parameters get their diagonal, in a ``Composite``; the option ``rest=none`` refuses them.
        backend: ``hooks`` (curvlab's own), ``backpack``, ``nngeometry``, ``curvlinops``, ``torch`` (the reference:
            per-sample automatic differentiation), or ``auto``: the fastest that is correct for this model.
        params: Selection of parameters: glob patterns of names, compiled regular expressions, or a function of name
            and parameter (``curvlab.parameters.Selection``); None for all trainable ones.
        batch_size: Samples processed at once; None for the data's own batches. It does not change the result.
        memory: Limit of the memory in addition to model and data: ``"2GB"``, bytes, or ``small`` (1 GB), ``medium``
            (4 GB) or ``large`` (16 GB). The samples processed at once, and other pieces, are then as many as fit, by
            trials on a few samples. None for no limit.
        progress: Show a progress bar on a terminal.

    Returns:
        A matrix over the selected parameters on the model's device, in its dtype or, for half-precision models, in
        float32. Its ``info`` has the backend that computed it, which others were rejected and why, and which parameters
        have no Kronecker factors and why.

    Raises:
        CurvlabError: A name is unknown, the data or weights are not finite, or targets do not fit the loss.
        UnsupportedError: No backend, or not the requested one, computes this correctly for this model; the message
            names the module that is the cause and an alternative. Or it does not fit into ``memory``.

    Examples:
        >>> import torch
        >>> problem = Problem(torch.nn.Linear(2, 3), "cross_entropy", (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> estimate(problem, "empirical_fisher", "diag")
        Diagonal(empirical_fisher, P=9, torch.float32, cpu)
    """
    quantity, structure = parse_quantity(quantity), parse_structure(structure)
    if backend not in ("auto", *BACKENDS):
        raise CurvlabError(unknown_name_message("backend", str(backend), ("auto", *BACKENDS)))
    if batch_size is not None:
        batch_size = whole_number(batch_size, "batch_size", 1)
    limit = None if memory is None else parse_memory(memory)
    if limit is not None and batch_size is not None:
        raise CurvlabError("memory chooses how many samples are processed at once: leave out batch_size, or memory")
    space = ParameterSpace.of(problem.model, params)
    find_backends(quantity, structure, backend)  # fail before the data are read if no backend has the combination
    if limit is not None:
        return _estimate_within(limit, problem, quantity, structure, backend, params, progress)
    with phase("check"):
        problem.check()
    if not isinstance(quantity, Hessian):
        problem = to_first_order(problem)
    problem = cache_verification(problem)
    # Works also if the caller has switched gradients off.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        ignore_torch_warnings(),  # also removes warning filters that are added by imports at the first use
        restore_attributes(problem.model.modules()),  # also those that a checkpoint sets in a backward pass
        disable_parametrization_cache(),  # also in a backward pass
        restore_gradients(problem.model),  # a patched forward may call the original model from a copy
        _bar(_label(problem, quantity, structure) if progress else "", problem.num_samples, progress) as advance,
    ):
        with phase("check"):
            verify_rules(problem, space)  # also refuses models that torch cannot differentiate, for every structure
        layers = kronecker_layers(problem, space, structure)[0] if isinstance(structure, Kronecker) else {}
        check_fits(_name(quantity, structure), _sum_bytes(problem, count_entries(structure, space, layers)))
        split, reasons = _parts(problem, quantity, structure, space, backend)
        parts = [
            _estimate(problem, quantity, part_structure, part_space, backend, batch_size, advance)
            for part_structure, part_space in split
        ]
    without = describe_parameters_without_factors(reasons)
    for part, (part_structure, _) in zip(parts, split, strict=True):
        if not isinstance(part_structure, Kronecker):
            part.info = replace(part.info, rejected=(*without, *part.info.rejected))
    if len(parts) == 1:
        return parts[0]
    backends = dict.fromkeys(part.info.backend for part in parts)
    return Composite(
        parts,
        space,
        replace(
            parts[0].info,
            structure=str(structure),
            backend=", ".join(backends),
            seconds=sum(part.info.seconds for part in parts),
            rejected=tuple(dict.fromkeys(chain.from_iterable(part.info.rejected for part in parts))),
        ),
    )


def _estimate_within(
    limit: float,
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    backend: str,
    params: Selection | None,
    progress: bool,
) -> CurvatureMatrix:
    """Return the matrix, computed with a peak below a limit in bytes, in addition to model and data."""

    def work(few: Problem) -> float:
        matrix = estimate(few, quantity, structure, backend=backend, params=params)
        if structure.name == "implicit":
            matrix.matvec(torch.ones(matrix.shape[0], dtype=matrix.dtype, device=matrix.device))
            return kept_bytes()
        stored = sum(tensor.nbytes for tensor in matrix.tensors().values())
        entries = sum(tensor.numel() for tensor in matrix.tensors().values())
        return _sum_bytes(problem, entries) - stored

    with limited(limit):
        size = fit_batch_size(_name(quantity, structure), problem, limit, work)
        matrix = estimate(
            problem.with_batch_size(size), quantity, structure, backend=backend, params=params, progress=progress
        )
    if not isinstance(quantity, MaSQ):
        matrix.info = replace(matrix.info, batch_size=size)
    return matrix


def _name(quantity: Quantity, structure: Structure) -> str:
    return f"{quantity.name} as {structure}"


def _sum_bytes(problem: Problem, entries: int) -> float:
    """Return the bytes of sums over many batches, which are in float64, too (see ``curvlab.estimators.sums``)."""
    itemsize, double = working_dtype(problem.dtype).itemsize, torch.float64.itemsize
    return float(entries * (itemsize + (double if itemsize < double else 0)))


def _label(problem: Problem, quantity: Quantity, structure: Structure) -> str:
    """Return the label of the progress bar, with a hint if the number of outputs makes the computation slow."""
    hint = None
    if structure.name != "implicit":
        inputs, _ = problem.probe()[0]
        hint = suggest_sampling(problem.loss, quantity, problem.forward({}, inputs[:1]).detach().shape[1])
    return f"{quantity} {structure}" + (f" ({hint})" if hint else "")


_bar = progress  # the argument of ``estimate`` hides the function's name there


def _parts(
    problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace, backend: str
) -> tuple[list[tuple[Structure, ParameterSpace]], Mapping[str, str]]:
    """Return what to compute: the whole matrix, or one part for the Kronecker layers and one for the rest.

    The second value has, by parameter of the rest, the reason why it has no Kronecker factors.
    """
    if not isinstance(structure, Kronecker):
        return [(structure, space)], {}
    layers, reasons = kronecker_layers(problem, space, structure)
    with_factors = replace(structure, rest=type(structure).rest)  # the default: every parameter of it has factors
    if not reasons:
        return [(with_factors, space)], {}
    name, reason = next(iter(reasons.items()))
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    if structure.rest is None:
        raise UnsupportedError(
            f"{structure} needs Kronecker factors for every parameter: {name} {reason}{more}; '{structure.name}' "
            "without rest=none gives such parameters their diagonal, and params=[...] leaves them out"
        )
    rest = parse_structure(structure.rest)
    if backend != "auto" and rest.name not in BACKENDS[backend].structures[type(quantity)]:
        raise UnsupportedError(
            f"backend {backend} does not compute {quantity.name} as {rest}, which parameters without Kronecker factors "
            f"get: {name} {reason}{more}; use backend auto, or leave them out with params=[...]"
        )
    if not layers:
        return [(rest, space)], reasons
    inside = {parameter for layer in layers.values() for parameter in layer.parameters}
    return [(with_factors, space.restrict(inside)), (rest, space.restrict(reasons))], reasons


def _estimate(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    backend: str,
    batch_size: int | None,
    advance: Advance,
) -> CurvatureMatrix:
    info = Info(
        quantity=str(quantity),
        structure=str(structure),
        loss=str(problem.loss),
        backend=backend,
        num_samples=problem.num_samples,
        samples=quantity.samples if isinstance(quantity, Fisher) else None,
        seed=quantity.seed if isinstance(quantity, Fisher) and quantity.samples else None,
        batch_size=quantity.batch_size if isinstance(quantity, MaSQ) else batch_size,
    )
    obstacles: dict[str, str] = {}
    failed: set[str] = set()  # those of them that failed during the computation
    for candidate in find_backends(quantity, structure, backend):
        started = time.perf_counter()
        if (reason := _obstacle(candidate, problem, quantity, structure, space, batch_size)) is not None:
            obstacles[candidate.name] = reason
            continue
        rejected = [f"backend {name}: {reason}" for name, reason in obstacles.items()]
        try:
            if structure.name == "implicit":
                assert candidate.product is not None
                product = candidate.product(problem, quantity, space, batch_size)
                info = replace(info, backend=candidate.name, rejected=tuple(rejected))
                implicit = Implicit(product, space, info, dtype=working_dtype(problem.dtype), device=problem.device)
                return _per_unit(implicit, problem)
            computed = candidate.compute(problem, quantity, structure, space, batch_size, advance)
        except Exception as error:
            obstacles[candidate.name] = _failure(error, problem)
            failed.add(candidate.name)
            if isinstance(error, ChangedUseError) and isinstance(structure, Kronecker):
                # No backend has factors for a parameter that some batch uses in another way.
                reason = " ".join(next(iter(error.reasons.items())))
                raise UnsupportedError(
                    f"{quantity.name} as {structure}: {reason}, so that it has no Kronecker factors: leave it out with "
                    "params=[...], or use diag or block_diag"
                ) from error
            continue
        try:
            matrix = CurvatureMatrix.kinds[structure.name].from_tensors(computed.tensors, space, info)
        except (CurvlabError, KeyError) as error:
            obstacles[candidate.name] = _incomplete(error, problem)
            continue
        for name, tensor in computed.tensors.items():
            if not is_finite(tensor):
                raise CurvlabError(f"the {quantity} of {name} is not finite: the model's outputs or gradients overflow")
        matrix = matrix if is_forward_only(structure) else _per_unit(matrix, problem)
        matrix.info = replace(
            info,
            backend=candidate.name,
            seconds=time.perf_counter() - started,
            rejected=(*rejected, *(f"{name} {reason}" for name, reason in computed.rejected.items())),
        )
        return matrix
    failures = "; ".join(
        f"backend {' and '.join(name for name in obstacles if obstacles[name] == reason)} cannot: {reason}"
        for reason in dict.fromkeys(obstacles.values())
    )
    others = [b for b in find_backends(quantity, structure) if b.name not in obstacles]
    # The reference has checked every sample: if it finds no factors, no backend does.
    impossible = isinstance(structure, Kronecker) and torch_func.BACKEND.name in failed
    capable = [
        b.name
        for b in others
        if not impossible and _obstacle(b, problem, quantity, structure, space, batch_size) is None
    ]
    alternative = f"; backend {_either(capable)} can" if capable else ""
    raise UnsupportedError(f"{quantity.name} as {structure}: {failures}{alternative}")


def _per_unit(matrix: CurvatureMatrix, problem: Problem) -> CurvatureMatrix:
    """Return a mean over samples as a mean over the units of the problem."""
    if problem.num_units == problem.num_samples:
        return matrix
    return matrix * (problem.num_samples / problem.num_units)


def _failure(error: Exception, problem: Problem) -> str:
    """Return a clause that describes an exception of a backend.

    Raises:
        CurvlabError: The cause is not the backend, but something that the user can correct.
    """
    if isinstance(error, UnsupportedError):
        return str(error)
    if isinstance(error, CurvlabError):
        raise error
    return _fails(problem, error)


def _incomplete(error: Exception, problem: Problem) -> str:
    detail = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
    return f"its tensors do not fit {type(problem.model).__name__}: {detail}"


def _fails(problem: Problem, error: Exception) -> str:
    return f"it fails on {type(problem.model).__name__} ({type_and_line(error)})"


def find_backends(quantity: Quantity, structure: Structure, backend: str = "auto") -> list[Backend]:
    """Return the backends that have a combination, the fastest first; only the named one unless it is ``auto``.

    Raises:
        UnsupportedError: No backend, or not the named one, has the combination.
    """
    found = [b for b in BACKENDS.values() if structure.name in b.structures.get(type(quantity), ())]
    if not found:
        offered = {s for b in BACKENDS.values() for s in b.structures.get(type(quantity), ())}
        names = ", ".join(name for name in STRUCTURES if name in offered)
        raise UnsupportedError(
            f"no backend computes {quantity.name} as {structure.name}; available structures: {names}"
        )
    if structure.name == "implicit":  # our own products support every model
        found.sort(key=lambda b: b.library)
    if backend == "auto":
        return found
    if BACKENDS[backend] not in found:
        names = _either(b.name for b in found)
        raise UnsupportedError(f"backend {backend} does not compute {quantity.name} as {structure.name}; {names} does")
    return [BACKENDS[backend]]


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)


def _obstacle(
    backend: Backend,
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
) -> str | None:
    """Return why a backend cannot compute a combination for this model; a library is also tested on a few samples."""
    if backend.library and problem.dtype.itemsize < torch.float32.itemsize:
        return f"it sums in {str(problem.dtype).removeprefix('torch.')} and loses precision"
    if backend.library and not problem.is_plain:
        return f"it needs a model with one input tensor and outputs (N, C), unlike {type(problem.model).__name__} here"
    if backend.library and isinstance(structure, Kronecker):
        if is_forward_only(structure):
            return "it computes the factors of the gradients, too"
        for key, layer in kronecker_layers(problem, space, structure)[0].items():
            if key != layer.name:
                return f"it has one pair of full factors per module, not a block {key}"
    try:
        obstacle = backend.obstacle(problem, quantity, structure, space)
    except Exception as error:
        return _failure(error, problem)
    if obstacle is not None or not backend.library:
        return obstacle
    if structure.name == "implicit":
        return _disagreement(backend, problem, quantity, structure, space)
    reason = _disagreement(backend, problem, quantity, structure, space)
    return reason or _change_of_use(problem, verify_rules(problem, space), batch_size)


def _disagreement(
    backend: Backend, problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace
) -> str | None:
    """Return a clause if a library's result on a few samples differs from the reference; else None.

    The list of modules does not show everything: a functional call between layers, a weight used elsewhere.
    """
    few = problem.probe()
    sample = problem.with_data(few)
    vectors = random_like(torch.empty((), dtype=problem.dtype, device=problem.device), (space.total, 2))
    info = Info("", str(structure), str(problem.loss), backend.name, sample.num_samples)

    def products(by: Backend) -> Tensor:
        if structure.name == "implicit":
            assert by.product is not None
            return by.product(sample, quantity, space, None)(vectors)
        tensors = by.compute(sample, quantity, structure, space, None, no_progress).tensors
        return CurvatureMatrix.kinds[structure.name].from_tensors(tensors, space, info) @ vectors

    try:
        if isinstance(structure, EKFACStructure):
            theirs, reference = _eigen_tensors(backend, sample, quantity, structure, space)
        else:
            theirs, reference = products(backend), products(torch_func.BACKEND)
    except UnsupportedError as error:
        return str(error)
    except Exception as error:  # the library can raise anything, or return tensors that do not fit
        return _fails(problem, error)
    tolerance = 10 * torch.finfo(problem.dtype).eps ** 0.5
    if bool((theirs - reference).abs().max() <= tolerance * reference.abs().max()):
        return None
    return (
        f"it gives a wrong result for {type(problem.model).__name__}: on {sample.num_samples} samples it differs "
        "from automatic differentiation"
    )


def _eigen_tensors(
    backend: Backend, sample: Problem, quantity: Quantity, structure: EKFACStructure, space: ParameterSpace
) -> tuple[Tensor, Tensor]:
    """Return the tensors that determine whether an EK-FAC is correct, and their expected values.

    The basis is not unique, so it is not compared with the reference's. It is correct if it is orthonormal and K-FAC's
    factors are diagonal in it; then the eigenvalues are unique.
    """
    theirs = backend.compute(sample, quantity, structure, space, None, no_progress).tensors
    turned, right = torch_func.compute_in_basis(sample, quantity, structure, space, theirs)
    bases = [theirs[name.replace("|", "|U_")] for name in turned]
    pairs = [(u.mT @ u, torch.eye(len(u), dtype=u.dtype, device=u.device)) for u in bases]
    for some in ("A", "S", "values"):
        ours = {name: tensor for name, tensor in (turned | right).items() if name.endswith(f"|{some}")}
        scale = max(float(tensor.abs().max()) for tensor in ours.values()) or 1.0
        for name, tensor in ours.items():
            pair = (theirs[name], tensor) if some == "values" else (tensor, tensor.diagonal().diag())
            pairs.append((pair[0] / scale, pair[1] / scale))
    actual, expected = zip(*pairs, strict=True)
    return torch.cat([t.flatten() for t in actual]), torch.cat([t.flatten() for t in expected])


def _change_of_use(problem: Problem, verified: Verification, batch_size: int | None) -> str | None:
    """Return a clause if a batch uses a parameter differently than the samples of the comparison; else None."""
    try:
        for inputs, _ in problem.batches(batch_size):
            verified.run(problem, inputs)
    except ChangedUseError as error:
        return str(error)
    return None
