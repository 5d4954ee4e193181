"""Stores that a disk, a copy or another program has changed: refused or right, and no files beside refused ones."""

import os
import random
import shutil
import sqlite3
from contextlib import closing

import pytest

from curvlab.errors import CurvlabError
from curvlab.grid import Outcome, RunSpec, read_store, write_store

SOFTWARE = {"versions": {"torch": "2"}, "git": None}
SPECS = [RunSpec("m:f", {"lr": 0.1 / 3**number, "word": "x" * 9, "seed": number % 3}) for number in range(12)]


def finish(store, number):
    spec, seed = SPECS[number], SPECS[number].config["seed"]
    records = [{"x": seed / 7, "n": number, "yes": True, "text": "½", "none": None, "row": row} for row in range(3)]
    if number % 4:
        store.finish(Outcome(spec.key, records=records, seconds=1.5, peak_bytes=10**8, host="h", software=SOFTWARE))
    else:
        store.finish(Outcome(spec.key, "raised", "an error", "a traceback\n" * 9, host="h", software=SOFTWARE))


def everything(file):
    """Return everything that a store can return."""
    with read_store(file) as store:
        return [
            *(
                store.records(),
                store.failed_runs(),
                store.tally(),
                store.axes(),
                store.count_failures(),
                store.software(),
            ),
            *(store.seconds(), store.table().to_csv(), store.summary(by=["row"]).to_csv()),
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a store, and its contents."""
    file = tmp_path_factory.mktemp("whole") / "s.sqlite"
    with write_store(file) as store:
        store.register(SPECS, {"digits": "fingerprint"})
        for number in range(10):
            finish(store, number)
    return file.read_bytes(), repr(everything(file))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "s.sqlite"


def beside(file):
    return sorted(entry.name for entry in file.parent.iterdir())


def refused(file):
    """Return whether readers and writers refuse a file; they must then change nothing."""
    before = file.read_bytes(), beside(file)
    try:
        with read_store(file):
            pass
    except CurvlabError:
        assert (file.read_bytes(), beside(file)) == before
        with pytest.raises(CurvlabError), write_store(file):
            pass
        assert (file.read_bytes(), beside(file)) == before
        return True
    return False


def test_copies_with_flipped_bits_are_refused_or_right(whole, file):
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
    assert 30 < count < 120  # the others changed unused parts of the file


CHANGES = {
    "value": "UPDATE entries SET value = value + 1 WHERE name = 'n' AND number = 1",
    "type": "UPDATE entries SET type = 'int' WHERE type = 'bool'",
    "integer for a number": "UPDATE entries SET value = 0 WHERE name = 'x' AND value = 0.0",
    "status": "UPDATE runs SET status = 'done' WHERE status = 'failed'",
    "position": "UPDATE runs SET position = 11 - position",
    "seed": "UPDATE runs SET seed = 1 WHERE seed = 2",
    "fingerprint": "UPDATE data SET fingerprint = 'other'",
    "versions": "UPDATE software SET described = '{}'",
    "fewer entries": "DELETE FROM entries WHERE number = 2",
    "fewer runs": "DELETE FROM runs WHERE status = 'absent'",
    "another entry": "INSERT INTO entries SELECT run, row + 7, number, name, type, value, checksum FROM entries",
    "total": "UPDATE totals SET number = number + 1 WHERE name = 'data'",
    "column": "ALTER TABLE runs ADD COLUMN other",
    "trigger": "SELECT 1",
    "index": "DROP INDEX runs_by_point",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_by_another_program_are_refused(whole, file, change):
    file.write_bytes(whole[0])
    with closing(sqlite3.connect(file)) as connection, connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(change)
        for _, text in triggers[change == CHANGES["trigger"] :]:
            connection.execute(text)
    with pytest.raises(CurvlabError, match=r"s.sqlite is damaged or not a store \("), read_store(file):
        pass
    assert refused(file)


def test_views_and_indexes_of_the_user_are_accepted(whole, file):
    file.write_bytes(whole[0])
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE VIEW mine AS SELECT name, avg(value) FROM entries GROUP BY name")
        connection.execute("CREATE INDEX mine_too ON entries (name)")
    assert repr(everything(file)) == whole[1]


def test_the_store_of_a_killed_sweep_is_right_an_earlier_state_or_refused(tmp_path):
    """The newest part is then in SQLite's log, and damaged parts of the log are ignored."""
    file, states, rng = tmp_path / "run" / "s.sqlite", [], random.Random(1)
    copy = tmp_path / "copy" / "s.sqlite"
    copy.parent.mkdir()
    names = [file, file.with_name("s.sqlite-wal")]
    with write_store(file) as store:
        store.register(SPECS)
        for number in range(8):
            if number == 4:  # moves a part of the log to the file
                store._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            finish(store, number)
            states.append(repr([store.records(), store.failed_runs(), store.tally()]))
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
            with read_store(copy) as store:
                state = repr([store.records(), store.failed_runs(), store.tally()])
            found["latest" if state == states[-1] else "earlier"] += 1
            assert state in states
        except CurvlabError:
            found["refused"] += 1
            assert beside(copy) == [name.name for name in names]
            assert [bytearray((copy.parent / name.name).read_bytes()) for name in names] == changed
        shutil.rmtree(copy.parent)
        copy.parent.mkdir()
    assert all(found.values())


@pytest.mark.parametrize("what", ["a folder", "not a regular file", "to itself|Symlink loop"])
def test_other_than_a_file_is_refused_and_nothing_is_written_beside_it(file, what):
    if what == "a folder":
        file.mkdir()
    elif what == "not a regular file":
        os.mkfifo(file)
    else:
        file.symlink_to(file)
    for use in (read_store, write_store):
        with pytest.raises(CurvlabError, match=what if use is write_store or "loop" not in what else "."), use(file):
            pass
        assert beside(file) == [file.name]


def test_names_that_a_file_cannot_have(tmp_path):
    for name in ("x" * 5000, "\0"):
        with pytest.raises(CurvlabError), read_store(tmp_path / name):
            pass
    assert beside(tmp_path / "x") == []


def test_an_existing_lock_file_is_kept(file):
    file.write_bytes(b"no store" * 100)
    lock = file.with_name("s.sqlite.lock")
    lock.write_text("")
    with pytest.raises(CurvlabError, match="is damaged or not a store"), write_store(file):
        pass
    assert lock.exists()
