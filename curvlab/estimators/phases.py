"""Seconds of the phases of an estimate."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: The phases in their order; ``sums`` is all that the others do not contain.
PHASES = ("check", "forward", "backward", "sums", "eigenvectors")
#: Phases whose seconds do not depend on the number of samples.
ONCE = ("check", "eigenvectors")

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)


@contextmanager
def record_phases() -> Iterator[dict[str, float]]:
    """Yield a dict to which the phases inside add their seconds."""
    seconds: dict[str, float] = {}
    token = _seconds.set(seconds)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Add the seconds inside to a phase, if phases are recorded."""
    seconds = _seconds.get()
    if seconds is None:
        yield
        return
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
