"""Results that are kept in the repository: records and provenance of a run, from which its report is made again."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curvlab.analyze import ANALYSES, load_analysis
from curvlab.analyze.frame.analysis import Analysis, Report, Results
from curvlab.analyze.frame.driver import PROVENANCE, read_run
from curvlab.analyze.frame.subject import Subject
from curvlab.errors import CurvlabError
from curvlab.files import write_whole
from curvlab.results.run_directory import read_analysis_name, to_json

FOLDER = "results"  # in the folder of a paper
_DPI = 110  # of the figures
_ORIGIN = ("command", "versions", "git", "ended")
_MACHINE = ("cpu", "cores", "threads", "memory_bytes", "device_name")


@dataclass(frozen=True)
class Result:
    """A kept run.

    Attributes:
        name: Of the analysis.
        preset: The one whose configuration it has; empty for another configuration.
        run: What its report is made of.
        origin: Command, versions, commit, machine and seconds of the run.
        file: The file that it is kept in.
    """

    name: str
    preset: str
    run: Results[Any]
    origin: Mapping[str, Any]
    file: Path

    @property
    def report(self) -> Report:
        """The report, made anew of the records."""
        report: Report = load_analysis(self.name).report(self.run)
        return report

    @property
    def minutes(self) -> float:
        """Wall time of the run."""
        return float(sum(self.origin["seconds"].values())) / 60


def keep_result(folder: Path, root: Path) -> Path:
    """Keep a finished run: its records, where they come from, and its figures, below the folder of its paper.

    What the runs saved for figures alone, the artifacts, is left out.

    Args:
        folder: Of the run.
        root: The folder ``analyses`` of the repository.

    Returns:
        The file.

    Raises:
        CurvlabError: There is no finished run, or runs of it have failed.
    """
    name = read_analysis_name(folder)
    if name not in ANALYSES:
        raise CurvlabError(f"{folder} is not a run of an analysis")
    analysis: Analysis[Any] = load_analysis(name)
    if not isinstance(analysis, Analysis):
        raise CurvlabError(f"{name} has no results to be kept: it answers at once")
    run = read_run(analysis, folder)
    if run.failed:
        raise CurvlabError(f"{len(run.failed)} of the {run.total} runs in {folder} have failed: repeat them first")
    origin = json.loads((folder / PROVENANCE).read_text())
    kept = {
        "analysis": name,
        "config": run.config.model_dump(mode="json"),
        "subject": asdict(run.subject),
        "records": run.records,
        "selection": run.selection,
        "runs": run.total,
        "origin": {key: origin[key] for key in _ORIGIN}
        | {"machine": {key: origin["machine"][key] for key in _MACHINE}, "seconds": origin["seconds"]},
    }
    file = root / ANALYSES[name].room / FOLDER / f"{name}.{find_preset(analysis, run.config) or 'other'}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, to_json(kept).encode())
    for figure_name, draw in analysis.report(run).figures.items():
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
        write_whole(file.with_suffix(f".{figure_name}.png"), buffer.getvalue())
    return file


def read_results(root: Path, room: str) -> list[Result]:
    """Return the kept runs of a paper, in the order of the list of analyses.

    Raises:
        CurvlabError: A file is not a kept run.
    """
    files = sorted((root / room / FOLDER).glob("*.json"))
    names = list(ANALYSES)
    return sorted((_read(file) for file in files), key=lambda result: (names.index(result.name), result.preset))


def _read(file: Path) -> Result:
    try:
        kept = json.loads(file.read_text())
        analysis: Analysis[Any] = load_analysis(kept["analysis"])
        config = analysis.config(**kept["config"])
        subject = Subject(**{**kept["subject"], "sample_shape": tuple(kept["subject"]["sample_shape"])})
        records = {name: kept["records"].get(name, []) for name in analysis.kinds}
        empty: dict[str, list[Any]] = {name: [] for name in analysis.artifacts}
        run = Results(config, subject, records, kept["selection"], empty, (), kept["runs"])
        return Result(kept["analysis"], find_preset(analysis, config), run, kept["origin"], file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CurvlabError(f"{file} is not a kept run ({error}); make it anew") from error


def find_preset(analysis: Analysis[Any], config: Any) -> str:
    """Return the name of the preset that has a configuration, or nothing."""
    return next((name for name, preset in analysis.presets.items() if preset.config == config), "")
