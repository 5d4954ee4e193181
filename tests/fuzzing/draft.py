"""Source code of a network, assembled step by step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

Shape = tuple[int, ...]


class Step(NamedTuple):
    """A step: its kind, its position among the steps as drawn, and the seed of its settings."""

    kind: str
    position: int
    seed: int


class UnfitError(Exception):
    """A step does not fit the current draft."""


@dataclass(frozen=True)
class Made:
    """A module of the network: attribute of the model, class, and whether it is called once and alone."""

    name: str
    kind: str
    called: bool


class Draft:
    """A network under construction.

    Attributes:
        shape: Shape of one sample after the last step.
        init: Lines of ``__init__``.
        forward: Lines of ``forward``, with ``x``.
        after: Lines with ``model``, run after its construction.
        made: Modules of the network.
        fresh: Whether no backward pass needs ``x``, so that it may be changed in place.
        whole: Whether ``x`` has integers.
        refusal: Reason why every estimate must be refused; None if it need not be.
    """

    def __init__(self, shape: Shape, whole: bool = False) -> None:
        self.shape, self.whole = shape, whole
        self.init: list[str] = []
        self.forward: list[str] = []
        self.after: list[str] = []
        self.made: list[Made] = []
        self.fresh = False
        self.refusal: str | None = None
        self._position = 0

    def attribute(self, expression: str) -> str:
        """Add an attribute; return its name in ``forward``."""
        name = f"m{self._position}{'abcdefgh'[self._attributes]}"
        self._attributes += 1
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def module(self, expression: str, called: bool = True) -> str:
        """Add a module, given as ``nn.Kind(...)``; return its name in ``forward``."""
        name = self.attribute(expression)
        self.made.append(Made(name.removeprefix("self."), expression.partition("(")[0].removeprefix("nn."), called))
        return name

    def then(self, *lines: str, shape: Shape | None = None, fresh: bool = False) -> None:
        """Add lines to ``forward``; ``shape`` is that of ``x`` after them."""
        self.forward += lines
        self.shape = self.shape if shape is None else shape
        self.fresh, self.whole = fresh, False

    def pick(self, random: Random, kinds: Iterable[str]) -> str:
        """Return the name of a module of these kinds that is called alone: the same as long as it exists."""
        names = [made.name for made in self.made if made.called and made.kind in kinds]
        if not names:
            raise UnfitError
        salt = random.random()
        return min(names, key=lambda name: Random(f"{salt} {name}").random())

    def take(self, step: Step, maker: Callable[["Draft", Random], None]) -> None:
        """Apply a step.

        Raises:
            UnfitError: The step does not fit; the draft is unchanged.
        """
        self._position, self._attributes = step.position, 0
        before = [list(held) for held in (self.init, self.forward, self.after, self.made)]
        state = self.shape, self.fresh, self.whole, self.refusal
        try:
            maker(self, Random(step.seed))
        except UnfitError:
            self.init, self.forward, self.after, self.made = before
            self.shape, self.fresh, self.whole, self.refusal = state
            raise


def require_fit(condition: bool) -> None:
    """Raise an error if the condition of a step does not hold.

    Raises:
        UnfitError: The condition is false.
    """
    if not condition:
        raise UnfitError


class Registry(dict[str, Callable[[Draft, Random], None]]):
    """Functions that add steps, by kind, with weights."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}

    def __call__(
        self, weight: float = 1.0
    ) -> Callable[[Callable[[Draft, Random], None]], Callable[[Draft, Random], None]]:
        """Register a function under its name."""

        def enter(maker: Callable[[Draft, Random], None]) -> Callable[[Draft, Random], None]:
            self[maker.__name__] = maker
            self.weights[maker.__name__] = weight
            return maker

        return enter

    def draw(self, random: Random) -> str:
        """Return a random kind."""
        return random.choices(list(self.weights), list(self.weights.values()))[0]
