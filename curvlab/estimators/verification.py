"""Verification of the rules: which are correct for the modules of a model, and why the others are not.

A rule computes the gradients of a module's parameters from the inputs of its calls and the gradients of their outputs.
It is correct if the parameters are used only there, in the way of this kind of module. Hooks, replaced forwards, tied
weights, parametrizations, in-place operations and derivatives inside the forward can make a rule wrong. They are not
searched for: on a few samples from several places of the data, the gradients of the rules are compared with those of
automatic differentiation, in one forward and one backward pass. Other samples may take another path through the model.
So the graph of every later batch is checked: it must call the layers as often and use the parameters in the same way as
the graph of these samples. A model that chooses rows by their values is verified on all data, because its graph does
not show which sample a row belongs to.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from curvlab.batches import Inputs, tensors_of, with_tensors
from curvlab.errors import CurvlabError, UnsupportedError, first_line
from curvlab.estimators.capture import (
    Call,
    Graph,
    Leaves,
    forward,
    gradients,
    group_by_layer,
    ignore_torch_warnings,
    inspect_graph,
    make_leaves,
    working_dtype,
)
from curvlab.estimators.layers import Layer, has_factors, make_layers
from curvlab.estimators.rules import agree, coarsest, has_rule, is_rounding, random_like, rule
from curvlab.estimators.selection import SelectionWatch
from curvlab.estimators.snapshots import SnapshotProblem, forbid_gradients
from curvlab.parameters import ParameterSpace
from curvlab.problem import Pair, Problem
from curvlab.structures import KFACStructure, Kronecker
from curvlab.text import enumerate_names

#: Further trials if all gradients on the samples are zero: the size of the perturbation of weights and inputs, relative
#: to their root mean square, and the first of the masked samples (every second one), whose outputs get no gradient.
_FURTHER = ((0.0, 0), (0.1, 1), (0.1, 0), (1.0, 1))
_UNTRIED = "which has no gradient on the samples of the verification: its rule cannot be verified"
_KFAC = KFACStructure()
_MEMORY = "_verified"  # attribute of a problem, for one call
#: The module in a reason, with its name, which differs between modules of one kind.
_OF_MODULE = re.compile(r"belongs to (\w+)(?: \([^()]*\)| [\w.]+)(?=$|[,:])")
_WRONG = "its gradient does not follow from its inputs and the gradient of its output"


class ChangedUseError(UnsupportedError):
    """A batch uses a module differently than the samples of the verification.

    Attributes:
        reasons: Reasons why a rule is not correct, by parameter.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        name, reason = next(iter(reasons.items()))
        super().__init__(f"{name} {reason}: the modules that a model calls must not depend on the data")
        self.reasons = reasons


