"""curvlinops (Dangel, Eschenhagen and others): the factors of K-FAC and EK-FAC, and products by ``torch.func``.

Its losses are replaced: by our covectors ``s``, for ``J' s s' J``, and for the Hessian by the sum of our losses. So its
scales (a squared error without the 1/2, divided by the number of outputs), its limits (binary targets) and its own
sampling of labels are not used. Its check of determinism, which costs several passes, is off, because ``Problem``
checks this.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from curvlab.errors import UnsupportedError, type_and_line
from curvlab.estimators import products, snapshots
from curvlab.estimators.backend import Backend, BackendResult
from curvlab.estimators.covectors import label_stream, output_covectors
from curvlab.estimators.snapshots import enable_all_derivatives, explain_torch_errors
from curvlab.estimators.verification import find_library_obstacle
from curvlab.graph import walk
from curvlab.interface import Pair
from curvlab.likelihoods import CrossEntropy, Likelihood
from curvlab.matrices.eigen import symmetric_eigh
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance, no_progress
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, Quantity
from curvlab.structures import Kronecker, Structure

with warnings.catch_warnings():  # from a library that it imports
    warnings.simplefilter("ignore", FutureWarning)
    from curvlinops import EKFACLinearOperator, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator

_NO_INDEX = 2**64 - 1  # the value that a node of torch's graph saves for "no index": -1
_PROBE_SAMPLES = 2
#: Modules whose gradient torch.func cannot differentiate, or differentiates wrongly (the weights of the norms).
_NO_SECOND_DERIVATIVE = (nn.LayerNorm, _InstanceNorm, nn.GroupNorm, nn.SiLU, nn.Mish, nn.Hardsigmoid)
_COLUMNS = 16  # vectors that are multiplied at once: the library keeps the activations of each


class _Passes:
    """Iterable over the batches of a problem that draws the same labels in every pass."""

    def __init__(
        self,
        problem: Problem,
        quantity: Quantity,
        batch_size: int | None,
        advance: Callable[[float], None] = no_progress,
    ) -> None:
        self.problem, self.quantity, self.batch_size, self.advance = problem, quantity, batch_size, advance

    def __iter__(self) -> Iterator[Pair]:
        self._rng = label_stream(self.quantity)
        for inputs, targets in self.problem.batches(self.batch_size):
            yield inputs, targets
            self.advance(len(inputs))

    def rows(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the covectors of the current batch, ``(N, R, C)``."""
        return output_covectors(self.problem.loss, self.quantity, outputs, targets, self._rng)[:]


class _WithRows(_Passes):
    """The same, with the covectors in place of the targets."""

    def __iter__(self) -> Iterator[Pair]:
        for inputs, targets in super().__iter__():
            with torch.enable_grad():  # for models with a derivative inside the forward pass
                outputs = self.problem.forward({}, inputs).detach()
            yield inputs, self.rows(outputs, targets)


# Factors -------------------------------------------------------------------------------------------------------------


