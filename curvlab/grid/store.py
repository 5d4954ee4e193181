"""The store of a sweep: one SQLite file that one process writes and any may read."""

import json
import math
import os
import platform
import sqlite3
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import pandas as pd

from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder
from curvlab.grid import checksums
from curvlab.grid.cell import Cell, Outcome, canonical

FORMAT = 2  # of the tables below; a file of a later one is refused, and one of 1 has no checksums
_APPLICATION = 0x63757276  # "curv", in the header of the file

_SCHEMA = """
CREATE TABLE cells (
    key TEXT PRIMARY KEY,       -- hash of name, version and configuration
    point TEXT NOT NULL,        -- the same without the seed
    position INTEGER,           -- in the sweep; NULL: not of the sweep as it was last run
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    config TEXT NOT NULL,       -- JSON, whole
    seed INTEGER,
    seed_name TEXT NOT NULL,    -- its key in config
    status TEXT NOT NULL DEFAULT 'absent' CHECK (status IN ('absent', 'done', 'failed')),
    kind TEXT,                  -- how it failed: raised, killed, timeout, nan
    error TEXT,
    traceback TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    seconds REAL,
    peak_bytes INTEGER,
    host TEXT,
    threads INTEGER,
    software INTEGER REFERENCES software (id),
    ended TEXT                  -- UTC
);
CREATE INDEX cells_of_point ON cells (point);
CREATE TABLE software (id INTEGER PRIMARY KEY, described TEXT NOT NULL UNIQUE);  -- JSON: versions, git
CREATE TABLE data (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;  -- what the cells read
CREATE TABLE entries (
    cell TEXT NOT NULL REFERENCES cells (key),
    row INTEGER NOT NULL,       -- which of the cell's records
    number INTEGER NOT NULL,    -- which of the record's entries
    name TEXT NOT NULL,
    type TEXT NOT NULL CHECK (type IN ('NoneType', 'bool', 'int', 'float', 'str')),
    value,                      -- as it is; NaN, which SQLite does not have, is a float without one
    PRIMARY KEY (cell, row, number)
) WITHOUT ROWID;
"""


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
        connection.create_aggregate("mean", 1, _Mean)  # type: ignore[arg-type]
        connection.create_aggregate("std", 1, _Std)  # type: ignore[arg-type]

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
        rows = self._rows(
            "SELECT name FROM (SELECT entry.key AS name, count(*) AS number FROM cells, json_each(config) AS entry "
            "WHERE position IS NOT NULL AND entry.key <> seed_name GROUP BY entry.key, entry.type, entry.value) "
            "GROUP BY name HAVING count(*) > 1 "
            "OR sum(number) < (SELECT count(*) FROM cells WHERE position IS NOT NULL) ORDER BY name"
        )
        return [name for (name,) in rows]

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
        return [record for key, record in self._records() if key[1] == "done"]

    def table(self) -> pd.DataFrame:
        """Return a row a record: the cell, its axes (``config.NAME``), the record, what it took, and how it failed.

        A cell without records, failed or absent, has a row too.
        """
        axes = self.axes()
        described = (
            "key",
            "status",
            "kind",
            "error",
            "config",
            "seed",
            "seconds",
            "peak_bytes",
            "host",
            "threads",
            "software",
            "ended",
        )
        cells = self._rows(f"SELECT {', '.join(described)} FROM cells WHERE position IS NOT NULL ORDER BY position")
        of_cell: dict[str, list[dict[str, Any]]] = {}
        for (key, _), record in self._records():
            of_cell.setdefault(key, []).append(record)
        rows = []
        for values in cells:
            cell = dict(zip(described, values, strict=True))
            config = json.loads(cell.pop("config"))
            head = {"cell": cell.pop("key"), "status": cell.pop("status"), "kind": cell.pop("kind")}
            head |= {f"config.{name}": _text(config.get(name)) for name in axes} | {"config.seed": cell.pop("seed")}
            tail = {f"cell.{name}": value for name, value in cell.items()}
            rows += [head | record | tail for record in of_cell.get(head["cell"], [{}])]
        number = {name: place for place, name in enumerate(dict.fromkeys(name for row in rows for name in row))}
        ordered = sorted(number, key=lambda name: (name.startswith("cell."), number[name]))
        return _frame(rows, ordered)

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
        here = "cells.position IS NOT NULL AND cells.status = 'done'"
        rows = self._rows(
            f"SELECT e.name, type, count(*) FROM entries AS e JOIN cells ON cells.key = cell WHERE {here} "
            "GROUP BY e.name, type ORDER BY min(number), e.name"
        )
        known = list(dict.fromkeys(name for name, _, _ in rows))
        texts = [name for name, kind, _ in rows if kind == "str"]
        numbers = [name for name, kind, _ in rows if kind in ("int", "float")]
        for name in (*by, *(values or ())):
            if known and name not in known:
                raise CurvlabError(f"no record has {name!r}; they have {', '.join(known)}")
        groups = list(dict.fromkeys([*texts, *by]))
        averaged = [n for n in dict.fromkeys(numbers) if n not in (*groups, "seed") and (values is None or n in values)]
        if twice := [name for name in averaged if f"{name}_std" in (*groups, *averaged)]:
            raise CurvlabError(
                f"the records have {twice[0]}_std, which is what the standard deviation of {twice[0]} is called here; "
                "name with --values those to average, without one of the two"
            )
        joins = "".join(
            f" LEFT JOIN entries AS g{n} ON g{n}.cell = e.cell AND g{n}.row = e.row AND g{n}.name = ?"
            for n in range(len(groups))
        )
        keys = ", ".join(["point", *(f"g{n}.value" for n in range(len(groups)))])
        found = self._rows(
            f"SELECT e.name, mean(e.value), std(e.value), count(*), count(DISTINCT e.cell), {keys} "
            f"FROM entries AS e JOIN cells ON cells.key = e.cell{joins} "
            f"WHERE {here} AND e.name IN (SELECT value FROM json_each(?)) "
            f"GROUP BY e.name, {keys} ORDER BY min(position), min(e.row), min(e.number)",
            (*groups, json.dumps(averaged)),
        )
        seeds = {
            tuple(group): count
            for count, *group in self._rows(
                f"SELECT count(DISTINCT e.cell), {keys} FROM entries AS e "
                f"JOIN cells ON cells.key = e.cell{joins} WHERE {here} GROUP BY {keys}",
                groups,
            )
        }
        tables: dict[Any, dict[tuple[Any, ...], dict[str, Any]]] = {}
        for name, mean, std, count, cells, point, *group in found:
            if count > cells:
                raise CurvlabError(
                    f"a cell has {count // cells} records of the same group; name what tells them apart with "
                    f"--by (one or several of {', '.join(n for n in known if n not in groups)})"
                )
            row = tables.setdefault(point, {}).setdefault(tuple(group), {"seeds": seeds[point, *group]})
            if cells < row["seeds"]:  # a seed without the number: as one with None
                mean = std = None
            row |= {name: mean, f"{name}_std": std}
        axes = self.axes()
        points = self._rows(
            "SELECT point, min(config), sum(status = 'done'), sum(status = 'failed'), sum(status = 'absent') "
            "FROM cells WHERE position IS NOT NULL GROUP BY point ORDER BY min(position)"
        )
        lines = []
        for point, config, done, failed, absent in points:
            whole = json.loads(config)
            head = {f"config.{name}": _text(whole.get(name)) for name in axes}
            for group, row in tables.get(point, {(): {"seeds": done}}).items():
                named = dict(zip(groups, group, strict=True)) if group else {}
                lines.append(head | named | {"seeds": row.pop("seeds"), "failed": failed, "absent": absent} | row)
        columns = [f"config.{name}" for name in axes] + groups + ["seeds", "failed", "absent"]
        columns += [name for value in averaged for name in (value, f"{value}_std")]
        return _frame(lines, columns)

    def _records(self) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
        """Yield ``(key, status)`` and each record of the sweep, in its order."""
        rows = self._rows(
            "SELECT cells.key, status, row, entries.name, type, value FROM entries JOIN cells ON cells.key = cell "
            "WHERE position IS NOT NULL ORDER BY position, row, number"
        )
        last, record = None, {}
        for key, status, row, name, kind, value in rows:
            if last is not None and last != (key, status, row):
                yield last[:2], record
                record = {}
            last = (key, status, row)
            record[name] = math.nan if kind == "float" and value is None else bool(value) if kind == "bool" else value
        if last is not None:
            yield last[:2], record

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with _told(self.path):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _writes(self) -> Iterator[sqlite3.Connection]:
        with _told(self.path), self._connection:  # commits, or rolls back
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection


