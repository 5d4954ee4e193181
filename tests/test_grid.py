"""Grids: axes, keys, the processes of runs, the store, and their failures."""

import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_under_test import NAME, everything

from curvlab.errors import CurvlabError
from curvlab.grid import Outcome, RunSpec, draw, expand, processes, read_store, run, run_folder, write_store
from curvlab.grid import store as store_module
from curvlab.grid.aggregates import Mean, Std
from curvlab.grid.functions import find_function
from curvlab.grid.output import Output
from curvlab.grid.run_process import OUTPUT
from curvlab.sweep import config
from curvlab.sweep.__main__ import main

pytestmark = pytest.mark.usefixtures("one_server", "light_server")

# Runs ----------------------------------------------------------------------------------------------------------------


def specs(function, *configs, version=1):
    return [RunSpec(f"{NAME}:{function}", config, version=version) for config in configs]


def grid_of(function, **axes):
    return specs(function, *expand({}, grid=axes))


@pytest.fixture(scope="module")
def light_server():
    """Import only what runs need in the servers; the modules for training take seconds more."""
    preloaded = processes._PRELOADED
    processes._PRELOADED = ("curvlab.grid.run_process",)
    yield preloaded
    processes._PRELOADED = preloaded


@pytest.fixture
def file(tmp_path):
    return tmp_path / "s.sqlite"


def until(condition):
    """Wait for a condition, on a slow machine too."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid):
    """Return whether a process has ended, also if its parent has not waited for it."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def contents(file):
    """Return the parts of a store that must be reproducible."""
    with read_store(file) as store:
        table = store.table()
        columns = [name for name in table if name not in ("run.seconds", "run.peak_bytes", "run.ended")]
        return table[columns].to_csv(), store.summary().to_csv(), [repr(record) for record in store.records()]


# Axes and keys -------------------------------------------------------------------------------------------------------


def test_expand_is_the_product_with_the_last_axis_fastest():
    found = list(expand({"a": 0, "b": 0}, grid={"a": [1, 2]}, points=[{"c": 3}, {"d": 4}], samples=[{"e": 5}]))
    assert found == [
        {"a": 1, "b": 0, "c": 3, "e": 5},
        {"a": 2, "b": 0, "c": 3, "e": 5},
        {"a": 1, "b": 0, "d": 4, "e": 5},
        {"a": 2, "b": 0, "d": 4, "e": 5},
    ]


@pytest.mark.parametrize(
    ("axes", "fragment"),
    [
        ({"grid": {"a": []}}, "list of values for 'a'"),
        ({"grid": {"a": "xy"}}, "list of values for 'a'"),
        ({"grid": {"a": [1]}, "points": [{"a": 2}]}, "'a' is set by two axes"),
        ({"points": [{"b": 1}], "samples": [{"b": 2}]}, "'b' is set by two axes"),
        ({"grid": {name: range(20) for name in "abcdefgh"}}, "25,600,000,000 combinations, and a sweep has at most"),
        ({"grid": {"a": [2, 1, 1]}}, "the grid's list for 'a' has 1 twice; equal values are one run"),
        ({"grid": {"a": [1, 1.0]}}, "has 1 and 1.0, which are equal"),
        ({"grid": {"a": [True, 0.5, 1]}}, "has True and 1, which are equal"),
        ({"grid": {"a": [[1, {"b": 2}], [1.0, {"b": 2.0}]]}}, "which are equal"),
        ({"points": [{"a": 1, "b": 2}, {"b": 2, "a": 1}]}, "the list of points has .*; equal values are one run"),
        ({"grid": {"a": [{1}]}}, "consist of JSON values"),
    ],
)
def test_expand_refuses(axes, fragment):
    with pytest.raises(CurvlabError, match=fragment):
        list(expand({}, **axes))


RANGES = {
    "u": {"uniform": [-1, 3]},
    "l": {"log_uniform": [1e-5, 1e-1]},
    "i": {"integers": [2, 4]},
    "c": {"choice": ["x", [1, 2]]},
}


def test_draw_has_the_right_distribution():
    found = draw(20000, RANGES, seed=1)
    u, log = np.array([c["u"] for c in found]), np.log10([c["l"] for c in found])
    assert abs(u.mean() - 1) < 4 * np.sqrt(16 / 12 / 20000)
    assert abs(log.mean() + 3) < 4 * np.sqrt(16 / 12 / 20000)
    assert u.min() >= -1
    assert u.max() <= 3
    counts = np.bincount([c["i"] for c in found])
    assert set(np.flatnonzero(counts)) == {2, 3, 4}
    assert np.abs(counts[2:] / 20000 - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 20000)
    assert {str(c["c"]) for c in found} == {"x", "[1, 2]"}


