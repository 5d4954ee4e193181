"""The first-order expansion of a model in its parameters, as a module."""

import warnings
from collections.abc import Mapping
from copy import copy, deepcopy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.linearize import augmented, pushforward, verification
from curvlab.linearize.point import iterate_parameters, point_value, reset_to_point, store_point
from curvlab.linearize.pushforward import Arguments, Keywords
from curvlab.linearize.verification import Origin
from curvlab.parameters import ParameterSpace
from curvlab.randomness import preserve_random_state
from curvlab.stateless import check_module, copy_model
from curvlab.text import did_you_mean


def linearize(
    model: nn.Module, at: Tensor | Mapping[str, Tensor] | None = None, *, head: str | None = None
) -> "Linearized":
    """Return ``f(x; theta0) + J(x; theta0) (theta - theta0)`` as a module with the parameter names of the model.

    The module can be trained and saved like any other. Its parameters ``theta`` start at ``theta0``. Each value of
    ``theta0`` is a buffer next to its parameter (``fc1.weight_at``), so that a state dict contains the whole function.
    With the squared error, the loss is exactly quadratic in the parameters (Shon et al., "DLCFT: Deep linear continual
    fine-tuning for general incremental learning", ECCV 2022; Mu, Liang and Li, "Gradients as features for deep
    representation learning", ICLR 2020).

    If every module of the model has a rule (Linear, Conv2d, ReLU, LeakyReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d,
    Flatten, Identity, Dropout, BatchNorm2d in eval mode, Sequential, and the blocks of ``ResNet20``), outputs and their
    change are computed layer by layer. Other models are differentiated in forward mode (``torch.func.jvp``). In train
    mode, dropout uses one mask for both: the result is the linearization of the thinned network.

    Args:
        model: Any module with one output tensor. It is copied and not changed. Frozen parameters (``requires_grad`` is
            False) and buffers are constants of the function.
        at: ``theta0``: a dict with all trainable parameters, such as a state dict, or a flat vector ``(P,)``; None for
            the present values of the model.
        head: Name of the last module, such as ``"fc"``, which is not linearized. The outputs are then ``head(g(x))``
            with linearized features ``g``, as in DLCFT. They are linear in the parameters of the features and linear in
            those of the head, but not in both together. The head can be replaced later.

    Returns:
        A module with the device, dtype and mode of the model.

    Raises:
        CurvlabError: No parameter is trainable, ``at`` does not fit the model, or the head does not exist.
        UnsupportedError: The model cannot be copied. At a call: batch normalisation is in train mode, torch has no
            forward derivative or it differs from the backward passes of the model, a closure uses parameters
            directly and not through their modules, or the head is not the last module. The message names the module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> linear, x = linearize(model), torch.randn(5, 2)
        >>> bool(torch.allclose(linear(x), model(x)))
        True
        >>> [name for name, _ in linear.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    check_module(model)
    origin = Origin(model)
    model = copy_model(model)
    if at is not None:
        _set_parameters(model, at)
    outside = set() if head is None else _parameters_of_head(model, head)
    points: dict[int, Tensor] = {}  # one per parameter, also if it is shared
    for name, module, key, parameter in list(iterate_parameters(model)):
        if not parameter.requires_grad or id(parameter) in outside:
            continue
        if point_value(module, key) is not None:
            raise CurvlabError(f"{name} belongs to a model that is already linearized: linearize the original model")
        store_point(module, key, points.setdefault(id(parameter), parameter.detach().clone()))
    if not points:
        but = f" outside of {head}" if head else ""
        raise CurvlabError(f"{type(model).__name__} has no trainable parameter{but}: set requires_grad on one")
    return Linearized(model, head, origin)


class Linearized(nn.Module):
    """A linearized model; create it with ``linearize``."""

    def __init__(self, model: nn.Module, head: str | None, origin: Origin) -> None:
        super().__init__()
        self._head = head  # not ``head``, which is a common name of a submodule
        # The dictionaries of the model itself, so that this module has the same names, including later additions.
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training
        self._model = (model,)  # in a tuple, so that it is not a submodule
        # Whether rules are used, and the number of hooks, at the last check. A list, because attributes are restored.
        self._checked_methods: list[tuple[bool, int]] = []
        self._origin = origin
        self._original: tuple[Linearized, ...] = ()  # set by ``first_order_model``

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Return the outputs of the linearized model.

        Raises:
            CurvlabError: A parameter is trainable that was frozen when the model was linearized.
            UnsupportedError: See ``linearize``.
        """
        if self._original:
            # With a graph, because the inputs may depend on parameters of other modules.
            change = self._original[0].push(inputs, keywords)[1]
            outputs = self._features()(*inputs, **keywords) + change
        else:
            at_point, change = self.push(inputs, keywords)
            outputs = at_point + change
        if self._head is not None:
            outputs = self.get_submodule(self._head)(outputs)
        result: Tensor = outputs
        return result

    def push(self, inputs: Arguments, keywords: Keywords) -> tuple[Tensor, Tensor]:
        """Return the outputs (with a head, the features) at ``theta0``, and their change up to ``theta``."""
        model = self._features()
        _check(model)
        ruled = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not keywords and augmented.has_rule(model)
        way = ruled, _hooks(model)
        if self._checked_methods != [way] and self._run_checks(model, inputs, keywords, ruled):
            self._checked_methods[:] = [way]
        return (_push_by_rules if ruled else pushforward.push)(model, inputs, keywords)

    def _features(self) -> nn.Module:
        """Return the model without its head."""
        (model,) = self._model
        model.training = self.training
        return model if self._head is None else _without(model, self._head)

    def _run_checks(self, model: nn.Module, inputs: Arguments, keywords: Keywords, ruled: bool) -> bool:
        """Run the checks that need inputs, at the first call of each method; return whether they could run."""
        # The values of tensors wrapped by torch.func cannot be read; a later call may be outside of torch.func.
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in inputs if isinstance(x, Tensor)):
            return False
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad(), preserve_random_state():
            # Torch itself raises this warning when dual numbers are first used.
            warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
            if self._head is not None:
                _check_head(self._model[0], self._head, inputs, keywords)
            push = _push_by_rules if ruled else pushforward.push
            verification.check(model, inputs, keywords, push, self._origin)
        return True


