"""Checksums of a store: one a row, and of every table the number of its rows and the sum of their checksums.

SQLite finds what is wrong with the structure of a file, but not a value that a disk or a copy has changed. The sums
find rows that are missing, or of another time than the rest.
"""

import sqlite3
import zlib
from collections.abc import Sequence
from typing import Any

TABLES = ("cells", "software", "data", "entries")

#: What is added to the tables of a store that has none.
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


def able_to_sign(connection: sqlite3.Connection) -> None:
    """Give a connection the function that ``sign`` uses."""
    connection.create_function("digest", -1, lambda *row: _digest(row), deterministic=True)


def sign(connection: sqlite3.Connection, table: str, where: str = "TRUE", values: Sequence[Any] = ()) -> None:
    """Set the checksums of those rows of a table that were written."""
    columns = ", ".join(_columns(connection, table))
    connection.execute(f"UPDATE {table} SET checksum = digest({columns}) WHERE {where}", values)


def wrong(connection: sqlite3.Connection) -> str | None:
    """Say what is not as it was written; None if all is.

    Args:
        connection: In a transaction; it gives bytes that are no text as some text or other.
    """
    totals = {name: rest for name, *rest in connection.execute("SELECT name, number, checksums FROM totals")}
    for table in TABLES:
        number = checksums = 0
        for checksum, *row in connection.execute(
            f"SELECT checksum, {', '.join(_columns(connection, table))} FROM {table}"
        ):
            if checksum != _digest(tuple(row)):
                return f"a row of the table {table} is not as it was written"
            number, checksums = number + 1, checksums + checksum
        if totals.get(table) != [number, checksums]:
            return f"the table {table} has not the rows that were written"
    return None


def _digest(row: tuple[Any, ...]) -> int:
    # The text of all the digits and types. 32 bits: a sum of them stays within the 64 bits of SQLite's integers.
    return zlib.crc32(ascii(row).encode())


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})") if name != "checksum"]