class _ByRows:
    """Mixin that runs a backward pass for each covector, to the outputs of the layers before any other hook.

    The library uses the outputs after the user's hooks, which may change them, even on some samples only. Its own hooks
    are lost if an output is a view that is changed in place.
    """

    _data: _Passes
    _params: list[Tensor]
    _outputs: dict[str, Tensor]  # copies of the layers' outputs, taken before any other hook

    def _keep_outputs(self, modules: Mapping[str, nn.Module]) -> None:
        self._outputs = {}
        for name, module in modules.items():
            module.register_forward_hook(partial(self._keep, name), prepend=True)

    def _keep(self, name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        self._outputs[name] = output.clone()
        return self._outputs[name]

    def _register_tensor_hook_on_output_to_accumulate_gradient_covariance(
        self, module: nn.Module, inputs: tuple[Tensor], _: Tensor, module_name: str
    ) -> None:
        kept = self._outputs.pop(module_name)
        super()._register_tensor_hook_on_output_to_accumulate_gradient_covariance(module, inputs, kept, module_name)  # type: ignore[misc]

    def _register_tensor_hook_on_output_to_accumulate_corrected_eigenvalues(
        self, module: nn.Module, inputs: tuple[Tensor], _: Tensor, module_name: str
    ) -> None:
        kept = self._outputs.pop(module_name)
        super()._register_tensor_hook_on_output_to_accumulate_corrected_eigenvalues(module, inputs, kept, module_name)  # type: ignore[misc]

    def _compute_loss_and_backward(self, output: Tensor, y: Tensor) -> None:
        rows = self._data.rows(output.detach(), y).unbind(dim=1)
        for left, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
            torch.autograd.grad(output, self._params, row, retain_graph=left > 0)


class _KFAC(_ByRows, KFACLinearOperator):  # type: ignore[misc]
    pass


class _EKFAC(_ByRows, EKFACLinearOperator):  # type: ignore[misc]
    pass


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> BackendResult:
    """See ``curvlab.estimators.backend.Compute``."""
    assert isinstance(structure, Kronecker)
    n = problem.num_samples
    corrected = structure.name == "ekfac"
    copy = _copy(problem, space)
    modules = {name: copy.model.get_submodule(name) for name in _layer_names(space)}
    for module in modules.values():
        module.register_forward_pre_hook(_by_position, with_kwargs=True)
    # Not computed, because ``_compute_loss_and_backward`` starts from our covectors; it tells the shape of the targets.
    loss = nn.CrossEntropyLoss if isinstance(problem.loss.each, CrossEntropy) else nn.MSELoss
    operator = (_EKFAC if corrected else _KFAC)(
        copy.model,
        loss(reduction="sum"),
        _parameters(copy, space),
        _Passes(copy, quantity, batch_size, lambda samples: advance(samples / 2 if corrected else samples)),
        check_deterministic=False,
        fisher_type="empirical",
        kfac_approx=structure.sharing,
        num_per_example_loss_terms=1,
        separate_weight_and_bias=False,
        num_data=n,
    )
    operator._keep_outputs(modules)
    operator.compute_kronecker_factors()
    one = torch.ones(1, 1, dtype=problem.dtype, device=problem.device)  # A of a bias alone
    inputs = {name: operator.state_dict()["input_covariances"].get(name, one) for name in modules}
    slopes = operator.state_dict()["gradient_covariances"]
    if not corrected:
        factors = {f"{name}|A": a for name, a in inputs.items()}
        return BackendResult(factors | {f"{name}|S": s / n for name, s in slopes.items()})
    # The library computes eigenvectors in the model's dtype; float32 does not converge for some factors of low rank.
    bases = {f"{name}|U_A": symmetric_eigh(a)[1] for name, a in inputs.items()}
    bases |= {f"{name}|U_S": symmetric_eigh(s)[1] for name, s in slopes.items()}
    operator._input_covariances_eigenvectors = {name: bases[f"{name}|U_A"] for name in inputs}
    operator._gradient_covariances_eigenvectors = {name: bases[f"{name}|U_S"] for name in slopes}
    operator.compute_eigenvalue_correction()
    for name, values in operator.state_dict()["corrected_eigenvalues"].items():
        # A dict by parameter if the layer has only one.
        both = values if isinstance(values, Tensor) else next(iter(values.values()))
        bases[f"{name}|values"] = both.reshape(len(both), -1) / n
    return BackendResult(bases)


def _layer_names(space: ParameterSpace) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in space.names))