def _push_by_rules(model: nn.Module, inputs: Arguments, _: Keywords) -> tuple[Tensor, Tensor]:
    return augmented.push(model, inputs[0])


def first_order_model(model: nn.Module) -> nn.Module:
    """Return a model with the same outputs and the same Jacobian that calls its layers as usual.

    A linearized model does not call its layers with its parameters, so that methods which use the inputs and output
    gradients of layers would be wrong. Its Jacobian is that of the model at ``theta0``. To first order in the
    parameters, it is therefore the model at ``theta0`` with the constant ``f_lin(x) - f(x; theta0)`` added to the
    outputs. Second derivatives differ: those of the linearized model are zero.

    Args:
        model: Any module. If one of its modules is linearized, a copy is returned, else the model itself.
    """
    if not any(map(_is_linearized, model.modules())):
        return model
    model = deepcopy(model)
    for module in filter(_is_linearized, model.modules()):
        module._original = (deepcopy(module).requires_grad_(False),)
        reset_to_point(module)
    return model


def outputs_at_point(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of a model by calling its layers; for a linearized model, at ``theta0``.

    Args:
        model: Any module with one output tensor.
        inputs: ``(N, ...)``.
    """
    if isinstance(model, Linearized):
        training, (model,) = model.training, model._model
        model.training = training
    return pushforward.outputs(model, (inputs,), {})


def _is_linearized(module: nn.Module) -> TypeGuard[Linearized]:
    return isinstance(module, Linearized) and not module._original


def _set_parameters(model: nn.Module, at: Tensor | Mapping[str, Tensor]) -> None:
    space = ParameterSpace.of(model)
    if isinstance(at, Tensor):
        if at.shape != (space.total,):
            raise CurvlabError(
                f"at must be a flat vector of shape ({space.total},) or a dict by parameter name, not {tuple(at.shape)}"
            )
        at = space.unflatten(at)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    faults = [f"no {name}" for name in space.names if name not in at]
    faults += [f"an unexpected {name}" for name in at if name not in own]
    faults += [
        f"{name} of shape {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in at.items()
        if name in own and value.shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CurvlabError(f"at does not fit {type(model).__name__}: it has {', '.join(faults[:3])}{more}")
    with torch.no_grad():
        for name, value in at.items():
            own[name].copy_(value)


def _parameters_of_head(model: nn.Module, head: str) -> set[int]:
    modules = {name: module for name, module in model.named_modules() if name}
    if head not in modules:
        hint = did_you_mean(head, modules)
        raise CurvlabError(f"{type(model).__name__} has no module {head!r} for the head{hint}")
    inside = {id(parameter) for parameter in modules[head].parameters()}
    for name, _, _, parameter in iterate_parameters(_without(model, head)):
        if id(parameter) in inside:
            raise CurvlabError(f"{name} is shared with the head {head}, which is not linearized: untie them")
    return inside


def _without(model: nn.Module, name: str) -> nn.Module:
    """Return a view of a model without one of its modules; the model does not change."""
    first, _, rest = name.partition(".")
    view = copy(model)
    view._modules = dict(model._modules)
    view._modules[first] = _without(model.get_submodule(first), rest) if rest else nn.Identity()
    return view


def _hooks(model: nn.Module) -> int:
    """Return the number of hooks and replaced ``forward`` methods of a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(sum(len(vars(m)[kind]) for kind in kinds) + ("forward" in vars(m)) for m in model.modules())


def _check(model: nn.Module) -> None:
    if torch.nn.modules.module._has_any_global_hook():
        raise UnsupportedError(
            "a global hook of torch (such as register_module_forward_hook) acts on a linearized model and also on the "
            "model inside it: remove it, or register hooks on the modules"
        )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UnsupportedError(
                f"{name or 'the model'} ({type(module).__name__}) normalises by its batch in train mode, which is not "
                "a function of one sample: freeze it first with curvlab.models.freeze_batch_norm, or merge it into its "
                "convolution with merge_batch_norm"
            )
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and point_value(module, key) is None:
                raise CurvlabError(
                    f"{name}.{key}".removeprefix(".")
                    + " is trainable, but was frozen or absent when the model was linearized: linearize it again"
                )


def _check_head(model: nn.Module, head: str, inputs: Arguments, keywords: Keywords) -> None:
    given: list[Any] = []
    handle = model.get_submodule(head).register_forward_hook(lambda _, __, output: given.append(output))
    try:
        with torch.no_grad():
            outputs = pushforward.outputs(model, inputs, keywords)
    finally:
        handle.remove()
    if len(given) != 1 or outputs is not given[0]:
        raise UnsupportedError(
            f"{head} cannot be the head: the outputs of {type(model).__name__} are not the outputs of {head}"
            + ("" if len(given) == 1 else f" (it is called {len(given)} times)")
        )
