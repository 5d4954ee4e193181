"""Options of training, for one task or for each task of a stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args

from curvlab.checks import describe_value, real_number, whole_number
from curvlab.errors import CurvlabError
from curvlab.forms import unknown_name_message
from curvlab.structures import parse_structure

FirstOrderName = Literal["adam", "adamw", "sgd"]
OptimizerName = Literal[FirstOrderName, "ngd"]
ScheduleName = Literal["constant", "linear", "cosine", "step", "exponential", "one_cycle"]


class TrainingChanges(TypedDict, total=False):
    """Fields of ``Training`` as keywords, for type checkers and editors."""

    optimizer: OptimizerName
    lr: float
    lr_decay: float
    min_lr: float
    momentum: float
    weight_decay: float
    structure: str
    damping: float
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
    """Options of training.

    NumPy numbers are converted to Python numbers, and sequences to tuples.

    Attributes:
        optimizer: ``adam``, ``adamw``, ``sgd`` or ``ngd``; ``continual.run`` creates a new optimizer for every task.
            ``ngd`` is natural gradient descent, ``theta <- theta - lr ((F + damping I)^-1 g + weight_decay theta)``.
            ``F`` is the exact Fisher of the samples of the step, with the model in eval mode; ``g`` is the gradient of
            the whole loss.
        lr: Learning rate at the first step (of the first task).
        lr_decay: Factor on the learning rate from one task to the next (Mirzadeh et al. 2020); for ``continual.run``.
        min_lr: Lower bound of the learning rate under ``lr_decay``; for ``continual.run``.
        momentum: Momentum of ``sgd``.
        weight_decay: Weight decay as defined by the optimizer in ``torch.optim``.
        structure: Structure of the Fisher of ``ngd``, as for ``curvlab.estimate``: ``dense`` and ``implicit``
            (conjugate gradients) are exact; ``kfac``, ``diag`` and others are approximations.
        damping: Number that ``ngd`` adds to the diagonal of the Fisher; at least 0.
        schedule: Learning rate at the fraction f of the steps (of one task, in ``continual.run``): ``constant``;
            ``linear`` or ``cosine``, which end at 0; ``step``, which multiplies the rate by ``schedule_factor`` at each
            of ``schedule_drops``; ``exponential``, ``lr * schedule_factor ** f``; ``one_cycle``, from ``lr / 25`` up to
            ``lr`` at f = 0.3 and down to 0 along cosines (Smith and Topin 2019).
        schedule_factor: Factor for ``step`` and ``exponential``; above 0 and at most 1.
        schedule_drops: Increasing fractions of the steps for ``step``, above 0 and below 1.
        clip_norm: Upper bound of the gradient norm, including what a continual learning method adds to the gradient;
            None for no bound.
        batch_size: Samples per step; for ``continual.run`` also a list with one number per task.
        epochs: Length in epochs; for ``continual.run`` also a list with one number per task.
        steps: Length in steps, in place of ``epochs``.
        seed: Seed of the sample order and of dropout; it does not determine the initial weights.

    Raises:
        CurvlabError: A value is out of its range, or two options exclude each other.

    Examples:
        >>> from dataclasses import replace
        >>> training = Training(optimizer="sgd", lr=0.1, momentum=0.9, schedule="step", epochs=20)
        >>> replace(training, schedule_factor=0.2).schedule_drops
        (0.5, 0.75)
        >>> replace(training, optimizer="adam")
        Traceback (most recent call last):
        curvlab.errors.CurvlabError: momentum belongs to sgd, not to adam; leave momentum at 0.0
    """

    optimizer: OptimizerName = "adam"
    lr: float = 1e-3
    lr_decay: float = 1.0
    min_lr: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    structure: str = "kfac"
    damping: float = 1e-3
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
                raise CurvlabError(f"there is no {name} {value!r}; available: {', '.join(names)}")
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
        self._set("structure", str(parse_structure(self.structure)))
        for name, optimizer in _OPTIMIZER_WITH.items():
            if self.optimizer != optimizer and getattr(self, name) != (default := DEFAULTS[name]):
                raise CurvlabError(f"{name} belongs to {optimizer}, not to {self.optimizer}; leave {name} at {default}")
        for name, schedules in _SCHEDULES_WITH.items():
            if self.schedule not in schedules and getattr(self, name) != (default := DEFAULTS[name]):
                raise CurvlabError(f"{name} belongs to schedule {' and '.join(schedules)}; leave it at {default}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    def describe(self) -> dict[str, Any]:
        """Return the options by name, without those of other schedules, and those of ``ngd`` only if it is used."""
        names = [field.name for field in fields(self) if self.optimizer == "ngd" or field.name not in _NATURAL]
        return {n: getattr(self, n) for n in names if self.schedule in _SCHEDULES_WITH.get(n, (self.schedule,))}


#: Default of every option.
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Training)}

#: Options that only one optimizer has.
_NATURAL = ("structure", "damping")
_OPTIMIZER_WITH = {"momentum": "sgd", **dict.fromkeys(_NATURAL, "ngd")}

#: Options that only some schedules have.
_SCHEDULES_WITH = {"schedule_factor": ("step", "exponential"), "schedule_drops": ("step",)}

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a finite number above 0", lambda value: value > 0),
    "lr_decay": ("a finite number above 0", lambda value: value > 0),
    "min_lr": ("a finite number of at least 0", lambda value: value >= 0),
    "momentum": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "weight_decay": ("a finite number of at least 0", lambda value: value >= 0),
    "damping": ("a finite number of at least 0", lambda value: value >= 0),
    "schedule_factor": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "clip_norm": ("a finite number above 0", lambda value: value > 0),
}


def combine(training: Training, changes: TrainingChanges) -> Training:
    """Return the options with some of them changed.

    ``steps`` replaces ``epochs``, and ``epochs`` replaces ``steps``.

    Raises:
        CurvlabError: An option is unknown or out of its range, or ``training`` is not a ``Training``.
    """
    if not isinstance(training, Training):
        raise CurvlabError(f"training must be a curvlab.training.Training, not {describe_value(training)}")
    for name in changes:
        if name not in DEFAULTS:
            raise CurvlabError(unknown_name_message("training option", name, tuple(DEFAULTS)))
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
        raise CurvlabError(f"{name} must be {text}, not {describe_value(value)}")
    return number


def _fractions(values: object) -> tuple[float, ...]:
    text = "increasing fractions of the steps, above 0 and below 1"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise CurvlabError(f"schedule_drops must be {text}, not {describe_value(values)}")
    numbers = tuple(_number("schedule_drops", value, text, lambda number: 0 < number < 1) for value in values)
    if list(numbers) != sorted(set(numbers)):
        raise CurvlabError(f"schedule_drops must be {text}, not {describe_value(values)}")
    return numbers


def _whole(name: str, value: object) -> int | tuple[int, ...]:
    """Return a whole number from 1, or a tuple of such numbers."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(whole_number(one, name, 1) for one in value)
    return whole_number(value, name, 1)
