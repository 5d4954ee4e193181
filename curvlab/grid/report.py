"""What a store is told as: lines for the console, files for other programs."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from curvlab.errors import CurvlabError
from curvlab.files import write_whole
from curvlab.grid.running import folder_of
from curvlab.grid.store import Store
from curvlab.text import quote_formula, significant

_HOUR = 3600


def print_status(console: Console, store: Store) -> None:
    """Print how many cells are done, failed and absent, and what is to be known of them."""
    tally = store.tally()
    total = tally["done"] + tally["failed"] + tally["absent"]
    failed = ", ".join(f"{count} {kind}" for kind, count in store.kinds().items())
    seconds = store.seconds()
    time = f"{seconds / _HOUR:.1f} hours" if seconds > _HOUR else f"{seconds:.1f} seconds"
    lines = [
        f"{total:,} cells: {tally['done']:,} done, {tally['failed']:,} failed{f' ({failed})' if failed else ''}, "
        f"{tally['absent']:,} absent; {time} of work."
    ]
    if tally["earlier"]:
        lines.append(f"{tally['earlier']:,} more, of other configurations or versions, are kept.")
    if (states := len(store.software())) > 1:
        lines.append(f"{states} different versions or states of the code were used: cell.software in the export.")
    _print(console, *lines)


def print_failures(console: Console, store: Store) -> None:
    """Print the failed cells, a line each: the cell, how it failed, its axes and the error."""
    for cell in store.failed():
        axes = {name: value for name, value in cell["axes"].items() if value is not None}
        if cell["seed"] is not None:
            axes["seed"] = cell["seed"]
        named = " ".join(f"{name}={value}" for name, value in axes.items())
        _print(console, f"{cell['key'][:8]}  {cell['kind']:7}  {named}: {cell['error']}")


def print_failure(console: Console, store: Store, key: str) -> None:
    """Print all that is known of a failed cell, the traceback too.

    Args:
        console: Where to.
        store: Which has it.
        key: Of the cell, or how it begins.

    Raises:
        CurvlabError: No failed cell, or more than one, has a key that begins so.
    """
    found = [cell for cell in store.failed() if cell["key"].startswith(key)]
    if len(found) != 1:
        raise CurvlabError(f"{len(found) or 'no'} failed cells of {store.path} have a key that begins with {key!r}")
    (cell,) = found
    folder = folder_of(store.path, cell["key"])
    _print(
        console,
        f"{cell['key']}  {cell['kind']}: {cell['error']}",
        f"on {cell['host']}, after {significant(cell['seconds'])} seconds, at the attempt number {cell['attempts']}",
        json.dumps(cell["config"], ensure_ascii=False),
        *([f"What it has left is in {folder}."] if folder.is_dir() else []),
        cell["traceback"] or "There is no traceback.",
    )


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_csv(frame: pd.DataFrame) -> str:
    """Return a table as CSV: every digit, nothing for None, ``nan``, ``inf`` and ``-inf`` as Python writes them.

    A text is one line, and behind an apostrophe where a spreadsheet would compute it.
    """
    # Not by pandas, which would make numbers with an exponent of integers beside a gap.
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(map(quote_formula, frame.columns))
    rows.writerows(map(quote_formula, row) for row in frame.itertuples(index=False, name=None))
    return text.getvalue()


def write_parquet(frame: pd.DataFrame) -> bytes:
    """Return a table as Parquet, None as null; a column of several types becomes one of strings.

    Raises:
        CurvlabError: There is no pyarrow.
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


def save(frame: pd.DataFrame, file: Path) -> None:
    """Write a table to a file, as its name ends: ``.csv`` or ``.parquet``.

    Raises:
        CurvlabError: It ends otherwise, or cannot be written.
    """
    if file.suffix == ".csv":
        write_whole(
            file, write_csv(frame).encode(errors="backslashreplace")
        )  # a file of a configuration may be so named
    elif file.suffix == ".parquet":
        write_whole(file, write_parquet(frame))
    else:
        raise CurvlabError(f"a table is exported to a file that ends in .csv or .parquet, not to {file}")
