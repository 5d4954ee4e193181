"""Reports on a store: lines for the console, and files for other programs."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from curvlab.errors import CurvlabError
from curvlab.files import write_whole
from curvlab.grid.running import run_folder
from curvlab.grid.store import Store
from curvlab.text import format_number, quote_formula

if TYPE_CHECKING:
    import pandas as pd

_HOUR = 3600


def print_status(console: Console, store: Store) -> None:
    """Print the numbers of runs that are done, failed and absent, the total time, and notes on them."""
    tally = store.tally()
    total = tally["done"] + tally["failed"] + tally["absent"]
    failed = ", ".join(f"{count} {kind}" for kind, count in store.count_failures().items())
    seconds = store.seconds()
    time = f"{seconds / _HOUR:.1f} hours" if seconds > _HOUR else f"{seconds:.1f} seconds"
    lines = [
        f"{total:,} runs: {tally['done']:,} done, {tally['failed']:,} failed{f' ({failed})' if failed else ''}, "
        f"{tally['absent']:,} absent; {time} of work."
    ]
    if tally["earlier"]:
        lines.append(f"{tally['earlier']:,} more runs, of other configurations or versions, are kept.")
    if (states := len(store.software())) > 1:
        lines.append(f"The runs used {states} versions or states of the code: see run.software in the export.")
    _print(console, *lines)


def print_failures(console: Console, store: Store) -> None:
    """Print one line per failed run: its key, the kind of failure, its axes and the error."""
    for run in store.failed_runs():
        axes = {name: value for name, value in run["axes"].items() if value is not None}
        if run["seed"] is not None:
            axes["seed"] = run["seed"]
        named = " ".join(f"{name}={value}" for name, value in axes.items())
        _print(console, f"{run['key'][:8]}  {run['kind']:7}  {named}: {run['error']}")


def print_failure(console: Console, store: Store, key: str) -> None:
    """Print everything that is known of a failed run, with its traceback.

    Args:
        console: Console to print to.
        store: Store that contains the run.
        key: Key of the run, or its beginning.

    Raises:
        CurvlabError: No failed run, or more than one, has a key with this beginning.
    """
    found = [run for run in store.failed_runs() if run["key"].startswith(key)]
    if len(found) != 1:
        raise CurvlabError(
            f"{len(found) or 'no'} failed runs of {store.path} have a key that begins with {key!r}; the "
            "command failed lists the keys"
        )
    (run,) = found
    folder = run_folder(store.path, run["key"])
    _print(
        console,
        f"{run['key']}  {run['kind']}: {run['error']}",
        f"on {run['host']}, after {format_number(run['seconds'])} seconds, in attempt {run['attempts']}",
        json.dumps(run["config"], ensure_ascii=False),
        *([f"Its files are in {folder}."] if folder.is_dir() else []),
        run["traceback"] or "There is no traceback.",
    )


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_csv(frame: "pd.DataFrame") -> str:
    """Return a table as CSV: all digits, an empty field for None, and ``nan``, ``inf`` and ``-inf`` as in Python.

    Line breaks in a text are escaped, and a text that a spreadsheet would evaluate gets an apostrophe before it.
    """
    # Not with pandas, which writes integers with an exponent in a column with a gap.
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(map(quote_formula, frame.columns))
    rows.writerows(map(quote_formula, row) for row in frame.itertuples(index=False, name=None))
    return text.getvalue()


def write_parquet(frame: "pd.DataFrame") -> bytes:
    """Return a table as Parquet, with None as null; a column of several types is written as strings.

    Raises:
        CurvlabError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CurvlabError("Parquet needs pyarrow: pip install 'curvlab[parquet]', or export CSV") from error

    def column(values: Sequence[Any]) -> Any:
        try:
            return pyarrow.array(values, from_pandas=False)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            return pyarrow.array([None if value is None else str(value) for value in values])

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: column(list(frame[name])) for name in frame}), buffer)
    return buffer.getvalue()


def save(frame: "pd.DataFrame", file: Path) -> None:
    """Write a table to a file in the format of its suffix, ``.csv`` or ``.parquet``.

    Raises:
        CurvlabError: The file has another suffix, or cannot be written.
    """
    if file.suffix == ".csv":
        # A configuration may contain a file name that UTF-8 cannot encode.
        write_whole(file, write_csv(frame).encode(errors="backslashreplace"))
    elif file.suffix == ".parquet":
        write_whole(file, write_parquet(frame))
    else:
        raise CurvlabError(f"cannot export a table to {file}: give a file that ends in .csv or .parquet")
