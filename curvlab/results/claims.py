"""Published claims, our values, and verdicts that data can refute."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal, Self

from rich.table import Table
from rich.text import Text

from curvlab.text import format_number, plus_minus

Verdict = Literal["reproduced", "not reproduced", "not tested"]

SEEDS_NEEDED = 3

_COLOURS = {"reproduced": "green", "not reproduced": "red", "not tested": "yellow"}


@dataclass(frozen=True)
class Gate:
    """Whether a run meets the conditions for judging a claim.

    Attributes:
        reason: Why the claim cannot be judged; empty if it can.
        scope: The conditions that differ from the published ones, if the claim is judged as a direction; else empty.
    """

    reason: str = ""
    scope: str = ""


OPEN = Gate()


def require(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Gate:
    """Return the gate of a claim about a published number: the run must meet every published condition.

    Args:
        ours: Conditions of the run, by name.
        theirs: Conditions of the publication; a condition that ``ours`` does not name is not met.

    Examples:
        >>> require({"data": "digits", "tasks": 5}, {"data": "mnist", "tasks": 5}).reason
        'data is digits, published: mnist'
    """
    missed = [
        f"{name} is {_word(ours.get(name))}, published: {_word(value)}"
        for name, value in theirs.items()
        if ours.get(name) != value
    ]
    return Gate("; ".join(missed))


def require_direction(ours: Mapping[str, Any], theirs: Mapping[str, Any], least: Mapping[str, Any]) -> Gate:
    """Return the gate of a claim about a direction, for which a smaller run than the published one may suffice.

    Args:
        ours: Conditions of the run, by name.
        theirs: Conditions of the publication.
        least: Required conditions: a value, a choice of values, ``{"one of": ["cifar100", "mnist"]}``, or a bound,
            ``{"at least": 5}`` or ``{"at most": 0.2}``.

    Examples:
        >>> require_direction({"data": "mnist", "tasks": 5}, {"data": "mnist", "tasks": 20}, {"tasks": {"at least": 3}})
        Gate(reason='', scope='direction, at tasks 5')
        >>> require_direction({"data": "digits"}, {"data": "mnist"}, {"data": {"one of": ["mnist", "cifar10"]}}).reason
        'data is digits, mnist or cifar10 is needed'
    """
    missed = []
    for name, value in least.items():
        own = ours.get(name)
        if isinstance(value, Mapping) and "one of" in value:
            if own not in value["one of"]:
                missed.append(f"{name} is {_word(own)}, {' or '.join(map(_word, value['one of']))} is needed")
        elif isinstance(value, Mapping):
            ((bound, limit),) = value.items()
            if own is None or not (own >= limit if bound == "at least" else own <= limit):
                missed.append(f"{name} is {_word(own)}, {bound} {_word(limit)} is needed")
        elif own != value:
            missed.append(f"{name} is {_word(own)}, published: {_word(value)}")
    if missed:
        return Gate("; ".join(missed))
    smaller = [f"{name} {_word(ours.get(name))}" for name, value in theirs.items() if ours.get(name) != value]
    return Gate(scope=f"direction, at {', '.join(smaller)}" if smaller else "")


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else format_number(value)


@dataclass(frozen=True)
class Claim:
    """A published claim, with our value and a verdict.

    Attributes:
        text: The claim, one sentence.
        source: Paper, table or figure, page.
        published: The published number or text; None if there is none.
        ours: Our mean over seeds; None if it was not measured.
        spread: Our standard deviation over seeds; None for a single seed.
        verdict: ``reproduced``, ``not reproduced`` or ``not tested``.
        reason: Why the claim was not tested; empty if it was tested.
        scope: The conditions of the test that differ from the published ones; empty if there are none.
        seeds: Text such as ``2 of 3`` if the claim holds for some seeds only; empty otherwise.
    """

    text: str
    source: str
    published: float | str | None
    ours: float | None
    spread: float | None
    verdict: Verdict
    reason: str = ""
    scope: str = ""
    seeds: str = ""

    @classmethod
    def of(
        cls,
        text: str,
        source: str,
        values: Sequence[float],
        test: Callable[[float], bool],
        published: float | str | None = None,
        gate: Gate = OPEN,
    ) -> Self:
        """Return a claim judged by one value per seed; ``ours`` is None if a value is not finite.

        Args:
            text: The claim, one sentence.
            source: Paper, table or figure, page.
            values: Our values, one per seed, NaN if a seed has none; empty if the runs of the claim are missing.
            test: Function that returns whether the claim holds for a value.
            published: The published number or text.
            gate: Whether the run meets the conditions of the claim.
        """
        finite = bool(values) and all(map(math.isfinite, values))
        reason = gate.reason or _missing(values)
        holds = sum(map(test, values)) if not reason else 0
        return cls(
            text,
            source,
            published,
            fmean(values) if finite else None,
            stdev(values) if finite and len(values) > 1 else None,
            "not tested" if reason else judge(values, test),
            reason,
            "" if reason else gate.scope,
            f"{holds} of {len(values)}" if 0 < holds < len(values) else "",
        )


def _missing(values: Sequence[float]) -> str:
    if not values:
        return "the runs that the claim compares are missing"
    if any(math.isnan(value) for value in values):
        return "a seed has no value"
    if len(values) < SEEDS_NEEDED:
        return f"{len(values)} of at least {SEEDS_NEEDED} seeds"
    return ""


def judge(values_per_seed: Sequence[float], test: Callable[[float], bool]) -> Verdict:
    """Return the verdict on a claim, which is reproduced only if it holds for every seed.

    With fewer than three seeds, or if a seed has no value (NaN), the claim is not tested.

    Examples:
        >>> judge([0.2, 0.3, 0.6], lambda share: share < 0.5)
        'not reproduced'
    """
    if _missing(values_per_seed):
        return "not tested"
    return "reproduced" if all(test(value) for value in values_per_seed) else "not reproduced"


@dataclass(frozen=True)
class Identity:
    """A mathematical identity or inequality, which no data can refute: our values, without a verdict.

    Attributes:
        text: The statement, one sentence.
        values: Our values, one per seed.
    """

    text: str
    values: Sequence[float]

    @property
    def mean_and_spread(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation of the finite values; None if there are too few."""
        known = [value for value in self.values if math.isfinite(value)]
        return fmean(known) if known else None, stdev(known) if len(known) > 1 else None


