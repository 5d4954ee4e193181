"""Snapshots of a model: verified copies, or the model itself with stored values.

A copy shares nothing with its model, except through code of the model: a hook or a forward that is a closure still
refers to the original layers and parameters, also in the copy. So a copy is used only if its outputs are those of the
model at other values of all parameters and buffers. Otherwise the model itself is used, with the stored values.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab import stateless
from curvlab.batches import Inputs
from curvlab.errors import CurvlabError, UnsupportedError, first_line
from curvlab.estimators.capture import gradients, ignore_torch_warnings, working_dtype
from curvlab.estimators.rules import random_like
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.randomness import preserve_random_state

Values = Mapping[str, Tensor]


def snapshot(problem: Problem, space: ParameterSpace) -> Problem:
    """Return the problem at its current parameters and buffers, independent of later changes to its model.

    A model in half precision is converted to float32 with the same weights, because in half precision, products are far
    from linear.

    Raises:
        UnsupportedError: A backward pass of the model loses gradients.
    """
    check_backward(problem, space)
    copy = copy_problem(problem, space)
    dtype = working_dtype(problem.dtype)
    if dtype != problem.dtype:
        with suppress(Exception):  # a model may require its own dtype
            wide = SnapshotProblem(problem, dtype) if copy is None else _convert(copy, dtype)
            compute_response(wide, space, {})
            return wide
    return SnapshotProblem(problem) if copy is None else copy


def copy_problem(problem: Problem, space: ParameterSpace) -> Problem | None:
    """Return the problem with an independent copy of its model, or None if no correct copy can be made.

    In the copy, batch norms in eval mode are computed by plain products.
    """
    try:
        copy = problem.with_model(stateless.copy_model(problem.model))
        for name, parameter in copy.model.named_parameters():
            # As for the leaves that replace them: a checkpoint computes with the parameters again.
            parameter.requires_grad_(name in space.names)
        for module in copy.model.modules():
            # Not a subclass, which may do more.
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not module.training:
                module.__class__ = _AffineBatchNorm
        other_values = _perturb_values(problem.model)
        right = compute_response(problem, space, other_values)
        same = _agree(compute_response(copy, space, other_values, problem.model), right)
    except Exception:  # from a module that is copied, or from a call of the copy
        return None
    return copy if same else None


def _convert(problem: Problem, dtype: torch.dtype) -> Problem:
    other = problem.with_model(stateless.copy_model(problem.model).to(dtype))
    other.space, other.dtype = problem.space, dtype
    return other


class _AffineBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm in eval mode by plain products: torch's second derivative of its kernel is slow."""

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


class SnapshotProblem(Problem):
    """A problem at the stored parameters, buffers and modes of its model, which may be trained further.

    Args:
        problem: Problem with the model.
        dtype: Dtype of the computation; None for the model's.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype | None = None) -> None:
        vars(self).update(vars(problem))  # also what it knows about the data
        self.dtype = problem.dtype if dtype is None else dtype
        held = _clone(chain(problem.model.named_parameters(), problem.model.named_buffers()))
        held = {
            name: tensor.to(self.dtype) if tensor.dtype == problem.dtype else tensor for name, tensor in held.items()
        }
        self._parameters = {name: held.pop(name) for name, _ in problem.model.named_parameters()}
        self._buffers = held
        self._modes = {name: module.training for name, module in problem.model.named_modules()}

    def parameters(self) -> dict[str, Tensor]:
        """Return the stored trainable parameters."""
        return {name: self._parameters[name].detach() for name in self.space.names}

    def forward(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the outputs; parameters that are not given, and all buffers, have their stored values."""
        now = [(module, module.training) for module in self.model.modules()]
        try:
            for name, module in self.model.named_modules():
                module.training = self._modes.get(name, module.training)
            held = self.parameters() | self._parameters | _clone(self._buffers.items())
            return super().forward(held | parameters, inputs)
        finally:
            for module, training in now:
                module.training = training


