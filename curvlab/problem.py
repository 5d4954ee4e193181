"""A problem: a model, a loss and data. What every estimator is given, and what it may rely on."""

import sys
import warnings
from collections.abc import Iterator
from copy import copy
from functools import cached_property
from importlib import import_module

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError, UnsupportedError, type_and_line
from curvlab.intake import BatchSource, Intake, Pair, are_equal, is_finite, numbers
from curvlab.losses import Loss, LossName, get_loss
from curvlab.parameters import ParameterSpace
from curvlab.randomness import preserved_random_state, watched
from curvlab.stateless import attributes_copied, call, check_dtype, check_module, leaves, refuse_memory, writes

__all__ = ["BatchSource", "Pair", "Problem", "is_stochastic"]


class Problem:
    """A model, a loss and the data on which its curvature is asked for.

    Nothing of the model is changed by what is computed from a problem: not gradients, modes, buffers, hooks, attributes
    or ``requires_grad``; nor is the global random state.

    Args:
        model: Any module with one output tensor ``(N, C)``, on any device; its trainable parameters have one
            floating dtype. Floating inputs and targets are moved to that dtype and device.
        loss: ``cross_entropy``, ``squared_error`` or ``binary_cross_entropy`` (see ``curvlab.losses``).
        data: A DataLoader or list of ``(inputs, targets)`` batches, or one pair of tensors ``(X, y)``.

    Raises:
        CurvlabError: The loss is unknown, the data can be read only once, nothing is trainable, or the model is none
            that can be called at other parameters (scripted, parallel, lazy, without values).

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
        self._intake = Intake(data)
        named = dict(model.named_parameters())
        kinds = {(named[name].dtype, named[name].device) for name in self.space.names}
        if len(kinds) > 1:
            raise CurvlabError(
                f"the trainable parameters have more than one dtype or device: {sorted(map(str, kinds))}"
            )
        self.dtype, self.device = kinds.pop()
        check_dtype(self.dtype)

    def with_model(self, model: nn.Module) -> "Problem":
        """Return the problem of another model on the same data, with what is known of them.

        Passes over the data count as passes of this problem: their first is that of both.
        """
        other = copy(self)
        other.model, other.space = model, ParameterSpace.of(model)
        return other

    @cached_property
    def num_samples(self) -> int:
        """Number of samples that one pass over the data sees (with ``drop_last``, fewer than the data set has).

        Counted by a pass over the data, once.
        """
        return self._intake.count()

    def probe(self) -> list[Pair]:
        """Return a few samples on which a computation can be verified, on the model's device and in its dtype.

        Two are from the beginning of the data, two from about the middle and two from the end; fewer if there are
        fewer. Those of equal shape and dtype are one batch, so that there is one batch of six as a rule. They are
        kept from the first pass over the data that was a whole one.

        Examples:
            >>> x, y = torch.arange(20.0)[:, None], torch.zeros(20).long()
            >>> [(inputs, _)] = Problem(nn.Linear(1, 3), "cross_entropy", (x, y)).probe()
            >>> inputs.flatten().tolist()
            [0.0, 1.0, 8.0, 9.0, 18.0, 19.0]
        """
        return [(self._place(inputs), self._place(targets)) for inputs, targets in self._intake.first().probe()]

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, detached: nothing done with them reaches the model's."""
        named = dict(self.model.named_parameters())
        return {name: named[name].detach() for name in self.space.names}

    def forward(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the outputs ``(N, C)`` at the given parameters; those not given are the model's own.

        Buffers may be given, too. Those that the model writes are written on copies, and so are inputs that it changes
        in place; what it sets on its modules is afterwards what it was. The outputs have the dtype of the parameters.

        Raises:
            UnsupportedError: They are not one real floating tensor ``(N, C)``, the model writes into a parameter, or
                ``torch.autocast`` is on around the call.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise UnsupportedError(
                "torch.autocast is on around this call, and would round what the curvature is computed from: leave it "
                "outside (the model's own forward pass may use it)"
            )
        if missing := [name for name in self.space.names if name not in parameters]:
            # Asking for gradients, as those of the model do: a forward may look at that and take another way.
            own = self.parameters()
            parameters = parameters | {name: own[name].requires_grad_() for name in missing}
        outputs = call(self.model, parameters, inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[0] != inputs.shape[0]:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            of = "one sample" if len(inputs) == 1 else f"{len(inputs)} samples"
            raise UnsupportedError(
                f"{type(self.model).__name__} must return one tensor (N, C); for {of} it gave "
                f"{shape}: wrap it in a module that returns such a tensor"
            )
        if not outputs.is_floating_point():
            raise UnsupportedError(
                f"{type(self.model).__name__} returns {outputs.dtype}; the losses are defined on real floating outputs"
            )
        # A model with autocast inside returns other ones.
        given = (parameters[name].dtype for name in self.space.names if name in parameters)
        return outputs.to(next(given, self.dtype))

    def batches(self, batch_size: int | None = None) -> Iterator[Pair]:
        """Go through the data once, in the same order at every call, on the model's device.

        Args:
            batch_size: Regroup the samples into batches of this size (the last may be smaller); None for the
                data's own batches (``500`` samples for a pair of tensors).

        Raises:
            CurvlabError: There are no samples, a batch is not a pair of ordinary tensors, an input is not finite, or
                the data fail or are not those of the first pass.
        """
        if batch_size is not None and batch_size < 1:
            raise CurvlabError(f"batch_size must be at least 1, not {batch_size}")
        for inputs, targets in self._intake.batches(batch_size):
            yield self._place(inputs), self._place(targets)

    def _place(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the model's device, without a graph, and in its precision unless it holds integers."""
        tensor = tensor.detach()
        if tensor.is_inference():
            with torch.inference_mode(False):
                tensor = tensor.clone()  # one that has gradients
        dtype = tensor.dtype
        if tensor.is_floating_point():
            dtype = self.dtype
        elif tensor.is_complex() and self.dtype != torch.bfloat16:  # which has no complex numbers
            dtype = self.dtype.to_complex()
        placed = tensor.to(self.device, dtype)
        if dtype.itemsize < tensor.dtype.itemsize and not is_finite(placed):
            raise CurvlabError(f"the data hold values beyond the range of the model's {self.dtype}: scale them")
        return placed

    def check(self) -> None:
        """Refuse what would make a per-sample quantity wrong, before any is computed.

        Raises:
            CurvlabError: A weight is not finite, or targets of any batch do not belong to the loss.
            UnsupportedError: A module is in train mode whose output there is random or mixes samples; or the model, on
                a few samples, fails, draws random numbers, gives outputs that depend on the rest of the batch or not on
                the parameters, or writes into its parameters or attributes.
        """
        _import_what_warns()
        for name, parameter in self.model.named_parameters():
            if not is_finite(parameter):
                bad = int((~numbers(parameter).isfinite()).sum())
                raise CurvlabError(f"the model's {name} holds {bad} NaN or infinite values")
        for name, buffer in self.model.named_buffers():
            # An attention mask is minus infinity by design.
            if bad := int(numbers(buffer).isnan().sum()):
                raise CurvlabError(f"the model's {name} holds {bad} NaN values")
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) keeps no running statistics, so that a sample's "
                    "output always depends on its batch: make it with track_running_stats=True"
                )
            if getattr(module, "scale_grad_by_freq", False):
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) divides its gradients by how often an entry is "
                    "in the batch, so that they are no derivatives: make it with scale_grad_by_freq=False"
                )
            if module.training and is_stochastic(module):
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) is in train mode, where a sample's output is "
                    "random or depends on its batch: call model.eval() first"
                )
        with torch.inference_mode(False), torch.enable_grad():
            own = {name: (p.detach(), p.requires_grad) for name, p in self.model.named_parameters()}
            # A model that writes into its parameters writes into these.
            copies, others = (
                {name: p.clone().requires_grad_(trained) for name, (p, trained) in own.items()} for _ in range(2)
            )
            outputs: Tensor | None = None
            with attributes_copied(self.model) as unchanged:
                for inputs, targets in self.batches():
                    if outputs is None:
                        with preserved_random_state(self.model.modules()):
                            outputs = self._tried(copies, inputs[:1])
                    self.loss.check(outputs.expand(len(targets), -1), targets)
                self.check_samples(others, outputs)  # of others, a tensor that the first pass has kept is seen
                unchanged()
            for name, (p, _) in own.items():
                if not (are_equal(copies[name], p) and are_equal(others[name], p)):
                    raise UnsupportedError(writes(self.model, name))

    def _tried(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the outputs for a few inputs, of a model that is deterministic and depends on its parameters."""
        name = type(self.model).__name__
        try:
            outputs = self.forward(parameters, inputs)
        except CurvlabError:
            raise
        except Exception as error:
            reason = type_and_line(error)
            if not inputs.is_floating_point() and self._takes(parameters, inputs.to(self.dtype)):
                reason = f"they are {inputs.dtype}, not floating: give x.float(), or x.float() / 255 of images"
            raise UnsupportedError(f"{name} fails on the first samples of the data: {reason}") from error
        reached = leaves(outputs)
        for parameter, own in self.model.named_parameters():
            if id(own) in reached:
                raise UnsupportedError(
                    f"{name} uses its parameter {parameter} by a tensor or a function that was made before the forward "
                    "pass, so that it cannot be moved: take it from the module at every call"
                )
        given = {id(tensor) for tensor in parameters.values()}
        for key, end in reached.items():
            if key not in given:
                refuse_memory(end, {one: parameters[one] for one in self.space.names})
        if not any(id(parameters[parameter]) in reached for parameter in self.space.names):
            raise UnsupportedError(
                f"the outputs of {name} do not depend on its trainable parameters, as far as torch's derivatives show: "
                "its forward pass must not use torch.no_grad, detach or .data"
            )
        return outputs.detach()

    def _takes(self, parameters: dict[str, Tensor], inputs: Tensor) -> bool:
        try:
            self.forward(parameters, inputs)
        except Exception:
            return False
        return True

    def check_samples(self, parameters: dict[str, Tensor], first: Tensor | None = None) -> None:
        """Refuse outputs that are random or depend on the rest of the batch, on the few samples of ``probe``.

        The first sample is tried alone, and every other one: what reaches a sample from those before it does not show
        in the first.

        Args:
            parameters: To use.
            first: The output of the first sample alone, where that is known.

        Raises:
            UnsupportedError: There are such outputs.
        """
        for index, (inputs, _) in enumerate(self.probe()):
            self._check_batch(parameters, inputs, first if index == 0 else None)

    def _check_batch(self, parameters: dict[str, Tensor], inputs: Tensor, first: Tensor | None) -> None:
        with watched(self.model) as watch:
            outputs = self._tried(parameters, inputs)
            alone = self._tried(parameters, inputs[:1]) if first is None else first
            parts = [(slice(0, 1), alone)]
            if len(inputs) > 1:
                parts.append((slice(1, None, 2), self._tried(parameters, inputs[1::2])))
        if watch.drawing:
            raise UnsupportedError(
                f"{watch.drawing}, so that a sample's output is random: call model.eval() first, or draw nothing in "
                "the forward pass"
            )
        scale = outputs.abs().max() + torch.finfo(outputs.dtype).tiny
        # What rounding may do: in half precision, which a model may also use within, its few digits allow less slack.
        bound = 10 * watch.eps**0.5 if watch.eps < 1e-6 else 16 * watch.eps
        for part, alone in parts:
            if bool((alone - outputs[part]).abs().max() / scale > bound):
                raise UnsupportedError(
                    f"an output of {type(self.model).__name__} is random or depends on the other samples of its "
                    "batch; per-sample curvature is not defined for it"
                )


def _import_what_warns() -> None:
    """Import what torch imports at its first gradient, without the filter of warnings that this adds for good."""
    if (name := "torch.fx.experimental.symbolic_shapes") not in sys.modules:
        with warnings.catch_warnings():
            import_module(name)


def is_stochastic(module: nn.Module) -> bool:
    """Return whether a module's output, in train mode, is random or depends on the other samples of its batch."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RNNBase) and module.dropout > 0
