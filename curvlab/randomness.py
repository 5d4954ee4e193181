"""Random numbers: save and restore random states, derive seeds, and detect random draws of a model."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from curvlab.dispatch import DispatchMode

_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator)
_numpy_state = partial(np.random.get_state, legacy=False)

#: A source of random numbers: its name in messages, a function that reads its state, and one that sets it.
_Source = tuple[str, Callable[[], Any], Callable[[Any], object]]


@contextmanager
def preserve_random_state(holders: Iterable[object] = ()) -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch, and of generators held by objects, on exit."""
    restore = save_random_state(holders)
    try:
        yield
    finally:
        restore()


def save_random_state(holders: Iterable[object] = ()) -> Callable[[], None]:
    """Return a function that restores the present global random states and those of generators held by objects."""
    states = [(put, get()) for _, get, put in _sources(holders)]

    def restore() -> None:
        for put, state in states:
            put(state)

    return restore


@contextmanager
def fork_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Restore torch's global random state of the CPU and of ``device`` on exit; inside, start from ``seed``."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            # torch.manual_seed would also seed all other GPUs.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield


def derive_seed(seed: int, *stream: int) -> int:
    """Return a seed for one of the independent random streams that belong to ``seed``."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0])


def generator_holders(data: object) -> list[object]:
    """Return the objects that may hold a generator of the data: a DataLoader, its samplers and its data set."""
    sampler, batch_sampler = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    return [data, sampler, batch_sampler, getattr(batch_sampler, "sampler", None), getattr(data, "dataset", None)]


def iterate_with_own_randomness(data: Iterable[Any], start: Callable[[], None]) -> Iterator[Any]:
    """Iterate data with a random state of their own, so that their draws do not change the global random state.

    The outer state is restored after every batch, not at the end: an unfinished generator that a traceback keeps alive
    would otherwise restore an old state at an unknown later time.

    Args:
        data: A DataLoader or another iterable.
        start: A function that sets the random state from which the data start.
    """
    holders = generator_holders(data)
    # Persistent workers have one shared iterator; ``iter`` would reset it for another loop that is using it.
    iterator: Iterator[Any] | None = None
    within = start
    while True:
        restore = save_random_state(holders)
        within()
        try:
            if iterator is None:
                persistent = isinstance(data, DataLoader) and data.persistent_workers
                iterator = cast("Any", data)._get_iterator() if persistent else iter(data)
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            within = save_random_state(holders)
            restore()
        yield batch


@contextmanager
def watch_randomness(model: nn.Module) -> Iterator["RandomnessWatch"]:
    """Detect draws of random numbers inside the block, and restore the states that they changed.

    Random operations of torch are detected by their tag. Other draws are detected by a changed state: of Python's,
    NumPy's and torch's global generators, and of generators held by the modules.
    """
    watch = RandomnessWatch(model)
    sources = _sources(model.modules())
    before = [get() for _, get, _ in sources]
    try:
        with watch:
            yield watch
    finally:
        for (name, get, put), state in zip(sources, before, strict=True):
            if not _same(get(), state):
                watch.drawing = watch.drawing or (
                    f"the forward pass of {type(model).__name__} draws random numbers from {name}"
                )
                put(state)


class RandomnessWatch(DispatchMode):
    """A dispatch mode that records random draws, values that Python reads, and precision of torch operations.

    Attributes:
        drawing: The first source of random numbers, as the beginning of a sentence; None without random draws.
        branches: Whether Python has read a value, on which the further operations may depend.
        eps: The lowest precision of a floating-point result, as ``torch.finfo(dtype).eps``.
        rounding: The lowest precision of a result that is coarser than one of its arguments; 0 without such a result.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.drawing: str | None = None
        self.branches = False
        self.eps = self.rounding = 0.0
        self._model = model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation and run it."""
        kwargs = kwargs or {}
        if self.drawing is None and torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            arguments = func._schema.arguments
            given = {a.name: a.default_value for a in arguments if a.has_default_value()}
            given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
            # Dropout with probability 0 does not draw, nor in fused attention and recurrent kernels.
            chances = [given[name] for name in ("p", "dropout", "dropout_p") if name in given]
            off = any(given.get(name) is False for name in ("train", "training"))
            if not off and not any(isinstance(p, (int, float)) and p == 0 for p in chances):
                name = func._schema.name.partition("::")[2]
                self.drawing = f"{self._calling()} draws random numbers ({name})"
        self.branches = self.branches or func is torch.ops.aten._local_scalar_dense.default
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            eps = torch.finfo(result.dtype).eps
            self.eps = max(self.eps, eps)
            finer = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
            if eps > self.rounding and any(torch.finfo(x.dtype).eps < eps for x in finer):
                self.rounding = eps
        return result

    def _calling(self) -> str:
        """Return the name of the innermost module whose code is running."""
        names = {id(module): name for name, module in self._model.named_modules()}
        frame = sys._getframe()
        while (above := frame.f_back) is not None:
            frame = above
            module = frame.f_locals.get("self")
            if id(module) in names:
                return f"{names[id(module)] or 'the model'} ({type(module).__name__})"
        return f"the forward pass of {type(self._model).__name__}"


def _sources(holders: Iterable[object]) -> list[_Source]:
    """Return the global sources of random numbers, and the generators held as attributes of the objects."""
    sources: list[_Source] = [
        ("Python's random", random.getstate, random.setstate),
        ("NumPy's global generator", _numpy_state, np.random.set_state),
        ("torch's global generator", torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_available():
        sources.append(("torch's CUDA generators", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    for holder in holders:
        for name, held in getattr(holder, "__dict__", {}).items():
            # ``isinstance(held, torch.Generator)`` is slow.
            if type(held) is not torch.Generator and not isinstance(held, _GENERATORS):
                continue
            called = f"{type(holder).__name__}.{name}"
            if isinstance(held, torch.Generator):
                sources.append((called, held.get_state, held.set_state))
            elif isinstance(held, random.Random):
                sources.append((called, held.getstate, held.setstate))
            elif isinstance(held, np.random.RandomState):
                sources.append((called, partial(held.get_state, legacy=False), held.set_state))
            else:
                bits = held.bit_generator
                sources.append((called, partial(getattr, bits, "state"), partial(setattr, bits, "state")))
    return sources


def _same(one: Any, other: Any) -> bool:
    """Return whether two random states (tensors, arrays, numbers or containers of these) are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return all(map(_same, one, other))
    return bool(one == other)