def _by_position(
    _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # The library expects the input among the positional arguments.
    return (*arguments, *keywords.values()), {}


# Products ------------------------------------------------------------------------------------------------------------


class _Values(nn.Module):
    """Sum of a loss over samples."""

    reduction = "sum"

    def __init__(self, loss: Likelihood) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.values(outputs, targets).sum()


class _Squares(nn.Module):
    """Loss whose Hessian with respect to the outputs is ``sum_r s_r s_r'``."""

    reduction = "sum"

    def forward(self, outputs: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("nrc,nc->nr", rows, outputs).square().sum() / 2


def product(
    problem: Problem, quantity: Quantity, space: ParameterSpace, batch_size: int | None
) -> Callable[[Tensor], Tensor]:
    """See ``curvlab.estimators.backend.Product``."""
    n = problem.num_samples
    copy = _copy(problem, space)
    model, parameters, checks = copy.model, _parameters(copy, space), {"check_deterministic": False, "num_data": n}
    if isinstance(quantity, Hessian):
        passes = _Passes(copy, quantity, batch_size)
        operator = HessianLinearOperator(model, _Values(problem.loss), parameters, passes, **checks)
    else:
        operator = GGNLinearOperator(model, _Squares(), parameters, _WithRows(copy, quantity, batch_size), **checks)

    def multiply(vectors: Tensor) -> Tensor:
        with enable_all_derivatives(copy), explain_torch_errors(copy.model):
            return torch.cat([operator @ some for some in vectors.detach().split(_COLUMNS, dim=1)], dim=1) / n

    return multiply


# Shared by factors and products --------------------------------------------------------------------------------------


def _copy(problem: Problem, space: ParameterSpace) -> Problem:
    """Return the problem with a copy of the model that does not change its inputs."""
    with enable_all_derivatives(problem):
        copy = snapshots.copy_problem(problem, space)
    if copy is None:
        raise UnsupportedError(f"{type(problem.model).__name__} cannot be copied, or its copy gives other outputs")
    copy.model.register_forward_pre_hook(lambda _, arguments: (arguments[0].clone(),))
    return copy


def _parameters(problem: Problem, space: ParameterSpace) -> list[Tensor]:
    named = dict(problem.model.named_parameters())
    return [named[name] for name in space.names]


def obstacle(problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace) -> str | None:
    """See ``curvlab.estimators.backend.Obstacle``."""
    if isinstance(structure, Kronecker):
        return _factor_obstacle(problem.model, space) or find_library_obstacle(problem, space)
    few = problem.with_data([next(problem.batches(_PROBE_SAMPLES))])
    try:
        return _product_obstacle(few, quantity, space)
    except Exception as error:  # the library can raise anything
        reason = type_and_line(error)
        return f"it fails on {_suspects(problem.model, quantity)} ({reason})"


def _factor_obstacle(model: nn.Module, space: ParameterSpace) -> str | None:
    for name in _layer_names(space):
        module = model.get_submodule(name)
        label = f"{type(module).__name__} ({name or 'the model'})"
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            return f"it has factors for Linear and Conv2d layers only, not for {label}"
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"its factors of {label} assume zero padding, not {module.padding_mode} padding"
    return None


def _product_obstacle(few: Problem, quantity: Quantity, space: ParameterSpace) -> str | None:
    if _has_padding_index(few):
        # The comparison below may miss it, because few samples need not contain the index.
        return "its forward-mode derivative of an embedding includes the row of padding_idx, which has no gradient"
    vectors = torch.randn(space.total, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = vectors.to(few.device, few.dtype)
    theirs = product(few, quantity, space, None)(vectors)
    ours = products.product(few, quantity, space, None)(vectors)
    if bool((theirs - ours).abs().max() > 10 * torch.finfo(few.dtype).eps ** 0.5 * ours.abs().max()):
        return f"its {quantity.name} of {_suspects(few.model, quantity)} differs from automatic differentiation"
    return None


def _has_padding_index(few: Problem) -> bool:
    inputs, _ = next(few.batches())
    leaves = {name: p.detach().requires_grad_() for name, p in few.model.named_parameters() if p.requires_grad}
    found = {getattr(node, "_saved_padding_idx", _NO_INDEX) for node, _ in walk([few.forward(leaves, inputs)])}
    return bool(found - {_NO_INDEX})


def _suspects(model: nn.Module, quantity: Quantity) -> str:
    """Return the model's name and, for the Hessian, its modules that are known to cause such failures."""
    known = [f"{type(m).__name__} ({n})" for n, m in model.named_modules() if isinstance(m, _NO_SECOND_DERIVATIVE)]
    return ", ".join([type(model).__name__, *(known if isinstance(quantity, Hessian) else [])])


_STRUCTURES = ("kfac", "ekfac", "implicit")
BACKEND = Backend(
    "curvlinops",
    {Fisher: _STRUCTURES, EmpiricalFisher: _STRUCTURES, GGN: _STRUCTURES, Hessian: ("implicit",)},
    compute,
    obstacle,
    product=product,
    library=True,
)
