"""BackPACK (Dangel, Kunstner and Hennig, "BackPACK: packing more into backprop", ICLR 2020).

First order, from per-sample gradients or their squares: the rows ``J' s_r`` of a quantity are the gradients of
``s_r' f``. Second order, propagated backwards layer by layer: the diagonals of the exact Fisher and of the Hessian, and
K-FAC. In place of its losses a module stands that starts from our ``s_r``, so that the library's scales (a squared
error divided by ``N C``), its limits (one output for binary cross-entropy) and its own draws have no part.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from backpack import backpack, extend
from backpack.context import CTX
from backpack.extensions import KFLR, BatchGrad, DiagGGNExact, DiagHessian, SumGradSquared
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn

from curvlab.estimators.backend import Backend, Computed
from curvlab.estimators.capture import output_changed_by_hooks
from curvlab.estimators.default_dtype import default_dtype
from curvlab.estimators.layers import Layer, layers_of
from curvlab.estimators.seeds import label_stream, output_rows
from curvlab.estimators.verification import unfaithful
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, Quantity
from curvlab.randomness import preserved_random_state
from curvlab.stateless import copied
from curvlab.structures import Kronecker, Structure

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FIRST_ORDER_RULES = (nn.Linear, *_CONVOLUTIONS, *_BATCH_NORMS, nn.Embedding)
_SECOND_ORDER_RULES = (
    *(nn.Linear, *_CONVOLUTIONS, nn.Flatten, nn.Dropout, nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.ReLU, nn.Sigmoid, nn.Tanh),
)
_KRONECKER_RULES = (*_SECOND_ORDER_RULES, nn.Identity)
_HESSIAN_RULES = (
    *_SECOND_ORDER_RULES,
    *(nn.MaxPool1d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU),
)
_GGN_RULES = (*_HESSIAN_RULES, *_BATCH_NORMS, nn.Identity, nn.Embedding)
_CHAIN = "its second-order rules are for a chain of modules"


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> Computed:
    """See ``curvlab.estimators.backend.Compute``."""
    hooks = len(CTX.hook_handles)
    try:
        with preserved_random_state():  # for its rule of pooling the library makes layers, which draw their weights
            means = _means(problem, quantity, structure, space, batch_size, advance)
    finally:
        del CTX.hook_handles[hooks:]  # which the library would keep for the rest of the process
    if structure.name == "diag":
        return Computed({"entries": torch.cat([means[name].reshape(-1) for name in space.names])})
    return Computed(means)


def _means(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> dict[str, Tensor]:
    copy = _copy(problem, space)
    if isinstance(structure, Kronecker):
        terms = _kronecker_terms(copy, quantity, layers_of(copy.model, space), batch_size)
    elif _is_second_order(quantity, structure):
        terms = _diagonal_terms(copy, quantity, batch_size)
    else:
        terms = _row_terms(copy, quantity, structure, layers_of(copy.model, space), batch_size)
    total: dict[str, Tensor] = {}
    for samples, summands in terms:
        for name, term in summands.items():
            total[name] = total[name].add_(term) if name in total else term
        advance(samples)
    return {name: value.div_(problem.num_samples) for name, value in total.items()}


#: The samples of a batch that are done, and a sum over them of what is asked for.
_Terms = Iterator[tuple[int, Mapping[str, Tensor]]]


def _is_second_order(quantity: Quantity, structure: Structure) -> bool:
    sampled = isinstance(quantity, EmpiricalFisher) or (isinstance(quantity, Fisher) and quantity.samples is not None)
    return isinstance(structure, Kronecker) or (structure.name == "diag" and not sampled)


def _copy(problem: Problem, space: ParameterSpace) -> Problem:
    """Return the problem with a copy of the model, of which only the parameters of the space are trainable.

    The library's hooks on the model would stay, and keep ``torch.func`` from it.
    """
    model = copied(problem.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in space.names)
    for module in model.modules():
        # What a module with a backward hook returns may not be changed in place.
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return problem.with_model(model)


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not list(module.children())}


def _trainable(problem: Problem) -> dict[str, Tensor]:
    return {name: p for name, p in problem.model.named_parameters() if p.requires_grad}


def _backward(value: Tensor, keep: bool = False) -> None:
    # Some of the library's buffers are of the default dtype, whatever the model's.
    with warnings.catch_warnings(), default_dtype(torch.promote_types(value.dtype, torch.get_default_dtype())):
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # which is what is wanted of first layers
        value.backward(retain_graph=keep)


def _take(parameters: Mapping[str, Tensor], field: str, *batch: int) -> dict[str, Tensor]:
    """Remove and return what the library left on parameters: nothing where the outputs do not depend on one."""
    taken = {}
    for name, parameter in parameters.items():
        parameter.grad = None
        found: Tensor | None = vars(parameter).pop(field, None)
        taken[name] = parameter.new_zeros(*batch, *parameter.shape) if found is None else found
    return taken


def _row_terms(
    problem: Problem, quantity: Quantity, structure: Structure, layers: Mapping[str, Layer], batch_size: int | None
) -> _Terms:
    for layer in layers.values():
        extend(layer.module)
    extension = SumGradSquared() if structure.name == "diag" else BatchGrad()
    parameters = _trainable(problem)
    rng = label_stream(quantity)
    for inputs, targets in problem.batches(batch_size):
        outputs = problem.model(inputs.clone())  # on which the library leaves what it needs
        seeds = output_rows(problem.loss, quantity, outputs.detach(), targets, rng)
        for left, seed in zip(range(len(seeds) - 1, -1, -1), seeds, strict=True):
            with backpack(extension, retain_graph=left > 0):
                _backward((outputs * seed).sum(), keep=left > 0)
            if structure.name == "diag":
                terms = _take(parameters, extension.savefield)
            else:
                rows = {name: v.flatten(1) for name, v in _take(parameters, extension.savefield, len(inputs)).items()}
                if structure.name == "dense":
                    rows = {"matrix": torch.cat(list(rows.values()), dim=1)}
                terms = {name: v.mT @ v for name, v in rows.items()}
            yield 0 if left else len(inputs), terms


class _OutputSpace(nn.modules.loss._Loss):
    """Stands where the library expects a loss: a linear function of the outputs with given slopes."""

    def forward(self, outputs: Tensor, slopes: Tensor) -> Tensor:
        return (outputs * slopes).sum()


class _Seeds(ModuleExtension):  # type: ignore[misc]
    """What is propagated backwards from there: the rows ``(R, N, C)`` of the output space."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def backpropagate(self, extension: Any, *_: object) -> Any:
        """Return the rows in the form that the extension takes."""
        return {"matrices": [self.rows], "signs": [1.0]} if isinstance(extension, DiagHessian) else self.rows