def format_published(published: float | str | None) -> str:
    """Return a published number with the published digits, or the published text."""
    return f"{published:g}" if isinstance(published, float) else format_number(published)


def sort_claims(claims: Sequence[Claim]) -> tuple[list[tuple[Claim, str]], list[str]]:
    """Return claims with the text of the verdict, those not reproduced first, and the reasons as numbered notes."""
    reasons = list(dict.fromkeys(claim.reason for claim in claims if claim.reason))

    def describe(claim: Claim) -> str:
        note = f" [{reasons.index(claim.reason) + 1}]" if claim.reason else ""
        note += f": holds for {claim.seeds} seeds" if claim.seeds else ""
        return f"{claim.verdict}{note}" + (f" ({claim.scope})" if claim.scope else "")

    ordered = sorted(claims, key=lambda claim: claim.verdict != "not reproduced")
    return [(claim, describe(claim)) for claim in ordered], [
        f"[{n}] {reason}" for n, reason in enumerate(reasons, start=1)
    ]


def render_claims(claims: Sequence[Claim]) -> Table:
    """Return the claims as a table for the console, those not reproduced first."""
    ordered, reasons = sort_claims(claims)
    caption = "\n".join(reasons)
    table = Table(title="Claims", show_edge=False, pad_edge=False, caption=Text(caption), caption_justify="left")
    for header in ("claim", "source"):
        table.add_column(header)
    for header in ("published", "ours"):
        table.add_column(header, justify="right")
    table.add_column("verdict")
    for claim, verdict in ordered:
        table.add_row(
            Text(claim.text),
            Text(claim.source),
            Text(format_published(claim.published)),
            Text(plus_minus(claim.ours, claim.spread)),
            Text(verdict, style=_COLOURS[claim.verdict]),
        )
    return table


def render_identities(identities: Sequence[Identity]) -> Table:
    """Return the identities as a table for the console."""
    table = Table(title="Identities and arithmetic (no verdict)", show_edge=False, pad_edge=False)
    table.add_column("statement")
    table.add_column("ours", justify="right")
    for one in identities:
        table.add_row(Text(one.text), Text(plus_minus(*one.mean_and_spread)))
    return table
