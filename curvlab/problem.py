"""A problem: a model, a loss and data. What every estimator is given, and what it may rely on."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlab.errors import CurvlabError, UnsupportedError
from curvlab.losses import Loss, LossName, get_loss
from curvlab.parameters import ParameterSpace

Batch = tuple[Tensor, Tensor]

_BATCH_SIZE = 500
_PROBE_SAMPLES = 4


class BatchSource(Protocol):
    """Data that can be gone through more than once: a DataLoader or a list of batches."""

    def __iter__(self) -> Iterator[Any]:
        """Start from the first batch."""


class Problem:
    """A model, a loss and the data on which its curvature is asked for.

    Nothing of the model is changed by what is computed from a problem: not gradients, modes, buffers, hooks
    or ``requires_grad``; nor is the global random state.

    Args:
        model: Any module with one output tensor ``(N, C)``, on any device; its trainable parameters have one
            floating dtype. Floating inputs and targets are moved to that dtype and device.
        loss: ``cross_entropy``, ``squared_error`` or ``binary_cross_entropy`` (see ``curvlab.losses``).
        data: A DataLoader or list of ``(inputs, targets)`` batches, or one pair of tensors ``(X, y)``.

    Raises:
        CurvlabError: The loss is unknown, the data can be read only once, or nothing is trainable.

    Examples:
        >>> problem = Problem(nn.Linear(2, 3), "cross_entropy", (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> problem.num_samples
        4
    """

    def __init__(
        self, model: nn.Module, loss: LossName | str = "cross_entropy", data: BatchSource | Batch = ()
    ) -> None:
        self.model = model
        self.loss: Loss = get_loss(loss)
        self.data = data
        self.space = ParameterSpace.of(model)
        if _is_pair(data):
            if len(data[0]) != len(data[1]):
                raise CurvlabError(f"the data have {len(data[0])} inputs but {len(data[1])} targets")
        elif not isinstance(data, Iterable):
            raise CurvlabError(
                f"data is a DataLoader, a list of batches or a pair of tensors, not {type(data).__name__}"
            )
        elif isinstance(data, Iterator):
            raise CurvlabError("the data can be gone through only once: give a DataLoader or a list of batches")
        named = dict(model.named_parameters())
        kinds = {(named[name].dtype, named[name].device) for name in self.space.names}
        if len(kinds) > 1:
            raise CurvlabError(
                f"the trainable parameters have more than one dtype or device: {sorted(map(str, kinds))}"
            )
        self._random_state = _random_state(None if _is_pair(data) else data)  # that every pass starts from
        self.dtype, self.device = kinds.pop()
        if not self.dtype.is_floating_point:
            raise CurvlabError(f"the trainable parameters are {self.dtype}; curvature needs a real floating dtype")

    @cached_property
    def num_samples(self) -> int:
        """Number of samples that one pass over the data sees (with ``drop_last``, fewer than the data set has).

        Counted by a pass over the data, once.
        """
        return len(self.data[0]) if _is_pair(self.data) else sum(len(y) for _, y in self.batches())

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, detached: nothing done with them reaches the model's."""
        named = dict(self.model.named_parameters())
        return {name: named[name].detach() for name in self.space.names}

    def forward(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the outputs ``(N, C)`` at the given parameters; those not given are the model's own, as constants.

        Buffers that the model writes are written on copies, and so are inputs that it changes in place.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        used: dict[int, Tensor] = {}
        slots: dict[str, Tensor] = {}
        for prefix, module in self.model.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if id(tensor) not in used:
                    own = tensor.detach() if id(tensor) in names else tensor.clone()
                    used[id(tensor)] = parameters.get(names.get(id(tensor), ""), own)
                slots[f"{prefix}.{key}".removeprefix(".")] = used[id(tensor)]
        # Ties are resolved above: torch would replace a module's parameters for good where it has two names.
        outputs = functional_call(self.model, slots, (inputs.clone(),), tie_weights=False)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[0] != inputs.shape[0]:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UnsupportedError(
                f"{type(self.model).__name__} must return one tensor (N, C); for {len(inputs)} samples it gave {shape}"
            )
        return outputs

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Go through the data once, in the same order at every call, on the model's device.

        Args:
            batch_size: Regroup the samples into batches of this size (the last may be smaller); None for the
                data's own batches (``500`` samples for a pair of tensors).

        Raises:
            CurvlabError: There are no samples, a batch is not a pair, or an input is not finite.
        """
        if batch_size is not None and batch_size < 1:
            raise CurvlabError(f"batch_size must be at least 1, not {batch_size}")
        empty = True
        for inputs, targets in _regroup(self._own_batches(batch_size or _BATCH_SIZE), batch_size):
            empty = False
            yield self._place(inputs), self._place(targets)
        if empty:
            raise CurvlabError("the data have no samples")

    def _own_batches(self, pair_batch_size: int) -> Iterator[Batch]:
        if _is_pair(self.data):
            if not len(self.data[0]):
                return
            inputs, targets = self.data
            yield from zip(torch.split(inputs, pair_batch_size), torch.split(targets, pair_batch_size), strict=True)
            return
        # A list holds its batches; anything else may draw them.
        held = isinstance(self.data, (list, tuple))
        for index, batch in enumerate(self.data if held else _with_own_randomness(self.data, self._random_state)):
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
                raise CurvlabError(f"batch {index} of the data is not a pair of tensors (inputs, targets)")
            if len(batch[0]) != len(batch[1]):
                raise CurvlabError(f"batch {index} has {len(batch[0])} inputs but {len(batch[1])} targets")
            if len(batch[0]):
                yield batch[0], batch[1]

    def _place(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        if not _finite(tensor):
            raise CurvlabError("the data hold NaN or infinite values")
        return tensor.to(self.device, self.dtype)

    def check(self) -> None:
        """Refuse what would make a per-sample quantity wrong, before any is computed.

        Raises:
            CurvlabError: A weight is not finite, or targets of any batch do not belong to the loss.
            UnsupportedError: A module is in train mode whose output there is random or mixes samples, or a probe
                shows that a sample's output depends on its batch.
        """
        for name, parameter in self.model.named_parameters():
            if not _finite(parameter):
                bad = int((~parameter.isfinite()).sum())
                raise CurvlabError(f"the model's {name} holds {bad} NaN or infinite values")
        for name, buffer in self.model.named_buffers():
            # An attention mask is minus infinity by design.
            if bool(buffer.isnan().any()):
                raise CurvlabError(f"the model's {name} holds {int(buffer.isnan().sum())} NaN values")
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) keeps no running statistics, so that a sample's "
                    "output always depends on its batch: make it with track_running_stats=True"
                )
            if module.training and is_stochastic(module):
                raise UnsupportedError(
                    f"{name or 'the model'} ({type(module).__name__}) is in train mode, where a sample's output is "
                    "random or depends on its batch: call model.eval() first"
                )
        outputs: Tensor | None = None
        for inputs, targets in self.batches():
            # A batch of one cannot show whether samples are mixed; a longer one later can.
            if outputs is None or len(outputs) == 1 < len(inputs):
                outputs = self._probe(inputs[:_PROBE_SAMPLES])
            self.loss.check(outputs[:1].expand(len(targets), -1), targets)

    def _probe(self, inputs: Tensor) -> Tensor:
        with torch.no_grad(), preserved_random_state():
            outputs = self.forward({}, inputs)
            for part in (slice(0, 1), slice(0, None, 2)):
                alone = self.forward({}, inputs[part])
                scale = outputs.abs().max() + torch.finfo(outputs.dtype).tiny
                if bool(((alone - outputs[part]).abs().max() / scale) > 10 * torch.finfo(outputs.dtype).eps ** 0.5):
                    raise UnsupportedError(
                        f"an output of {type(self.model).__name__} is random or depends on the other samples of its "
                        "batch; per-sample curvature is not defined for it"
                    )
        return outputs


def _finite(tensor: Tensor) -> bool:
    # A sum is quicker than a mask, and is not finite where an entry is not; it may overflow where all are.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give back Python's, NumPy's and torch's global random states as they were."""
    restore = _random_state()
    try:
        yield
    finally:
        restore()


def _with_own_randomness(data: BatchSource, start: Callable[[], None]) -> Iterator[Any]:
    """Go through data whose draws, from a start, continue from batch to batch but are not seen outside.

    The states are given back whenever a batch is out, not at the end: a generator that is abandoned half-way, and kept
    alive by a traceback, would give back old ones at any later time.
    """
    iterator = chain(data)  # starts the data only at the first step
    within = start
    while True:
        restore = _random_state(data)
        within()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            within = _random_state(data)
            restore()
        yield batch


def _random_state(data: object = None) -> Callable[[], None]:
    """Return what sets the global random states, and those of a DataLoader's generators, to what they are now."""
    sampler, batch_sampler = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    holders = (data, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = [g for g in (getattr(h, "generator", None) for h in holders) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    python, legacy_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's transforms may use it
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(legacy_numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    return restore


def _is_pair(data: BatchSource | Batch) -> TypeGuard[Batch]:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)


def is_stochastic(module: nn.Module) -> bool:
    """Return whether a module's output, in train mode, is random or depends on the other samples of its batch."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RNNBase) and module.dropout > 0


def _regroup(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """Yield the same samples in the same order in batches of exactly ``size``, but for the last."""
    if size is None:
        yield from batches
        return
    held: list[Batch] = []
    count = 0
    for inputs, targets in batches:
        while len(inputs):
            take = size - count
            held.append((inputs[:take], targets[:take]))
            count += len(held[-1][0])
            inputs, targets = inputs[take:], targets[take:]
            if count == size:
                yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
                held, count = [], 0
    if held:
        yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
