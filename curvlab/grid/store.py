"""The store of a sweep: one SQLite file that one process writes and any may read."""

import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder
from curvlab.grid import checksums
from curvlab.grid.aggregates import add_aggregates
from curvlab.grid.cell import Cell, Outcome, canonical
from curvlab.grid.schema import make_tables
from curvlab.grid.sqlite_errors import report_errors
from curvlab.grid.store_file import check, connect_reader, exists, lock, resolve
from curvlab.grid.tables import read_records, record_table, summary_table, varied_keys


class Store:
    """The cells of a sweep and what became of them.

    Made by ``reading`` and ``writing``. All tables are of the sweep as it was last run: cells that are no more of it,
    by their configuration or version, are kept and counted, and come back with the sweep that has them.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        add_aggregates(connection)

    # Writing

    def register(self, cells: Sequence[Cell], data: Mapping[str, str] = MappingProxyType({})) -> None:
        """Enter the cells of the sweep, in its order; what is known of those that were there stays.

        Args:
            cells: The sweep.
            data: Names of data sets and files that the cells read, and their fingerprints.

        Raises:
            CurvlabError: The store was begun with other data.
        """
        rows = [
            (
                cell.key,
                cell.point,
                position,
                cell.name or cell.function,
                cell.version,
                canonical(cell.config),
                _seed(cell),
                cell.seed,
            )
            for position, cell in enumerate(cells)
        ]
        with self._writes() as connection:
            known = dict(connection.execute("SELECT name, fingerprint FROM data"))
            if other := [name for name, fingerprint in data.items() if known.get(name, fingerprint) != fingerprint]:
                raise CurvlabError(
                    f"{other[0]} is not what it was for the cells that {self.path} has, and one table would mix them; "
                    "put back what it was, or choose another store (--out)"
                )
            connection.executemany("INSERT OR IGNORE INTO data (name, fingerprint) VALUES (?, ?)", data.items())
            checksums.sign(connection, "data", "checksum IS NULL")
            before = connection.execute(
                "SELECT key, point FROM cells WHERE position IS NOT NULL ORDER BY position"
            ).fetchall()
            if [row[:2] for row in rows] == before:
                return
            connection.execute("UPDATE cells SET position = NULL")
            connection.executemany(
                "INSERT INTO cells (key, point, position, name, version, config, seed, seed_name) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET position = excluded.position, "
                "point = excluded.point, seed = excluded.seed, seed_name = excluded.seed_name",
                rows,
            )
            checksums.sign(connection, "cells")

    def open_cells(self, retry_failed: bool = False) -> set[str]:
        """Return the keys of the cells that are to be run: the absent ones, and with ``retry_failed`` the failed."""
        statuses = ("absent", "failed") if retry_failed else ("absent", "absent")
        rows = self._rows("SELECT key FROM cells WHERE position IS NOT NULL AND status IN (?, ?)", statuses)
        return {key for (key,) in rows}

    def finish(self, outcome: Outcome) -> None:
        """Record what became of a cell, in one transaction; of a cell that is done nothing is changed."""
        software = canonical(outcome.software) if outcome.software else None
        with self._writes() as connection:
            if software is not None:
                connection.execute("INSERT OR IGNORE INTO software (described) VALUES (?)", (software,))
                checksums.sign(connection, "software", "checksum IS NULL")
            changed = connection.execute(
                "UPDATE cells SET status = ?, kind = ?, error = ?, traceback = ?, attempts = attempts + 1, "
                "seconds = ?, peak_bytes = ?, host = ?, threads = ?, ended = ?, "
                "software = (SELECT id FROM software WHERE described = ?) WHERE key = ? AND status <> 'done'",
                (
                    "done" if outcome.kind is None else "failed",
                    outcome.kind,
                    outcome.error,
                    outcome.traceback,
                    outcome.seconds,
                    outcome.peak_bytes,
                    outcome.host,
                    outcome.threads,
                    datetime.now(UTC).isoformat(timespec="milliseconds"),
                    software,
                    outcome.key,
                ),
            ).rowcount
            if not changed:
                return
            checksums.sign(connection, "cells", "key = ?", (outcome.key,))
            connection.execute("DELETE FROM entries WHERE cell = ?", (outcome.key,))
            connection.executemany(
                "INSERT INTO entries (cell, row, number, name, type, value) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (outcome.key, row, number, name, type(value).__name__, value)
                    for row, record in enumerate(outcome.records)
                    for number, (name, value) in enumerate(record.items())
                ],
            )
            checksums.sign(connection, "entries", "cell = ?", (outcome.key,))

    # Reading

    def tally(self) -> dict[str, int]:
        """Return how many cells are ``done``, ``failed`` and ``absent``, and how many are kept of earlier sweeps."""
        counts = dict.fromkeys(("done", "failed", "absent", "earlier"), 0)
        return counts | dict(
            self._rows(
                "SELECT CASE WHEN position IS NULL THEN 'earlier' ELSE status END AS what, count(*) "
                "FROM cells GROUP BY what"
            )
        )

    def failed(self) -> list[dict[str, Any]]:
        """Return the failed cells in the order of the sweep: their columns, and what sets them apart as ``axes``."""
        columns = ("key", "kind", "error", "traceback", "seed", "seconds", "peak_bytes", "host", "attempts", "config")
        rows = self._rows(
            f"SELECT {', '.join(columns)} FROM cells WHERE position IS NOT NULL AND status = 'failed' ORDER BY position"
        )
        varied = self.axes()
        found = []
        for row in rows:
            cell = dict(zip(columns, row, strict=True))
            config = json.loads(cell["config"])
            found.append(cell | {"config": config, "axes": {name: config.get(name) for name in varied}})
        return found

    def axes(self) -> list[str]:
        """Return the keys whose values differ between the configurations of the sweep, the seed left out."""
        return varied_keys(self._rows)

    def kinds(self) -> dict[str, int]:
        """Return how many cells have failed in which way."""
        return dict(
            self._rows(
                "SELECT kind, count(*) FROM cells WHERE position IS NOT NULL AND status = 'failed' "
                "GROUP BY kind ORDER BY kind"
            )
        )

    def software(self) -> dict[int, dict[str, Any]]:
        """Return the versions and states of the code that the cells of the sweep were computed with, by their number.

        It is one, unless the sweep was continued with others.
        """
        query = "SELECT id, described FROM software WHERE id IN (SELECT software FROM cells WHERE position IS NOT NULL)"
        return {number: json.loads(text) for number, text in self._rows(query)}

    def seconds(self) -> float:
        """Return the seconds that the cells of the sweep have taken, added up."""
        ((seconds,),) = self._rows("SELECT total(seconds) FROM cells WHERE position IS NOT NULL")
        return float(seconds)

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the cells that are done, as the cells returned them, in the order of the sweep."""
        return [record for key, record in read_records(self._rows) if key[1] == "done"]

    def table(self) -> pd.DataFrame:
        """Return a row a record: the cell, its axes (``config.NAME``), the record, what it took, and how it failed.

        A cell without records, failed or absent, has a row too.
        """
        return record_table(self._rows)

    def summary(self, by: Sequence[str] = (), values: Sequence[str] | None = None) -> pd.DataFrame:
        """Return means and standard deviations over the seeds, a row a configuration and group of records.

        Args:
            by: The keys of the records that make a group; strings always do.
            values: The keys of the numbers to average; None for all but ``seed``.

        Returns:
            The axes, the keys ``by``, ``seeds`` (done), ``failed`` and ``absent`` (how many more there should be) and
            for each value its mean and ``<value>_std`` (n - 1; missing for one seed). Where a record of the group has
            None or an infinite number, the mean is missing too. Booleans have none. Bit for bit the same in whatever
            order the cells ended.

        Raises:
            CurvlabError: No record has such a key, a seed has several records in a group, or one of the values is
                called as another one's standard deviation.
        """
        return summary_table(self._rows, by, values)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with report_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _writes(self) -> Iterator[sqlite3.Connection]:
        with report_errors(self.path), self._connection:  # commits, or rolls back
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection


@contextmanager
def writing(path: Path) -> Iterator[Store]:
    """Open a store as its one writer; make it where there is none. One without checksums is given them.

    Raises:
        CurvlabError: Another process writes it, it cannot be written, it is damaged, of a newer version or no store.
    """
    path = resolve(path)  # under any name it has one lock
    make_writable_folder(path.parent)
    with lock(path), report_errors(path):
        connection = sqlite3.connect(path, isolation_level=None, timeout=30)
        try:
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise CurvlabError(f"{path} lies on a file system without shared memory; choose a local folder")
            connection.execute("PRAGMA synchronous = FULL")  # also what the machine's power takes is whole or absent
            connection.execute("PRAGMA foreign_keys = ON")
            checksums.able_to_sign(connection)
            make_tables(connection)
            yield Store(path, connection)
        finally:
            connection.close()


@contextmanager
def reading(path: Path) -> Iterator[Store]:
    """Open a store to read it, also while another process writes it.

    Raises:
        CurvlabError: There is none, or it is damaged, of a newer version or no store.
    """
    if not exists(path):
        raise CurvlabError(f"there is no store {path}; name the file that a run has made, which ends in .sqlite")
    with report_errors(path):
        check(path, begun=True)
        connection = connect_reader(resolve(path))
        try:
            yield Store(path, connection)
        finally:
            connection.close()


def _seed(cell: Cell) -> int | None:
    value = cell.config.get(cell.seed)
    if isinstance(value, Collection) and not isinstance(value, str) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, int) else None