@dataclass(frozen=True)
class Verification:
    """Result of the verification: the modules and parameters of a model whose rules are correct.

    Attributes:
        layers: Layers by key, only with the parameters whose rules are correct.
        reasons: Reason why a rule is wrong or missing, by parameter: a phrase that follows the parameter's name.
        cloned: Keys of layers whose outputs are replaced by copies (see ``curvlab.estimators.capture.forward``).
        reached: For each call of a layer in a forward pass, whether the outputs of the model depend on it, by key.
        sizes: Size of the inputs and outputs of each layer together, in bytes per sample.
        tables: Keys of layers that are also called on rows that are not samples, without effect on the outputs.
    """

    layers: Mapping[str, Layer]
    reasons: Mapping[str, str]
    cloned: Collection[str]
    reached: Mapping[str, Sequence[bool]]
    sizes: Mapping[str, int]
    tables: Collection[str] = ()

    def run(self, problem: Problem, inputs: Inputs) -> tuple[Tensor, dict[str, list[Call]]]:
        """Run a batch; return the outputs, with their graph, and the calls of each of the layers.

        Raises:
            ChangedUseError: The batch takes another path through the model than the samples of the verification.
        """
        # Whether an output is a view can depend on the batch: the second attempt copies all outputs.
        for cloned in (self.cloned, self.layers):
            outputs, calls, reasons = self._run(problem, inputs, cloned)
            if not reasons:
                return outputs, calls
        raise ChangedUseError(reasons)

    def _run(
        self, problem: Problem, inputs: Inputs, cloned: Collection[str]
    ) -> tuple[Tensor, dict[str, list[Call]], dict[str, str]]:
        leaves = make_leaves(problem)
        outputs, calls = forward(problem, self.layers, inputs, leaves, cloned)
        graph = inspect_graph(outputs, leaves)
        reasons: dict[str, str] = {}
        for name, layer in self.layers.items():
            usual = self.reached[name]
            reason = _calls_obstacle(layer, calls[name], len(inputs))
            if reason is None and len(calls[name]) != len(usual):
                reason = f"{_describe_calls(layer, len(calls[name]))} instead of {len(usual)}"
            if reason is None and _find_reached(calls[name], graph) != usual:
                reason = f"belongs to {_label(layer)}, on which the outputs depend for some samples only"
            for parameter in layer.parameters:
                if reason is not None:
                    reasons[parameter] = f"{reason} in some batch"
                elif graph.uses[parameter] > sum(usual) * layer.groups:
                    reasons[parameter] = f"belongs to {_label(layer)}, but is also used elsewhere in some batch"
        return outputs, calls, reasons or self._check_replaced_forwards(problem, outputs, calls, leaves, graph)

    def _check_replaced_forwards(
        self, problem: Problem, outputs: Tensor, calls: Mapping[str, list[Call]], leaves: Leaves, graph: Graph
    ) -> dict[str, str]:
        """Return the rules that are wrong on a batch, among the layers whose forward was replaced.

        A replaced forward can change the gradients of some samples only, for example with a clamp, and the graph does
        not show this. Hooks need no check: they run after the recorded outputs.
        """
        replaced = [key for key, layer in self.layers.items() if "forward" in vars(layer.module)]
        replaced = [key for key in replaced if any(self.reached[key])]
        layers, seen = [self.layers[key] for key in replaced], [calls[key] for key in replaced]
        if not layers:
            return {}
        names = [name for layer in layers for name in layer.parameters]
        covector = random_like(outputs, tuple(outputs.shape))
        slopes, found = gradients(outputs, [*chain(*seen)], [leaves[name] for name in names], covector, keep=True)
        right = dict(zip(names, found, strict=True))
        norms = {name: float(value.detach().norm()) for name, value in right.items()}
        reasons: dict[str, str] = {}
        for layer, of_layer, slope in zip(layers, seen, group_by_layer(slopes, seen), strict=True):
            reasons |= _differences(layer, of_layer, slope, len(outputs), right, norms, graph, problem.dtype)
        return {name: f"{reason} in some batch" for name, reason in reasons.items()}

    def restrict(self, space: ParameterSpace) -> "Verification":
        """Return the verification for the parameters of a smaller space."""
        others = {name: "" for layer in self.layers.values() for name in layer.parameters if name not in space.names}
        reasons = {name: reason for name, reason in self.reasons.items() if name in space.names}
        return replace(self, layers=_restrict(self.layers, others), reasons=reasons)

    def in_blocks(self, structure: Kronecker) -> "Verification":
        """Return the verification with the blocks of a structure in place of the layers."""
        separate = structure.bias == "separate"
        whole = {block.key: (key, block) for key, la in self.layers.items() for block in la.blocks(separate)}
        return replace(
            self,
            layers={new: block for new, (_, block) in whole.items()},
            cloned={new for new, (key, _) in whole.items() if key in self.cloned},
            reached={new: self.reached[key] for new, (key, _) in whole.items()},
            sizes={new: self.sizes[key] for new, (key, _) in whole.items()},
        )

    def exclude(self, reasons: Mapping[str, str]) -> "Verification":
        """Return the verification without some parameters whose rules are not correct."""
        return replace(self, layers=_restrict(self.layers, reasons), reasons={**self.reasons, **reasons})