def test_a_larger_draw_begins_with_the_same_values():
    assert draw(10, RANGES)[:4] == draw(4, RANGES)
    assert [c["u"] for c in draw(4, RANGES)] == [c["u"] for c in draw(4, {"u": RANGES["u"]})]
    assert draw(4, RANGES, seed=1) != draw(4, RANGES, seed=2)


@pytest.mark.parametrize(
    "given",
    [
        {"uniform": [1]},
        {"uniform": [2, 1]},
        {"log_uniform": [0, 1]},
        {"integers": [0.5, 2]},
        {"choice": []},
        {"uniform": [0, math.inf]},
        {"uniform": [0, 10**400]},
        {"uniform": [-1.7e308, 1.7e308]},
        {"uniform": [False, True]},
        {"integers": [0, 2**60]},
        {"integers": [0, 10**400]},
        {"normal": [0, 1]},
        3,
    ],
)
def test_draw_refuses(given):
    with pytest.raises(CurvlabError, match="random: a needs"):
        draw(2, {"a": given})


def test_the_key_depends_on_name_version_and_the_whole_configuration():
    spec = RunSpec("m:f", {"a": 1, "seed": 0})
    assert spec.key == RunSpec("m:f", {"seed": 0, "a": 1}).key
    others = [
        RunSpec("m:g", {"a": 1, "seed": 0}),
        RunSpec("m:f", {"a": 1, "seed": 0}, version=2),
        RunSpec("m:f", {"a": 1.5, "seed": 0}),
        RunSpec("m:f", {"a": "1", "seed": 0}),
        RunSpec("m:f", {"a": 1, "seed": 0, "b": None}),
        RunSpec("m:f", {"a": 1, "seed": 1}),
    ]
    assert len({spec.key, *(other.key for other in others)}) == 7
    assert spec.point == others[-1].point != others[2].point
    assert len(spec.key) == 32


NESTED = []
for _ in range(200):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "value", [math.nan, {1}, np.float64(1) * 1j, Path("x"), {1: 2}, {True: 2}, 2**63, "\ud800", {"\ud800": 1}, NESTED]
)
def test_the_key_needs_json(value):
    with pytest.raises(CurvlabError, match="JSON values"):
        _ = RunSpec("m:f", {"a": value}).key


# Running -------------------------------------------------------------------------------------------------------------


def test_records_come_back_to_the_bit(file):
    assert run(specs("everything", {}), file) == {"done": 1, "failed": 0, "absent": 0, "earlier": 0}
    with read_store(file) as store:
        first, second = store.records()
    assert second == {"other": 1}
    expected = everything({}, None)[0] | {"numpy": float(np.float32(0.1)), "tensor": 2}
    assert first == expected
    assert {name: type(value) for name, value in first.items()} == {n: type(v) for n, v in expected.items()}
    assert list(first) == list(expected)


def test_the_number_of_jobs_changes_no_bit(tmp_path):
    work = grid_of("drawn", seed=list(range(12)))
    run(work, tmp_path / "one.sqlite", jobs=1)
    run(work, tmp_path / "three.sqlite", jobs=3)
    one, three = contents(tmp_path / "one.sqlite"), contents(tmp_path / "three.sqlite")
    assert one == three
    with read_store(tmp_path / "one.sqlite") as store:
        records = store.records()
    assert {record["threads"] for record in records} == {1}
    assert len({record["torch"] for record in records}) == 12  # every run draws its own numbers


def test_number_of_threads_and_preloaded_modules(file, monkeypatch, light_server):
    monkeypatch.setattr(processes, "_PRELOADED", light_server)
    run(grid_of("drawn", seed=[0]) + specs("imported", {}), file, threads=2)
    with read_store(file) as store:
        drawn, imported = store.records()
        assert drawn["threads"] == 2
        assert store.table()["run.threads"].tolist() == [2, 2]
    assert imported == {"torch._dynamo": True, "sklearn.datasets": True}


