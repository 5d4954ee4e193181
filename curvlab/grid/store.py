"""Store of a sweep: one SQLite file with a single writer and any number of readers."""

import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder
from curvlab.grid import checksums
from curvlab.grid.aggregates import add_aggregates
from curvlab.grid.run_spec import Outcome, RunSpec, canonical
from curvlab.grid.schema import make_tables
from curvlab.grid.sqlite_errors import report_errors
from curvlab.grid.store_file import check, connect_reader, exists, lock, resolve
from curvlab.grid.tables import read_records, record_table, summary_table, varied_keys

if TYPE_CHECKING:
    import pandas as pd


class StoreMismatchError(CurvlabError):
    """The runs in a store have read other data, or called another version of a function: it cannot be continued."""


class Store:
    """The runs of a sweep and their outcomes.

    Opened by ``read_store`` and ``write_store``. All tables cover the most recent sweep. Runs of earlier sweeps with
    other configurations or versions are kept and counted, and are used again by a sweep that contains them.

    Attributes:
        path: Path of the file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        add_aggregates(connection)

    # Writing

    def register(
        self,
        specs: Sequence[RunSpec],
        data: Mapping[str, str] = MappingProxyType({}),
        functions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Set the runs of the sweep, in its order; outcomes of runs that the store has already are kept.

        Args:
            specs: Runs of the sweep.
            data: Names of the data sets and files that the runs read -> their fingerprints.
            functions: Functions that the runs call -> fingerprints of their source and of what they return.

        Raises:
            StoreMismatchError: Runs in the store have read other data, or have called another version of a function.
        """
        rows = [
            (
                spec.key,
                spec.point,
                position,
                spec.name or spec.function,
                spec.version,
                canonical(spec.config),
                _find_seed(spec),
                spec.seed_key,
            )
            for position, spec in enumerate(specs)
        ]
        with self._transaction() as connection:
            known = dict(connection.execute("SELECT name, fingerprint FROM data"))
            if other := [name for name, fingerprint in data.items() if known.get(name, fingerprint) != fingerprint]:
                raise StoreMismatchError(
                    f"the runs in {self.path} have read other data of {other[0]}, and one table must not mix them; "
                    "restore the former data, or choose another store (--out)"
                )
            if other := [name for name, version in functions.items() if known.get(name, version) != version]:
                raise StoreMismatchError(
                    f"the runs in {self.path} have called another version of {other[0]}: its source files, or what it "
                    "returns, have changed since, and one table must not mix them; restore the former version, or "
                    "choose another store (--out)"
                )
            seen = {**data, **functions}
            connection.executemany("INSERT OR IGNORE INTO data (name, fingerprint) VALUES (?, ?)", seen.items())
            checksums.sign(connection, "data", "checksum IS NULL")
            before = connection.execute(
                "SELECT key, point FROM runs WHERE position IS NOT NULL ORDER BY position"
            ).fetchall()
            if [row[:2] for row in rows] == before:
                return
            connection.execute("UPDATE runs SET position = NULL")
            connection.executemany(
                "INSERT INTO runs (key, point, position, name, version, config, seed, seed_key) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET position = excluded.position, "
                "point = excluded.point, seed = excluded.seed, seed_key = excluded.seed_key",
                rows,
            )
            checksums.sign(connection, "runs")

    def pending_runs(self, retry_failed: bool = False) -> set[str]:
        """Return the keys of the runs to execute: the absent ones, and with ``retry_failed`` also the failed ones."""
        statuses = ("absent", "failed") if retry_failed else ("absent", "absent")
        rows = self._rows("SELECT key FROM runs WHERE position IS NOT NULL AND status IN (?, ?)", statuses)
        return {key for (key,) in rows}

    def finish(self, outcome: Outcome) -> None:
        """Store the outcome of a run in one transaction; a run that is done already does not change."""
        software = canonical(outcome.software) if outcome.software else None
        with self._transaction() as connection:
            if software is not None:
                connection.execute("INSERT OR IGNORE INTO software (described) VALUES (?)", (software,))
                checksums.sign(connection, "software", "checksum IS NULL")
            changed = connection.execute(
                "UPDATE runs SET status = ?, kind = ?, error = ?, traceback = ?, attempts = attempts + 1, "
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
            checksums.sign(connection, "runs", "key = ?", (outcome.key,))
            connection.execute("DELETE FROM entries WHERE run = ?", (outcome.key,))
            connection.executemany(
                "INSERT INTO entries (run, row, number, name, type, value) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (outcome.key, row, number, name, type(value).__name__, value)
                    for row, record in enumerate(outcome.records)
                    for number, (name, value) in enumerate(record.items())
                ],
            )
            checksums.sign(connection, "entries", "run = ?", (outcome.key,))

    # Reading

    def tally(self) -> dict[str, int]:
        """Return the numbers of runs: ``done``, ``failed``, ``absent``, and those of ``earlier`` sweeps."""
        counts = dict.fromkeys(("done", "failed", "absent", "earlier"), 0)
        return counts | dict(
            self._rows(
                "SELECT CASE WHEN position IS NULL THEN 'earlier' ELSE status END AS what, count(*) "
                "FROM runs GROUP BY what"
            )
        )

    def failed_runs(self) -> list[dict[str, Any]]:
        """Return the failed runs in the order of the sweep: their columns, and ``axes`` with the values of the axes."""
        columns = ("key", "kind", "error", "traceback", "seed", "seconds", "peak_bytes", "host", "attempts", "config")
        rows = self._rows(
            f"SELECT {', '.join(columns)} FROM runs WHERE position IS NOT NULL AND status = 'failed' ORDER BY position"
        )
        varied = self.axes()
        found = []
        for row in rows:
            run = dict(zip(columns, row, strict=True))
            config = json.loads(run["config"])
            found.append(run | {"config": config, "axes": {name: config.get(name) for name in varied}})
        return found

    def axes(self) -> list[str]:
        """Return the keys whose values differ between the configurations of the sweep, except the key of the seed."""
        return varied_keys(self._rows)

    def count_failures(self) -> dict[str, int]:
        """Return the number of failed runs by kind of failure."""
        return dict(
            self._rows(
                "SELECT kind, count(*) FROM runs WHERE position IS NOT NULL AND status = 'failed' "
                "GROUP BY kind ORDER BY kind"
            )
        )

    def software(self) -> dict[int, dict[str, Any]]:
        """Return the software that the runs of the sweep have used: id -> versions and git state.

        There is more than one if the sweep was continued with other software.
        """
        query = "SELECT id, described FROM software WHERE id IN (SELECT software FROM runs WHERE position IS NOT NULL)"
        return {number: json.loads(text) for number, text in self._rows(query)}

    def seconds(self) -> float:
        """Return the total wall time of the runs of the sweep, in seconds."""
        ((seconds,),) = self._rows("SELECT total(seconds) FROM runs WHERE position IS NOT NULL")
        return float(seconds)

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the runs that are done, as they were returned, in the order of the sweep."""
        return [record for key, record in read_records(self._rows) if key[1] == "done"]

    def records_by_key(self) -> dict[str, list[dict[str, Any]]]:
        """Return the records of every finished run of the sweep, by its key."""
        found: dict[str, list[dict[str, Any]]] = {}
        for (key, status), record in read_records(self._rows):
            if status == "done":
                found.setdefault(key, []).append(record)
        return found

    def table(self) -> "pd.DataFrame":
        """Return a table with one row per record.

        Its columns are the run, its axes (``config.NAME``), the record, and the cost and the error of the run. A run
        without records, failed or absent, has one row.
        """
        return record_table(self._rows)

    def summary(self, by: Sequence[str] = (), values: Sequence[str] | None = None) -> "pd.DataFrame":
        """Return means and standard deviations over the seeds, one row per configuration and group of records.

        Args:
            by: Record keys that define the groups, in addition to every key with string values.
            values: Record keys of the numbers to average; None for all except ``seed``.

        Returns:
            A table with the axes, the keys of the groups, the numbers of runs that are done (``seeds``), ``failed``
            and ``absent``, and for each value its mean and ``<value>_std`` (n - 1; missing for one seed). Both are
            missing if a record of the group has None or an infinite number. Booleans are not averaged. The result
            does not depend on the order in which the runs ended, to the bit.

        Raises:
            CurvlabError: No record has a given key, a run has several records in a group, or a value has the name of
                the standard deviation of another value.
        """
        return summary_table(self._rows, by, values)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with report_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with report_errors(self.path), self._connection:  # commits, or rolls back
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection


@contextmanager
def write_store(path: Path) -> Iterator[Store]:
    """Open a store as its only writer; create it if it does not exist.

    Raises:
        CurvlabError: Another process writes the store, or the file is not writable, damaged, not a store, or a store
            of another format.
    """
    path = resolve(path)  # one lock for all names of the file
    make_writable_folder(path.parent)
    with lock(path), report_errors(path):
        connection = sqlite3.connect(path, isolation_level=None, timeout=30)
        try:
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise CurvlabError(f"{path} is on a file system without shared memory; choose a local folder")
            connection.execute("PRAGMA synchronous = FULL")  # transactions stay atomic also after a power failure
            connection.execute("PRAGMA foreign_keys = ON")
            checksums.add_digest(connection)
            make_tables(connection)
            yield Store(path, connection)
        finally:
            connection.close()


@contextmanager
def read_store(path: Path) -> Iterator[Store]:
    """Open a store for reading, also while another process writes to it.

    Raises:
        CurvlabError: The file does not exist, is damaged, not a store, or a store of another format.
    """
    if not exists(path):
        raise CurvlabError(f"there is no store {path}; give the file that a sweep has written, which ends in .sqlite")
    with report_errors(path):
        check(path, need_tables=True)
        connection = connect_reader(resolve(path))
        try:
            yield Store(path, connection)
        finally:
            connection.close()


def _find_seed(spec: RunSpec) -> int | None:
    value = spec.config.get(spec.seed_key)
    if isinstance(value, Collection) and not isinstance(value, str) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, int) else None