def cache_verification(problem: Problem) -> Problem:
    """Return a copy of the problem that caches its verification, for one call in which the model does not change."""
    cached = copy(problem)
    vars(cached)[_MEMORY] = []
    return cached


def verify_rules(problem: Problem, space: ParameterSpace) -> Verification:
    """Return the modules with a rule whose per-sample gradients follow from their calls.

    Raises:
        UnsupportedError: Torch cannot differentiate the model, or its backward passes lose gradients.
    """
    memory: list[tuple[ParameterSpace, Verification]] = vars(problem).get(_MEMORY, [])
    for known, verified in memory:
        if set(space.names) <= set(known.names):
            return verified.restrict(space)
    memory.append((space, _verify(problem, space)))
    return memory[-1][1]


def verify_factors(problem: Problem, space: ParameterSpace, structure: Kronecker = _KFAC) -> Verification:
    """Return the layers with Kronecker factors by key: if a weight of the space has none, its bias has none either.

    Args:
        problem: Model, loss and data.
        space: Parameters.
        structure: Options of the factors.

    Raises:
        UnsupportedError: As ``verify_rules``.
    """
    verified = verify_rules(problem, space)
    own = {id(p): name for name, p in problem.model.named_parameters()}
    reasons: dict[str, str] = {}
    for key, layer in verified.layers.items():
        weight, name = layer.weight_parameter, f"{layer.name}.weight".removeprefix(".")
        if not has_factors(layer.module):
            reason = _describe_module(layer)
        elif weight is not None and own[id(weight)] in verified.reasons:  # by its first name if it is tied
            reason = f"belongs to the same layer as {own[id(weight)]}, which {verified.reasons[own[id(weight)]]}"
        elif weight is None and not layer.alone and getattr(layer.module, "weight", None) is not None:
            reason = f"belongs to the same layer as {name}, which is computed from other parameters"
        elif key in verified.tables:
            reason = f"{_describe_module(layer)}, which is also called on rows that are not samples"
        elif layer.is_embedding and structure.sharing == "reduce":
            reason = f"{_describe_module(layer)}, whose input factor is not diagonal with sharing=reduce"
        else:
            continue
        reasons.update(dict.fromkeys(layer.parameters, reason))
    return verified.exclude(reasons).in_blocks(structure)


def kronecker_layers(
    problem: Problem, space: ParameterSpace, structure: Kronecker = _KFAC
) -> tuple[Mapping[str, Layer], Mapping[str, str]]:
    """Return the layers with Kronecker factors by key, and for every other parameter the reason.

    Every parameter of the space is either in one of the layers or among the reasons. A reason is a phrase that follows
    the parameter's name: ``belongs to LayerNorm (norm1)``.
    """
    verified = verify_factors(problem, space, structure)
    return verified.layers, verified.reasons


def describe_parameters_without_factors(reasons: Mapping[str, str]) -> list[str]:
    """Return one phrase per reason, such as ``no Kronecker factors for norm1.weight, norm1.bias: each belongs to ...``.

    Modules of one kind with the same reason share a phrase, so that a deep network has a few phrases only.

    Args:
        reasons: Reasons by parameter name, as from ``kronecker_layers``.
    """
    groups: dict[str, list[str]] = {}
    for parameter, reason in reasons.items():
        groups.setdefault(_OF_MODULE.sub(r"belongs to \1", reason), []).append(parameter)
    return [
        f"no Kronecker factors for {enumerate_names(names)}: {'it' if len(names) == 1 else 'each'} "
        f"{reason if len({reasons[name] for name in names}) > 1 else reasons[names[0]]}"
        for reason, names in groups.items()
    ]


