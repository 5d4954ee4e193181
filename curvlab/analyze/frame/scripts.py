"""Functions for the scripts in ``analyses/`` and ``figures/``: run an analysis, draw its figures."""

import sys
from collections.abc import Sequence
from pathlib import Path

from curvlab.analyze import load_analysis
from curvlab.analyze.frame.command import execute
from curvlab.analyze.frame.driver import PROVENANCE, draw, read_run
from curvlab.commandline.program import report_errors, run_program
from curvlab.results import RunDirectory


def run_script(name: str, preset: str, out: str, options: Sequence[str] = ()) -> int:
    """Run an analysis with a preset, a run directory and options; options on the command line override all of them.

    Returns:
        The exit code.
    """
    return _run(name, "--preset", preset, "--out", out, *options, *sys.argv[1:])


def draw_script(name: str, preset: str, out: str, figures: Sequence[str] = ()) -> int:
    """Draw figures from the run directory named by the first argument; run the analysis first if it is not finished.

    Args:
        name: Name of the analysis.
        preset: Preset that the analysis is run with.
        out: Run directory if the command line names none.
        figures: Names of the figures; empty for all.

    Returns:
        The exit code.
    """
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else out)
    code = 0
    if not (folder / PROVENANCE).exists():
        code = _run(name, "--preset", preset, "--out", str(folder))
        if not (folder / PROVENANCE).exists():
            return code
    return report_errors(lambda: _draw(name, folder, figures), debug=False) or code


def _run(name: str, *arguments: str) -> int:
    return run_program(lambda: execute(load_analysis(name), list(arguments), f"python -m curvlab.analyze {name}"))


def _draw(name: str, folder: Path, figures: Sequence[str]) -> None:
    analysis = load_analysis(name)
    finished = read_run(analysis, folder)
    report = analysis.report(finished)
    for path in draw(finished, report, RunDirectory(folder, resumed=True), figures):
        print(path)
