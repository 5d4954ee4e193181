"""Observers: objects that measure a model during training without changing it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError
from curvlab.randomness import preserve_random_state
from curvlab.training.state import StepGuard, restore_gradients, restore_modes


class Observer(Protocol):
    """Object that ``fit`` calls between steps: at step 0, at every step for which ``due`` is true, and at the end.

    ``curvlab.EigenvalueRecorder`` is an observer.
    """

    def due(self, step: int) -> bool:
        """Return whether to call the observer after this many steps (step 0 and the last step are always due)."""

    def __call__(self, step: int, model: nn.Module) -> None:
        """Measure the model after this many steps.

        The model is in eval mode, its weights are finite, and it must not be changed. Modes, gradients and the global
        random states are restored afterwards.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: numbers, strings, tensors, and lists and dictionaries of them.

        A later call of the observer must not change the returned objects.
        """

    def load_state_dict(self, states: Mapping[str, Any], /) -> None:
        """Restore the state that ``state_dict`` returned in a stopped run.

        Raises:
            CurvlabError: The state belongs to an observer with other options.
        """


class Observers:
    """Observers of one run; each is called once at a step, also if the run was stopped and continued at that step.

    Attributes:
        seconds: Wall time spent in the observers.

    Raises:
        CurvlabError: They are not a sequence of observers.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        if not isinstance(observers, Sequence) or not all(map(_is_observer, observers)):
            raise CurvlabError(
                "observers must be a list of objects with the methods of curvlab.training.Observer, not "
                f"{describe_value(observers)}"
            )
        self._observers = tuple(observers)
        #: For each observer: the step of its last complete call, and its state after that call.
        self._last: list[tuple[int, dict[str, Any] | None]] = [(-1, None)] * len(self._observers)
        self.seconds = 0.0

    @property
    def names(self) -> str:
        """Names of the observers' types."""
        return ", ".join(type(observer).__name__ for observer in self._observers)

    def due(self, step: int, finished: bool) -> list[int]:
        """Return the indices of the observers that must be called now."""
        return [
            index
            for index, (observer, (called, _)) in enumerate(zip(self._observers, self._last, strict=True))
            if called < step and (step == 0 or finished or observer.due(step))
        ]

    def call(self, indices: Sequence[int], step: int, model: nn.Module, guard: StepGuard) -> None:
        """Call the observers with these indices.

        Raises:
            CurvlabError: An observer changes the model.
        """
        for index in indices:
            observer = self._observers[index]
            started = time.perf_counter()
            try:
                with (
                    require_unchanged(model),
                    preserve_random_state(),
                    restore_gradients(model),
                    restore_modes(model),
                ):
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
        """Return the states of the observers for a checkpoint."""
        return [{"step": step, "state": state} for step, state in self._last]

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore what ``states`` returned.

        Raises:
            CurvlabError: An observer does not accept its state.
        """
        self._last = [(saved["step"], saved["state"]) for saved in states]
        for observer, (_, state) in zip(self._observers, self._last, strict=True):
            if state is not None:
                observer.load_state_dict(state)


def _is_observer(one: object) -> bool:
    methods = ("due", "__call__", "state_dict")  # load_state_dict is needed by continued runs only
    return not isinstance(one, type) and all(callable(getattr(one, method, None)) for method in methods)


@contextmanager
def require_unchanged(model: nn.Module) -> Iterator[None]:
    """Context in which parameters and buffers must stay the same tensors with the same values.

    Raises:
        CurvlabError: A tensor was changed; the message names it.
    """
    before = _versions(model)
    yield
    after = _versions(model)
    for name in before | after:
        if before.get(name) != after.get(name):
            raise CurvlabError(f"an observer changed {name} of the model; let it work on a copy of the model")


def _versions(model: nn.Module) -> dict[str, tuple[int, bool, int]]:
    """Return values that change when a tensor is replaced, frozen or written in place (except through ``.data``)."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(t), t.requires_grad, 0 if t.is_inference() else t._version) for name, t in named.items()}
