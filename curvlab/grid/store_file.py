"""File of a store: its lock for a single writer, and its check for damage."""

import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from curvlab.errors import CurvlabError
from curvlab.grid import checksums
from curvlab.grid.schema import APPLICATION, FORMAT, list_definitions
from curvlab.grid.sqlite_errors import damage_error, report_errors


def resolve(path: Path) -> Path:
    """Return the path with its symbolic links resolved.

    Raises:
        CurvlabError: The links cannot be resolved.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # the latter: a link to itself
        raise CurvlabError(f"cannot open {path}: {error}; choose another store") from error


def exists(path: Path) -> bool:
    """Return whether a path exists.

    Raises:
        CurvlabError: The path cannot be looked up, as in a folder without permission.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a null byte
        return False
    except OSError as error:
        raise CurvlabError(f"cannot read {path}: {error.strerror}; choose another store") from error
    return True


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Check a store and hold its lock for writing; the system releases the lock of a killed process."""
    try:
        import fcntl
    except ImportError as error:
        raise CurvlabError("sweeps need Linux or macOS; on Windows, run them in WSL") from error
    file = path.with_name(f"{path.name}.lock")
    while True:
        existed = file.exists()
        try:
            held: IO[str] = file.open("a+")
        except OSError as error:
            raise CurvlabError(f"cannot write {file}: {error.strerror}; choose a writable folder") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held.seek(0)
            who = held.read().strip() or "another process"
            held.close()
            raise CurvlabError(
                f"{path} is being written by {who}; wait until it ends, or choose another store"
            ) from error
        with suppress(FileNotFoundError):  # another process refused the store and removed the lock
            if os.path.samestat(os.fstat(held.fileno()), file.stat()):
                break
        held.close()
    with held:
        try:
            with report_errors(path):
                if exists(path):
                    check(path, need_tables=False)
        except BaseException:
            if not existed:
                file.unlink(missing_ok=True)
            raise
        with suppress(OSError):  # on a full disk the lock does not name its process
            held.truncate(0)
            held.write(f"process {os.getpid()} on {platform.node()}")
            held.flush()
        yield


def connect_reader(path: Path) -> sqlite3.Connection:
    """Return a read-only connection. The last connection to a store removes SQLite's other two files."""
    for mode in ("rw", "ro"):
        try:
            connection = _connect(path, f"mode={mode}")
        except sqlite3.OperationalError:  # SQLite cannot write its shared-memory file here
            continue
        connection.execute("PRAGMA query_only = ON")
        return connection
    return _connect(path, "mode=ro&immutable=1")


def _connect(path: Path, how: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.as_uri()}?{how}", uri=True, timeout=30, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def check(path: Path, need_tables: bool) -> None:
    """Refuse a file that is damaged, not a store or, if ``need_tables``, empty; leave no file beside it.

    Raises:
        CurvlabError: The file is refused.
    """
    if path.is_dir():
        raise CurvlabError(f"{path} is a folder; give the file of the store in it")
    if not path.is_file():
        raise CurvlabError(f"{path} is not a regular file; choose another file for the store")
    file = resolve(path)
    log, shared = (file.with_name(f"{file.name}-{ending}") for ending in ("wal", "shm"))
    existed = shared.exists()
    while True:
        before = file.stat()
        newest = log.exists() and log.stat().st_size > 0
        try:
            try:
                # Immutable: SQLite then creates no files beside it, and needs no permission to.
                connection = _connect(file, "mode=ro" if newest else "mode=ro&immutable=1")
            except sqlite3.OperationalError as error:
                if not newest or error.sqlite_errorcode & 0xFF not in (
                    sqlite3.SQLITE_CANTOPEN,
                    sqlite3.SQLITE_READONLY,
                ):
                    raise
                raise CurvlabError(
                    f"the newest part of {path} is in {log.name}, which SQLite cannot read in a read-only folder; "
                    "copy both files to a writable folder"
                ) from error
            try:
                _examine(path, connection, need_tables)
            finally:
                connection.close()
        except (CurvlabError, sqlite3.Error, UnicodeDecodeError):
            now = file.stat()
            if not newest and (now.st_mtime_ns, now.st_size) != (before.st_mtime_ns, before.st_size):
                continue  # another process has just written to it
            if not existed:
                shared.unlink(missing_ok=True)
            raise
        return


def _examine(path: Path, connection: sqlite3.Connection, need_tables: bool) -> None:
    connection.text_factory = lambda text: text.decode(errors="surrogateescape")  # invalid text then fails the checksum
    connection.execute("BEGIN")  # one state, while another process may be writing
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    found = {(kind, name): text for kind, name, text in connection.execute("SELECT type, name, sql FROM sqlite_master")}
    if not (application or version or found or need_tables):
        return  # the sweep was killed before it created the tables
    if application != APPLICATION:
        raise CurvlabError(f"{path} is a database, but not the store of a sweep; choose another file")
    if version < 1:
        raise damage_error(path, "its version is missing")
    if version != FORMAT:
        other, way_out = "an earlier", "read it with that version, and run again with another store (--out)"
        if version > FORMAT:
            other, way_out = "a newer", "update curvlab"
        raise CurvlabError(
            f"{path} was written by {other} curvlab (store format {version}, this one reads format {FORMAT} only); "
            f"{way_out}"
        )
    for (kind, name), text in list_definitions().items():
        if (kind, name) not in found:
            raise damage_error(path, f"{name} is missing")
        if found[kind, name] != text:
            raise damage_error(path, f"the definition of the {kind} {name} has changed")
    ((structure,),) = connection.execute("PRAGMA integrity_check(1)")
    if structure != "ok":
        raise damage_error(path, structure)
    if damage := checksums.find_damage(connection):
        raise damage_error(path, damage)
