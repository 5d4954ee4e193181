"""Where a matrix came from."""

import math
from dataclasses import dataclass, fields

from curvlab.checks import shown
from curvlab.errors import CurvlabError


@dataclass(frozen=True)
class Info:
    """Where a matrix came from.

    ``seconds`` is wall time; ``samples`` and ``seed`` are those of Monte Carlo labels; ``rejected`` says what was not
    taken, a backend or the rule for a parameter, and why.
    """

    quantity: str
    structure: str
    loss: str
    backend: str
    num_samples: int
    samples: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    seconds: float = 0.0
    rejected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what a file could not give back.

        Raises:
            CurvlabError: A field is of another type, or negative, or not finite.
        """
        if not isinstance(self.rejected, (tuple, list)) or not all(isinstance(told, str) for told in self.rejected):
            raise CurvlabError(f"rejected of a matrix's info cannot be {shown(self.rejected)}")
        object.__setattr__(self, "rejected", tuple(self.rejected))  # a file gives a list
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            kind = (int, float) if field.type is float else field.type
            number = isinstance(value, (int, float))
            if (
                not isinstance(value, kind)  # type: ignore[arg-type]
                or isinstance(value, bool)
                or (number and not (value >= 0 and math.isfinite(value)))
            ):
                raise CurvlabError(f"{field.name} of a matrix's info cannot be {shown(value)}")
