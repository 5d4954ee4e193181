"""The options of a training, in one value: how a network is trained, on one task or on each of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args

from curvlab.checks import real_number, shown, whole_number
from curvlab.errors import CurvlabError
from curvlab.forms import unknown

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine", "step", "exponential"]


class TrainingChanges(TypedDict, total=False):
    """The fields of ``Training`` as keywords: what type checkers and editors know of ``**changes``."""

    optimizer: OptimizerName
    lr: float
    lr_decay: float
    min_lr: float
    momentum: float
    weight_decay: float
    schedule: ScheduleName
    schedule_factor: float
    schedule_drops: Sequence[float]
    clip_norm: float | None
    batch_size: int | Sequence[int]
    epochs: int | Sequence[int] | None
    steps: int | Sequence[int] | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained.

    Numbers of NumPy become Python's, and sequences tuples.

    Attributes:
        optimizer: ``adam``, ``adamw`` or ``sgd``; ``continual.run`` makes a new one for every task.
        lr: Learning rate at the first step, of the first task.
        lr_decay: Factor on it from one task to the next (Mirzadeh et al. 2020); for ``continual.run``.
        min_lr: Lower bound of that decay; for ``continual.run``.
        momentum: For ``sgd``.
        weight_decay: As the optimizer of ``torch.optim`` understands it.
        schedule: The learning rate within a training (of one task, in ``continual.run``), at the fraction f of its
            steps: ``constant``; ``linear`` or ``cosine``, which end at 0; ``step``, which multiplies it by
            ``schedule_factor`` at each of ``schedule_drops``; ``exponential``, ``lr * schedule_factor ** f``.
        schedule_factor: For ``step`` and ``exponential``; above 0 and at most 1.
        schedule_drops: For ``step``: increasing fractions of the steps, above 0 and below 1.
        clip_norm: Upper bound of the norm of the gradient, with what a continual method adds to it; None for no bound.
        batch_size: Samples a step; for ``continual.run`` also a list, one number a task.
        epochs: Length of the training, or of a task; for ``continual.run`` also a list, one number a task.
        steps: The length in batches instead.
        seed: Decides the order of the samples and what dropout draws; not the initial weights.

    Raises:
        CurvlabError: A value is out of its range, or two do not go together.

    Examples:
        >>> from dataclasses import replace
        >>> training = Training(optimizer="sgd", lr=0.1, momentum=0.9, schedule="step", epochs=20)
        >>> replace(training, schedule_factor=0.2).schedule_drops
        (0.5, 0.75)
        >>> replace(training, optimizer="adam")
        Traceback (most recent call last):
        curvlab.errors.CurvlabError: momentum belongs to sgd; adam has its own, so leave momentum at 0
    """

    optimizer: OptimizerName = "adam"
    lr: float = 1e-3
    lr_decay: float = 1.0
    min_lr: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: ScheduleName = "constant"
    schedule_factor: float = 0.1
    schedule_drops: Sequence[float] = (0.5, 0.75)
    clip_norm: float | None = None
    batch_size: int | Sequence[int] = 100
    epochs: int | Sequence[int] | None = None
    steps: int | Sequence[int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, names in (("optimizer", get_args(OptimizerName)), ("schedule", get_args(ScheduleName))):
            if (value := getattr(self, name)) not in names:
                raise CurvlabError(f"there is no {name} {value!r}; the {name}s are {', '.join(names)}")
        for name, (text, test) in _RANGES.items():
            if name != "clip_norm" or self.clip_norm is not None:
                self._set(name, _number(name, getattr(self, name), text, test))
        self._set("schedule_drops", _fractions(self.schedule_drops))
        self._set("batch_size", _whole("batch_size", self.batch_size))
        self._set("seed", whole_number(self.seed, "seed"))
        for name in ("epochs", "steps"):
            if (value := getattr(self, name)) is not None:
                self._set(name, _whole(name, value))
        if self.epochs is not None and self.steps is not None:
            raise CurvlabError("give either epochs or steps, not both")
        if self.momentum and self.optimizer != "sgd":
            raise CurvlabError(f"momentum belongs to sgd; {self.optimizer} has its own, so leave momentum at 0")
        for name, schedules in _SCHEDULES_WITH.items():
            if self.schedule not in schedules and getattr(self, name) != (default := DEFAULTS[name]):
                raise CurvlabError(f"{name} belongs to schedule {' and '.join(schedules)}; leave it at {default}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # as the class is frozen

    def describe(self) -> dict[str, Any]:
        """Return the options by name, without those that belong to another schedule."""
        names = (field.name for field in fields(self))
        return {n: getattr(self, n) for n in names if self.schedule in _SCHEDULES_WITH.get(n, (self.schedule,))}


#: Of every option.
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Training)}

#: The options that only some schedules have.
_SCHEDULES_WITH = {"schedule_factor": ("step", "exponential"), "schedule_drops": ("step",)}

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a positive number", lambda value: value > 0),
    "lr_decay": ("a positive number", lambda value: value > 0),
    "min_lr": ("a number of at least 0", lambda value: value >= 0),
    "momentum": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "weight_decay": ("at least 0", lambda value: value >= 0),
    "schedule_factor": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "clip_norm": ("a positive number", lambda value: value > 0),
}


def combine(training: Training, changes: TrainingChanges) -> Training:
    """Return the options with some of them changed: ``fit(..., lr=0.1)`` is short for a ``Training``.

    ``steps`` replaces ``epochs``, and ``epochs`` replaces ``steps``.

    Raises:
        CurvlabError: There is no such option, a value is out of its range, or ``training`` is something else.
    """
    if not isinstance(training, Training):
        raise CurvlabError(f"training must be a curvlab.training.Training, not {shown(training)}")
    for name in changes:
        if name not in DEFAULTS:
            raise CurvlabError(unknown("training option", name, tuple(DEFAULTS)))
    if changes.get("steps") is not None and "epochs" not in changes:
        training = replace(training, epochs=None)
    if changes.get("epochs") is not None and "steps" not in changes:
        training = replace(training, steps=None)
    return replace(training, **changes)


def _number(name: str, value: object, text: str, test: Callable[[float], bool]) -> float:
    try:
        number = real_number(value, name)
    except CurvlabError:
        number = None
    if number is None or not test(number):
        raise CurvlabError(f"{name} must be {text}, not {shown(value)}")
    return number


def _fractions(values: object) -> tuple[float, ...]:
    text = "increasing fractions of the steps, above 0 and below 1"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise CurvlabError(f"schedule_drops must be {text}, not {shown(values)}")
    numbers = tuple(_number("schedule_drops", value, text, lambda number: 0 < number < 1) for value in values)
    if list(numbers) != sorted(set(numbers)):
        raise CurvlabError(f"schedule_drops must be {text}, not {shown(values)}")
    return numbers


def _whole(name: str, value: object) -> int | tuple[int, ...]:
    """Return a whole number from 1, or a tuple of them."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(whole_number(one, name, 1) for one in value)
    return whole_number(value, name, 1)
