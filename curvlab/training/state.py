"""Contexts that restore modes, gradients, random state and the handling of Ctrl-C after training."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from curvlab.randomness import derive_seed, fork_random_state
from curvlab.stateless import restore_gradients, restore_modes

__all__ = [
    "StepGuard",
    "defer_interrupts",
    "derive_seed",
    "fork_random_state",
    "restore_gradients",
    "restore_modes",
]


class StepGuard:
    """Context for work that must not be interrupted half-way: Ctrl-C is delayed until it ends (a second one is not).

    ``broken`` is true inside the context, and stays true if the work fails: parameters, optimizer, losses and random
    state may then belong to different steps.
    """

    def __init__(self) -> None:
        self.broken = False
        self.pending: Callable[[], object] | None = None

    def __enter__(self) -> None:
        self.broken = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.broken = False
            if self.pending is not None:
                interrupt, self.pending = self.pending, None
                interrupt()


@contextmanager
def defer_interrupts() -> Iterator[StepGuard]:
    """Context that yields the guard for the steps; outside the guard, Ctrl-C has its previous effect."""
    guard = StepGuard()
    previous = signal.getsignal(signal.SIGINT)
    # Python delivers signals to the main thread only; if the caller ignores Ctrl-C, it stays ignored.
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield guard
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if guard.broken and guard.pending is None:
            guard.pending = lambda: previous(signum, None)
        else:
            previous(signum, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield guard
    finally:
        signal.signal(signal.SIGINT, previous)
