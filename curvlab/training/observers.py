"""Observers: what looks at a model while it trains, and leaves no trace in it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from curvlab.errors import CurvlabError
from curvlab.randomness import preserved_random_state
from curvlab.training.state import StepGuard, gradients_restored, modes_restored


class Observer(Protocol):
    """What ``fit`` calls between steps: at step 0, at every step that is due, and at the end.

    ``curvlab.EigenvalueRecorder`` is one.
    """

    def due(self, step: int) -> bool:
        """Say whether to be called after this many steps (before the first and after the last one: always)."""

    def __call__(self, step: int, model: nn.Module) -> None:
        """Look at the model after this many steps.

        It is in eval mode, its weights are finite, and it must not be changed. Modes, gradients and the global random
        states are put back afterwards.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: numbers, strings, tensors, and lists and dictionaries of them.

        A later call must not change what was returned.
        """

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        """Take up what ``state_dict`` returned in a run that was stopped.

        Raises:
            CurvlabError: It was returned by an observer with other options.
        """


class Observers:
    """The observers of one run: each is called once at a step, also in a run that was stopped there.

    Attributes:
        seconds: Spent in them.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)
        #: Of each the step of its last whole call, and its state then: one that was stopped half-way has no other.
        self._last: list[tuple[int, dict[str, Any] | None]] = [(-1, None)] * len(self._observers)
        self.seconds = 0.0

    @property
    def names(self) -> str:
        """Their types."""
        return ", ".join(type(observer).__name__ for observer in self._observers)

    def due(self, step: int, finished: bool) -> list[int]:
        """Return the indices of those that are to be called now."""
        return [
            index
            for index, (observer, (called, _)) in enumerate(zip(self._observers, self._last, strict=True))
            if called < step and (step == 0 or finished or observer.due(step))
        ]

    def call(self, indices: Sequence[int], step: int, model: nn.Module, guard: StepGuard) -> None:
        """Call some of them.

        Raises:
            CurvlabError: One changes the model.
        """
        for index in indices:
            observer = self._observers[index]
            started = time.perf_counter()
            try:
                with unchanged(model), preserved_random_state(), gradients_restored(model), modes_restored(model):
                    model.eval()
                    observer(step, model)
            except BaseException as error:
                error.add_note(f"in {type(observer).__name__}, called after step {step} of the training")
                raise
            finally:
                self.seconds += time.perf_counter() - started
            with guard:
                self._last[index] = step, observer.state_dict()

    def states(self) -> list[dict[str, Any]]:
        """Return what a checkpoint keeps of them."""
        return [{"step": step, "state": state} for step, state in self._last]

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take up what ``states`` returned.

        Raises:
            CurvlabError: An observer does not take its own.
        """
        self._last = [(saved["step"], saved["state"]) for saved in states]
        for observer, (_, state) in zip(self._observers, self._last, strict=True):
            if state is not None:
                observer.load_state_dict(state)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Require that parameters and buffers are afterwards the same tensors with the same values.

    Raises:
        CurvlabError: One is not; the message names it.
    """
    before = _versions(model)
    yield
    after = _versions(model)
    for name in before | after:
        if before.get(name) != after.get(name):
            raise CurvlabError(f"an observer changed the model's {name}; it may only look: let it work on a copy")


def _versions(model: nn.Module) -> dict[str, tuple[int, bool, int]]:
    """Return what differs after a tensor was replaced, frozen or written in place (not through ``.data``)."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(t), t.requires_grad, 0 if t.is_inference() else t._version) for name, t in named.items()}
