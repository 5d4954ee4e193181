"""BackPACK (Dangel, Kunstner and Hennig, "BackPACK: packing more into backprop", ICLR 2020).

First-order extensions give per-sample gradients or their squares: the rows ``J' s_r`` of a quantity are the gradients
of ``s_r' f``. Second-order extensions, which propagate backwards layer by layer, give the diagonals of the exact Fisher
and of the Hessian, and K-FAC. Its losses are replaced by a module that starts from our ``s_r``. So the library's scales
(a squared error divided by ``N C``), its limits (one output for binary cross-entropy) and its own sampling of labels
are not used.
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

from curvlab.estimators.backend import Backend, BackendResult
from curvlab.estimators.capture import find_changing_hook
from curvlab.estimators.covectors import label_stream, output_covectors
from curvlab.estimators.default_dtype import default_dtype
from curvlab.estimators.layers import Layer, find_layers
from curvlab.estimators.verification import find_library_obstacle
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.progress import Advance
from curvlab.quantities import GGN, EmpiricalFisher, Fisher, Hessian, Quantity
from curvlab.randomness import preserve_random_state
from curvlab.stateless import copy_model
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
_CHAIN = "its second-order rules need a chain of modules"


def compute(
    problem: Problem,
    quantity: Quantity,
    structure: Structure,
    space: ParameterSpace,
    batch_size: int | None,
    advance: Advance,
) -> BackendResult:
    """See ``curvlab.estimators.backend.Compute``."""
    hooks = len(CTX.hook_handles)
    try:
        with preserve_random_state():  # the library's pooling rule creates layers with random weights
            means = _means(problem, quantity, structure, space, batch_size, advance)
    finally:
        del CTX.hook_handles[hooks:]  # the library would keep these for the rest of the process
    if structure.name == "diag":
        return BackendResult({"entries": torch.cat([means[name].reshape(-1) for name in space.names])})
    return BackendResult(means)


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
        terms = _kronecker_terms(copy, quantity, find_layers(copy.model, space), batch_size)
    elif _is_second_order(quantity, structure):
        terms = _diagonal_terms(copy, quantity, batch_size)
    else:
        terms = _row_terms(copy, quantity, structure, find_layers(copy.model, space), batch_size)
    total: dict[str, Tensor] = {}
    for samples, summands in terms:
        for name, term in summands.items():
            total[name] = total[name].add_(term) if name in total else term
        advance(samples)
    return {name: value.div_(problem.num_samples) for name, value in total.items()}


#: The number of samples done and, by name, the sums over these samples.
_Terms = Iterator[tuple[int, Mapping[str, Tensor]]]


def _is_second_order(quantity: Quantity, structure: Structure) -> bool:
    sampled = isinstance(quantity, EmpiricalFisher) or (isinstance(quantity, Fisher) and quantity.samples is not None)
    return isinstance(structure, Kronecker) or (structure.name == "diag" and not sampled)


def _copy(problem: Problem, space: ParameterSpace) -> Problem:
    """Return the problem with a copy of the model in which only the parameters of the space are trainable.

    A copy, because the library's hooks stay on the model and make ``torch.func`` fail.
    """
    model = copy_model(problem.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in space.names)
    for module in model.modules():
        # The output of a module with a backward hook may not be changed in place.
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return problem.with_model(model)


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not list(module.children())}


def _trainable(problem: Problem) -> dict[str, Tensor]:
    return {name: p for name, p in problem.model.named_parameters() if p.requires_grad}


def _backward(value: Tensor, keep: bool = False) -> None:
    # Some of the library's buffers have the default dtype, not the model's.
    with warnings.catch_warnings(), default_dtype(torch.promote_types(value.dtype, torch.get_default_dtype())):
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # intended for the first layers
        value.backward(retain_graph=keep)


def _take(parameters: Mapping[str, Tensor], field: str, *batch: int) -> dict[str, Tensor]:
    """Remove and return what the library stored on parameters; zeros for a parameter on which no output depends."""
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
        outputs = problem.model(inputs.clone())  # a clone, because the library stores attributes on it
        covectors = output_covectors(problem.loss, quantity, outputs.detach(), targets, rng)
        for left, covector in zip(range(len(covectors) - 1, -1, -1), covectors, strict=True):
            with backpack(extension, retain_graph=left > 0):
                _backward((outputs * covector).sum(), keep=left > 0)
            if structure.name == "diag":
                terms = _take(parameters, extension.savefield)
            else:
                rows = {name: v.flatten(1) for name, v in _take(parameters, extension.savefield, len(inputs)).items()}
                if structure.name == "dense":
                    rows = {"matrix": torch.cat(list(rows.values()), dim=1)}
                terms = {name: v.mT @ v for name, v in rows.items()}
            yield 0 if left else len(inputs), terms


class _OutputSpace(nn.modules.loss._Loss):
    """Linear function of the outputs with given slopes, in place of a loss."""

    def forward(self, outputs: Tensor, slopes: Tensor) -> Tensor:
        return (outputs * slopes).sum()


class _Covectors(ModuleExtension):  # type: ignore[misc]
    """Start of the backward propagation: the covectors ``(R, N, C)`` in output space."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def backpropagate(self, extension: Any, *_: object) -> Any:
        """Return the covectors in the format of the extension."""
        return {"matrices": [self.rows], "signs": [1.0]} if isinstance(extension, DiagHessian) else self.rows


