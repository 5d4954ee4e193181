"""The one verification: which rules of which modules are right for the model at hand, and why the others are not.

A rule takes a module's inputs and the gradient of its output and gives the gradients of its parameters. It is right if
the parameters act there and nowhere else, in the way that the module's kind says. Hooks, replaced forwards, tied
weights, parametrizations, in-place operations, derivatives inside the forward and whatever else can make a rule wrong
need no list: on a few samples from several places of the data, the rule's gradients are compared with those of
automatic differentiation, in one forward and one backward pass. What these samples cannot show, since only others take
another way through the model, the graph of every later batch does: it must use the parameters as theirs did.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError, UnsupportedError, first_line
from curvlab.estimators.capture import (
    Call,
    Graph,
    Leaves,
    forward,
    gradients,
    graph_of,
    leaves_of,
    quiet,
    working_dtype,
)
from curvlab.estimators.layers import Layer, has_factors, layer_in
from curvlab.estimators.rules import has_rule, is_rounding, random_like, rule
from curvlab.estimators.snapshots import HeldProblem, without_gradients
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem

#: Where all gradients on the samples are zero: by how much weights and inputs are moved, relative to their root mean
#: square, and which samples get no gradient of their outputs, every second one from the first or from the second.
_FURTHER = ((0.0, 0), (0.1, 1), (0.1, 0), (1.0, 1))
_UNTRIED = "without a gradient on the samples of the verification: its rule cannot be verified"
_MEMORY = "_verified"  # of a problem, in one call
_WRONG = "does not have the gradient that its inputs and the gradient of its output give"


class UnfaithfulError(UnsupportedError):
    """On a later batch a module is not used as it was on the samples of the verification.

    Attributes:
        reasons: Why a rule does not hold, by parameter.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        name, reason = next(iter(reasons.items()))
        super().__init__(f"{name} {reason}: what a model calls must not depend on its data")
        self.reasons = reasons


@dataclass(frozen=True)
class Verified:
    """Modules of a model and those of their parameters whose rules are right.

    Attributes:
        layers: By module name, with the right ones of the parameters alone.
        reasons: Why a rule is wrong, or that there is none, by parameter: a phrase that follows its name.
        apart: Modules whose outputs go on as copies (see ``curvlab.estimators.capture.forward``).
        reached: Modules whose outputs are in the graph of the model's.
        sizes: Of the input and output of each of the layers, together, in bytes a sample.
    """

    layers: Mapping[str, Layer]
    reasons: Mapping[str, str]
    apart: Collection[str]
    reached: Collection[str]
    sizes: Mapping[str, int]

    def run(self, problem: Problem, inputs: Tensor) -> tuple[Tensor, dict[str, Call]]:
        """Run a batch; return the outputs, with their graph, and the one call of each of the layers.

        Raises:
            UnfaithfulError: The batch takes another way through the model than the samples of the verification.
        """
        # Whether an output is a view can depend on the batch: then its copy has to go on here, too.
        for apart in (self.apart, self.layers):
            outputs, calls, reasons = self._run(problem, inputs, apart)
            if not reasons:
                return outputs, {name: seen[0] for name, seen in calls.items()}
        raise UnfaithfulError(reasons)

    def _run(
        self, problem: Problem, inputs: Tensor, apart: Collection[str]
    ) -> tuple[Tensor, dict[str, list[Call]], dict[str, str]]:
        leaves = leaves_of(problem)
        modules = {name: layer.module for name, layer in self.layers.items()}
        outputs, calls = forward(problem, modules, inputs, leaves, apart)
        graph = graph_of(outputs, leaves)
        reasons: dict[str, str] = {}
        for name, layer in self.layers.items():
            told = _calls_obstacle(layer, calls[name], len(inputs))
            if told is None and (calls[name][0].output.node in graph.nodes) != (name in self.reached):  # type: ignore[union-attr]
                told = f"is of {_label(layer)}, on which the outputs depend for some samples only"
            for parameter in layer.parameters:
                if told is not None:
                    reasons[parameter] = f"{told} on some batch"
                elif graph.uses[parameter] > (name in self.reached):
                    reasons[parameter] = f"is of {_label(layer)}, but acts elsewhere too on some batch"
        return outputs, calls, reasons or self._wrong_here(problem, outputs, calls, leaves, graph)

    def _wrong_here(
        self, problem: Problem, outputs: Tensor, calls: Mapping[str, list[Call]], leaves: Leaves, graph: Graph
    ) -> dict[str, str]:
        """Return which rules are wrong on a batch, of the layers whose forward is the user's own.

        What that does after the layer's operation can change the gradients of some samples only, as a clamp does, and
        a graph does not show it. What hooks do comes after the outputs that are looked at.
        """
        layers = [self.layers[name] for name in calls if "forward" in vars(self.layers[name].module)]
        layers = [layer for layer in layers if layer.name in self.reached]
        if not layers:
            return {}
        once, names = [calls[layer.name][0] for layer in layers], [name for one in layers for name in one.parameters]
        seed = random_like(outputs, tuple(outputs.shape))
        slopes, found = gradients(outputs, once, [leaves[name] for name in names], seed, keep=True)
        right = dict(zip(names, found, strict=True))
        norms = {name: float(value.detach().norm()) for name, value in right.items()}
        reasons: dict[str, str] = {}
        for layer, call, slope in zip(layers, once, slopes, strict=True):
            reasons |= _differences(layer, call, slope, len(outputs), right, norms, graph, problem.dtype)
        return {name: f"{told} on some batch" for name, told in reasons.items()}

    def within(self, space: ParameterSpace) -> "Verified":
        """Return what there is of the parameters of a smaller space."""
        others = {name: "" for layer in self.layers.values() for name in layer.parameters if name not in space.names}
        reasons = {name: reason for name, reason in self.reasons.items() if name in space.names}
        return replace(self, layers=_restricted(self.layers, others), reasons=reasons)

    def without(self, reasons: Mapping[str, str]) -> "Verified":
        """Return what is left when some parameters' rules turned out not to hold."""
        return replace(self, layers=_restricted(self.layers, reasons), reasons={**self.reasons, **reasons})


