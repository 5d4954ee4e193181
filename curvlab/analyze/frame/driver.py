"""Execute the runs of an analysis, then write and print its report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from curvlab import grid, yaml_file
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results
from curvlab.analyze.frame.functions import describe_functions, list_functions
from curvlab.analyze.frame.search import choose, list_pairs, select, show_selection
from curvlab.analyze.frame.subject import Subject, check_distinct, locate_weights
from curvlab.commandline.config import C
from curvlab.commandline.options import GridOptions
from curvlab.commandline.program import RunsFailed
from curvlab.errors import CurvlabError
from curvlab.grid import RunSpec
from curvlab.grid.report import print_failures
from curvlab.grid.store import StoreMismatchError
from curvlab.results import (
    Column,
    RunDirectory,
    Stopwatch,
    collect,
    open_run,
    render,
    render_claims,
    write_tables,
)
from curvlab.results.claims import render_identities
from curvlab.results.run_directory import read_analysis_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORE = "sweep.sqlite"
PROVENANCE = "provenance.json"  # written last: a run directory that has it is finished
SELECTION, CLAIMS = "selection", "claims"
_SEEDS = Column("seeds", "seeds")  # added to a table if a run has failed
_TITLE = 10  # font size of figure titles


def run(analysis: Analysis[C], config: C, options: GridOptions, console: Console) -> None:
    """Choose hyper-parameters, execute the runs that the run directory lacks, and write and print the report.

    Raises:
        CurvlabError: The configuration, the data or the weights are invalid, and nothing is written; or a run failed,
            and the report of the other runs is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = analysis.load(config, options)
        data_hash = None if dataset is None else dataset.fingerprint()
    check_distinct(seeds=config.seeds)  # type: ignore[attr-defined]
    analysis.check(locate_weights(config, options), dataset)
    functions: dict[str, Any] = {}
    if dataset is not None and data_hash is not None and list_functions(config):
        with clock("data"):
            again = analysis.load(config, options)
            assert again is not None
            functions = describe_functions(config, dataset, again, data_hash)
    with _open(analysis, config, options) as directory:
        done = _do_runs(analysis, config, options, directory, clock, functions)
        finished = replace(done, subject=Subject.of(dataset))
        report = analysis.report(finished)
        with clock("figures"):
            _write(analysis, finished, report, directory)
        _write_provenance(directory, finished, analysis.version, data_hash, clock, functions)
        _print(analysis, finished, report, console)
        _print_saved(directory, console)
        _report_failures(directory, console)


def read_run(analysis: Analysis[C], folder: Path) -> Results[C]:
    """Read the results of a finished run directory.

    Raises:
        CurvlabError: The folder is not a finished run directory of this analysis, or of another version of it.
    """
    name = read_analysis_name(folder)
    if name not in ("", analysis.name):
        raise CurvlabError(f"{folder} is a run of {name}, not of {analysis.name}")
    try:
        config = analysis.config(**yaml_file.loads((folder / "config.yaml").read_text()))
        origin = json.loads((folder / PROVENANCE).read_text())
        files = {
            name: json.loads(file.read_text())
            for name in (*analysis.kinds, *analysis.artifacts, SELECTION)
            if (file := folder / f"{name}.json").exists()
        }
        subject = Subject(**{**origin["subject"], "sample_shape": tuple(origin["subject"]["sample_shape"])})
    except (OSError, ValueError, KeyError, CurvlabError) as error:
        raise CurvlabError(f"{folder} is not a finished run of {analysis.name}: {error}") from error
    check_version(analysis, origin, folder)
    return Results(
        config,
        subject,
        {name: files.get(name, []) for name in analysis.kinds},
        files.get(SELECTION, []),
        {name: files.get(name, []) for name in analysis.artifacts},
        origin["failed"],
        origin["runs"],
    )


def check_version(analysis: Analysis[Any], saved: Mapping[str, Any], where: Path) -> None:
    """Check that saved records are of the present version of an analysis.

    Args:
        analysis: The analysis.
        saved: The saved description, with ``version``; 1 without it.
        where: The file or folder, for the message.

    Raises:
        CurvlabError: They are of another version.
    """
    version = saved.get("version", 1)
    if version != analysis.version:
        raise CurvlabError(
            f"{where} was created by version {version} of {analysis.name}, and this is version {analysis.version}: "
            "run the analysis again"
        )


# The runs -------------------------------------------------------------------------------------------------------------


