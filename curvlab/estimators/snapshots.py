"""A model as it was at one moment: verified copies, and models that are held at the values they had.

A copy shares nothing with its model, unless code of the model's does: a hook or a forward that is a closure keeps the
layers and parameters that it was written for, in the copy too. So a copy is believed only where it answers, at other
values of all parameters and buffers, as the model does. Else the model itself is used, with the values of that moment.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab import stateless
from curvlab.errors import CurvlabError, UnsupportedError, first_line
from curvlab.estimators.capture import gradients, quiet, working_dtype
from curvlab.estimators.rules import random_like
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.randomness import preserved_random_state

Values = Mapping[str, Tensor]


def snapshot(problem: Problem, space: ParameterSpace) -> Problem:
    """Return the problem at its parameters and buffers of now, whatever is done to its model after.

    A model in half precision is one in float32 there, of the same weights: in its own, products are hardly linear.

    Raises:
        UnsupportedError: A backward pass of the model loses gradients.
    """
    check_backward(problem, space)
    alone = copied(problem, space)
    dtype = working_dtype(problem.dtype)
    if dtype != problem.dtype:
        with suppress(Exception):  # a model may ask for its own
            wide = HeldProblem(problem, dtype) if alone is None else _converted(alone, dtype)
            response(wide, space, {})
            return wide
    return HeldProblem(problem) if alone is None else alone


def copied(problem: Problem, space: ParameterSpace) -> Problem | None:
    """Return the problem with a copy of its model, which nothing that is done to either then shares; None if none can.

    Batch norms in eval mode are replaced by plain products.
    """
    try:
        alone = problem.with_model(stateless.copied(problem.model))
        for name, parameter in alone.model.named_parameters():
            # As the leaves do in whose place they are: a checkpoint computes with them again.
            parameter.requires_grad_(name in space.names)
        for module in alone.model.modules():
            # Not a subclass: it may do more than that.
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not module.training:
                module.__class__ = _AffineBatchNorm
        elsewhere = _elsewhere(problem.model)
        right = response(problem, space, elsewhere)
        same = _same(response(alone, space, elsewhere, problem.model), right)
    except Exception:  # whatever a module does when it is copied, or its copy when it is called
        return None
    return alone if same else None


def _converted(problem: Problem, dtype: torch.dtype) -> Problem:
    other = problem.with_model(stateless.copied(problem.model).to(dtype))
    other.space, other.dtype = problem.space, dtype
    return other


class _AffineBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm in eval mode, of plain products: torch's second derivative of its kernel is slow."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = (self.running_var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = (-1, *[1] * (input.ndim - 2))
        return input * scale.view(shape) + shift.view(shape)


class HeldProblem(Problem):
    """A problem at the parameters, buffers and modes that its model had, which may train on meanwhile.

    Args:
        problem: With the model.
        dtype: To compute in; None for the model's.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype | None = None) -> None:
        vars(self).update(vars(problem))  # with what it knows of the data
        self.dtype = problem.dtype if dtype is None else dtype
        held = _cloned(chain(problem.model.named_parameters(), problem.model.named_buffers()))
        held = {
            name: tensor.to(self.dtype) if tensor.dtype == problem.dtype else tensor for name, tensor in held.items()
        }
        self._parameters = {name: held.pop(name) for name, _ in problem.model.named_parameters()}
        self._buffers = held
        self._modes = {name: module.training for name, module in problem.model.named_modules()}

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters of that moment."""
        return {name: self._parameters[name].detach() for name in self.space.names}

    def forward(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the outputs; parameters that are not given, and buffers, are those of that moment."""
        now = [(module, module.training) for module in self.model.modules()]
        try:
            for name, module in self.model.named_modules():
                module.training = self._modes.get(name, module.training)
            held = self.parameters() | self._parameters | _cloned(self._buffers.items())
            return super().forward(held | parameters, inputs)
        finally:
            for module, training in now:
                module.training = training


class Watch:
    """Says when a snapshot is no longer what it was: a model can use what is not its own.

    Args:
        snapshot: Just taken.
        space: Of the parameters whose gradients are looked at.
    """

    def __init__(self, snapshot: Problem, space: ParameterSpace) -> None:
        self._snapshot, self._space = snapshot, space
        self._answers = self._now()

    def _now(self) -> list[Tensor]:
        return response(self._snapshot, self._space, {})

    def check(self) -> None:
        """Compare with what it was.

        Raises:
            CurvlabError: It is something else.
        """
        if not _same(self._now(), self._answers):
            raise CurvlabError(
                f"{type(self._snapshot.model).__name__} has changed since this matrix was estimated, in tensors or "
                "modules that cannot be held: estimate the matrix again"
            )