def _propagate(
    problem: Problem,
    quantity: Quantity,
    batch_size: int | None,
    extension_type: Callable[[], Any],
    hook: Callable[[nn.Module], None],
) -> Iterator[int]:
    """Go backwards through every batch and yield its size; what was computed is on the parameters then."""
    for module in _leaves(problem.model).values():
        extend(module)
    loss = extend(_OutputSpace())
    rng = label_stream(quantity)
    # The Hessian of these losses in the outputs is the exact Fisher's.
    of_outputs = GGN() if isinstance(quantity, Hessian) else quantity
    for inputs, targets in problem.batches(batch_size):
        outputs = problem.model(inputs.clone())  # on which the library leaves what it needs
        given = outputs.detach()
        rows = output_rows(problem.loss, of_outputs, given, targets, rng)[:]
        extension = extension_type()
        extension.set_module_extension(_OutputSpace, _Seeds(rows.transpose(0, 1)))
        with backpack(extension, extension_hook=hook):
            _backward(loss(outputs, problem.loss.gradients(given, targets).to(given.dtype)))
        yield len(inputs)


def _diagonal_terms(problem: Problem, quantity: Quantity, batch_size: int | None) -> _Terms:
    extension_type = DiagHessian if isinstance(quantity, Hessian) else DiagGGNExact
    for samples in _propagate(problem, quantity, batch_size, extension_type, lambda _: None):
        yield samples, _take(_trainable(problem), extension_type().savefield)