@contextmanager
def _open(analysis: Analysis[C], config: C, options: GridOptions) -> Iterator[RunDirectory]:
    """Open the run directory, new or resumed, for the duration of the block.

    If the block is interrupted, add a note that says how to continue, or remove the directory if nothing was computed.
    """
    directory = open_run(options.out, analysis.name, config.to_yaml())
    try:
        yield directory
    except StoreMismatchError:  # the same command would be refused again
        raise
    except (CurvlabError, KeyboardInterrupt) as stop:
        store = directory.path / STORE
        tally = dict.fromkeys(("done", "failed", "absent"), 0)
        try:
            with grid.read_store(store) as stored:
                tally = stored.tally()
        except CurvlabError:  # it cannot be continued, and the message says so
            if store.exists():
                raise stop from None
        checkpoints = any(path.is_file() for path in grid.run_folder(store, "").rglob("*"))
        if tally["done"] or tally["failed"] or checkpoints:
            again = " --retry-failed" if tally["failed"] else ""
            # The total is not known yet: more runs may follow from the results of these.
            stop.add_note(
                f"runs done in {directory.path}: {tally['done']}; "
                f"the same command with --out {directory.path}{again} continues there"
            )
        else:
            directory.discard(f"{STORE}*")
        raise


def _do_runs(
    analysis: Analysis[C],
    config: C,
    options: GridOptions,
    directory: RunDirectory,
    clock: Stopwatch,
    functions: Mapping[str, Mapping[str, Any]],
) -> Results[C]:
    """Execute all runs and return the results, with an empty subject."""
    returned = {one["function"]: one["returned"] for one in functions.values()}
    trial_specs = analysis.trial_specs(config)
    selection: list[Record] = []
    trials: list[Record] = []
    configs: Sequence[C] = [config]
    if analysis.search is not None:
        with clock(SELECTION):
            if trial_specs and (finished := _read_trials(trial_specs, directory)) is not None:
                trials = finished  # without a change of the store, which has the runs that follow, too
            elif trial_specs:
                trials, failed = _do(trial_specs, options, directory, returned)
                if failed:
                    raise RunsFailed(f"hyper-parameters cannot be chosen because a run failed: {failed[0]['error']}")
            chosen = choose(analysis.search, config, trials)
            selection = select(analysis.search, config, trials, chosen)
            configs = analysis.search.runs(config, chosen)
    elif analysis.parts is not None:
        configs = analysis.parts(config)
    specs = analysis.run_specs(configs)
    with clock("runs"):
        found, failed = _do([*trial_specs, *specs], options, directory, returned)
    found = found[len(trials) :]
    records = {name: [record for record in found if key in record] for name, key in analysis.kinds.items()}
    if not records["table"]:
        raise _failure(failed, len(failed))
    artifacts = {
        name: [
            json.loads(file.read_text())
            for spec in specs
            # Missing if the run failed, or ran on a machine of a cluster that does not share the folder.
            if (file := grid.run_folder(directory.path / STORE, spec.key) / f"{name}.json").exists()
        ]
        for name in analysis.artifacts
    }
    with grid.read_store(directory.path / STORE) as store:
        total = sum(store.tally().values())
    seen = [{"seed": one["seed"], "error": one["error"]} for one in failed]
    return Results(config, Subject.of(None), records, selection, artifacts, seen, total)


def _read_trials(specs: Sequence[RunSpec], directory: RunDirectory) -> list[Record] | None:
    """Return the records of the search, in order, if the store has all of them; otherwise None."""
    store = directory.path / STORE
    if not store.exists():
        return None
    with grid.read_store(store) as stored:
        found = stored.records_by_key()
    if not all(spec.key in found for spec in specs):
        return None
    return [record for spec in specs for record in found[spec.key]]