class SnapshotGuard:
    """Detects changes of a snapshot: a model can use tensors or modules that do not belong to it.

    Args:
        snapshot: A new snapshot.
        space: Space of the parameters whose gradients are compared.
    """

    def __init__(self, snapshot: Problem, space: ParameterSpace) -> None:
        self._snapshot, self._space = snapshot, space
        self._first_response = self._respond()

    def _respond(self) -> list[Tensor]:
        return compute_response(self._snapshot, self._space, {})

    def check(self) -> None:
        """Compare the snapshot with its first response.

        Raises:
            CurvlabError: The snapshot has changed.
        """
        if not _agree(self._respond(), self._first_response):
            raise CurvlabError(
                f"{type(self._snapshot.model).__name__} has changed since this matrix was estimated, in tensors or "
                "modules that cannot be copied: estimate the matrix again"
            )


def check_backward(problem: Problem, space: ParameterSpace) -> None:
    """Refuse models whose backward passes add to the parameters' ``grad`` themselves.

    A re-entrant checkpoint or a reversible block does this; ``torch.autograd.grad`` does not return these gradients.

    Raises:
        UnsupportedError: A backward pass adds to ``grad``, or torch cannot differentiate the model.
    """
    with torch.inference_mode(False), explain_torch_errors(problem.model):
        # With copies of all parameters: a forward may renormalise its weights in place.
        compute_response(problem, space, dict(problem.model.named_parameters()))


def compute_response(
    problem: Problem, space: ParameterSpace, values: Values, original: nn.Module | None = None
) -> list[Tensor]:
    """Return the outputs on a few samples and their gradients along a random vector.

    Args:
        problem: Model, loss and data.
        space: Space of the parameters whose gradients are returned.
        values: Values of parameters and buffers by name; for other names, those of the model.
        original: The original model, if the problem has a copy.

    Raises:
        UnsupportedError: A gradient of the parameters is lost, or the copy uses parameters of the original.
    """
    found: list[Tensor] = []
    others = () if original is None else original.parameters()
    foreign = {id(parameter) for parameter in others}
    with preserve_random_state(), torch.enable_grad(), forbid_gradients(problem.model):
        for inputs, _ in problem.probe():
            given = _clone((problem.parameters() | dict(values)).items())
            leaves = {name: given[name].requires_grad_() for name in space.names}
            outputs = problem.forward(given, inputs)
            if foreign & stateless.graph_leaves(outputs).keys():
                raise UnsupportedError(f"the copy of {type(problem.model).__name__} uses parameters of the original")
            along = random_like(outputs, tuple(outputs.shape))
            found += [outputs.detach(), *gradients(outputs, (), list(leaves.values()), along, keep=False)[1]]
    return found


@contextmanager
def forbid_gradients(model: nn.Module) -> Iterator[None]:
    """Raise an error if a backward pass in the block sets the parameters' ``grad``; restore the values before."""
    with stateless.restore_gradients(model):
        yield
        if any(p.grad is not None for p in model.parameters()):
            raise UnsupportedError(
                f"a backward pass of {type(model).__name__} adds to its parameters' grad itself, as a re-entrant "
                "checkpoint does, so the gradient is lost: use torch.utils.checkpoint with use_reentrant=False"
            )


def _perturb_values(model: nn.Module) -> dict[str, Tensor]:
    """Return values of the floating-point parameters and buffers that are close to the model's."""
    values = {}
    for index, (name, tensor) in enumerate(chain(model.named_parameters(), model.named_buffers())):
        if tensor.is_floating_point():
            part = torch.finfo(tensor.dtype).eps ** 0.25
            noise = random_like(tensor, tuple(tensor.shape), seed=index).clamp(-2, 2) / 4
            values[name] = tensor.detach() * (1 + part * noise)
    return values


def _agree(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Return whether responses agree up to rounding."""
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


def _clone(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


# Settings of torch for differentiating a model --------------------------------------------------------------------


@contextmanager
def enable_all_derivatives(problem: Problem) -> Iterator[None]:
    """Let torch use kernels with all derivatives, also if the caller has switched gradients off or uses autocast."""
    with ExitStack() as settings:
        settings.enter_context(ignore_torch_warnings())
        # Torch itself causes this warning at the first use of dual numbers.
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
def explain_torch_errors(model: nn.Module) -> Iterator[None]:
    """Convert an exception of torch in a derivative into an error of one sentence."""
    try:
        yield
    except (CurvlabError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name = type(model).__name__
        raise UnsupportedError(f"torch cannot differentiate {name}: {first_line(error)}") from error
