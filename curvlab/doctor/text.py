"""Text of a diagnosis."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isnan
from operator import itemgetter
from textwrap import fill
from typing import Any

from curvlab.estimators.memory import MEMORY
from curvlab.estimators.phases import PHASES
from curvlab.text import format_bytes, format_seconds, three_digits, to_printable

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
        presets = "".join(f" {name:>7}" for name in MEMORY)
        yield f"\n{quantity:<28} {'seconds':>9} {'passes':>8} {'peak':>9} {'matrix':>9}{presets}"
        for structure, rows in groupby(group, itemgetter("structure")):
            yield f"  {structure}"
            yield from _write_rows(list(rows))
    yield (
        "\n* used by auto. seconds: predicted for all samples, for implicit for one product; passes: the same in "
        "plain\nforward and backward passes; peak: memory in addition to model and data; matrix: size of the result;\n"
        + ", ".join(f"{name} ({format_bytes(limit)})" for name, limit in MEMORY.items())
        + ": samples at once with estimate(memory=...)"
    )


def _write_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    obstacles: dict[str, list[str]] = {}
    for row in rows:
        if row["supported"] == "yes":
            name = f"{row['backend']} *" if row["auto"] else row["backend"]
            passes = "-" if isnan(row["passes"]) else three_digits(row["passes"])
            seconds, peak, matrix = (
                format_seconds(row["seconds"]),
                format_bytes(row["peak_bytes"]),
                format_bytes(row["matrix_bytes"]),
            )
            pieces = "".join(f" {'-' if isnan(row[name]) else int(row[name]):>7}" for name in MEMORY)
            yield f"    {name:<24} {seconds:>9} {passes:>8} {peak:>9} {matrix:>9}{pieces}"
            phases = {phase: row[phase] for phase in PHASES if not isnan(row[phase])}
            if row["auto"] and phases:
                yield "      " + ", ".join(f"{phase} {format_seconds(seconds)}" for phase, seconds in phases.items())
        else:
            obstacle = "does not compute this" if row["supported"] == "absent" else row["obstacle"]
            obstacles.setdefault(obstacle, []).append(row["backend"])
    for obstacle, backends in obstacles.items():
        yield _wrap(f"    {', '.join(backends)}: {obstacle}", "      ")


def _wrap(text: str, indent: str) -> str:
    return fill(to_printable(text), _LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
