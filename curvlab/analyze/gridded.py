"""A run directory that holds the store of a grid: what every analysis does around its cells."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from curvlab import grid
from curvlab.errors import CurvlabError
from curvlab.grid import report
from curvlab.results import RunDirectory

STORE = "sweep.sqlite"


@contextmanager
def resumable(directory: RunDirectory) -> Iterator[None]:
    """Say of a run that is stopped how it is continued; remove its new folder if nothing in it is worth that."""
    try:
        yield
    except (CurvlabError, KeyboardInterrupt) as stop:
        store = directory.path / STORE
        tally = dict.fromkeys(("done", "failed", "absent"), 0)
        with suppress(CurvlabError), grid.reading(store) as opened:
            tally = opened.tally()
        checkpoints = any(path.is_file() for path in grid.folder_of(store, "").rglob("*"))
        if tally["done"] or tally["failed"] or checkpoints:
            total = tally["done"] + tally["failed"] + tally["absent"]
            again = " --retry-failed" if tally["failed"] else ""
            stop.add_note(
                f"{tally['done']} of {total} cells done in {directory.path}; "
                f"the same command with --out {directory.path}{again} continues there"
            )
        else:
            directory.discard()
        raise


def results(directory: RunDirectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of the cells that are done, in the order of the grid, and the cells that have failed.

    Raises:
        CurvlabError: No cell is done.
    """
    with grid.reading(directory.path / STORE) as store:
        found, failed, done = store.records(), store.failed(), store.tally()["done"]
    if failed and not done:
        raise _failure(failed, len(failed))
    return found, failed


def report_failures(console: Console, directory: RunDirectory) -> None:
    """Print the cells that have failed, as the footer of the tables that are without them.

    Raises:
        CurvlabError: There are such cells.
    """
    with grid.reading(directory.path / STORE) as store:
        failed, tally = store.failed(), store.tally()
        if not failed:
            return
        console.print("Failed, and in no number above:")
        report.print_failures(console, store)
    raise _failure(failed, tally["done"] + tally["failed"] + tally["absent"])


def _failure(failed: Sequence[Mapping[str, Any]], total: int) -> CurvlabError:
    have = "has" if len(failed) == 1 else "have"
    return CurvlabError(
        f"{len(failed)} of {total} cells {have} failed, the first (seed {failed[0]['seed']}) so: {failed[0]['error']}"
    )