def remembering(problem: Problem) -> Problem:
    """Return the problem with a memory for what is verified of it: for one call, in which the model does not change."""
    remembered = copy(problem)
    vars(remembered)[_MEMORY] = []
    return remembered


def verify_rules(problem: Problem, space: ParameterSpace) -> Verified:
    """Return the modules whose per-sample gradients follow from their calls, of all kinds for which there is a rule.

    Raises:
        UnsupportedError: Torch cannot differentiate the model, or its backward passes lose gradients.
    """
    memory: list[tuple[ParameterSpace, Verified]] = vars(problem).get(_MEMORY, [])
    for known, verified in memory:
        if set(space.names) <= set(known.names):
            return verified.within(space)
    memory.append((space, _verify(problem, space)))
    return memory[-1][1]


def verify_factors(problem: Problem, space: ParameterSpace) -> Verified:
    """Return the layers with Kronecker factors: where a weight of the space has none, its bias has none either.

    Raises:
        UnsupportedError: As ``verify_rules``.
    """
    verified = verify_rules(problem, space)
    own = {id(p): name for name, p in problem.model.named_parameters()}
    reasons: dict[str, str] = {}
    for layer in verified.layers.values():
        weight, name = layer.module._parameters.get("weight"), f"{layer.name}.weight".removeprefix(".")
        if not has_factors(layer.module):
            told = _of_module(layer)
        elif weight is not None and own[id(weight)] in verified.reasons:  # by its first name, if it is tied
            told = f"is beside {own[id(weight)]}, which {verified.reasons[own[id(weight)]]}"
        elif weight is None and getattr(layer.module, "weight", None) is not None:
            told = f"is beside {name}, which is computed from other parameters"
        else:
            continue
        reasons.update(dict.fromkeys(layer.parameters, told))
    return verified.without(reasons)


def kronecker_layers(problem: Problem, space: ParameterSpace) -> tuple[Mapping[str, Layer], Mapping[str, str]]:
    """Return the layers with Kronecker factors by module name, and for every other parameter why it has none.

    Every parameter of the space is either in one of the layers or among the reasons. The second is a phrase that
    follows the parameter's name: ``is of a LayerNorm (norm1)``.
    """
    verified = verify_factors(problem, space)
    return verified.layers, verified.reasons


def unfaithful(problem: Problem, space: ParameterSpace) -> str | None:
    """Return a clause that names the first parameter of a space whose rule is wrong, or that has none, if any."""
    return next((f"{name} {reason}" for name, reason in verify_rules(problem, space).reasons.items()), None)


def _verify(problem: Problem, space: ParameterSpace) -> Verified:
    candidates: dict[str, Layer] = {}
    others: dict[str, str] = {}
    for name, module in problem.model.named_modules():
        layer = layer_in(space, name, module)
        own = [f"{name}.{key}".removeprefix(".") for key in module._parameters]
        told = _of_module(layer)
        if has_rule(module):
            told = f"is no weight or bias of its {type(module).__name__} ({name or 'the model'})"
            if layer.parameters:
                candidates[name] = layer
        others.update(
            dict.fromkeys(set(own) & set(space.names) - set(layer.parameters if has_rule(module) else ()), told)
        )
    with torch.inference_mode(False), torch.enable_grad():
        verified = _verified(_precise(problem), candidates)
    reasons = {**others, **verified.reasons}
    for name, sharing in _shared(problem.model).items():
        if name in verified.reasons:
            reasons[name] = f"is shared with {', '.join(other or 'the model' for other in sharing)} (a tied weight)"
    return replace(verified, reasons={name: reasons[name] for name in space.names if name in reasons})