def test_a_finished_run_is_not_repeated_and_a_sweep_grows(file):
    work = grid_of("plain", a=[1, 2])
    run(work, file)
    before = contents(file), raw(file)
    assert run(work, file)["done"] == 2
    assert (contents(file), raw(file)) == before
    assert run(grid_of("plain", a=[2, 3]), file) == {"done": 2, "failed": 0, "absent": 0, "earlier": 1}
    with read_store(file) as store:
        assert [record["value"] for record in store.records()] == [2 * 0.1, 3 * 0.1]
    assert run(grid_of("plain", a=[3, 2, 1]), file) == {"done": 3, "failed": 0, "absent": 0, "earlier": 0}
    with read_store(file) as store:
        assert [record["value"] for record in store.records()] == [3 * 0.1, 2 * 0.1, 0.1]
    assert attempts(file) == [1, 1, 1]


def test_a_new_version_is_computed_anew(file):
    run(specs("plain", {"a": 1}), file)
    assert run(specs("plain", {"a": 1}, version=2), file) == {"done": 1, "failed": 0, "absent": 0, "earlier": 1}


def raw(file):
    with sqlite3.connect(file) as connection:
        return connection.execute("SELECT * FROM runs ORDER BY key").fetchall()


def attempts(file):
    with sqlite3.connect(file) as connection:
        return [n for (n,) in connection.execute("SELECT attempts FROM runs ORDER BY key")]


TROUBLES = {
    "raises": ("raised", "ValueError: one two"),
    "exits": ("raised", "SystemExit: away"),
    "killed": ("killed", "killed (SIGKILL), most likely because memory ran out, with "),
    "crashes": ("killed", "killed (SIGSEGV)"),
    "vanishes": ("killed", "ended with exit code 3 and no records"),
    "sleeps": ("timeout", "not done after 1 seconds"),
    "nan": ("nan", "x is NaN"),
    "nested": ("raised", "'x' is a list; records are flat dictionaries"),
    "huge": ("raised", "more than 64 bits"),
    "memory": ("raised", "MemoryError"),
    "escapes": ("raised", r"ValueError: \udc80 \x1b[2J"),
    "not UTF-8": ("raised", "'x' cannot be encoded as UTF-8"),
    "named so": ("raised", r"'\udc80' cannot be encoded as UTF-8"),
    "nothing": ("raised", "returned None, not a list of records"),
    "dictionary": ("raised", "returned a dict, not a list of records"),
    "column": ("raised", "'seeds' is a column that the tables have themselves"),
    "prefix": ("raised", "'config.how' is a column that the tables have themselves"),
}


def test_every_kind_of_failure_is_recorded_and_the_rest_continues(file):
    work = grid_of("troubled", how=[*TROUBLES, "fine"])
    sleeps = work[list(TROUBLES).index("sleeps")]
    # Without a time limit for the others.
    assert run([spec for spec in work if spec != sleeps], file, jobs=3)["failed"] == len(TROUBLES) - 1
    assert run(work, file, run_timeout=1) == {"done": 1, "failed": len(TROUBLES), "absent": 0, "earlier": 0}
    with read_store(file) as store:
        failed = {failure["axes"]["how"]: failure for failure in store.failed_runs()}
        table, summary = store.table(), store.summary()
        assert store.count_failures() == {"killed": 3, "nan": 1, "raised": 12, "timeout": 1}
    assert list(failed) == list(TROUBLES)
    for how, (kind, error) in TROUBLES.items():
        assert failed[how]["kind"] == kind
        assert error in failed[how]["error"]
    assert failed["memory"]["error"] == "MemoryError"
    assert 'raise ValueError("one\\ntwo")' in failed["raises"]["traceback"]
    assert "\x1b" not in failed["escapes"]["traceback"]
    assert failed["killed"]["traceback"] == "heard of killed"
    assert "Segmentation fault" in failed["crashes"]["traceback"]
    assert failed["killed"]["peak_bytes"] > failed["vanishes"]["peak_bytes"] + 300e6
    assert failed["sleeps"]["seconds"] >= 1
    # In the tables too: the records of a run with NaN are shown, and are in no mean.
    assert table["status"].tolist().count("failed") == len(TROUBLES) + 1  # two records of one run
    (nan,) = (value for value in table["x"] if isinstance(value, float) and math.isnan(value))
    assert math.isnan(nan)
    assert summary["failed"].tolist() == [1] * len(TROUBLES) + [0]
    assert summary["x"].tolist() == [None] * len(TROUBLES) + [1.0]
    started = run_folder(file, sleeps.key) / "started"
    until(lambda: not started.exists() or gone(started.read_text()))  # what the run has started has ended too


