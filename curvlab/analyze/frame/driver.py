"""Do the runs of an analysis, and write and print what its report makes of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from curvlab import grid, yaml_file
from curvlab.analyze.frame.analysis import Analysis, Record, Report, Results
from curvlab.analyze.frame.search import choose, select, show_selection
from curvlab.analyze.frame.subject import Subject, check_distinct, locate_weights
from curvlab.commandline.config import C
from curvlab.commandline.options import GridOptions
from curvlab.commandline.program import RunsFailed
from curvlab.errors import CurvlabError
from curvlab.grid import RunSpec
from curvlab.grid.report import print_failures
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORE = "sweep.sqlite"
PROVENANCE = "provenance.json"  # written last: a run that has it is finished
SELECTION, CLAIMS = "selection", "claims"
_SEEDS = Column("seeds", "seeds")  # of a table, shown where a run has failed
_TITLE = 10  # size of the titles of figures


def run(analysis: Analysis[C], config: C, options: GridOptions, console: Console) -> None:
    """Choose hyper-parameters, do the runs that the folder does not have, and write and print the report.

    Raises:
        CurvlabError: The configuration, the data or the weights are not usable, and nothing is written; or a run has
            failed, and what the others gave is written and printed.
    """
    clock = Stopwatch()
    with clock("data"):
        dataset = analysis.load(config, options)
        data_hash = dataset.fingerprint()
    check_distinct(seeds=config.seeds)  # type: ignore[attr-defined]
    analysis.check(locate_weights(config, options), dataset)
    with _open(analysis, config, options) as directory:
        done = _do_runs(analysis, config, options, directory, clock)
        finished = replace(done, subject=Subject.of(dataset))
        report = analysis.report(finished)
        with clock("figures"):
            _write(analysis, finished, report, directory)
        _write_provenance(directory, finished, data_hash, clock)
        _print(analysis, finished, report, console)
        _print_saved(directory, console)
        _report_failures(directory, console)


def read_run(analysis: Analysis[C], folder: Path) -> Results[C]:
    """Return a finished run, as its report is made of it, from the files that it has left.

    Raises:
        CurvlabError: There is no finished run of this analysis.
    """
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
        raise CurvlabError(f"{folder} is no finished run of {analysis.name}: {error}") from error
    return Results(
        config,
        subject,
        {name: files.get(name, []) for name in analysis.kinds},
        files.get(SELECTION, []),
        {name: files.get(name, []) for name in analysis.artifacts},
        origin["failed"],
        origin["runs"],
    )


# The runs -------------------------------------------------------------------------------------------------------------


@contextmanager
def _open(analysis: Analysis[C], config: C, options: GridOptions) -> Iterator[RunDirectory]:
    """Open the folder of a run, new or to be continued, for the block that fills it.

    If that is stopped, say how to continue it, or remove the new folder if nothing in it is worth that.
    """
    directory = open_run(options.out, analysis.name, config.to_yaml())
    try:
        yield directory
    except (CurvlabError, KeyboardInterrupt) as stop:
        store = directory.path / STORE
        tally = dict.fromkeys(("done", "failed", "absent"), 0)
        with suppress(CurvlabError), grid.read_store(store) as stored:
            tally = stored.tally()
        checkpoints = any(path.is_file() for path in grid.run_folder(store, "").rglob("*"))
        if tally["done"] or tally["failed"] or checkpoints:
            again = " --retry-failed" if tally["failed"] else ""
            # Not of how many: more may follow from what these give.
            stop.add_note(
                f"runs done in {directory.path}: {tally['done']}; "
                f"the same command with --out {directory.path}{again} continues there"
            )
        else:
            directory.discard(f"{STORE}*")
        raise


def _do_runs(
    analysis: Analysis[C], config: C, options: GridOptions, directory: RunDirectory, clock: Stopwatch
) -> Results[C]:
    """Return the run but for its subject."""
    trial_specs = analysis.trial_specs(config)
    selection: list[Record] = []
    trials: list[Record] = []
    configs: Sequence[C] = [config]
    if analysis.search is not None:
        with clock(SELECTION):
            if trial_specs:
                trials, failed = _do(trial_specs, options, directory)
                if failed:
                    raise RunsFailed(f"the best hyper-parameters are not known: a run failed: {failed[0]['error']}")
            chosen = choose(analysis.search, config, trials)
            selection = select(analysis.search, config, trials, chosen)
            configs = analysis.search.runs(config, chosen)
    elif analysis.parts is not None:
        configs = analysis.parts(config)
    specs = analysis.run_specs(configs)
    with clock("runs"):
        found, failed = _do([*trial_specs, *specs], options, directory)
    found = found[len(trials) :]
    records = {name: [record for record in found if key in record] for name, key in analysis.kinds.items()}
    if not records["table"]:
        raise _failure(failed, len(failed))
    artifacts = {
        name: [
            json.loads(file.read_text())
            for spec in specs
            # None of a run that has failed, or was done on a machine of a cluster that does not share the folder.
            if (file := grid.run_folder(directory.path / STORE, spec.key) / f"{name}.json").exists()
        ]
        for name in analysis.artifacts
    }
    with grid.read_store(directory.path / STORE) as store:
        total = sum(store.tally().values())
    seen = [{"seed": one["seed"], "error": one["error"]} for one in failed]
    return Results(config, Subject("", (), 0, 0, 0), records, selection, artifacts, seen, total)


def _do(
    specs: Sequence[RunSpec], options: GridOptions, directory: RunDirectory
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Do the runs that the store does not have; return the records of those done, in order, and the failed ones."""
    store = directory.path / STORE
    options.run(specs, store)
    with grid.read_store(store) as stored:
        found, failed, done = stored.records(), stored.failed_runs(), stored.tally()["done"]
    if failed and not done:
        raise _failure(failed, len(failed))
    return found, failed