@contextmanager
def writing(path: Path) -> Iterator[Store]:
    """Open a store as its one writer; make it where there is none. One without checksums is given them.

    Raises:
        CurvlabError: Another process writes it, it cannot be written, it is damaged, of a newer version or no store.
    """
    path = _resolved(path)  # under any name it has one lock
    make_writable_folder(path.parent)
    with _lock(path), _told(path):
        connection = sqlite3.connect(path, isolation_level=None, timeout=30)
        try:
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise CurvlabError(f"{path} lies on a file system without shared memory; choose a local folder")
            connection.execute("PRAGMA synchronous = FULL")  # also what the machine's power takes is whole or absent
            connection.execute("PRAGMA foreign_keys = ON")
            checksums.able_to_sign(connection)
            _bring_up_to_date(connection)
            yield Store(path, connection)
        finally:
            connection.close()


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Make the tables, or their checksums, where there are none."""
    ((version,),) = connection.execute("PRAGMA user_version")
    if version == FORMAT:
        return
    tables = f"{_SCHEMA} PRAGMA application_id = {_APPLICATION};" if version == 0 else ""
    connection.executescript(f"BEGIN IMMEDIATE; {tables} {checksums.SCHEMA}")
    for table in checksums.TABLES:
        checksums.sign(connection, table)
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute("COMMIT")


@contextmanager
def reading(path: Path) -> Iterator[Store]:
    """Open a store to read it, also while another process writes it.

    Raises:
        CurvlabError: There is none, or it is damaged, of a newer version or no store.
    """
    if not _is_there(path):
        raise CurvlabError(f"there is no store {path}; name the file that a run has made, which ends in .sqlite")
    with _told(path):
        _check(path, begun=True)
        connection = _reader(_resolved(path))
        try:
            yield Store(path, connection)
        finally:
            connection.close()


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # the latter: a link to itself
        raise CurvlabError(f"{path} is not to be had: {error}; choose another store") from error


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a name with a null byte
        return False
    except OSError as error:
        raise CurvlabError(f"cannot read {path}: {error.strerror}; choose another store") from error
    return True


def _reader(path: Path) -> sqlite3.Connection:
    """Return a connection that changes nothing, but removes SQLite's other two files when it is the last one."""
    for mode in ("rw", "ro"):
        try:
            connection = _connected(path, f"mode={mode}")
        except sqlite3.OperationalError:  # what it has to write for its readers cannot be written here
            continue
        connection.execute("PRAGMA query_only = ON")
        return connection
    return _connected(path, "mode=ro&immutable=1")