def test_what_a_run_has_started_ends_with_it(file):
    assert run(specs("forgetful", {}), file)["done"] == 1
    with read_store(file) as store:
        ((started,),) = (record.values() for record in store.records())
    until(lambda: gone(started))


@pytest.mark.parametrize("how", ["fine", "raises", "crashes", "text", "leaves", "for ever"])
def test_the_output_of_a_run_is_kept_within_bounds(file, how):
    (spec,) = specs("loud", {"how": how, "lines": 10 if how in ("text", "leaves") else 5000})
    run([spec], file, run_timeout=1 if how == "for ever" else None)
    kept = (run_folder(file, spec.key) / OUTPUT).read_bytes()
    assert kept.startswith(b"first line\nxxx")
    if how in ("text", "leaves"):  # what is left may write before it is over
        assert kept.partition(b"y\n")[0] == b"first line\n" + (b"x" * 999 + b"\n") * 10 + "last ½\n".encode()
    elif how != "for ever":
        assert kept.endswith("xxx\nlast ½\n".encode())
        whole = len("first line\nlast ½\n".encode()) + 5_000_000
        assert f"\n[... {whole - 2 * 2**20:,} bytes are left out here ...]\n".encode() in kept
    assert len(kept) < 2 * 2**20 + 100
    with read_store(file) as store:
        failed = store.failed_runs()
    if how == "raises":
        assert len(failed[0]["error"]) < 4100
        assert len(failed[0]["traceback"]) < 41000
        assert "characters are left out here ...] yyy" in failed[0]["error"]
        assert 'raise ValueError("y" * 1_000_000)' in failed[0]["traceback"]
    elif how == "crashes":
        assert failed[0]["traceback"].endswith("xxx\nlast ½")
    elif how == "text":
        assert failed[0]["error"].startswith(
            "record 0: 'text' is a text of 1,000,001 characters, and at most 1,000,000"
        )
    elif how == "for ever":
        assert failed[0]["kind"] == "timeout"


def test_a_full_disk_for_output_fails_no_run(tmp_path):
    reading_end, writing_end = os.pipe()
    os.write(writing_end, b"text")
    os.close(writing_end)
    (tmp_path / "file").write_text("")
    with closing(Output(reading_end, tmp_path / "file" / OUTPUT)) as output:
        assert output.read()
        assert not output.read()
    os.close(reading_end)


def test_failed_runs_are_retried_on_request_and_find_their_checkpoint(file):
    work = specs("counting", {"enough": 3})
    assert run(work, file)["failed"] == 1
    assert run(work, file)["failed"] == 1
    assert (run_folder(file, work[0].key) / "count").read_text() == "1"
    left = run_folder(file, work[0].key) / ".count.0123abcd.tmp"  # like an interrupted write
    left.write_text("")
    assert run(work, file, retry_failed=True)["failed"] == 1
    assert not left.exists()
    assert run(work, file, retry_failed=True)["done"] == 1
    with read_store(file) as store:
        assert store.records() == [{"count": 3}]
        assert store.failed_runs() == []
    assert attempts(file) == [3]
    assert raw(file)[0][9:12] == (None, None, None)  # no kind, error or traceback is left


def test_a_run_that_leaves_nothing_has_no_folder(file):
    work = specs("plain", {"a": 1}) + specs("troubled", {"how": "fine"})
    run(work, file)
    assert not run_folder(file, work[0].key).exists()
    assert (run_folder(file, work[1].key) / OUTPUT).read_text() == "heard of fine\n"


def test_the_output_of_a_run_is_not_printed(file, capfd):
    run(specs("troubled", {"how": "fine"}), file)
    assert capfd.readouterr() == ("", "")


def test_a_missing_function(file):
    missing = [f"{NAME}:no_such", NAME]
    run([RunSpec(function, {"a": 1}) for function in missing], file)
    with read_store(file) as store:
        for function, failed in zip(missing, store.failed_runs(), strict=True):
            assert function in failed["error"]
    with pytest.raises(CurvlabError, match="no_such_module:f: cannot import 'no_such_module': no such module"):
        find_function("no_such_module:f")


