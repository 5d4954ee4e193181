"""A problem: a model, a loss and data, with the checks on which every estimator relies."""

import sys
import warnings
from collections.abc import Iterator
from copy import copy
from functools import cached_property
from importlib import import_module

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError, UnsupportedError, type_and_line
from curvlab.intake import BatchSource, Pair, RepeatableData, are_equal, is_finite, plain_entries
from curvlab.losses import Loss, LossName, get_loss
from curvlab.parameters import ParameterSpace
from curvlab.randomness import preserve_random_state, watch_randomness
from curvlab.stateless import (
    call,
    check_dtype,
    check_module,
    check_not_cached,
    copy_attributes,
    graph_leaves,
    parameter_write_message,
)

__all__ = ["BatchSource", "Pair", "Problem", "is_stochastic"]


class Problem:
    """A model, a loss and the data on which the curvature is computed.

    Computations on a problem do not change the model (gradients, modes, buffers, hooks, attributes, ``requires_grad``)
    or the global random state.

    Args:
        model: Any module with one output tensor ``(N, C)``, on any device. Its trainable parameters must have the same
            floating dtype. Floating-point inputs and targets are converted to that dtype and device.
        loss: ``cross_entropy``, ``squared_error`` or ``binary_cross_entropy`` (see ``curvlab.losses``).
        data: A DataLoader or list of ``(inputs, targets)`` batches, or one pair of tensors ``(X, y)``.

    Raises:
        CurvlabError: The loss is unknown, the data can be iterated only once, no parameter is trainable, or the model
            cannot be called with other parameters (scripted, parallel, lazy, on the meta device).

    Examples:
        >>> problem = Problem(nn.Linear(2, 3), "cross_entropy", (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> problem.num_samples
        4
    """

    def __init__(self, model: nn.Module, loss: LossName | str = "cross_entropy", data: BatchSource | Pair = ()) -> None:
        check_module(model)
        self.model = model
        self.loss: Loss = get_loss(loss)
        self.data = data
        self.space = ParameterSpace.of(model)
        self._intake = RepeatableData(data)
        named = dict(model.named_parameters())
        kinds = {(named[name].dtype, named[name].device) for name in self.space.names}
        if len(kinds) > 1:
            raise CurvlabError(
                f"the trainable parameters must have one dtype and device, not {sorted(map(str, kinds))}"
            )
        self.dtype, self.device = kinds.pop()
        check_dtype(self.dtype)

    def with_model(self, model: nn.Module) -> "Problem":
        """Return a problem with another model and the same data.

        Both problems share the record of the first pass over the data.
        """
        other = copy(self)
        other.model, other.space = model, ParameterSpace.of(model)
        return other

    @cached_property
    def num_samples(self) -> int:
        """Number of samples in one pass over the data (with ``drop_last``, fewer than in the data set).

        The first access may take a pass over the data.
        """
        return self._intake.count()

    def probe(self) -> list[Pair]:
        """Return a few samples for the verification of a computation, on the model's device and in its dtype.

        Two samples are from the beginning of the data, two from near the middle and two from the end; small data give
        fewer. Samples of equal shape and dtype form one batch, so that there is usually one batch of six. The samples
        are kept from the first complete pass over the data.

        Examples:
            >>> x, y = torch.arange(20.0)[:, None], torch.zeros(20).long()
            >>> [(inputs, _)] = Problem(nn.Linear(1, 3), "cross_entropy", (x, y)).probe()
            >>> inputs.flatten().tolist()
            [0.0, 1.0, 8.0, 9.0, 18.0, 19.0]
        """
        return [(self._place(inputs), self._place(targets)) for inputs, targets in self._intake.first().probe()]

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, detached from the model's graph."""
        named = dict(self.model.named_parameters())
        return {name: named[name].detach() for name in self.space.names}

    def forward(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the outputs ``(N, C)`` for the given parameters; other parameters have the model's own values.

        The dict may also contain buffers. The model writes into copies of its buffers and inputs, and attributes that
        it sets on its modules are restored. The outputs have the dtype of the parameters.

        Raises:
            UnsupportedError: The outputs are not one real floating tensor ``(N, C)``, the model writes into a
                parameter, or ``torch.autocast`` is on around the call.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise UnsupportedError(
                "torch.autocast is on around this call and would round intermediate results: call curvlab outside of "
                "it (the model's own forward pass may use autocast)"
            )
        if missing := [name for name in self.space.names if name not in parameters]:
            # With requires_grad, as in the model: a forward pass may branch on it.
            own = self.parameters()
            parameters = parameters | {name: own[name].requires_grad_() for name in missing}
        outputs = call(self.model, parameters, inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[0] != inputs.shape[0]:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            of = "one sample" if len(inputs) == 1 else f"{len(inputs)} samples"
            raise UnsupportedError(
                f"{type(self.model).__name__} must return one tensor (N, C); for {of} it returned "
                f"{shape}: wrap the model in a module that returns such a tensor"
            )
        if not outputs.is_floating_point():
            raise UnsupportedError(
                f"{type(self.model).__name__} returns {outputs.dtype}; the losses need real floating-point outputs"
            )
        # A model with autocast inside returns another dtype.
        given = (parameters[name].dtype for name in self.space.names if name in parameters)
        return outputs.to(next(given, self.dtype))

    def batches(self, batch_size: int | None = None) -> Iterator[Pair]:
        """Iterate the data once on the model's device, in the same order at every call.

        Args:
            batch_size: Regroup the samples into batches of this size (the last may be smaller); None for the
                batches of the data (500 samples for a pair of tensors).

        Raises:
            CurvlabError: There are no samples, a batch is not a pair of ordinary tensors, an input is not finite, or
                the data raise an error or differ from the first pass.
        """
        if batch_size is not None and batch_size < 1:
            raise CurvlabError(f"batch_size must be at least 1, not {batch_size}")
        for inputs, targets in self._intake.batches(batch_size):
            yield self._place(inputs), self._place(targets)

    def _place(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the model's device without a graph; floating-point tensors get the model's dtype."""
        tensor = tensor.detach()
        if tensor.is_inference():
            with torch.inference_mode(False):
                tensor = tensor.clone()  # a normal tensor, which can have gradients
        dtype = tensor.dtype
        if tensor.is_floating_point():
            dtype = self.dtype
        elif tensor.is_complex() and self.dtype != torch.bfloat16:  # bfloat16 has no complex dtype
            dtype = self.dtype.to_complex()
        placed = tensor.to(self.device, dtype)
        if dtype.itemsize < tensor.dtype.itemsize and not is_finite(placed):
            raise CurvlabError(
                f"the data hold values outside the range of {self.dtype}, the dtype of the model: rescale them"
            )
        return placed

    def check(self) -> None:
        """Check, before a computation, that the per-sample curvature of the model on the data is defined.

        Raises:
            CurvlabError: A weight is not finite, or the targets of a batch do not match the loss.
            UnsupportedError: A module is in train mode and its output there is random or depends on other samples; or
                the model, on a few samples, raises an error, draws random numbers, returns outputs that depend on the
                rest of the batch or do not depend on the parameters, or writes into its parameters or attributes.
        """
        _import_what_warns()
        for name, parameter in self.model.named_parameters():
            if not is_finite(parameter):
                bad = int((~plain_entries(parameter).isfinite()).sum())
                raise CurvlabError(f"the parameter {name} of the model holds {bad} NaN or infinite values")
        for name, buffer in self.model.named_buffers():
            # Infinite values are allowed: attention masks hold minus infinity.
            if bad := int(plain_entries(buffer).isnan().sum()):
                raise CurvlabError(f"the buffer {name} of the model holds {bad} NaN values")
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) keeps no running statistics, so that the "
                    "output of a sample always depends on its batch: create it with track_running_stats=True"
                )
            if getattr(module, "scale_grad_by_freq", False):
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) divides its gradients by the frequency of an "
                    "index in the batch, so that they are not derivatives: create it with scale_grad_by_freq=False"
                )
            if module.training and is_stochastic(module):
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) is in train mode, where the output of a sample "
                    "is random or depends on its batch: call model.eval() first"
                )
        with torch.inference_mode(False), torch.enable_grad():
            own = {name: (p.detach(), p.requires_grad) for name, p in self.model.named_parameters()}
            # If the model writes into its parameters, it writes into these copies.
            copies, others = (
                {name: p.clone().requires_grad_(trained) for name, (p, trained) in own.items()} for _ in range(2)
            )
            outputs: Tensor | None = None
            with copy_attributes(self.model) as check_attributes:
                for inputs, targets in self.batches():
                    if outputs is None:
                        with preserve_random_state(self.model.modules()):
                            outputs = self._checked_outputs(copies, inputs[:1])
                    self.loss.check(outputs.expand(len(targets), -1), targets)
                # With other tensors, so that a tensor cached by the first pass is noticed.
                self.check_samples(others, outputs)
                check_attributes()
            for name, (p, _) in own.items():
                if not (are_equal(copies[name], p) and are_equal(others[name], p)):
                    raise UnsupportedError(parameter_write_message(self.model, name))

    def _checked_outputs(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the outputs for a few inputs; check that they depend on the given parameters and no others."""
        name = type(self.model).__name__
        try:
            outputs = self.forward(parameters, inputs)
        except CurvlabError:
            raise
        except Exception as error:
            reason = type_and_line(error)
            if not inputs.is_floating_point() and self._accepts(parameters, inputs.to(self.dtype)):
                reason = f"the inputs are {inputs.dtype}, not floating: use x.float(), or x.float() / 255 for images"
            raise UnsupportedError(f"{name} raises an error on the first samples of the data: {reason}") from error
        reached = graph_leaves(outputs)
        for parameter, own in self.model.named_parameters():
            if id(own) in reached:
                raise UnsupportedError(
                    f"{name} uses its parameter {parameter} through a tensor or a function made before the forward "
                    "pass, so that it cannot be replaced: read the parameter from its module at every call"
                )
        given = {id(tensor) for tensor in parameters.values()}
        for key, end in reached.items():
            if key not in given:
                check_not_cached(end, {one: parameters[one] for one in self.space.names})
        if not any(id(parameters[parameter]) in reached for parameter in self.space.names):
            raise UnsupportedError(
                f"the outputs of {name} do not depend on its trainable parameters according to torch's autograd graph: "
                "its forward pass must not use torch.no_grad, detach or .data"
            )
        return outputs.detach()

    def _accepts(self, parameters: dict[str, Tensor], inputs: Tensor) -> bool:
        try:
            self.forward(parameters, inputs)
        except Exception:
            return False
        return True

    def check_samples(self, parameters: dict[str, Tensor], first: Tensor | None = None) -> None:
        """Check on the samples of ``probe`` that outputs are not random and do not depend on the rest of the batch.

        Each batch is compared with its first sample alone and with a batch of every second sample: an influence of
        earlier samples on later ones does not change the first output.

        Args:
            parameters: The parameters at which the model is called, by name.
            first: The output of the first sample alone, if it is known.

        Raises:
            UnsupportedError: An output is random or depends on the rest of the batch.
        """
        for index, (inputs, _) in enumerate(self.probe()):
            self._check_batch(parameters, inputs, first if index == 0 else None)

    def _check_batch(self, parameters: dict[str, Tensor], inputs: Tensor, first: Tensor | None) -> None:
        with watch_randomness(self.model) as watch:
            outputs = self._checked_outputs(parameters, inputs)
            alone = self._checked_outputs(parameters, inputs[:1]) if first is None else first
            parts = [(slice(0, 1), alone)]
            if len(inputs) > 1:
                parts.append((slice(1, None, 2), self._checked_outputs(parameters, inputs[1::2])))
        if watch.drawing:
            raise UnsupportedError(
                f"{watch.drawing}, so that the output of a sample is random: call model.eval() first, or draw no "
                "random numbers in the forward pass"
            )
        scale = outputs.abs().max() + torch.finfo(outputs.dtype).tiny
        # The bound on rounding errors; in half precision, which a model may use inside, there is less slack.
        bound = 10 * watch.eps**0.5 if watch.eps < 1e-6 else 16 * watch.eps
        for part, alone in parts:
            if bool((alone - outputs[part]).abs().max() / scale > bound):
                raise UnsupportedError(
                    f"an output of {type(self.model).__name__} is random or depends on the other samples of its "
                    "batch, so that per-sample curvature is not defined: make the outputs deterministic and per-sample"
                )


def _import_what_warns() -> None:
    """Import the module that torch imports at its first gradient, without keeping the warning filter that it adds."""
    if (name := "torch.fx.experimental.symbolic_shapes") not in sys.modules:
        with warnings.catch_warnings():
            import_module(name)


def is_stochastic(module: nn.Module) -> bool:
    """Return whether the output of a module in train mode is random or depends on the other samples of the batch."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RNNBase) and module.dropout > 0