def _precise(problem: Problem) -> Problem:
    """Return the problem in at least float32: what is wrong in half precision hides in its rounding.

    It is the problem itself where the model insists on its own dtype.
    """
    if problem.dtype == working_dtype(problem.dtype):
        return problem
    precise = HeldProblem(problem, working_dtype(problem.dtype))
    leaves = {name: value.requires_grad_() for name, value in precise.parameters().items()}
    try:
        for inputs, _ in precise.probe():
            precise.forward(leaves, inputs)
    except Exception:  # of the user's code, at tensors of another dtype
        return problem
    precise.check_samples(leaves)  # of which little is seen in half precision
    return precise


def _shared(model: nn.Module) -> dict[str, list[str]]:
    """Return the other modules that have a parameter, by its first name, of those that several have."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: [other.rpartition(".")[0] for other in others] for first, *others in names.values() if others}


def _of_module(layer: Layer) -> str:
    grouped = "grouped " if getattr(layer.module, "groups", 1) != 1 else ""
    return f"is of a {grouped}{type(layer.module).__name__} ({layer.name or 'the model'})"


def _verified(problem: Problem, candidates: Mapping[str, Layer]) -> Verified:
    attempt = partial(_attempt, problem)
    try:
        trial = attempt(candidates, apart=())
    except CurvlabError:
        raise
    except Exception as error:  # of the user's code, or of torch's on the user's code
        raise UnsupportedError(
            f"torch cannot differentiate {type(problem.model).__name__}: {first_line(error)}"
        ) from error
    if failed := {layer.name for layer in candidates.values() if trial.reasons.keys() & set(layer.parameters)}:
        # Perhaps only since what is done to their outputs in place takes these out of the graph.
        retrial = attempt(candidates, apart=failed)
        if len(retrial.reasons) < len(trial.reasons):
            trial = retrial
    reasons, silent = dict(trial.reasons), trial.silent - trial.reasons.keys()
    left = _restricted(candidates, reasons)
    # Nothing was compared where all gradients are zero, as behind a last layer that begins at zero.
    for perturbation, masked in _FURTHER if silent else ():
        with suppress(Exception):  # weights that are not the model's may be no weights of it
            layers = {name: layer for name, layer in left.items() if silent & set(layer.parameters)}
            moved = attempt(layers, apart=trial.apart, perturbation=perturbation, masked=masked)
            reasons.update(moved.reasons)
            silent = silent & moved.silent - moved.reasons.keys()
            left = _restricted(left, moved.reasons)
    for name, layer in left.items():
        if name in trial.reached:  # without a part in the outputs, zero is right
            reasons.update(dict.fromkeys(silent & set(layer.parameters), f"is of {_label(layer)}, {_UNTRIED}"))
    return Verified(_restricted(left, reasons), reasons, trial.apart, trial.reached, trial.sizes)


@dataclass(frozen=True)
class _Trial:
    reasons: Mapping[str, str]
    silent: set[str]  # parameters without a gradient on any sample
    reached: frozenset[str]
    apart: Collection[str]
    sizes: Mapping[str, int]  # of input and output of the layers, in bytes a sample


def _attempt(
    problem: Problem,
    candidates: Mapping[str, Layer],
    apart: Collection[str],
    perturbation: float = 0.0,
    masked: int = 1,
) -> _Trial:
    reasons: dict[str, str] = {}
    reached: set[str] = set()
    sizes: dict[str, int] = {}
    silent = {parameter for layer in candidates.values() for parameter in layer.parameters}
    modules = {name: layer.module for name, layer in candidates.items()}
    for inputs, _ in problem.probe():
        leaves = {name: leaf.requires_grad_() for name, leaf in _moved(leaves_of(problem), perturbation).items()}
        if inputs.is_floating_point():
            inputs = _moved({"": inputs}, perturbation)[""]
        with without_gradients(problem.model), quiet():
            outputs, calls = forward(problem, modules, inputs, leaves, apart)
            graph = graph_of(outputs, leaves)
            for layer in candidates.values():
                if told := _calls_obstacle(layer, calls[layer.name], len(inputs)):
                    reasons.update(dict.fromkeys(layer.parameters, told))
            layers = [layer for layer in candidates.values() if not reasons.keys() & set(layer.parameters)]
            once = [calls[layer.name][0] for layer in layers]
            # Random ones, not the loss's own gradients: those vanish at a perfect fit and would show nothing.
            seed = random_like(outputs, tuple(outputs.shape))
            seed[masked::2] = 0  # of every second sample: no other row may see them
            names = [parameter for layer in layers for parameter in layer.parameters]
            wanted = names or list(leaves)  # also where there are no rules: can torch differentiate the model?
            slopes, found = gradients(outputs, once, [leaves[name] for name in wanted], seed, keep=False)
        of_parameters = dict(zip(wanted, found, strict=True))
        norms = {parameter: float(value.detach().norm()) for parameter, value in of_parameters.items()}
        reached |= {layer.name for layer, call in zip(layers, once, strict=True) if _reached(call, graph)}
        for layer, call, slope in zip(layers, once, slopes, strict=True):
            assert call.inputs is not None
            size = (call.inputs.nbytes + slope.nbytes) // len(inputs)
            sizes[layer.name] = max(size, sizes.get(layer.name, 0))
            reasons.update(_differences(layer, call, slope, masked, of_parameters, norms, graph, problem.dtype))
            silent -= {parameter for parameter in layer.parameters if norms[parameter]}
    return _Trial(reasons, silent, frozenset(reached), frozenset(apart), sizes)


def _differences(
    layer: Layer,
    call: Call,
    slope: Tensor,
    masked: int,
    right: Mapping[str, Tensor],
    norms: Mapping[str, float],
    graph: Graph,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Return what is wrong with the rule for a call, by parameter, given the right gradients and their norms."""
    label = _label(layer)
    if bool(slope[masked::2].any()):
        return dict.fromkeys(layer.parameters, f"is of {label}, which the outputs of other samples depend on")
    assert call.inputs is not None
    inputs = call.inputs.detach()
    try:
        of_call = rule(layer, inputs)
        errors = of_call.distances(slope.detach(), right)
    except Exception as error:  # a rule may be given what its kind of module never sees
        told = f"is of {label}, whose rule fails on its inputs ({first_line(error)})"
        return dict.fromkeys(layer.parameters, told)
    sizes = inputs.flatten(1).norm(dim=1) if inputs.is_floating_point() else 1.0
    scale = float(((1 + sizes) * slope.detach().flatten(1).norm(dim=1)).sum())
    coarser = max(dtype, of_call.dtype, key=lambda one: torch.finfo(one).eps)
    reasons = {}
    for parameter in layer.parameters:
        # A parameter may act without its layer: where the layer's output has no part in the model's, any use is one.
        if graph.uses[parameter] > _reached(call, graph):
            reasons[parameter] = f"is of {label}, which does not have it to itself: it acts elsewhere, too"
        elif not is_rounding(errors[parameter], norms[parameter], scale, coarser):
            reasons[parameter] = _explained(layer)
    return reasons