def test_two_processes_of_one_run_wait_for_each_other(file):
    """A process of a sweep that was killed on a cluster may still work when the next sweep starts the run again."""
    request = {"key": "0" * 32, "function": f"{NAME}:timed", "config": {}, "offline": False}
    request |= {"folder": str(file.parent / "f"), "cwd": str(file.parent), "data_root": None, "threads": 1}
    whole = json.dumps(request).encode()
    answers = []

    def work():
        output = file.parent / "f" / OUTPUT
        ended = processes.run(f"{NAME}:timed", 1, "", whole, output, None, lambda: True)
        answers.append(json.loads(ended.answer))

    both = [threading.Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    first, second = sorted((answer["records"][0] for answer in answers), key=lambda record: record["begun"])
    assert first["ended"] <= second["begun"]


# The store -----------------------------------------------------------------------------------------------------------


def outcome(spec, *records, **others):
    return Outcome(spec.key, records=records, **others)


def test_summary_has_mean_spread_and_seeds(file):
    work = grid_of("plain", lr=[0.1, 0.2], seed=[0, 1, 2])
    with write_store(file) as store:
        store.register(work)
        for spec in reversed(work[:5]):
            seed = spec.config["seed"]
            only = {"z": 1.0} if seed == 1 else {}
            store.finish(outcome(spec, {"x": seed / 7, "y": 1.0 if seed else None} | only))
        summary = store.summary()
        assert store.axes() == ["lr"]
        assert store.tally() == {"done": 5, "failed": 0, "absent": 1, "earlier": 0}
    x = [0.0, 1 / 7, 2 / 7]
    assert summary.columns.tolist()[:8] == ["config.lr", "seeds", "failed", "absent", "x", "x_std", "y", "y_std"]
    assert summary.iloc[0, :6].tolist() == [0.1, 3, 0, 0, math.fsum(x) / 3, np.std(x, ddof=1)]
    assert summary.iloc[1, :5].tolist() == [0.2, 2, 0, 1, 1 / 14]
    assert summary["y"].tolist() == [None, None]  # a record has no number
    assert summary["z"].tolist() == [None, None]  # a record does not have the key


def test_summary_asks_for_keys_that_distinguish_records(file):
    work = grid_of("steps", seed=[0, 2])
    run(work, file)
    with read_store(file) as store:
        with pytest.raises(CurvlabError, match=r"a run has 3 records in the same group.*--by.*step"):
            store.summary()
        with pytest.raises(CurvlabError, match="no record has 'stp'; they have step, loss"):
            store.summary(by=["stp"])
        summary = store.summary(by=["step"])
        assert summary.columns.tolist() == ["step", "seeds", "failed", "absent", "loss", "loss_std"]
        assert summary["step"].tolist() == [0, 1, 2]
        assert summary["loss"].tolist() == [1.0, 1.1, (0.2 + 2.2) / 2]
        assert store.summary(by=["step"], values=["loss"]).equals(summary)


def test_summary_does_not_mix_a_record_with_a_deviation(file):
    (spec,) = work = specs("plain", {"a": 1})
    with write_store(file) as store:
        store.register(work)
        store.finish(outcome(spec, {"loss": 1.0, "loss_std": 2.0}))
        with pytest.raises(
            CurvlabError, match=r"the records have loss_std, which is also the name of the standard deviation of loss"
        ):
            store.summary()
        assert store.summary(values=["loss"])["loss"].tolist() == [1.0]
        assert store.summary(values=["loss_std"])["loss_std"].tolist() == [2.0]
        assert store.table()["loss_std"].tolist() == [2.0]


def test_axes_have_different_values(file):
    """Values are compared by all digits, and equal values in another form are not an axis."""
    near = 0.30000000000000004
    points = [{"a": 0.3, "b": 1, "c": None, "d": [near]}, {"a": near, "b": 1.0, "c": "", "d": [near]}]
    with write_store(file) as store:
        store.register(specs("plain", *points))
        assert store.axes() == ["a", "b", "c"]
        assert store.table()["config.a"].tolist() == [0.3, near]


def test_another_seed_key_makes_other_points(file):
    configs = [{"seed": 0, "draw": draw} for draw in range(3)]
    with write_store(file) as store:
        for seed, rows in (("seed", 3), ("draw", 1)):
            store.register([RunSpec("m:f", config, seed_key=seed) for config in configs])
            assert len(store.summary()) == rows
            assert store.table()["config.seed"].tolist() == ([0, 0, 0] if seed == "seed" else [0, 1, 2])


def test_a_store_is_not_continued_with_other_data(file):
    run(specs("plain", {"a": 1}), file, data={"digits": "1"})
    with pytest.raises(CurvlabError, match=r"the runs in .*s.sqlite have read other data of digits"):
        run(specs("plain", {"a": 2}), file, data={"mnist": "1", "digits": "2"})
    with read_store(file) as store:
        assert store.tally() == {"done": 1, "failed": 0, "absent": 0, "earlier": 0}
    assert run(specs("plain", {"a": 2}), file, data={"mnist": "2", "digits": "1"})["done"] == 1


def test_mean_and_spread_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(50) * 10.0 ** rng.integers(-8, 8, 50)
    for aggregate in (Mean, Std):
        found = set()
        for _ in range(20):
            gathered = aggregate()
            for value in rng.permutation(values).tolist():
                gathered.step(value)
            found.add(gathered.finalize())
        assert len(found) == 1


def test_a_finished_run_is_not_overwritten(file):
    (spec,) = specs("plain", {"a": 1})
    with write_store(file) as store:
        store.register([spec])
        store.finish(outcome(spec, {"x": 1}))
        store.finish(outcome(spec, {"x": 2}))
        store.finish(Outcome(spec.key, "raised", "late"))
        assert store.records() == [{"x": 1}]
        assert store.tally()["done"] == 1


def test_a_second_writer_is_refused_and_readers_are_not(file):
    with write_store(file) as store:
        store.register(specs("plain", {"a": 1}))
        with pytest.raises(CurvlabError, match=rf"s.sqlite is being written by process {os.getpid()} on "):
            run(specs("plain", {"a": 1}), file)
        with read_store(file) as reader:
            assert reader.tally()["absent"] == 1
    assert run(specs("plain", {"a": 1}), file)["done"] == 1


def test_a_store_by_another_name_is_the_same(file):
    link = file.parent / "there" / "link.sqlite"
    link.parent.mkdir()
    link.symlink_to(file)
    with write_store(file), pytest.raises(CurvlabError, match="is being written by"):
        run(specs("plain", {"a": 1}), link)
    (spec,) = specs("troubled", {"how": "fine"})
    assert run([spec], link)["done"] == 1
    assert run_folder(link, spec.key) == run_folder(file, spec.key)
    assert (run_folder(file, spec.key) / OUTPUT).exists()


def test_nothing_is_left_beside_a_store(file):
    """The last connection removes SQLite's files; a reader changes nothing."""
    with write_store(file) as store:
        store.register(specs("plain", {"a": 1}))
    beside = {file.name, f"{file.name}.lock"}
    assert {path.name for path in file.parent.iterdir()} == beside
    before = file.read_bytes()
    with read_store(file) as store:
        assert store.tally()["absent"] == 1
        with pytest.raises(CurvlabError, match="readonly"):
            store.register([])
    assert {path.name for path in file.parent.iterdir()} == beside
    assert file.read_bytes() == before
    with read_store(file) as reader:
        with write_store(file) as store:
            store.register(specs("plain", {"a": 2}))
        assert reader.tally()["absent"] == 1
    assert {path.name for path in file.parent.iterdir()} == beside


def test_a_missing_store(file):
    with pytest.raises(CurvlabError, match="there is no store"), read_store(file):
        pass


def test_a_damaged_store_is_refused_and_not_changed(file):
    run(grid_of("plain", a=list(range(40))), file)
    whole = file.read_bytes()
    for broken in (b"no database at all" * 100, whole[:5000], whole[:8192] + b"\xff" * 12000 + whole[20192:]):
        file.write_bytes(broken)
        for use in (read_store, write_store):
            with pytest.raises(CurvlabError, match="is damaged or not a store"), use(file):
                pass
        assert file.read_bytes() == broken


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (4, r"a newer curvlab \(store format 4, this one reads format 3 only\); update curvlab"),
        (2, r"an earlier curvlab \(store format 2, this one reads format 3 only\); .* another store \(--out\)"),
        (1, r"an earlier curvlab \(store format 1, "),
    ],
)
def test_a_store_of_another_version_is_refused_and_not_changed(file, version, message):
    run(specs("plain", {"a": 1}), file)
    with sqlite3.connect(file) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    before = file.read_bytes()
    for use in (read_store, write_store):
        with pytest.raises(CurvlabError, match=message), use(file):
            pass
    assert file.read_bytes() == before