def find_library_obstacle(problem: Problem, space: ParameterSpace) -> str | None:
    """Return a clause that names the first parameter of a space for which the rules of a library are not correct.

    These are the parameters whose rule is wrong or missing, and those of modules that are called several times: the
    rules of the libraries are for one call.
    """
    verified = verify_rules(problem, space)
    reasons = dict(verified.reasons)
    for key, layer in verified.layers.items():
        if len(verified.reached[key]) > 1:
            reasons |= dict.fromkeys(layer.parameters, _describe_calls(layer, len(verified.reached[key])))
    return next((f"{name} {reasons[name]}" for name in space.names if name in reasons), None)


def _verify(problem: Problem, space: ParameterSpace) -> Verification:
    candidates: dict[str, Layer] = {}
    others: dict[str, str] = {}
    for name, module in problem.model.named_modules():
        layers = [layer for layer in make_layers(space, name, module) if has_rule(layer.module)]
        # An attention comes before its output projection, which it does not call as a module.
        candidates |= {layer.key: layer for layer in layers if layer.key not in candidates}
        reason = f"belongs to {type(module).__name__} ({name or 'the model'})"
        if has_rule(module):
            reason = f"is not the weight or bias of its {type(module).__name__} ({name or 'the model'})"
        others |= {f"{name}.{key}".removeprefix("."): reason for key in module._parameters}
    for layer in candidates.values():
        for parameter in layer.parameters:
            others.pop(parameter, None)
    with torch.inference_mode(False), torch.enable_grad():
        verified = _verify_candidates(_to_working_dtype(problem), candidates)
    reasons = {**others, **verified.reasons}
    for name, sharing in _find_shared(problem.model).items():
        if name in verified.reasons:
            reasons[name] = f"is shared with {', '.join(other or 'the model' for other in sharing)} (a tied weight)"
    return replace(verified, reasons={name: reasons[name] for name in space.names if name in reasons})


def _to_working_dtype(problem: Problem) -> Problem:
    """Return the problem in at least float32, because rounding in half precision hides wrong rules.

    If the model requires its own dtype, the problem itself is returned.
    """
    if problem.dtype == working_dtype(problem.dtype):
        return problem
    precise = SnapshotProblem(problem, working_dtype(problem.dtype))
    leaves = {name: value.requires_grad_() for name, value in precise.parameters().items()}
    try:
        for inputs, _ in precise.probe():
            outputs = precise.forward(leaves, inputs)
            if outputs.requires_grad:  # a checkpoint computes again in the backward pass
                torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    except Exception:  # from the user's code, for tensors of another dtype
        return problem
    precise.check_samples(leaves)  # in half precision this check shows little
    return precise