def check_backward(problem: Problem, space: ParameterSpace) -> None:
    """Refuse models whose backward passes add to the parameters' ``grad`` by themselves.

    That is what a re-entrant checkpoint or a reversible block does; ``torch.autograd.grad`` does not see it.

    Raises:
        UnsupportedError: The model does, or torch cannot differentiate it.
    """
    with torch.inference_mode(False), told(problem.model):
        # All that the model holds, on copies: a forward may renormalise its weights in place.
        response(problem, space, dict(problem.model.named_parameters()))


def response(
    problem: Problem, space: ParameterSpace, values: Values, original: nn.Module | None = None
) -> list[Tensor]:
    """Return the outputs on a few samples and their gradients along a random vector.

    Args:
        problem: Model, loss and data.
        space: Of the parameters whose gradients are wanted.
        values: Of parameters and buffers by name; those of the model where there is none.
        original: Of which the model is a copy.

    Raises:
        UnsupportedError: A gradient of the parameters is lost, or is one of the original's.
    """
    found: list[Tensor] = []
    others = () if original is None else original.parameters()
    foreign = {id(parameter) for parameter in others}
    with preserved_random_state(), torch.enable_grad(), without_gradients(problem.model):
        for inputs, _ in problem.probe():
            given = _cloned((problem.parameters() | dict(values)).items())
            leaves = {name: given[name].requires_grad_() for name in space.names}
            outputs = problem.forward(given, inputs)
            if foreign & stateless.leaves(outputs).keys():
                raise UnsupportedError(f"the copy of {type(problem.model).__name__} uses parameters of the original")
            along = random_like(outputs, tuple(outputs.shape))
            found += [outputs.detach(), *gradients(outputs, (), list(leaves.values()), along, keep=False)[1]]
    return found


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Refuse a backward pass within that gives the model's parameters gradients; keep those that they have."""
    with stateless.gradients_restored(model):
        yield
        if any(p.grad is not None for p in model.parameters()):
            raise UnsupportedError(
                f"a backward pass of {type(model).__name__} adds to its parameters' grad by itself, as a re-entrant "
                "checkpoint does, and the gradient is lost: take torch.utils.checkpoint with use_reentrant=False"
            )


def _elsewhere(model: nn.Module) -> dict[str, Tensor]:
    """Return other values of the floating parameters and buffers, near the model's."""
    values = {}
    for index, (name, tensor) in enumerate(chain(model.named_parameters(), model.named_buffers())):
        if tensor.is_floating_point():
            part = torch.finfo(tensor.dtype).eps ** 0.25
            noise = random_like(tensor, tuple(tensor.shape), seed=index).clamp(-2, 2) / 4
            values[name] = tensor.detach() * (1 + part * noise)
    return values


def _same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Return whether responses agree, but for rounding."""
    pairs = list(zip(one, other, strict=True))
    largest = max(_size(b) for _, b in pairs)
    for a, b in pairs:
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        eps = torch.finfo(a.dtype).eps
        if _size(a - b) > eps**0.6 * _size(b) + 100 * eps * largest:
            return False
    return True


def _size(tensor: Tensor) -> float:
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max()) if tensor.numel() else 0.0


def _cloned(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


# What torch must be told to differentiate a model -----------------------------------------------------------------


@contextmanager
def differentiable(problem: Problem) -> Iterator[None]:
    """Have torch take kernels with all their derivatives, where the caller has gradients off or autocasts, too."""
    with ExitStack() as settings:
        settings.enter_context(quiet())
        # It is torch's own, the first time that numbers with a dual part are used.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        settings.enter_context(torch.inference_mode(False))  # also within no_grad
        settings.enter_context(torch.autocast(problem.device.type, enabled=False))
        settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in problem.model.modules()):
            for fused in (torch.backends.mkldnn, torch.backends.cudnn):
                settings.callback(setattr, fused, "enabled", fused.enabled)
                fused.enabled = False  # type: ignore[attr-defined]
        yield


@contextmanager
def told(model: nn.Module) -> Iterator[None]:
    """Turn whatever torch raises in a derivative into one sentence."""
    try:
        yield
    except (CurvlabError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name = type(model).__name__
        raise UnsupportedError(f"torch cannot differentiate {name}: {first_line(error)}") from error