def _calls_obstacle(layer: Layer, seen: Collection[Call], samples: int) -> str | None:
    label = _label(layer)
    if len(seen) != 1:
        return f"is of {label}, which is called {len(seen)} times"
    (call,) = seen
    if call.inputs is None or call.output is None:
        return f"is of {label}, whose {'input' if call.inputs is None else 'output'} is no tensor"
    if not call.inputs.ndim or len(call.inputs) != samples or call.shape[:1] != (samples,):
        return f"is of {label}, whose input has no row a sample: {tuple(call.inputs.shape)}"
    return None


def _explained(layer: Layer) -> str:
    module = layer.module
    if "forward" in vars(module):
        return f"is of {_label(layer)}, whose forward was replaced: it {_WRONG}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"is of {_label(layer)}, which has hooks: it {_WRONG}"
    return f"is of {_label(layer)}: it {_WRONG}"


def _reached(call: Call, graph: Graph) -> bool:
    return call.output is not None and call.output.node in graph.nodes


def _restricted(layers: Mapping[str, Layer], reasons: Mapping[str, str]) -> dict[str, Layer]:
    """Return layers without some of their parameters, and without those that have none left."""
    left = {
        name: replace(
            layer,
            weight=None if layer.weight in reasons else layer.weight,
            bias=None if layer.bias in reasons else layer.bias,
        )
        for name, layer in layers.items()
    }
    return {name: layer for name, layer in left.items() if layer.parameters}


def _moved(tensors: Leaves, by: float) -> Leaves:
    """Return tensors moved by some noise relative to their root mean square, or to one where they are zero."""
    if not by:
        return tensors
    moved = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        size = float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
        noise = random_like(tensor.detach(), tuple(tensor.shape), seed=index)
        moved[name] = tensor.detach() + by * (size or 1.0) * noise
    return moved


def _label(layer: Layer) -> str:
    return f"{type(layer.module).__name__} {layer.name}".strip()