def _do(
    specs: Sequence[RunSpec], options: GridOptions, directory: RunDirectory, returned: Mapping[str, str]
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Execute the runs that the store lacks; return the records of finished runs, in order, and the failed runs."""
    store = directory.path / STORE
    options.run(specs, store, returned)
    with grid.read_store(store) as stored:
        found, failed, done = stored.records(), stored.failed_runs(), stored.tally()["done"]
    if failed and not done:
        raise _failure(failed, len(failed))
    return found, failed


def _failure(failed: Sequence[Mapping[str, Any]], total: int) -> RunsFailed:
    return RunsFailed(
        f"{len(failed)} of {total} runs failed; the first (seed {failed[0]['seed']}): {failed[0]['error']}"
    )


# Files ----------------------------------------------------------------------------------------------------------------


def _write(analysis: Analysis[C], finished: Results[C], report: Report, directory: RunDirectory) -> None:
    """Write records, tables, claims and figures."""
    columns = _with_seeds(report.summary.columns, finished)
    write_tables(directory, finished.records["table"], columns, summary=report.summary.records)
    others = {name: records for name, records in finished.records.items() if name != "table"}
    for name, records in {**others, **finished.artifacts, **report.files}.items():
        directory.write_json(f"{name}.json", records)
    if analysis.search is not None:
        directory.write_json(f"{SELECTION}.json", finished.selection)
    directory.write_json(f"{CLAIMS}.json", report.claims)
    draw(finished, report, directory)


def draw(finished: Results[Any], report: Report, directory: RunDirectory, names: Sequence[str] = ()) -> list[Path]:
    """Draw the figures of a report into a run directory, and return the files.

    Args:
        finished: The results.
        report: The report on them.
        directory: The run directory.
        names: Names of the figures; empty for all.
    """
    return [
        path
        for name, figure in report.figures.items()
        if not names or name in names
        for path in directory.write_figure(name, _mark_failures(figure(), finished))
    ]


def _mark_failures(figure: "Figure", finished: Results[Any]) -> "Figure":
    """Add the number of finished runs to the title of a figure if some runs failed."""
    if finished.failed:
        seeds = ", ".join(dict.fromkeys(str(one["seed"]) for one in finished.failed))
        done = finished.total - len(finished.failed)
        note = f"{done} of {finished.total} runs; the others failed (seed {seeds})"
        figure.suptitle("\n".join(filter(None, [figure.get_suptitle(), note])), fontsize=_TITLE)
    return figure


def _write_provenance(
    directory: RunDirectory,
    finished: Results[Any],
    version: int,
    data_hash: str | None,
    clock: Stopwatch,
    functions: Mapping[str, Any],
) -> None:
    """Write the provenance, after everything else; keep the old file if no run has changed."""
    file = directory.path / PROVENANCE
    with grid.read_store(directory.path / STORE) as store:
        tally = store.tally()
    if file.exists() and json.loads(file.read_text()).get("runs_by_status") == tally:
        return
    device = getattr(finished.config, "device", "cpu")
    origin = collect(
        seeds=finished.seeds, data_hash=data_hash, stages=clock.seconds, started=clock.started, device=device
    )
    more = {
        "version": version,
        "continued": directory.resumed,
        "runs_by_status": tally,
        "subject": asdict(finished.subject),
        "failed": finished.failed,
        "runs": finished.total,
    }
    if functions:
        more["functions"] = functions
    directory.write_json(PROVENANCE, origin | more)


# Console --------------------------------------------------------------------------------------------------------------


def _print(analysis: Analysis[C], finished: Results[C], report: Report, console: Console) -> None:
    for table in report.tables or [report.summary]:
        console.print(render(table.records, _with_seeds(table.columns, finished), table.title), crop=False)
    if any(row.get("note") is not None for row in finished.selection):
        assert analysis.search is not None
        columns, rows = show_selection(analysis.search, finished.config, finished.selection)
        console.print(render(rows, columns, "Hyper-parameters, chosen on held-out samples"), crop=False)
        if any("*" in str(value) for row in rows for value in row.values()):
            _say(console, "* Smallest or largest value tried: a better one may lie outside the range.")
        if pairs := list_pairs(analysis.search, finished.config):
            names = ", ".join(name.replace("_", " ") for name in pairs)
            _say(
                console,
                f"Only two values were tried for {names}: add values to see whether the best one is inside the range.",
            )
    if report.claims:
        console.print(render_claims(report.claims), crop=False)
    if report.identities:
        console.print(render_identities(report.identities), crop=False)
    if report.deviations:
        _say(console, "Differences from the published runs (published values in brackets):")
    for line in (*(f"- {deviation}" for deviation in report.deviations), *report.notes):
        _say(console, line)


def _print_saved(directory: RunDirectory, console: Console) -> None:
    stems: dict[str, list[str]] = {}
    for name in sorted(directory.written | {PROVENANCE}):
        stems.setdefault(Path(name).stem, []).append(Path(name).suffix)
    files = ", ".join(f"{stem} ({' '.join(endings)})" for stem, endings in stems.items() if stem != "config")
    _say(console, f"Saved in {directory.path}: {files}, {STORE}.")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _with_seeds(columns: Sequence[Column], finished: Results[Any]) -> Sequence[Column]:
    return (*columns, _SEEDS) if finished.failed else columns


def _report_failures(directory: RunDirectory, console: Console) -> None:
    """Print the failed runs below the tables, which do not include them.

    Raises:
        RunsFailed: A run failed.
    """
    with grid.read_store(directory.path / STORE) as store:
        failed, tally = store.failed_runs(), store.tally()
        if not failed:
            return
        _say(console, "Failed runs (not included above):")
        print_failures(console, store)
    raise _failure(failed, sum(tally.values()))