def _failure(failed: Sequence[Mapping[str, Any]], total: int) -> RunsFailed:
    have = "has" if len(failed) == 1 else "have"
    return RunsFailed(
        f"{len(failed)} of {total} runs {have} failed, the first (seed {failed[0]['seed']}) so: {failed[0]['error']}"
    )


# What is written ------------------------------------------------------------------------------------------------------


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
    """Draw the figures of a report into a folder, and return the files.

    Args:
        finished: The run.
        report: What was made of it.
        directory: Where to.
        names: Which figures; empty for all.
    """
    return [
        path
        for name, figure in report.figures.items()
        if not names or name in names
        for path in directory.write_figure(name, _mark_failures(figure(), finished))
    ]


def _mark_failures(figure: "Figure", finished: Results[Any]) -> "Figure":
    """Say under the title how many runs are in a figure, if some have failed."""
    if finished.failed:
        seeds = ", ".join(dict.fromkeys(str(one["seed"]) for one in finished.failed))
        done = finished.total - len(finished.failed)
        note = f"{done} of {finished.total} runs; the others have failed (seed {seeds})"
        figure.suptitle("\n".join(filter(None, [figure.get_suptitle(), note])), fontsize=_TITLE)
    return figure


def _write_provenance(directory: RunDirectory, finished: Results[Any], data_hash: str, clock: Stopwatch) -> None:
    """Write where the results come from: last, and not again where no run has changed since."""
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
        "continued": directory.resumed,
        "runs_by_status": tally,
        "subject": asdict(finished.subject),
        "failed": finished.failed,
        "runs": finished.total,
    }
    directory.write_json(PROVENANCE, origin | more)


# What is printed ------------------------------------------------------------------------------------------------------


def _print(analysis: Analysis[C], finished: Results[C], report: Report, console: Console) -> None:
    for table in report.tables or [report.summary]:
        console.print(render(table.records, _with_seeds(table.columns, finished), table.title), crop=False)
    if any(row.get("note") is not None for row in finished.selection):
        assert analysis.search is not None
        columns, rows = show_selection(analysis.search, finished.config, finished.selection)
        console.print(render(rows, columns, "Hyper-parameters, chosen on held-out samples"), crop=False)
        if any("*" in str(value) for row in rows for value in row.values()):
            _say(console, "* The smallest or largest value that was tried: beyond it may be a better one.")
    if report.claims:
        console.print(render_claims(report.claims), crop=False)
    if report.identities:
        console.print(render_identities(report.identities), crop=False)
    if report.deviations:
        _say(console, "Here, and in the published runs (in brackets):")
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
    """Print the runs that have failed, as the footer of the tables that are without them.

    Raises:
        RunsFailed: There are such runs.
    """
    with grid.read_store(directory.path / STORE) as store:
        failed, tally = store.failed_runs(), store.tally()
        if not failed:
            return
        _say(console, "Failed, and in no number above:")
        print_failures(console, store)
    raise _failure(failed, sum(tally.values()))