def _propagate(
    problem: Problem,
    quantity: Quantity,
    batch_size: int | None,
    extension_type: Callable[[], Any],
    hook: Callable[[nn.Module], None],
) -> Iterator[int]:
    """Run the backward pass of every batch and yield its size; the results are then stored on the parameters."""
    for module in _leaves(problem.model).values():
        extend(module)
    loss = extend(_OutputSpace())
    rng = label_stream(quantity)
    # The Hessian of these losses with respect to the outputs is that of the exact Fisher.
    output_quantity = GGN() if isinstance(quantity, Hessian) else quantity
    for inputs, targets in problem.batches(batch_size):
        outputs = problem.model(inputs.clone())  # a clone, because the library stores attributes on it
        given = outputs.detach()
        rows = output_covectors(problem.loss, output_quantity, given, targets, rng)[:]
        extension = extension_type()
        extension.set_module_extension(_OutputSpace, _Covectors(rows.transpose(0, 1)))
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
            # The library gives S as a sum over samples and A as a mean, without the bias.
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
    layers = find_layers(problem.model, space)
    for name, layer in layers.items():
        if type(layer.module) not in _FIRST_ORDER_RULES:
            return f"it has no rule for {_label(name, layer.module)}"
        if reason := _padding_obstacle(name, layer.module):
            return reason
        if isinstance(structure, Kronecker) and type(layer.module) is not nn.Linear:
            return f"its factors of {_label(name, layer.module)} use another approximation"
    modules = {name: layer.module for name, layer in layers.items()}
    if reason := find_library_obstacle(problem, space) or find_changing_hook(problem, modules):
        return reason
    if _is_second_order(quantity, structure):
        kronecker, hessian = isinstance(structure, Kronecker), isinstance(quantity, Hessian)
        rules = _KRONECKER_RULES if kronecker else _HESSIAN_RULES if hessian else _GGN_RULES
        if reason := _chain_obstacle(_copy(problem, space), rules, flat=kronecker):
            return reason
    return None


def _label(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} ({name or 'the model'})"


def _padding_obstacle(name: str, module: nn.Module) -> str | None:
    """Return a clause if a convolution has a padding that the library silently treats as no padding; else None."""
    if isinstance(module, nn.modules.conv._ConvNd) and (module.padding_mode != "zeros" or module.padding == "same"):
        how = module.padding_mode if module.padding_mode != "zeros" else module.padding
        return f"its rule for {_label(name, module)} is wrong with {how!r} padding"
    return None


def _chain_obstacle(problem: Problem, rules: tuple[type[nn.Module], ...], flat: bool) -> str | None:
    """Return a clause if the trainable part of the model is not a chain of modules with second-order rules; else None.

    Second-order quantities are propagated from a module to the module whose output is its input: not through a branch,
    nor through an operation between modules. The hooks that this function adds stay on the problem's model.
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
        if reason := _padding_obstacle(name, module):
            return reason
        if name in [earlier for earlier, *_ in calls[:index]]:
            return f"{_CHAIN}, and {_label(name, module)} is called more than once"
        if flat and isinstance(module, nn.Linear) and given.ndim != 2:
            return f"its factors of {_label(name, module)} need inputs (N, d)"
        if given.requires_grad and given is not previous:
            return f"{_CHAIN}, and the input of {_label(name, module)} is not the output of the module before it"
        previous = output
    if outputs is not previous:
        return f"{_CHAIN}, and the model's outputs are not the output of the last module"
    return None


_ROWS = ("dense", "block_diag", "diag", "kfac")
BACKEND = Backend(
    "backpack",
    {Fisher: _ROWS, EmpiricalFisher: _ROWS, GGN: _ROWS, Hessian: ("diag",)},
    compute,
    obstacle,
    library=True,
)
