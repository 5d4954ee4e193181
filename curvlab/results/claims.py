"""Published claims beside our numbers, each with a verdict."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, Self

from rich.table import Table
from rich.text import Text

from curvlab.results.tables import plus_minus, significant

Verdict = Literal["reproduced", "not reproduced", "not tested"]

SEEDS_NEEDED = 3

_COLOURS = {"reproduced": "green", "not reproduced": "red", "not tested": "yellow"}


@dataclass(frozen=True)
class Claim:
    """A claim of a publication and what became of it here.

    Attributes:
        text: The claim, one sentence.
        source: Where it stands: paper, table or figure, page.
        published: The published number, or its words; None if there is none.
        ours: Our mean over seeds; None if it was not measured.
        spread: Our standard deviation over seeds; None if there is none.
        verdict: ``reproduced``, ``not reproduced`` or ``not tested``.
    """

    text: str
    source: str
    published: float | str | None
    ours: float | None
    spread: float | None
    verdict: Verdict

    @classmethod
    def of(
        cls,
        text: str,
        source: str,
        values: Sequence[float],
        test: Callable[[float], bool],
        published: float | str | None = None,
    ) -> Self:
        """Return a claim judged by the values of the seeds; ``ours`` is missing where one of them is not finite."""
        finite = bool(values) and all(map(math.isfinite, values))
        return cls(
            text,
            source,
            published,
            fmean(values) if finite else None,
            stdev(values) if finite and len(values) > 1 else None,
            judge(values, test),
        )


def judge(values_per_seed: Sequence[float], test: Callable[[float], bool]) -> Verdict:
    """Test a claim on every seed: it is reproduced only if it holds for each.

    With fewer than three seeds, or where one of them has no value (NaN), it is not tested.

    Examples:
        >>> judge([0.2, 0.3, 0.6], lambda share: share < 0.5)
        'not reproduced'
    """
    if len(values_per_seed) < SEEDS_NEEDED or any(math.isnan(value) for value in values_per_seed):
        return "not tested"
    return "reproduced" if all(test(value) for value in values_per_seed) else "not reproduced"


def render_claims(claims: Sequence[Claim]) -> Table:
    """Return the claims as a table for the console."""
    table = Table(title="Claims", show_edge=False, pad_edge=False)
    for header in ("claim", "source"):
        table.add_column(header)
    for header in ("published", "ours"):
        table.add_column(header, justify="right")
    table.add_column("verdict", no_wrap=True)
    for claim in claims:
        table.add_row(
            Text(claim.text),
            Text(claim.source),
            Text(significant(claim.published)),
            Text(plus_minus(claim.ours, claim.spread)),
            Text(claim.verdict, style=_COLOURS[claim.verdict]),
        )
    return table