def _connected(path: Path, how: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.as_uri()}?{how}", uri=True, timeout=30, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _check(path: Path, begun: bool) -> None:
    """Refuse a file that is not whole, not one of ours or, if ``begun``, empty; leave nothing beside it."""
    if path.is_dir():
        raise CurvlabError(f"{path} is a folder; name the file of the store in it")
    if not path.is_file():
        raise CurvlabError(f"{path} is no regular file; choose another one for the store")
    file = _resolved(path)
    log, shared = (file.with_name(f"{file.name}-{ending}") for ending in ("wal", "shm"))
    there = shared.exists()
    while True:
        before = file.stat()
        newest = log.exists() and log.stat().st_size > 0
        try:
            try:
                # As a file that does not change: nothing comes beside it, and there may be no right to write there.
                connection = _connected(file, "mode=ro" if newest else "mode=ro&immutable=1")
            except sqlite3.OperationalError as error:
                if not newest or error.sqlite_errorcode & 0xFF not in (
                    sqlite3.SQLITE_CANTOPEN,
                    sqlite3.SQLITE_READONLY,
                ):
                    raise
                raise CurvlabError(
                    f"the newest part of {path} is in {log.name}, which cannot be read where nothing can be written; "
                    "copy both to a folder that is writable"
                ) from error
            try:
                _examine(path, connection, begun)
            finally:
                connection.close()
        except (CurvlabError, sqlite3.Error, UnicodeDecodeError):
            now = file.stat()
            if not newest and (now.st_mtime_ns, now.st_size) != (before.st_mtime_ns, before.st_size):
                continue  # another process has just written it
            if not there:
                shared.unlink(missing_ok=True)
            raise
        return


