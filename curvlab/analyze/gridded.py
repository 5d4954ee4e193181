"""A run directory that holds the store of a grid: what every analysis does around its cells."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from curvlab import grid
from curvlab.analyze.command import CellsFailed, GridOptions
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.errors import CurvlabError
from curvlab.grid import Cell, report
from curvlab.results import Column, RunDirectory, Stopwatch, collect, open_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORE = "sweep.sqlite"
SEEDS = Column("seeds", "seeds")  # of a table, shown where a cell has failed
_TITLE = 10  # size of the titles of figures


@contextmanager
def opened(analysis: str, config: SubjectConfig, options: GridOptions) -> Iterator[RunDirectory]:
    """Open the folder of a run, new or to be continued, for the block that fills it.

    If that is stopped, it is said how it is continued, or the new folder is removed if nothing in it is worth that.

    Raises:
        CurvlabError: The folder cannot be used.
    """
    directory = open_run(options.out, analysis, config.to_yaml())
    try:
        yield directory
    except (CurvlabError, KeyboardInterrupt) as stop:
        store = directory.path / STORE
        tally = dict.fromkeys(("done", "failed", "absent"), 0)
        with suppress(CurvlabError), grid.reading(store) as stored:
            tally = stored.tally()
        checkpoints = any(path.is_file() for path in grid.folder_of(store, "").rglob("*"))
        if tally["done"] or tally["failed"] or checkpoints:
            again = " --retry-failed" if tally["failed"] else ""
            # Not of how many: more may follow from what these give.
            stop.add_note(
                f"cells done in {directory.path}: {tally['done']}; "
                f"the same command with --out {directory.path}{again} continues there"
            )
        else:
            directory.discard(f"{STORE}*")
        raise


def run(
    cells: Sequence[Cell], options: GridOptions, directory: RunDirectory
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the cells that the store does not have.

    Returns:
        The records of the cells that are done, in the order of the grid, and the cells that have failed.

    Raises:
        CellsFailed: All of them have.
        CurvlabError: The store or the cluster cannot be used, or the run was begun with other data.
    """
    store = directory.path / STORE
    options.run(cells, store)
    with grid.reading(store) as stored:
        found, failed, done = stored.records(), stored.failed(), stored.tally()["done"]
    if failed and not done:
        raise _failure(failed, len(failed))
    return found, failed


def candidates(cells: Sequence[Cell], options: GridOptions, directory: RunDirectory) -> list[dict[str, Any]]:
    """Run the cells that hyper-parameters are chosen by, and return their records, in the order of the grid.

    Raises:
        CellsFailed: One was not brought to its end, and the best of the others may not be the best.
        CurvlabError: The store or the cluster cannot be used, or the run was begun with other data.
    """
    found, failed = run(cells, options, directory)
    if failed:
        raise CellsFailed(f"the best hyper-parameters are not known: a cell has failed: {failed[0]['error']}")
    return found


def write_provenance(
    directory: RunDirectory, seeds: Sequence[int], data_hash: str, clock: Stopwatch, device: str
) -> None:
    """Write where the results come from: last, and not again where no cell has changed since.

    Args:
        directory: With the results.
        seeds: Of the networks.
        data_hash: Of the data set.
        clock: The stages of the run.
        device: Where the computation was.
    """
    file = directory.path / "provenance.json"
    with grid.reading(directory.path / STORE) as store:
        tally = store.tally()
    if not file.exists() or json.loads(file.read_text()).get("cells") != tally:
        origin = collect(seeds=seeds, data_hash=data_hash, stages=clock.seconds, started=clock.started, device=device)
        directory.write_json(file.name, origin | {"continued": directory.resumed, "cells": tally})


def report_failures(console: Console, directory: RunDirectory) -> None:
    """Print the cells that have failed, as the footer of the tables that are without them.

    Raises:
        CellsFailed: There are such cells.
    """
    with grid.reading(directory.path / STORE) as store:
        failed, tally = store.failed(), store.tally()
        if not failed:
            return
        console.print("Failed, and in no number above:")
        report.print_failures(console, store)
    raise _failure(failed, _total(tally))


def marked(figure: "Figure", run: Path) -> "Figure":
    """Say under the title of a figure how many cells of the run are in it, if some have failed; return it.

    Args:
        figure: Of all the results of the run.
        run: Its folder.
    """
    store = run / STORE
    if not store.exists():  # a run of an earlier version: it ended without a failure
        return figure
    with grid.reading(store) as stored:
        failed, tally = stored.failed(), stored.tally()
    if failed:
        seeds = ", ".join(dict.fromkeys(str(cell["seed"]) for cell in failed))
        note = f"{tally['done']} of {_total(tally)} cells; the others have failed (seed {seeds})"
        figure.suptitle("\n".join(filter(None, [figure.get_suptitle(), note])), fontsize=_TITLE)
    return figure


def _total(tally: Mapping[str, int]) -> int:
    return tally["done"] + tally["failed"] + tally["absent"]


def _failure(failed: Sequence[Mapping[str, Any]], total: int) -> CellsFailed:
    have = "has" if len(failed) == 1 else "have"
    return CellsFailed(
        f"{len(failed)} of {total} cells {have} failed, the first (seed {failed[0]['seed']}) so: {failed[0]['error']}"
    )
