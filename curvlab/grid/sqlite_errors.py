"""What SQLite raises about a store, in one sentence each."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curvlab.errors import CurvlabError


@contextmanager
def report_errors(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite into one sentence each."""
    try:
        yield
    except UnicodeDecodeError as error:  # in a message of SQLite
        raise damage_error(path, "it has what is no text") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise damage_error(path, str(error)) from error
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


def damage_error(path: Path, what: str) -> CurvlabError:
    """Return the error of a store that is damaged, with what is wrong."""
    what = " ".join(what.replace("***", "").split())  # what SQLite says has lines and stars
    return CurvlabError(
        f"{path} is damaged or no store ({what}); move it away, or save what can be read with: "
        f"sqlite3 {path} .recover | sqlite3 recovered.sqlite"
    )
