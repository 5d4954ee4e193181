"""The source of a network, put together step by step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

Shape = tuple[int, ...]


class Step(NamedTuple):
    """A step of a recipe: a kind, its position in the recipe as it was drawn, and the seed of its settings."""

    kind: str
    position: int
    seed: int


class UnfitError(Exception):
    """A step does not fit the draft as it is."""


@dataclass(frozen=True)
class Made:
    """A module of the network: an attribute of the model, the class, and whether it is called, once and by itself."""

    name: str
    kind: str
    called: bool


class Draft:
    """A network so far.

    Attributes:
        shape: Of one sample, as it leaves the last step.
        init: Lines of ``__init__``.
        forward: Lines of ``forward``, on ``x``.
        after: Lines on ``model``, once it is made.
        made: Its modules.
        fresh: Whether ``x`` is a tensor that no backward pass needs, so that it may be changed in place.
        whole: Whether ``x`` holds whole numbers.
        refusal: Why every estimate has to be refused, if it has to.
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
        """Add an attribute; return how ``forward`` names it."""
        name = f"m{self._position}{'abcdefgh'[self._attributes]}"
        self._attributes += 1
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def module(self, expression: str, called: bool = True) -> str:
        """Add a module, given as ``nn.Kind(...)``; return how ``forward`` names it."""
        name = self.attribute(expression)
        self.made.append(Made(name.removeprefix("self."), expression.partition("(")[0].removeprefix("nn."), called))
        return name

    def then(self, *lines: str, shape: Shape | None = None, fresh: bool = False) -> None:
        """Add lines to ``forward``, after which ``x`` has another shape."""
        self.forward += lines
        self.shape = self.shape if shape is None else shape
        self.fresh, self.whole = fresh, False

    def pick(self, random: Random, kinds: Iterable[str]) -> str:
        """Return the name of a module of these kinds that is called by itself: the same one while it is there."""
        names = [made.name for made in self.made if made.called and made.kind in kinds]
        if not names:
            raise UnfitError
        salt = random.random()
        return min(names, key=lambda name: Random(f"{salt} {name}").random())

    def take(self, step: Step, maker: Callable[["Draft", Random], None]) -> None:
        """Apply a step.

        Raises:
            UnfitError: It does not fit; nothing is changed.
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


def fits(condition: bool) -> None:
    """Say that a step does not fit unless the condition holds."""
    if not condition:
        raise UnfitError


class Registry(dict[str, Callable[[Draft, Random], None]]):
    """Steps by kind, with weights."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}

    def __call__(
        self, weight: float = 1.0
    ) -> Callable[[Callable[[Draft, Random], None]], Callable[[Draft, Random], None]]:
        """Enter a function under its name."""

        def enter(maker: Callable[[Draft, Random], None]) -> Callable[[Draft, Random], None]:
            self[maker.__name__] = maker
            self.weights[maker.__name__] = weight
            return maker

        return enter

    def draw(self, random: Random) -> str:
        """Return a kind."""
        return random.choices(list(self.weights), list(self.weights.values()))[0]