def _kronecker_terms(
    problem: Problem, quantity: Quantity, layers: Mapping[str, Layer], batch_size: int | None
) -> _Terms:
    means: dict[nn.Module, Tensor] = {}

    def keep_mean(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            means[module] = vars(module)["input0"].mean(dim=0)

    for n in _propagate(problem, quantity, batch_size, KFLR, keep_mean):
        factors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            # The library has S, as a sum over samples, and A, as a mean, without the bias.
            own: dict[str, list[Tensor]] = {
                key: vars(p).pop("kflr") for key, p in layer.module.named_parameters() if p.requires_grad
            }
            s = next(iter(own.values()))[0]
            one = s.new_ones(1, 1)
            a = own["weight"][1] if "weight" in own else one
            if len(own) == 2:
                column = means[layer.module].unsqueeze(1)
                a = torch.cat([torch.cat([a, column], dim=1), torch.cat([column.mT, one], dim=1)])
            factors[f"{name}|A"], factors[f"{name}|S"] = n * a, s
        yield n, factors


def obstacle(problem: Problem, quantity: Quantity, structure: Structure, space: ParameterSpace) -> str | None:
    """See ``curvlab.estimators.backend.Obstacle``."""
    layers = layers_of(problem.model, space)
    for name, layer in layers.items():
        if type(layer.module) not in _FIRST_ORDER_RULES:
            return f"it has no rule for {_label(name, layer.module)}"
        if told := _padding_obstacle(name, layer.module):
            return told
        if isinstance(structure, Kronecker) and type(layer.module) is not nn.Linear:
            return f"its factors of {_label(name, layer.module)} are of another approximation"
    modules = {name: layer.module for name, layer in layers.items()}
    if told := unfaithful(problem, space) or output_changed_by_hooks(problem, modules):
        return told
    if _is_second_order(quantity, structure):
        kronecker, hessian = isinstance(structure, Kronecker), isinstance(quantity, Hessian)
        rules = _KRONECKER_RULES if kronecker else _HESSIAN_RULES if hessian else _GGN_RULES
        if told := _chain_obstacle(_copy(problem, space), rules, flat=kronecker):
            return told
    return None


def _label(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} ({name or 'the model'})"


def _padding_obstacle(name: str, module: nn.Module) -> str | None:
    """Return a clause where a convolution's padding is one that the library silently takes for zeros of no width."""
    if isinstance(module, nn.modules.conv._ConvNd) and (module.padding_mode != "zeros" or module.padding == "same"):
        how = module.padding_mode if module.padding_mode != "zeros" else module.padding
        return f"its rule for {_label(name, module)} is wrong with {how!r} padding"
    return None


def _chain_obstacle(problem: Problem, rules: tuple[type[nn.Module], ...], flat: bool) -> str | None:
    """Return a clause where the trainable part of the model is no chain of modules with second-order rules.

    Second-order quantities go from a module to the one whose output is its input: not through a branch, nor through an
    operation between modules. The problem's model gets hooks that stay.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not isinstance(output, Tensor) or output.requires_grad:
                calls.append((name, module, next(chain(arguments, keywords.values())), output))

        return hook

    for name, module in _leaves(problem.model).items():
        module.register_forward_hook(recorder(name), with_kwargs=True)
    outputs = problem.forward(_trainable(problem), problem.probe()[0][0])
    previous: Tensor | None = None
    for index, (name, module, given, output) in enumerate(calls):
        if type(module) not in rules:
            return f"it has no second-order rule for {_label(name, module)}"
        if told := _padding_obstacle(name, module):
            return told
        if name in [earlier for earlier, *_ in calls[:index]]:
            return f"{_CHAIN}, and {_label(name, module)} is called more than once"
        if flat and isinstance(module, nn.Linear) and given.ndim != 2:
            return f"its factors of {_label(name, module)} are for inputs (N, d)"
        if given.requires_grad and given is not previous:
            return f"{_CHAIN}, and {_label(name, module)} takes something else than the output of the one before"
        previous = output
    if outputs is not previous:
        return f"{_CHAIN}, and the model's outputs are not those of the last"
    return None


_ROWS = ("dense", "block_diag", "diag", "kfac")
BACKEND = Backend(
    "backpack",
    {Fisher: _ROWS, EmpiricalFisher: _ROWS, GGN: _ROWS, Hessian: ("diag",)},
    compute,
    obstacle,
    library=True,
)
