"""Schema of a store: its tables, and how they are created."""

import sqlite3
from contextlib import closing
from functools import cache

from curvlab.grid import checksums

FORMAT = 3  # version of the tables below; stores of any other version are refused
APPLICATION = 0x63757276  # "curv", in the header of the file

SCHEMA = """
CREATE TABLE runs (
    key TEXT PRIMARY KEY,       -- hash of name, version and configuration
    point TEXT NOT NULL,        -- hash of the same without the seed
    position INTEGER,           -- in the sweep; NULL: not in the most recent sweep
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    config TEXT NOT NULL,       -- the whole configuration as JSON
    seed INTEGER,
    seed_key TEXT NOT NULL,     -- key of the seed in config
    status TEXT NOT NULL DEFAULT 'absent' CHECK (status IN ('absent', 'done', 'failed')),
    kind TEXT,                  -- kind of failure: raised, killed, timeout, nan
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
CREATE INDEX runs_by_point ON runs (point);
CREATE TABLE software (id INTEGER PRIMARY KEY, described TEXT NOT NULL UNIQUE);  -- JSON: versions, git
CREATE TABLE data (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;  -- data that the runs read
CREATE TABLE entries (
    run TEXT NOT NULL REFERENCES runs (key),
    row INTEGER NOT NULL,       -- index of the record
    number INTEGER NOT NULL,    -- index of the entry in the record
    name TEXT NOT NULL,
    type TEXT NOT NULL CHECK (type IN ('NoneType', 'bool', 'int', 'float', 'str')),
    value,                      -- NaN, which SQLite does not have, is a float whose value is NULL
    PRIMARY KEY (run, row, number)
) WITHOUT ROWID;
"""


def make_tables(connection: sqlite3.Connection) -> None:
    """Create the tables in an empty file."""
    ((version,),) = connection.execute("PRAGMA user_version")
    if version == FORMAT:
        return
    connection.executescript(
        f"BEGIN IMMEDIATE; {SCHEMA} {checksums.SCHEMA} "
        f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {FORMAT}; COMMIT;"
    )


@cache
def list_definitions() -> dict[tuple[str, str], str]:
    """Return the definitions of a store: type and name -> SQL."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA + checksums.SCHEMA)
        return {
            (kind, name): sql for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master")
        }