def _find_shared(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each parameter that several modules have, the other modules by the parameter's first name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: [other.rpartition(".")[0] for other in others] for first, *others in names.values() if others}


def _describe_module(layer: Layer) -> str:
    return f"belongs to {layer.kind} ({layer.name or 'the model'})"


def _verify_candidates(problem: Problem, candidates: Mapping[str, Layer]) -> Verification:
    attempt = partial(_attempt, problem, batches=problem.probe())
    try:
        trial = attempt(candidates, cloned=())
    except CurvlabError:
        raise
    except Exception as error:  # from the user's code, or from torch
        raise UnsupportedError(
            f"torch cannot differentiate {type(problem.model).__name__}: {first_line(error)}"
        ) from error
    if failed := {key for key, layer in candidates.items() if trial.reasons.keys() & set(layer.parameters)}:
        # The cause may be an in-place operation that removes their outputs from the graph: try again with copies.
        retrial = attempt(candidates, cloned=failed)
        if len(retrial.reasons) < len(trial.reasons):
            trial = retrial
    reasons, silent = dict(trial.reasons), trial.silent - trial.reasons.keys()
    left = _restrict(candidates, reasons)
    # If all gradients are zero, nothing was compared, for example before a last layer that is initialised to zero.
    for perturbation, masked in _FURTHER if silent else ():
        with suppress(Exception):  # the model may not accept perturbed weights
            layers = {name: layer for name, layer in left.items() if silent & set(layer.parameters)}
            perturbed = attempt(layers, cloned=trial.cloned, perturbation=perturbation, masked=masked)
            reasons.update(perturbed.reasons)
            silent = silent & perturbed.silent - perturbed.reasons.keys()
            left = _restrict(left, perturbed.reasons)
    for name, layer in left.items():
        if any(trial.reached[name]):  # if the outputs do not depend on it, zero is correct
            reasons.update(dict.fromkeys(silent & set(layer.parameters), f"belongs to {_label(layer)}, {_UNTRIED}"))
    left = _restrict(left, reasons)
    if trial.selects and left:
        reasons |= attempt(left, cloned=trial.cloned, batches=problem.batches(), ordered=True).reasons
        left = _restrict(left, reasons)
    return Verification(left, reasons, trial.cloned, trial.reached, trial.sizes, _find_tables(problem, left, trial))


def _find_tables(problem: Problem, layers: Mapping[str, Layer], trial: "_Trial") -> set[str]:
    """Return the keys of the layers that are also called on a table, which has as many rows as samples by chance.

    The gradients do not show such a call if the outputs do not depend on it: DoRA takes the norm of its product of
    factors without a gradient. With fewer samples, a table has as many rows as before.
    """
    partly = {key: layer for key, layer in layers.items() if len(set(trial.reached[key])) > 1}
    if not partly:
        return set()
    inputs, _ = problem.probe()[0]
    if len(inputs) < 2:
        return set(partly)
    leaves = {name: leaf.requires_grad_() for name, leaf in make_leaves(problem).items()}
    with forbid_gradients(problem.model), ignore_torch_warnings():
        _, calls = forward(problem, partly, inputs[1:], leaves, trial.cloned)
    rows = {key: [0 if call.inputs is None else len(call.inputs) for call in calls[key]] for key in partly}
    return {key for key in partly if set(rows[key]) != {len(inputs) - 1}}


@dataclass(frozen=True)
class _Trial:
    reasons: Mapping[str, str]
    silent: set[str]  # parameters without a gradient on any sample
    reached: Mapping[str, Sequence[bool]]  # by call of a layer
    cloned: Collection[str]
    sizes: Mapping[str, int]  # of inputs and outputs of the layers, in bytes per sample
    selects: bool  # whether the model chooses rows by their values


def _attempt(
    problem: Problem,
    candidates: Mapping[str, Layer],
    cloned: Collection[str],
    batches: Iterable[Pair],
    perturbation: float = 0.0,
    masked: int = 1,
    ordered: bool = False,
) -> _Trial:
    """Compare the gradients by the rules with those of automatic differentiation.

    Args:
        problem: Model, loss and data.
        candidates: Layers with a rule, by key.
        cloned: Keys of layers whose output is replaced by a copy.
        batches: The samples.
        perturbation: Size of the noise on weights and inputs, relative to their root mean square.
        masked: First of the samples whose outputs get no gradient; of these, every second one.
        ordered: Whether the order of the rows is compared, also of layers that are called once.
    """
    selects = False
    reasons: dict[str, str] = {}
    reached: dict[str, list[bool]] = {}
    sizes: dict[str, int] = {}
    silent = {parameter for layer in candidates.values() for parameter in layer.parameters}
    for inputs, _ in batches:
        leaves = {name: leaf.requires_grad_() for name, leaf in _perturb(make_leaves(problem), perturbation).items()}
        inputs = _perturb_inputs(inputs, perturbation)
        with forbid_gradients(problem.model), ignore_torch_warnings():
            with SelectionWatch() as watch:
                outputs, calls = forward(problem, candidates, inputs, leaves, cloned)
            selects = selects or watch.selects
            graph = inspect_graph(outputs, leaves)
            for key, layer in candidates.items():
                seen = calls[key]
                reason = _calls_obstacle(layer, seen, len(inputs))
                if reason is None and len(before := reached.get(key, seen)) != len(seen):
                    reason = f"{_describe_calls(layer, len(before))} for some samples and {len(seen)} for others"
                if reason is not None:
                    reasons.update(dict.fromkeys(layer.parameters, reason))
            layers = {key: la for key, la in candidates.items() if not reasons.keys() & set(la.parameters)}
            of_layers = [calls[key] for key in layers]
            every_call = [*chain(*of_layers)]
            compared = ordered or len(every_call) > len(layers)  # whether the order of rows is
            # Random, because the gradients of the loss are zero at a perfect fit and would show nothing.
            covector = random_like(outputs, tuple(outputs.shape))
            covector[masked::2] = 0  # every second sample, to detect layers that mix samples
            names = list(dict.fromkeys(parameter for layer in layers.values() for parameter in layer.parameters))
            wanted = names or list(leaves)  # without rules, this still checks that torch can differentiate the model
            tensors = [leaves[name] for name in wanted]
            slopes, found = gradients(outputs, every_call, tensors, covector, keep=compared)
            weights = random_like(outputs.detach(), (len(outputs), 1), seed=1)
            weighted = gradients(outputs, every_call, (), weights * covector, keep=False)[0] if compared else slopes
        parameter_gradients = dict(zip(wanted, found, strict=True))
        norms = {parameter: float(value.detach().norm()) for parameter, value in parameter_gradients.items()}
        for (key, layer), seen, slope, other in zip(
            layers.items(),
            of_layers,
            group_by_layer(slopes, of_layers),
            group_by_layer(weighted, of_layers),
            strict=True,
        ):
            now = _find_reached(seen, graph)
            reached[key] = [a or b for a, b in zip(now, reached.get(key, now), strict=True)]
            size = (sum(call.inputs.nbytes for call in seen if call.inputs is not None) + slope.nbytes) // len(inputs)
            sizes[key] = max(size, sizes.get(key, 0))
            reasons.update(_differences(layer, seen, slope, masked, parameter_gradients, norms, graph, problem.dtype))
            if (ordered or len(seen) > 1) and not _keeps_order(
                slope, other, weights, coarsest(problem.dtype, *(call.dtype for call in seen))
            ):
                order = "whose calls do not have the samples in the same order"
                reason = f"belongs to {_label(layer)}, {order if len(seen) > 1 else 'whose rows are not the samples'}"
                reasons.update(dict.fromkeys(layer.parameters, reason))
            silent -= {parameter for parameter in layer.parameters if norms[parameter]}
    return _Trial(reasons, silent, reached, frozenset(cloned), sizes, selects)


def _keeps_order(slope: Tensor, weighted: Tensor, weights: Tensor, dtype: torch.dtype) -> bool:
    """Return whether row ``n`` of a layer's output gradients is that of sample ``n`` in every call.

    The gradients of one sample are summed over the calls, so that the rows must belong to the same sample.

    Args:
        slope: Joined gradients of the outputs of all calls, ``(N, ...)``.
        weighted: The same for outputs whose gradients were multiplied by the weights.
        weights: ``(N, 1)``.
        dtype: Dtype of the network.
    """
    expected = weights.to(slope) * slope.detach().flatten(1)
    scale = float(expected.norm(dim=1).sum())
    return agree(weighted.flatten(1), expected, scale, dtype)


def _differences(
    layer: Layer,
    calls: Sequence[Call],
    slope: Tensor,
    masked: int,
    right: Mapping[str, Tensor],
    norms: Mapping[str, float],
    graph: Graph,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Return the reasons why the rule for the calls of a layer is wrong, by parameter, given the right gradients.

    Args:
        layer: The layer.
        calls: Its calls.
        slope: Gradients of their outputs, joined (see ``curvlab.estimators.capture.join_calls``).
        masked: First of the samples whose outputs got no gradient; of these, every second one.
        right: Right gradients by parameter.
        norms: Their norms.
        graph: Graph of the outputs.
        dtype: Dtype of the network.
    """
    label = _label(layer)
    if bool(slope[masked::2].any()):
        return dict.fromkeys(layer.parameters, f"belongs to {label}, which mixes the samples of a batch")
    inputs = [call.inputs.detach() for call in calls if call.inputs is not None]
    try:
        call_rule = rule(layer, [replace(call, inputs=x) for call, x in zip(calls, inputs, strict=True)])
        errors = call_rule.distances(slope.detach(), right)
    except Exception as error:  # the inputs may not fit the rule
        reason = f"belongs to {label}, whose rule fails on its inputs ({first_line(error)})"
        return dict.fromkeys(layer.parameters, reason)
    norm = torch.stack([x.flatten(1).norm(dim=1) for x in inputs]).norm(dim=0) if _is_floating(inputs) else 1.0
    scale = float(((1 + norm) * slope.detach().flatten(1).norm(dim=1)).sum())
    coarser = coarsest(dtype, call_rule.dtype, *(call.dtype for call in calls if call.output is not None))
    reasons = {}
    for parameter in layer.parameters:
        # One use per call, and group, is allowed; none if the model's outputs do not depend on the output of the call.
        if graph.uses[parameter] > sum(_find_reached(calls, graph)) * layer.groups:
            reasons[parameter] = f"belongs to {label}, but is also used elsewhere"
        elif not is_rounding(errors[parameter], norms[parameter], scale, coarser):
            reasons[parameter] = _explain_difference(layer)
    return reasons


def _calls_obstacle(layer: Layer, seen: Collection[Call], samples: int) -> str | None:
    label = _label(layer)
    if not seen:
        return f"belongs to {label}, which is not called"
    for call in seen:
        if call.inputs is None or call.output is None:
            return f"belongs to {label}, whose {'input' if call.inputs is None else 'output'} is not a tensor"
        if not call.inputs.ndim or len(call.inputs) != samples or call.shape[:1] != (samples,):
            return f"belongs to {label}, whose input does not have one row per sample: {tuple(call.inputs.shape)}"
    return None


def _describe_calls(layer: Layer, number: int) -> str:
    return f"belongs to {_label(layer)}, which is called {number} time{'' if number == 1 else 's'}"


def _explain_difference(layer: Layer) -> str:
    module = layer.module
    if "forward" in vars(module):
        return f"belongs to {_label(layer)}, whose forward was replaced: {_WRONG}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"belongs to {_label(layer)}, which has hooks: {_WRONG}"
    return f"belongs to {_label(layer)}: {_WRONG}"


def _find_reached(calls: Sequence[Call], graph: Graph) -> list[bool]:
    """Return for each call whether its output is in the graph."""
    return [call.output is not None and call.output.node in graph.nodes for call in calls]


def _is_floating(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def _restrict(layers: Mapping[str, Layer], reasons: Mapping[str, str]) -> dict[str, Layer]:
    """Return layers without some parameters; layers without any parameter left are dropped."""
    left = {
        name: replace(
            layer,
            weight=None if layer.weight in reasons else layer.weight,
            bias=None if layer.bias in reasons else layer.bias,
        )
        for name, layer in layers.items()
    }
    return {name: layer for name, layer in left.items() if layer.parameters}


def _perturb(tensors: Leaves, by: float) -> Leaves:
    """Return tensors with added noise, relative to their root mean square, or to one if they are zero."""
    if not by:
        return tensors
    perturbed = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        size = float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
        noise = random_like(tensor.detach(), tuple(tensor.shape), seed=index)
        perturbed[name] = tensor.detach() + by * (size or 1.0) * noise
    return perturbed


def _perturb_inputs(inputs: Inputs, by: float) -> Inputs:
    """Return inputs with noise on the floating-point ones."""
    named = {str(index): tensor for index, tensor in enumerate(tensors_of(inputs))}
    noisy = _perturb({name: tensor for name, tensor in named.items() if tensor.is_floating_point()}, by)
    return with_tensors(inputs, list((named | dict(noisy)).values()))


def _label(layer: Layer) -> str:
    return f"{layer.kind} {layer.name}".strip()
