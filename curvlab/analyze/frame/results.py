"""Results kept in the repository: records and provenance, from which the report is made again."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from curvlab.analyze import ANALYSES, load_analysis
from curvlab.analyze.frame.analysis import Analysis, Report, Results
from curvlab.analyze.frame.driver import PROVENANCE, check_version, read_run
from curvlab.analyze.frame.subject import Subject
from curvlab.errors import CurvlabError
from curvlab.files import write_whole
from curvlab.results.run_directory import read_analysis_name, to_json

FOLDER = "results"  # inside the folder of a paper
_DPI = 110  # resolution of the figures
_ORIGIN = ("command", "versions", "git", "ended")
_MACHINE = ("cpu", "cores", "threads", "memory_bytes", "device_name")


@dataclass(frozen=True)
class KeptResult:
    """A result kept in the repository.

    Attributes:
        name: Name of the analysis.
        preset: Name of the preset with this configuration; empty if there is none.
        results: The results of the runs.
        origin: Command, versions, commit, machine and seconds.
        file: The JSON file.
    """

    name: str
    preset: str
    results: Results[Any]
    origin: Mapping[str, Any]
    file: Path

    @cached_property
    def report(self) -> Report:
        """The report, made from the records."""
        report: Report = load_analysis(self.name).report(self.results)
        return report

    @property
    def minutes(self) -> float:
        """Wall time of the command, in minutes."""
        return float(sum(self.origin["seconds"].values())) / 60


def keep_result(folder: Path, root: Path) -> tuple[Path, bool]:
    """Copy records, provenance and figures of a finished run directory into the folder of its paper.

    The artifacts, which only figures use, are left out.

    Args:
        folder: The run directory.
        root: The folder ``analyses`` of the repository.

    Returns:
        The JSON file, and whether it replaces an earlier one.

    Raises:
        CurvlabError: The folder is not a finished run directory, or some of its runs failed.
    """
    name = read_analysis_name(folder)
    if name not in ANALYSES:
        raise CurvlabError(f"{folder} is not the run directory of an analysis")
    analysis: Analysis[Any] = load_analysis(name)
    if not isinstance(analysis, Analysis):
        raise CurvlabError(f"{name} has no results to keep: it only prints")
    results = read_run(analysis, folder)
    if results.failed:
        raise CurvlabError(
            f"{len(results.failed)} of {results.total} runs in {folder} failed: repeat them with --retry-failed first"
        )
    origin = json.loads((folder / PROVENANCE).read_text())
    kept = {
        "analysis": name,
        "version": analysis.version,
        "config": results.config.model_dump(mode="json"),
        "subject": asdict(results.subject),
        "records": results.records,
        "selection": results.selection,
        "runs": results.total,
        "origin": {key: origin[key] for key in _ORIGIN}
        | {"machine": {key: origin["machine"][key] for key in _MACHINE}, "seconds": origin["seconds"]},
    }
    file = root / ANALYSES[name].room / FOLDER / f"{name}.{find_preset(analysis, results.config) or 'other'}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    replaces = file.exists()
    write_whole(file, to_json(kept).encode())
    for figure_name, draw in analysis.report(results).figures.items():
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
        write_whole(file.with_suffix(f".{figure_name}.png"), buffer.getvalue())
    return file, replaces


def read_results(root: Path, room: str) -> list[KeptResult]:
    """Return the kept results of a paper, in the order of the list of analyses.

    Raises:
        CurvlabError: A file is not a kept result.
    """
    files = sorted((root / room / FOLDER).glob("*.json"))
    names = list(ANALYSES)
    return sorted((_read(file) for file in files), key=lambda result: (names.index(result.name), result.preset))


def _read(file: Path) -> KeptResult:
    try:
        kept = json.loads(file.read_text())
        analysis: Analysis[Any] = load_analysis(kept["analysis"])
        check_version(analysis, kept, file)
        config = analysis.config(**kept["config"])
        subject = Subject(**{**kept["subject"], "sample_shape": tuple(kept["subject"]["sample_shape"])})
        records = {name: kept["records"].get(name, []) for name in analysis.kinds}
        empty: dict[str, list[Any]] = {name: [] for name in analysis.artifacts}
        results = Results(config, subject, records, kept["selection"], empty, (), kept["runs"])
        return KeptResult(kept["analysis"], find_preset(analysis, config), results, kept["origin"], file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CurvlabError(f"{file} is not a kept result ({error}); create it again with papers --keep") from error


def find_preset(analysis: Analysis[Any], config: Any) -> str:
    """Return the name of the preset with this configuration; an empty string if there is none."""
    return next((name for name, preset in analysis.presets.items() if preset.config == config), "")