def _examine(path: Path, connection: sqlite3.Connection, begun: bool) -> None:
    connection.text_factory = lambda text: text.decode(errors="surrogateescape")  # what is no text is a wrong one
    connection.execute("BEGIN")  # another process may be writing
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    found = {(kind, name): text for kind, name, text in connection.execute("SELECT type, name, sql FROM sqlite_master")}
    if not (application or version or found or begun):
        return  # a run was killed before it could make the tables
    if application != _APPLICATION:
        raise CurvlabError(f"{path} is a database, but not the store of a sweep; choose another file")
    if version > FORMAT:
        raise CurvlabError(
            f"{path} was written by a newer curvlab (format {version}, this one knows {FORMAT}); update curvlab"
        )
    if version < 1:
        raise _damaged(path, "it lacks its version")
    for (kind, name), text in _definitions(version).items():
        if (kind, name) not in found:
            raise _damaged(path, f"it lacks {name}")
        if found[kind, name] != text:
            raise _damaged(path, f"the {kind} {name} is not what it was made as")
    ((structure,),) = connection.execute("PRAGMA integrity_check(1)")
    if structure != "ok":
        raise _damaged(path, structure)
    if version > 1 and (what := checksums.wrong(connection)):
        raise _damaged(path, what)


@cache
def _definitions(version: int) -> dict[tuple[str, str], str]:
    """Return what a store of a version defines: type and name -> SQL."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_SCHEMA + (checksums.SCHEMA if version > 1 else ""))
        return {
            (kind, name): sql for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master")
        }


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the right to write a store that is whole; the system takes it back from a process that is killed."""
    try:
        import fcntl
    except ImportError as error:
        raise CurvlabError("sweeps run on Linux and macOS; on Windows, run them in WSL") from error
    file = path.with_name(f"{path.name}.lock")
    while True:
        there = file.exists()
        try:
            held: IO[str] = file.open("a+")
        except OSError as error:
            raise CurvlabError(f"cannot write {file}: {error.strerror}; choose a folder that is writable") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held.seek(0)
            who = held.read().strip() or "another process"
            held.close()
            raise CurvlabError(
                f"{path} is being written by {who}; wait for its end, or choose another store"
            ) from error
        with suppress(FileNotFoundError):  # another process has removed it, since it refused the store
            if os.path.samestat(os.fstat(held.fileno()), file.stat()):
                break
        held.close()
    with held:
        try:
            with _told(path):
                if _is_there(path):
                    _check(path, begun=False)
        except BaseException:
            if not there:
                file.unlink(missing_ok=True)
            raise
        with suppress(OSError):  # the disk is full: it is then not said who holds the lock
            held.truncate(0)
            held.write(f"process {os.getpid()} on {platform.node()}")
            held.flush()
        yield


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite into one sentence each."""
    try:
        yield
    except UnicodeDecodeError as error:  # in a message of SQLite
        raise _damaged(path, "it has what is no text") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(path, str(error)) from error
        if code == sqlite3.SQLITE_FULL:
            reason = "there is no space left; make some, and repeat the command: what is finished is in the store"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            reason = f"{error}; choose a folder that is writable"
        elif code == sqlite3.SQLITE_BUSY:
            reason = "another program holds it; close that program"
        elif code == sqlite3.SQLITE_IOERR:
            reason = f"{error}; is the disk full or gone? what is finished is in the store"
        else:
            raise CurvlabError(f"cannot use {path}: {error}") from error
        raise CurvlabError(f"cannot write {path}: {reason}") from error


def _damaged(path: Path, what: str) -> CurvlabError:
    return CurvlabError(
        f"{path} is damaged or no store ({what}); move it away, or save what can be read with: "
        f"sqlite3 {path} .recover | sqlite3 recovered.sqlite"
    )


def _seed(cell: Cell) -> int | None:
    value = cell.config.get(cell.seed)
    if isinstance(value, Collection) and not isinstance(value, str) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, int) else None


def _frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    # As objects: a column of integers with a gap stays one of integers, and NaN is told from nothing, which is None.
    return pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=list(columns), dtype=object)


def _text(value: Any) -> Any:
    return canonical(value) if isinstance(value, list | dict) else value


class _Values:
    """An SQL aggregate that gathers numbers."""

    def __init__(self) -> None:
        self.values: list[float | None] = []

    def step(self, value: Any) -> None:
        self.values.append(float(value) if isinstance(value, int | float) else None)

    def known(self) -> list[float]:
        """Return the numbers; none if one is missing, not finite or no number."""
        known = [value for value in self.values if value is not None and math.isfinite(value)]
        return known if len(known) == len(self.values) else []


class _Mean(_Values):
    def finalize(self) -> float | None:
        known = self.known()
        return math.fsum(known) / len(known) if known else None  # exact, whatever the order


class _Std(_Values):
    def finalize(self) -> float | None:
        known = self.known()
        return statistics.stdev(known) if len(known) > 1 else None  # in exact fractions
