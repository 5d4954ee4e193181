"""Stores that a disk, a copy or a stranger has changed: refused, or right; and nothing is left beside a refused one."""

import os
import random
import shutil
import sqlite3
from contextlib import closing

import pytest

from curvlab.errors import CurvlabError
from curvlab.grid import Cell, Outcome, reading, writing
from curvlab.grid.schema import APPLICATION, SCHEMA

SOFTWARE = {"versions": {"torch": "2"}, "git": None}
CELLS = [Cell("m:f", {"lr": 0.1 / 3**number, "word": "x" * 9, "seed": number % 3}) for number in range(12)]


def finish(store, number):
    cell, seed = CELLS[number], CELLS[number].config["seed"]
    records = [{"x": seed / 7, "n": number, "yes": True, "text": "½", "none": None, "row": row} for row in range(3)]
    if number % 4:
        store.finish(Outcome(cell.key, records=records, seconds=1.5, peak_bytes=10**8, host="h", software=SOFTWARE))
    else:
        store.finish(Outcome(cell.key, "raised", "an error", "a traceback\n" * 9, host="h", software=SOFTWARE))


def everything(file):
    """Return all that can be read of a store."""
    with reading(file) as store:
        return [
            *(store.records(), store.failed(), store.tally(), store.axes(), store.kinds(), store.software()),
            *(store.seconds(), store.table().to_csv(), store.summary(by=["row"]).to_csv()),
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a store, and what it holds."""
    file = tmp_path_factory.mktemp("whole") / "s.sqlite"
    with writing(file) as store:
        store.register(CELLS, {"digits": "fingerprint"})
        for number in range(10):
            finish(store, number)
    return file.read_bytes(), repr(everything(file))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "s.sqlite"


def beside(file):
    return sorted(entry.name for entry in file.parent.iterdir())


def refused(file):
    """Say whether a file is refused by readers and writers alike, which then leave all as it is."""
    before = file.read_bytes(), beside(file)
    try:
        with reading(file):
            pass
    except CurvlabError:
        assert (file.read_bytes(), beside(file)) == before
        with pytest.raises(CurvlabError), writing(file):
            pass
        assert (file.read_bytes(), beside(file)) == before
        return True
    return False


def test_of_copies_with_flipped_bits_each_is_refused_or_right(whole, file):
    content, right = whole
    rng, count = random.Random(0), 0
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 3])):
            place = rng.randrange(len(content) * 8)
            changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        if refused(file):
            count += 1
        else:
            assert repr(everything(file)) == right
    assert 30 < count < 120  # the rest is in parts of the file that hold nothing


CHANGES = {
    "value": "UPDATE entries SET value = value + 1 WHERE name = 'n' AND number = 1",
    "type": "UPDATE entries SET type = 'int' WHERE type = 'bool'",
    "integer for a number": "UPDATE entries SET value = 0 WHERE name = 'x' AND value = 0.0",
    "status": "UPDATE cells SET status = 'done' WHERE status = 'failed'",
    "position": "UPDATE cells SET position = 11 - position",
    "seed": "UPDATE cells SET seed = 1 WHERE seed = 2",
    "fingerprint": "UPDATE data SET fingerprint = 'other'",
    "versions": "UPDATE software SET described = '{}'",
    "fewer entries": "DELETE FROM entries WHERE number = 2",
    "fewer cells": "DELETE FROM cells WHERE status = 'absent'",
    "another entry": "INSERT INTO entries SELECT cell, row + 7, number, name, type, value, checksum FROM entries",
    "total": "UPDATE totals SET number = number + 1 WHERE name = 'data'",
    "column": "ALTER TABLE cells ADD COLUMN other",
    "trigger": "SELECT 1",
    "index": "DROP INDEX cells_of_point",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_another_program_has_changed_is_refused(whole, file, change):
    file.write_bytes(whole[0])
    with closing(sqlite3.connect(file)) as connection, connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(change)
        for _, text in triggers[change == CHANGES["trigger"] :]:
            connection.execute(text)
    with pytest.raises(CurvlabError, match=r"s.sqlite is damaged or no store \("), reading(file):
        pass
    assert refused(file)


def test_a_view_and_an_index_of_the_users_do_no_harm(whole, file):
    file.write_bytes(whole[0])
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE VIEW mine AS SELECT name, avg(value) FROM entries GROUP BY name")
        connection.execute("CREATE INDEX mine_too ON entries (name)")
    assert repr(everything(file)) == whole[1]


def test_a_store_without_checksums_is_read_and_given_them_by_the_next_run(whole, file):
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute("PRAGMA user_version = 1")
        new = file.with_name("new.sqlite")
        new.write_bytes(whole[0])
        connection.execute("ATTACH ? AS new", (str(new),))
        for table in ("software", "cells", "data", "entries"):
            columns = ", ".join(name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})"))
            connection.execute(f"INSERT INTO main.{table} SELECT {columns} FROM new.{table}")
        connection.commit()
    old = file.read_bytes()
    assert repr(everything(file)) == whole[1]
    assert file.read_bytes() == old
    with writing(file) as store:
        finish(store, 10)
    with closing(sqlite3.connect(file)) as connection, connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    with reading(file) as store:
        assert store.tally() == {"done": 8, "failed": 3, "absent": 1, "earlier": 0}
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE entries SET value = 7 WHERE name = 'n'")
    assert refused(file)


def test_what_a_killed_run_has_left_is_right_an_earlier_state_or_refused(tmp_path):
    """The newest part is in SQLite's log then, and what of it is damaged is as if it had not been written."""
    file, states, rng = tmp_path / "run" / "s.sqlite", [], random.Random(1)
    copy = tmp_path / "copy" / "s.sqlite"
    copy.parent.mkdir()
    names = [file, file.with_name("s.sqlite-wal")]
    with writing(file) as store:
        store.register(CELLS)
        for number in range(8):
            if number == 4:  # a part of the log is in the file
                store._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            finish(store, number)
            states.append(repr([store.records(), store.failed(), store.tally()]))
        contents = [bytearray(name.read_bytes()) for name in names]
    found = {"refused": 0, "latest": 0, "earlier": 0}
    for _ in range(60):
        changed = [bytearray(content) for content in contents]
        one = rng.choice(changed)
        place = rng.randrange(len(one) * 8)
        one[place // 8] ^= 1 << place % 8
        for name, content in zip(names, changed, strict=True):
            (copy.parent / name.name).write_bytes(content)
        try:
            with reading(copy) as store:
                state = repr([store.records(), store.failed(), store.tally()])
            found["latest" if state == states[-1] else "earlier"] += 1
            assert state in states
        except CurvlabError:
            found["refused"] += 1
            assert beside(copy) == [name.name for name in names]
            assert [bytearray((copy.parent / name.name).read_bytes()) for name in names] == changed
        shutil.rmtree(copy.parent)
        copy.parent.mkdir()
    assert all(found.values())


@pytest.mark.parametrize("what", ["a folder", "no regular file", "to itself|Symlink loop"])
def test_what_is_no_file_is_refused_and_nothing_comes_beside_it(file, what):
    if what == "a folder":
        file.mkdir()
    elif what == "no regular file":
        os.mkfifo(file)
    else:
        file.symlink_to(file)
    for use in (reading, writing):
        with pytest.raises(CurvlabError, match=what if use is writing or "loop" not in what else "."), use(file):
            pass
        assert beside(file) == [file.name]


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 5000, "\0"):
        with pytest.raises(CurvlabError), reading(tmp_path / name):
            pass
    assert beside(tmp_path / "x") == []


def test_a_lock_that_was_there_stays(file):
    file.write_bytes(b"no store" * 100)
    lock = file.with_name("s.sqlite.lock")
    lock.write_text("")
    with pytest.raises(CurvlabError, match="is damaged or no store"), writing(file):
        pass
    assert lock.exists()