def test_another_database_and_other_files(tmp_path):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    for use in (read_store, write_store):
        with pytest.raises(CurvlabError, match="not the store of a sweep"), use(other):
            pass
    with pytest.raises(CurvlabError, match="is a folder"), read_store(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    for use in (read_store, write_store):
        with pytest.raises(CurvlabError, match="not a regular file"), use(tmp_path / "pipe"):
            pass


@pytest.mark.parametrize("change", ["DROP TABLE entries", "PRAGMA user_version = 0"])
def test_a_store_with_something_missing(file, change):
    run(specs("plain", {"a": 1}), file)
    with sqlite3.connect(file) as connection:
        connection.execute(change)
    for use in (read_store, write_store):
        with (
            pytest.raises(CurvlabError, match=r"damaged or not a store \((entries|its version) is missing\)"),
            use(file),
        ):
            pass


@pytest.mark.parametrize("how", ["empty", "without tables"])
def test_a_sweep_killed_before_its_tables_were_created(file, how):
    with sqlite3.connect(file) as connection:
        if how == "without tables":
            connection.execute("PRAGMA journal_mode = WAL")
    assert run(specs("plain", {"a": 1}), file)["done"] == 1


def test_a_full_disk_is_reported_and_finished_runs_are_kept(file, monkeypatch):
    work = specs("plain", *({"a": a} for a in range(30)))
    register = store_module.Store.register

    def little(store, *args):
        register(store, *args)
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages + 4}")

    monkeypatch.setattr(store_module.Store, "register", little)
    monkeypatch.setattr(store_module.Store, "finish", _long(store_module.Store.finish))
    with pytest.raises(CurvlabError, match=r"cannot write .*s.sqlite: no space left"):
        run(work, file, jobs=2)
    monkeypatch.undo()
    with read_store(file) as store:
        done = len(store.records())
    assert 0 < done < 30
    assert store_is_whole(file)
    assert run(work, file)["done"] == 30
    assert attempts(file) == [1] * 30


