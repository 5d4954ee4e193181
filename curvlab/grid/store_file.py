"""The file of a store: the one process that may write it, and whether it is whole."""

import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from curvlab.errors import CurvlabError
from curvlab.grid import checksums
from curvlab.grid.schema import APPLICATION, FORMAT, definitions
from curvlab.grid.sqlite_errors import damage_error, report_errors


def resolve(path: Path) -> Path:
    """Return the path without links.

    Raises:
        CurvlabError: It cannot be followed.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # the latter: a link to itself
        raise CurvlabError(f"{path} is not to be had: {error}; choose another store") from error


def exists(path: Path) -> bool:
    """Return whether anything is there.

    Raises:
        CurvlabError: That cannot be found out.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a name with a null byte
        return False
    except OSError as error:
        raise CurvlabError(f"cannot read {path}: {error.strerror}; choose another store") from error
    return True


@contextmanager
def lock(path: Path) -> Iterator[None]:
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
            with report_errors(path):
                if exists(path):
                    check(path, begun=False)
        except BaseException:
            if not there:
                file.unlink(missing_ok=True)
            raise
        with suppress(OSError):  # the disk is full: it is then not said who holds the lock
            held.truncate(0)
            held.write(f"process {os.getpid()} on {platform.node()}")
            held.flush()
        yield


def connect_reader(path: Path) -> sqlite3.Connection:
    """Return a connection that changes nothing, but removes SQLite's other two files when it is the last one."""
    for mode in ("rw", "ro"):
        try:
            connection = _connect(path, f"mode={mode}")
        except sqlite3.OperationalError:  # what it has to write for its readers cannot be written here
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


def check(path: Path, begun: bool) -> None:
    """Refuse a file that is not whole, not one of ours or, if ``begun``, empty; leave nothing beside it."""
    if path.is_dir():
        raise CurvlabError(f"{path} is a folder; name the file of the store in it")
    if not path.is_file():
        raise CurvlabError(f"{path} is no regular file; choose another one for the store")
    file = resolve(path)
    log, shared = (file.with_name(f"{file.name}-{ending}") for ending in ("wal", "shm"))
    there = shared.exists()
    while True:
        before = file.stat()
        newest = log.exists() and log.stat().st_size > 0
        try:
            try:
                # As a file that does not change: nothing comes beside it, and there may be no right to write there.
                connection = _connect(file, "mode=ro" if newest else "mode=ro&immutable=1")
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
    if application != APPLICATION:
        raise CurvlabError(f"{path} is a database, but not the store of a sweep; choose another file")
    if version > FORMAT:
        raise CurvlabError(
            f"{path} was written by a newer curvlab (format {version}, this one knows {FORMAT}); update curvlab"
        )
    if version < 1:
        raise damage_error(path, "it lacks its version")
    for (kind, name), text in definitions(version).items():
        if (kind, name) not in found:
            raise damage_error(path, f"it lacks {name}")
        if found[kind, name] != text:
            raise damage_error(path, f"the {kind} {name} is not what it was made as")
    ((structure,),) = connection.execute("PRAGMA integrity_check(1)")
    if structure != "ok":
        raise damage_error(path, structure)
    if version > 1 and (what := checksums.wrong(connection)):
        raise damage_error(path, what)
