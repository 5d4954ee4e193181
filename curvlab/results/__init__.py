"""Results: one folder a run, its tables in every form, where they come from, and the claims that they test."""

from curvlab.results.claims import Claim, Gate, Identity, Verdict, judge, render_claims, require, require_direction
from curvlab.results.provenance import Stopwatch, collect
from curvlab.results.run_directory import RunDirectory, open_run
from curvlab.results.tables import Column, aggregate, render, write_tables
from curvlab.text import plus_minus, significant

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
    "judge",
    "open_run",
    "plus_minus",
    "render",
    "render_claims",
    "require",
    "require_direction",
    "significant",
    "write_tables",
]
