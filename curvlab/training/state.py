"""What training borrows from its surroundings and gives back: modes, gradients, random state, Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from torch import nn

from curvlab.randomness import derived_seed, random_state_restored
from curvlab.stateless import gradients_restored

__all__ = [
    "StepGuard",
    "derived_seed",
    "gradients_restored",
    "interrupts_between_steps",
    "modes_restored",
    "random_state_restored",
]


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Give every submodule back the train or eval mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class StepGuard:
    """A context for what must not be done by halves: Ctrl-C waits until it is done (a second one does not).

    ``broken`` is true while it is under way, and stays true after it failed: parameters, optimizer, losses and
    random state may then be those of different steps.
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
def interrupts_between_steps() -> Iterator[StepGuard]:
    """Yield the guard for every step and its bookkeeping; between them Ctrl-C does what it did before."""
    guard = StepGuard()
    previous = signal.getsignal(signal.SIGINT)
    # Python delivers signals to its main thread only; whoever has ignored Ctrl-C is left in peace.
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