def _long(finish):
    return lambda store, outcome: finish(
        store, Outcome(**{**vars(outcome), "records": [*outcome.records, {"long": "x" * 1000}]})
    )


def store_is_whole(file):
    with sqlite3.connect(file) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(file):
    run(specs("plain", {"a": 1}), file)
    file.parent.chmod(0o500)
    try:
        with pytest.raises(CurvlabError, match="cannot write"):
            run(specs("plain", {"a": 2}), file)
        with read_store(file) as store:
            assert len(store.records()) == 1
    finally:
        file.parent.chmod(0o700)


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CurvlabError, match=r"not a folder|cannot write"):
        run(specs("plain", {"a": 1}), tmp_path / "file" / "s.sqlite")


def test_a_store_in_a_read_only_folder_is_read(file, monkeypatch):
    run(specs("plain", {"a": 1}), file)
    connect = sqlite3.connect

    def cannot_share(name, **others):
        if "immutable" not in str(name):
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        return connect(name, **others)

    monkeypatch.setattr(sqlite3, "connect", cannot_share)
    log = file.with_name("s.sqlite-wal")
    for content in (None, b""):
        if content is not None:
            log.write_bytes(content)
        with read_store(file) as store:
            assert len(store.records()) == 1
    log.write_bytes(b"what is newer")
    with pytest.raises(CurvlabError, match=r"the newest part of .*s.sqlite is in s.sqlite-wal"), read_store(file):
        pass


def test_equal_software_is_stored_once(file):
    work = specs("plain", {"a": 1}, {"a": 2}, {"a": 3})
    with write_store(file) as store:
        store.register(work)
        for spec, version in zip(work, ("1", "1", "2"), strict=True):
            store.finish(outcome(spec, {"x": 1}, software={"versions": {"torch": version}}))
        assert [state["versions"] for state in store.software().values()] == [{"torch": "1"}, {"torch": "2"}]
    run(specs("plain", {"a": 4}), file)
    with read_store(file) as store:
        ((_, state),) = store.software().items()
    assert state["versions"]["torch"] == torch.__version__.partition("+")[0] or state["versions"]["torch"]
    assert set(state) == {"versions", "git"}


# Killed and started again --------------------------------------------------------------------------------------------

