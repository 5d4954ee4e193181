"""Checksums of a store: one per row, and for every table the number of rows and the sum of their checksums.

SQLite detects damage to the structure of a file, but not a value that a disk or a copy has changed. The sums detect
rows that are missing or older than the rest.
"""

import sqlite3
import zlib
from collections.abc import Sequence
from typing import Any

TABLES = ("runs", "software", "data", "entries")

#: Added to the tables of ``curvlab.grid.schema``.
SCHEMA = "CREATE TABLE totals (name TEXT PRIMARY KEY, number INTEGER, checksums INTEGER) WITHOUT ROWID;" + "".join(
    f"""
ALTER TABLE {table} ADD COLUMN checksum INTEGER;
INSERT INTO totals SELECT '{table}', count(*), 0 FROM {table};
CREATE TRIGGER {table}_inserted AFTER INSERT ON {table} BEGIN
    UPDATE totals SET number = number + 1, checksums = checksums + ifnull(NEW.checksum, 0) WHERE name = '{table}';
END;
CREATE TRIGGER {table}_signed AFTER UPDATE OF checksum ON {table} BEGIN
    UPDATE totals SET checksums = checksums + ifnull(NEW.checksum, 0) - ifnull(OLD.checksum, 0) WHERE name = '{table}';
END;
CREATE TRIGGER {table}_deleted AFTER DELETE ON {table} BEGIN
    UPDATE totals SET number = number - 1, checksums = checksums - ifnull(OLD.checksum, 0) WHERE name = '{table}';
END;"""
    for table in TABLES
)


def add_digest(connection: sqlite3.Connection) -> None:
    """Add the SQL function that ``sign`` uses to a connection."""
    connection.create_function("digest", -1, lambda *row: _digest(row), deterministic=True)


def sign(connection: sqlite3.Connection, table: str, where: str = "TRUE", values: Sequence[Any] = ()) -> None:
    """Set the checksums of the rows of a table that match a condition."""
    columns = ", ".join(_columns(connection, table))
    connection.execute(f"UPDATE {table} SET checksum = digest({columns}) WHERE {where}", values)


def find_damage(connection: sqlite3.Connection) -> str | None:
    """Describe the first difference from what was written; None without any.

    Args:
        connection: A connection in a transaction, which decodes invalid text without an error.
    """
    totals = {name: rest for name, *rest in connection.execute("SELECT name, number, checksums FROM totals")}
    for table in TABLES:
        number = checksums = 0
        for checksum, *row in connection.execute(
            f"SELECT checksum, {', '.join(_columns(connection, table))} FROM {table}"
        ):
            if checksum != _digest(tuple(row)):
                return f"a row of the table {table} has changed"
            number, checksums = number + 1, checksums + checksum
        if totals.get(table) != [number, checksums]:
            return f"rows of the table {table} are missing, added or outdated"
    return None


def _digest(row: tuple[Any, ...]) -> int:
    # The text shows every digit and type. The sum of 32-bit checksums fits into SQLite's 64-bit integers.
    return zlib.crc32(ascii(row).encode())


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})") if name != "checksum"]
