"""The form of a store: its tables, and how they are made."""

import sqlite3
from contextlib import closing
from functools import cache

from curvlab.grid import checksums

FORMAT = 2  # of the tables below; a file of a later one is refused, and one of 1 has no checksums
APPLICATION = 0x63757276  # "curv", in the header of the file

SCHEMA = """
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


def make_tables(connection: sqlite3.Connection) -> None:
    """Make the tables, or their checksums, where there are none."""
    ((version,),) = connection.execute("PRAGMA user_version")
    if version == FORMAT:
        return
    tables = f"{SCHEMA} PRAGMA application_id = {APPLICATION};" if version == 0 else ""
    connection.executescript(f"BEGIN IMMEDIATE; {tables} {checksums.SCHEMA}")
    for table in checksums.TABLES:
        checksums.sign(connection, table)
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.execute("COMMIT")


@cache
def definitions(version: int) -> dict[tuple[str, str], str]:
    """Return what a store of a version defines: type and name -> SQL."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA + (checksums.SCHEMA if version > 1 else ""))
        return {
            (kind, name): sql for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master")
        }