RUN = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background processes
sys.path[:0] = {sys.path!r}
from curvlab.grid import processes
processes._PRELOADED = ("curvlab.grid.run_process",)
from curvlab.sweep.__main__ import main
sys.exit(main(["run", "killed.yaml", "--jobs", "2"]))
"""


def kill_at_random(tmp_path, number, signs):
    """Kill a sweep at random moments, and require the result of an undisturbed sweep and no further output."""
    sweep = {"function": f"{NAME}:gated", "seeds": list(range(number))}
    (tmp_path / "killed.yaml").write_text(json.dumps(sweep))
    rng, file, ended = random.Random(0), tmp_path / "killed.sqlite", {}
    for turn, sign in enumerate(signs, 1):
        allow(tmp_path, number * turn // (len(signs) + 1))  # it cannot end before it is killed
        process = subprocess.Popen([sys.executable, "-c", RUN], cwd=tmp_path, stderr=subprocess.PIPE)
        before = len(ended)
        until(lambda before=before: finished(file) > before)  # it has begun to work
        time.sleep(rng.uniform(0, 0.2))
        children = descendants(process.pid)
        process.send_signal(sign)
        _, err = process.communicate()
        assert (process.returncode, err.decode()) == {
            signal.SIGKILL: (-signal.SIGKILL, ""),
            signal.SIGINT: (130, "interrupted; the same command continues\n"),
        }[sign]
        until(lambda children=children: all(map(gone, children)))  # the server and the runs
        assert children
        now = dict(rows(file))
        assert {key: now[key] for key in ended} == ended  # what was finished was not touched
        ended = now
    assert len(ended) < number
    allow(tmp_path, number)


def allow(folder, seeds):
    (folder / "new").write_text(str(seeds))
    (folder / "new").replace(folder / "go")


def rows(file):
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute("SELECT key, ended FROM runs WHERE status = 'done'").fetchall()


def finished(file):
    try:
        return len(rows(file))
    except sqlite3.OperationalError:  # there is no store or no table yet
        return 0


def require_undisturbed_result(tmp_path, number, capfd):
    assert main(["run", "killed.yaml", "--jobs", "2"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[0].startswith(f"{number} runs: {number} done, 0 failed, 0 absent; ")
    assert out.splitlines()[1:] == ["Saved in killed.sqlite."]
    assert err == ""
    run(config.read(Path("killed.yaml")), tmp_path / "undisturbed.sqlite", jobs=1)
    assert contents(tmp_path / "killed.sqlite") == contents(tmp_path / "undisturbed.sqlite")
    assert set(attempts(tmp_path / "killed.sqlite")) == {1}
    assert store_is_whole(tmp_path / "killed.sqlite")


def test_a_killed_sweep_leaves_nothing_and_ends_like_an_undisturbed_one(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    kill_at_random(tmp_path, 12, [signal.SIGKILL, signal.SIGINT])
    require_undisturbed_result(tmp_path, 12, capfd)


@pytest.mark.slow
def test_a_large_sweep_that_is_killed_ten_times(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    kill_at_random(tmp_path, 200, [signal.SIGKILL] * 10)
    require_undisturbed_result(tmp_path, 200, capfd)


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def test_a_killed_server_is_started_again_and_its_run_once(file):
    run(specs("plain", {"a": 1}), file)
    for server in list(processes._servers.values()):
        server._process.kill()
        server._process.wait()
    # The first is killed while it does nothing, the next by its first run, and two by the second run.
    assert run(specs("twice", {"kills": 1}, {"kills": 2}), file, jobs=1) == {
        "done": 1,
        "failed": 1,
        "absent": 0,
        "earlier": 1,
    }
    with read_store(file) as store:
        assert store.records() == [{"begun": 2}]
        (failed,) = store.failed_runs()
    assert failed["kind"] == "killed"
    assert failed["error"].startswith("the process that starts the runs was killed twice")


def test_a_server_that_is_importing_is_ended(tmp_path, monkeypatch, capfd):
    """Messages of the imported module are not in the output of the sweep."""
    (tmp_path / "sluggish.py").write_text(
        "import time, pathlib; print('here', flush=True); pathlib.Path(__file__).with_suffix('.begun').touch(); "
        "time.sleep(1000)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    server = processes.Server(1, ["sluggish"])
    while not (tmp_path / "sluggish.begun").exists():
        time.sleep(0.05)
    server.close()
    assert not server.is_alive()
    assert server._process.returncode == -signal.SIGKILL
    assert capfd.readouterr().out == ""
