"""Translation of SQLite's errors about a store to ``CurvlabError``."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curvlab.errors import CurvlabError


@contextmanager
def report_errors(path: Path) -> Iterator[None]:
    """Raise the errors of SQLite as a ``CurvlabError`` of one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:  # in a message of SQLite
        raise damage_error(path, "it contains invalid text") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise damage_error(path, str(error)) from error
        if code == sqlite3.SQLITE_FULL:
            reason = "no space left on the disk; free some and repeat the command: finished runs are in the store"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            reason = f"{error}; choose a folder that is writable"
        elif code == sqlite3.SQLITE_BUSY:
            reason = "another program has locked it; close that program"
        elif code == sqlite3.SQLITE_IOERR:
            reason = f"{error}; check the disk and repeat the command: finished runs are in the store"
        else:
            raise CurvlabError(f"cannot use {path}: {error}") from error
        raise CurvlabError(f"cannot write {path}: {reason}") from error


def damage_error(path: Path, what: str) -> CurvlabError:
    """Return the error for a damaged store, with the reason."""
    what = " ".join(what.replace("***", "").split())  # messages of SQLite have line breaks and stars
    return CurvlabError(
        f"{path} is damaged or not a store ({what}); move it away, or recover the readable part with: "
        f"sqlite3 {path} .recover | sqlite3 recovered.sqlite"
    )
