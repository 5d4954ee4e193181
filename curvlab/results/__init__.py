"""Results: run directories, tables in several formats, provenance, and claims with verdicts."""

from curvlab.results.claims import Claim, Gate, Identity, Verdict, judge, render_claims, require, require_direction
from curvlab.results.provenance import Stopwatch, collect
from curvlab.results.run_directory import RunDirectory, open_run
from curvlab.results.tables import Column, aggregate, mean_column, render, write_tables
from curvlab.text import format_number, plus_minus

__all__ = [
    "Claim",
    "Column",
    "Gate",
    "Identity",
    "RunDirectory",
    "Stopwatch",
    "Verdict",
    "aggregate",
    "collect",
    "format_number",
    "judge",
    "mean_column",
    "open_run",
    "plus_minus",
    "render",
    "render_claims",
    "require",
    "require_direction",
    "write_tables",
]
