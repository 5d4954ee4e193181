"""Text of a diagnosis."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isnan
from operator import itemgetter
from textwrap import fill
from typing import Any

from curvlab.text import to_printable

_LINE = 120  # characters


def write_lines(summary: str, findings: Sequence[str], combinations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a diagnosis: its summary, findings and combinations."""
    yield _wrap(summary, "")
    for finding in findings:
        yield _wrap(f"- {finding}", "  ")
    if {row["supported"] for row in combinations} == {"no"} and len({row["obstacle"] for row in combinations}) == 1:
        yield "Nothing can be computed until this is corrected."
        return
    for quantity, group in groupby(combinations, itemgetter("quantity")):
        yield f"\n{quantity:<28} {'seconds':>9} {'passes':>8} {'peak':>9} {'matrix':>9}"
        for structure, rows in groupby(group, itemgetter("structure")):
            yield f"  {structure}"
            yield from _write_rows(list(rows))
    yield (
        "\n* used by auto. seconds: predicted for all samples, for implicit for one product; passes: the same in "
        "plain\nforward and backward passes; peak: memory in addition to model and data; matrix: size of the result"
    )


def _write_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    obstacles: dict[str, list[str]] = {}
    for row in rows:
        if row["supported"] == "yes":
            name = f"{row['backend']} *" if row["auto"] else row["backend"]
            passes = "-" if isnan(row["passes"]) else _three_digits(row["passes"])
            seconds, peak, matrix = (
                format_seconds(row["seconds"]),
                format_bytes(row["peak_bytes"]),
                format_bytes(row["matrix_bytes"]),
            )
            yield f"    {name:<24} {seconds:>9} {passes:>8} {peak:>9} {matrix:>9}"
        else:
            obstacle = "does not compute this" if row["supported"] == "absent" else row["obstacle"]
            obstacles.setdefault(obstacle, []).append(row["backend"])
    for obstacle, backends in obstacles.items():
        yield _wrap(f"    {', '.join(backends)}: {obstacle}", "      ")


def _wrap(text: str, indent: str) -> str:
    return fill(to_printable(text), _LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def format_seconds(seconds: float) -> str:
    """Return seconds with their unit; a dash for NaN."""
    if isnan(seconds):
        return "-"
    return f"{_three_digits(1e3 * seconds)} ms" if seconds < 1 else f"{_three_digits(seconds)} s"


def format_bytes(size: float) -> str:
    """Return bytes with their unit; a dash for NaN."""
    if isnan(size):
        return "-"
    unit, name = next((u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1, "B"))
    return f"{_three_digits(size / unit)} {name}"


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
