"""A problem: a model, a loss and data, with the checks on which every estimator relies."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from importlib import import_module
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from curvlab.alignment import Alignment
from curvlab.batches import Inputs, map_tensors, tensors_of
from curvlab.errors import CurvlabError, UnsupportedError, type_and_line
from curvlab.intake import BatchSource, RepeatableData, are_equal, is_finite, plain_entries
from curvlab.interface import Forward, Interface, Pair, Targets, takes_labels, two_dimensional
from curvlab.likelihoods import Likelihood, LossName, Terms, get_likelihood
from curvlab.likelihoods.terms import Unit
from curvlab.likelihoods.torch_losses import default_unit
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
        model: Any module with an output ``(N, C)``, or ``(N, *S, C)`` for samples of several terms (tokens, pixels), or
            ``(N,)`` for one number; on any device. Its trainable parameters must have the same floating dtype.
            Floating-point inputs and targets are converted to that dtype and device.
        loss: A likelihood of ``curvlab.likelihoods`` or its name, such as ``cross_entropy``; or a loss of ``torch.nn``.
        data: A DataLoader, data set or list of batches, or one batch of all samples. A batch is a pair ``(inputs,
            targets)`` of tensors or arrays, where the inputs may be a tuple or a dict of tensors, or a mapping with the
            targets in ``labels``. With ``forward`` and ``targets`` it is any nesting of tensors with a row per sample.
        forward: Function of the model and a batch that returns the outputs; None: the model is called with the inputs
            (see ``curvlab.interface``), and an output with ``logits`` is replaced by them.
        targets: Function of a batch that returns the targets: ``(N, *S)`` or ``(N, *S, ...)``; None: those of the pair
            or the ``labels``.
        unit: What every matrix is a mean over: ``sample`` (the terms of a sample are summed) or ``term``. None: terms
            for a loss of ``torch.nn`` with the reduction ``mean``, else samples.
        class_dim: Dimension of the outputs with the ``C`` numbers of a term: 1 for images ``(N, C, H, W)``. None: the
            last one; for ``nn.CrossEntropyLoss`` the second, as it takes them, unless only the last fits the targets.

    Raises:
        CurvlabError: The loss is unknown, the data can be iterated only once, no parameter is trainable, or the model
            cannot be called with other parameters (scripted, parallel, lazy, on the meta device).

    Examples:
        >>> problem = Problem(nn.Linear(2, 3), "cross_entropy", (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> problem.num_samples
        4
        >>> tokens = {"x": torch.zeros(4, 5, 2), "y": torch.zeros(4, 5, dtype=torch.int64)}
        >>> problem = Problem(
        ...     nn.Linear(2, 3),
        ...     "cross_entropy",
        ...     tokens,
        ...     forward=lambda model, batch: model(batch["x"]),
        ...     targets=lambda batch: batch["y"],
        ...     unit="term",
        ... )
        >>> problem.num_units
        20.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss: "LossName | str | Likelihood | nn.Module" = "cross_entropy",
        data: Any = (),
        *,
        forward: Forward | None = None,
        targets: Targets | None = None,
        unit: Unit | None = None,
        class_dim: int | None = None,
    ) -> None:
        check_module(model)
        self.model = model
        unit = default_unit(loss) if unit is None else unit  # type: ignore[assignment]
        if unit not in ("sample", "term"):
            raise CurvlabError(f"unit must be 'sample' or 'term', not {unit!r}")
        self.loss = Terms(get_likelihood(loss), unit)
        self.data = data
        self.space = ParameterSpace.of(model)
        self._interface = _check_interface(forward, targets, class_dim)
        self._batch_size: int | None = None  # None for the batches of the data
        self._source = RepeatableData(data, self._interface)
        self._alignment = _open_questions(model, loss, forward, targets, class_dim)  # None once it is known
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

    def with_data(self, data: Pair | Sequence[Pair]) -> "Problem":
        """Return a problem on other data with the same model, loss and interface.

        Args:
            data: A pair of inputs and targets, or a list of pairs, as ``batches`` yields them.
        """
        _ = self._intake  # what is found from a batch of the original data
        other = copy(self)
        vars(other).pop("num_samples", None)
        vars(other).pop("num_units", None)
        other.data = data
        other._batch_size = None
        other._source = RepeatableData(data, Interface())
        return other

    def with_batch_size(self, batch_size: int) -> "Problem":
        """Return a problem on the same data in batches of this size (the last may be smaller)."""
        other = copy(self)
        other._batch_size = batch_size
        return other

    @property
    def _intake(self) -> RepeatableData:
        # In train mode, a loss may be random: ``check`` says so.
        if self._alignment is not None and not any(m.training and is_stochastic(m) for m in self.model.modules()):
            interface, self.loss.each = self._alignment.find(
                self.model, self.loss.each, self._interface, self._source.peek(), self._place
            )
            if interface != self._interface:
                self._interface, self._source = interface, RepeatableData(self.data, interface)
            self._alignment = None
        return self._source

    @cached_property
    def num_samples(self) -> int:
        """Number of samples in one pass over the data (with ``drop_last``, fewer than in the data set).

        The first access may take a pass over the data.
        """
        return self._intake.count()

    @cached_property
    def num_units(self) -> float:
        """Number of units that a matrix is a mean over: samples, or the terms that count, with their weights.

        The first access may take a pass over the data.

        Raises:
            CurvlabError: No term counts.
        """
        if self.loss.unit == "sample":
            return float(self.num_samples)
        if self.loss.num_outputs is None:
            with torch.no_grad():
                self.forward({}, self.probe()[0][0][:1])
        count = sum(self.loss.count(targets) for _, targets in self._intake.batches())
        if not count:
            raise CurvlabError("no term of the data counts: all targets are ignored, or their weights are 0")
        return count

    @property
    def is_plain(self) -> bool:
        """Whether the model takes one tensor and returns ``(N, C)``: what other libraries can take."""
        inputs, _ = self._intake.first().probe()[0]
        return self._interface.is_plain and isinstance(inputs, Tensor) and not self.loss.dims

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
        return [self._place_pair(pair) for pair in self._intake.first().probe()]

    def loss_value(self) -> float:
        """Return the mean loss over the units of the data, at the parameters of the model, in nats.

        Raises:
            CurvlabError: As ``check``, or the loss of a batch is NaN or infinite.
        """
        self.check()
        total = 0.0
        with torch.no_grad():
            for inputs, targets in self.batches():
                total += float(self.loss.values(self.forward({}, inputs), targets).double().sum())
        self._require_finite("loss", total)
        return total / self.num_units

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss over the units of the data, ``(P,)``, over the trainable parameters.

        Raises:
            CurvlabError: As ``check``, or the gradient of a batch is NaN or infinite.
        """
        self.check()
        total: Tensor | None = None
        for inputs, targets in self.batches():
            found = self._summed_gradient(inputs, targets).double()
            total = found if total is None else total.add_(found)
        assert total is not None
        self._require_finite("gradient", float(total.sum()))
        return total.div_(self.num_units).to(torch.promote_types(self.dtype, torch.float32))

    def _require_finite(self, what: str, value: float) -> None:
        if not isfinite(value):
            raise CurvlabError(
                f"the {what} is {value}: look for NaN and infinite values in the outputs of {type(self.model).__name__}"
            )

    def per_sample_gradients(self) -> Iterator[Tensor]:
        """Yield the gradient of every sample's loss, ``(P,)``, in the order of the data; one is held at a time.

        Raises:
            CurvlabError: As ``check``.
        """
        self.check()
        for inputs, targets in self.batches():
            for one, target in zip(inputs.split(1), targets.split(1), strict=True):
                yield self._summed_gradient(one, target)

    def _summed_gradient(self, inputs: Inputs, targets: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: value.requires_grad_() for name, value in self.parameters().items()}
            value = self.loss.values(self.forward(leaves, inputs), targets).sum()
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([(g.to_dense() if g.is_sparse else g).detach().reshape(-1) for g in found])

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, detached from the model's graph."""
        named = dict(self.model.named_parameters())
        return {name: named[name].detach() for name in self.space.names}

    def forward(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the outputs for the given parameters; other parameters have the model's own values.

        The terms of a sample are flattened: ``(N, T C)``.

        The dict may also contain buffers. The model writes into copies of its buffers and inputs, and attributes that
        it sets on its modules are restored. The outputs have the dtype of the parameters.

        Raises:
            UnsupportedError: The outputs are not one real floating tensor with a row per sample, the model writes into
                a parameter, or ``torch.autocast`` is on around the call.
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
        outputs = two_dimensional(call(self.model, parameters, inputs, self._interface.outputs))
        if outputs.ndim < 2 or outputs.shape[0] != len(inputs):
            of = "one sample" if len(inputs) == 1 else f"{len(inputs)} samples"
            raise UnsupportedError(
                f"{type(self.model).__name__} must return one tensor (N, C) or (N, *S, C); for {of} it returned "
                f"{tuple(outputs.shape)}: give forward=lambda model, batch: ... that returns such a tensor"
            )
        if not outputs.is_floating_point():
            raise UnsupportedError(
                f"{type(self.model).__name__} returns {outputs.dtype}; the losses need real floating-point outputs"
            )
        # A model with autocast inside returns another dtype.
        given = (parameters[name].dtype for name in self.space.names if name in parameters)
        return self.loss.flatten(outputs.to(next(given, self.dtype)))

    def eps(self) -> float:
        """Return the largest rounding error of a result in the forward pass, as ``torch.finfo(dtype).eps``.

        A model may compute a part in a lower precision than its parameters have, such as a norm in float32. Constants
        in a lower precision do not count.
        """
        with watch_randomness(self.model) as watch:  # with gradients, which the forward pass may take
            self.forward({}, self.probe()[0][0][:1])
        return max(watch.rounding, torch.finfo(self.dtype).eps)

    def batches(self, batch_size: int | None = None) -> Iterator[Pair]:
        """Iterate the data once on the model's device, in the same order at every call.

        Args:
            batch_size: Regroup the samples into batches of this size (the last may be smaller); None for the
                batches of the data (500 samples for a pair of tensors).

        Raises:
            CurvlabError: There are no samples, no inputs and targets can be taken from a batch, an input is not finite,
                or the data raise an error or differ from the first pass.
        """
        if batch_size is not None and batch_size < 1:
            raise CurvlabError(f"batch_size must be at least 1, not {batch_size}")
        yield from map(self._place_pair, self._intake.batches(batch_size or self._batch_size))

    def _place_pair(self, pair: Pair) -> Pair:
        inputs, targets = pair
        return map_tensors(inputs, self._place), self._place(targets)

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
            if (tensor := _find_drifting(module)) is not None:
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) changes its buffers whenever its {tensor} is "
                    "read, as spectral_norm does in train mode, so that its outputs have no definite value: call "
                    "model.eval() first"
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
                    try:
                        self.loss.check(outputs, targets)
                    except CurvlabError:
                        self.check_samples(others, outputs)  # a contrastive model has an output per sample of a batch
                        raise
                # With other tensors, so that a tensor cached by the first pass is noticed.
                self.check_samples(others, outputs)
                check_attributes()
            for name, (p, _) in own.items():
                if not (are_equal(copies[name], p) and are_equal(others[name], p)):
                    raise UnsupportedError(parameter_write_message(self.model, name))

    def _checked_outputs(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the outputs for a few inputs; check that they depend on the given parameters and no others."""
        name = type(self.model).__name__
        try:
            outputs = self.forward(parameters, inputs)
        except CurvlabError:
            raise
        except Exception as error:
            reason = type_and_line(error)
            whole = isinstance(inputs, Tensor) and not inputs.is_floating_point()
            if whole and self._accepts(parameters, map_tensors(inputs, lambda x: x.to(self.dtype))):
                dtype = tensors_of(inputs)[0].dtype
                reason = f"the inputs are {dtype}, not floating: use x.float(), or x.float() / 255 for images"
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

    def _accepts(self, parameters: dict[str, Tensor], inputs: Inputs) -> bool:
        try:
            self.forward(parameters, inputs)
        except Exception:
            return False
        return True

    def check_samples(self, parameters: dict[str, Tensor], first: Tensor | None = None) -> None:
        """Check on the samples of ``probe`` that outputs are not random and do not depend on the rest of the batch.

        Each batch is compared with its first sample alone and with a batch of every second sample: an influence of
        earlier samples on later ones does not change the first output. If the model reads a value, for example to
        decide whether an iteration has converged, every sample is compared alone.

        Args:
            parameters: The parameters at which the model is called, by name.
            first: The output of the first sample alone, if it is known.

        Raises:
            UnsupportedError: An output is random or depends on the rest of the batch.
        """
        for index, (inputs, _) in enumerate(self.probe()):
            self._check_batch(parameters, inputs, first if index == 0 else None)

    def _check_batch(self, parameters: dict[str, Tensor], inputs: Inputs, first: Tensor | None) -> None:
        with watch_randomness(self.model) as watch:
            outputs = self._checked_outputs(parameters, inputs)
            alone = self._checked_outputs(parameters, inputs[:1]) if first is None else first
            parts = [(slice(0, 1), alone)]
            if len(inputs) > 1:
                parts.append((slice(1, None, 2), self._checked_outputs(parameters, inputs[1::2])))
            if watch.branches:
                singles = [slice(n, n + 1) for n in range(1, len(inputs))]
                parts += [(single, self._checked_outputs(parameters, inputs[single])) for single in singles]
        if watch.drawing:
            raise UnsupportedError(
                f"{watch.drawing}, so that the output of a sample is random: call model.eval() first, or draw no "
                "random numbers in the forward pass"
            )
        scale = outputs.abs().max() + torch.finfo(outputs.dtype).tiny
        # The bound on rounding errors; in half precision, which a model may use inside, there is less slack.
        bound = 10 * watch.eps**0.5 if watch.eps < 1e-6 else 16 * watch.eps
        for part, alone in parts:
            whole = outputs[part]
            if alone.shape != whole.shape or bool((alone - whole).abs().max() / scale > bound):
                raise UnsupportedError(
                    f"an output of {type(self.model).__name__} is random or depends on the other samples of its "
                    "batch, so that per-sample curvature is not defined: make the outputs deterministic and per-sample"
                )


def _check_interface(forward: Any, targets: Any, class_dim: Any) -> Interface:
    for role, function in (("forward", forward), ("targets", targets)):
        if function is not None and not callable(function):
            raise CurvlabError(f"{role} must be a function, not {type(function).__name__}")
    if class_dim is not None and (isinstance(class_dim, bool) or not isinstance(class_dim, int)):
        raise CurvlabError(f"class_dim must be a whole number, not {class_dim!r}")
    return Interface(forward, targets, -1 if class_dim is None else class_dim)


def _open_questions(model: nn.Module, loss: Any, forward: Any, targets: Any, class_dim: int | None) -> Alignment | None:
    own_labels = forward is None and targets is None and takes_labels(model)
    torch_layout = class_dim is None and isinstance(loss, nn.CrossEntropyLoss) and not own_labels
    is_open = own_labels or torch_layout or class_dim not in (None, -1)
    return Alignment(own_labels, torch_layout) if is_open else None


def _import_what_warns() -> None:
    """Import the module that torch imports at its first gradient, without keeping the warning filter that it adds."""
    if (name := "torch.fx.experimental.symbolic_shapes") not in sys.modules:
        with warnings.catch_warnings():
            import_module(name)


def _find_drifting(module: nn.Module) -> str | None:
    """Return the name of a tensor whose parametrization writes into its buffers when it is read; restore these."""
    if not is_parametrized(module):
        return None
    for name, parametrization in cast(nn.ModuleDict, module.parametrizations).items():
        before = [buffer.clone() for buffer in parametrization.buffers()]
        with torch.no_grad():
            getattr(module, name)
        if not all(map(torch.equal, before, parametrization.buffers())):
            for buffer, old in zip(parametrization.buffers(), before, strict=True):
                buffer.copy_(old)
            return name
    return None


def is_stochastic(module: nn.Module) -> bool:
    """Return whether the output of a module in train mode is random or depends on the other samples of the batch."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RNNBase) and module.dropout > 0
