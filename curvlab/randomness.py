"""The global random states: given back as they were, and kept from what data draw."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give back Python's, NumPy's and torch's global random states as they were."""
    restore = random_state()
    try:
        yield
    finally:
        restore()


def random_state(data: object = None) -> Callable[[], None]:
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


def with_own_randomness(data: Iterable[Any], start: Callable[[], None]) -> Iterator[Any]:
    """Go through data whose draws, from a start, continue from batch to batch but are not seen outside.

    The states are given back whenever a batch is out, not at the end: a generator that is abandoned half-way, and kept
    alive by a traceback, would give back old ones at any later time.
    """
    iterator = chain(data)  # starts the data only at the first step
    within = start
    while True:
        restore = random_state(data)
        within()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            within = random_state(data)
            restore()
        yield batch
