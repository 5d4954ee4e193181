"""Grids: axes, keys, the processes of cells, the store, and what can go wrong with any of them."""

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
from pathlib import Path

import numpy as np
import pytest
import torch

from curvlab.errors import CurvlabError
from curvlab.grid import Cell, Outcome, draw, expand, folder_of, processes, reading, run, writing
from curvlab.grid import store as store_module
from curvlab.grid.cell import OUTPUT
from curvlab.sweep import config

pytestmark = pytest.mark.usefixtures("one_server")

# Cells ---------------------------------------------------------------------------------------------------------------


def plain(config, place):
    return [{"value": config["a"] * 0.1, "word": "w"}]


def everything(config, place):
    values = {
        "none": None,
        "yes": True,
        "large": 2**62,
        "third": 1 / 3,
        "tiny": 5e-324,
        "inf": math.inf,
        "no": -math.inf,
    }
    return [values | {"numpy": np.float32(0.1), "tensor": torch.tensor(2), "text": "naïve ½"}, {"other": 1}]


def drawn(config, place):
    """Depend on all that could differ between processes, but must not."""
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(config["seed"]))
    for _ in range(5):
        a = torch.tanh(a @ a / 17)
    words = "".join({f"{word}" for word in ("a", "b", "c", "d", "e")})
    return [
        {"sum": float(a.sum()), "torch": float(torch.rand(())), "order": words}
        | {"numpy": float(np.random.rand())}  # noqa: NPY002
        | {"python": random.random(), "threads": torch.get_num_threads()}
    ]


def troubled(config, place):
    print("heard of", config["how"], flush=True)
    match config["how"]:
        case "raises":
            raise ValueError("one\ntwo")
        case "exits":
            sys.exit("away")
        case "killed":
            bytearray(400_000_000)
            os.kill(os.getpid(), signal.SIGKILL)
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "vanishes":
            os._exit(3)
        case "sleeps":
            subprocess.Popen(["sleep", "1234"])
            time.sleep(1000)
        case "nan":
            return [{"x": 1.0}, {"x": math.nan, "y": 2}]
        case "nested":
            return [{"x": [1, 2]}]
        case "huge":
            return [{"x": 2**63}]
        case "memory":
            raise MemoryError
        case "escapes":
            raise ValueError("\udc80 \x1b[2J")
        case "not UTF-8":
            return [{"x": "\udc80"}]
        case "named so":
            return [{"\udc80": 1}]
        case "nothing":
            return None
        case "dictionary":
            return {"x": 1}
        case "column":
            return [{"seeds": 1}]
        case "prefix":
            return [{"config.how": 1}]
    return [{"x": 1.0}]


def counting(config, place):
    """Go on from a checkpoint; fail until there are enough."""
    file = place.folder / "count"
    count = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(count))
    if count < config["enough"]:
        raise RuntimeError(f"only {count}")
    return [{"count": count}]


def waiting(config, place):
    time.sleep(config["seconds"])
    return [{"x": 1}]


def twice(config, place):
    """Kill the process that has started this one."""
    file = place.folder / "begun"
    begun = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(begun))
    if begun <= config["kills"]:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return [{"begun": begun}]


def slow(config, place):
    (place.folder / "begun").write_text("")
    time.sleep(0.2)
    return [{"x": config["seed"] / 3}]


def steps(config, place):
    return [{"step": step, "loss": config["seed"] + 0.1 * step} for step in range(3)]


def imported(config, place):
    return [{name: name in sys.modules for name in ("torch._dynamo", "sklearn.datasets")}]


def forgetful(config, place):
    subprocess.Popen(["sleep", "4321"])
    return [{"x": 1}]


NAME = __name__


def cells(function, *configs, version=1):
    return [Cell(f"{NAME}:{function}", config, version=version) for config in configs]


def grid_of(function, **axes):
    return cells(function, *expand({}, grid=axes))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "s.sqlite"


def contents(file):
    """Return all of a table that must not depend on chance."""
    with reading(file) as store:
        table = store.table()
        columns = [name for name in table if name not in ("cell.seconds", "cell.peak_bytes", "cell.ended")]
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


def test_draw_goes_on_where_it_was():
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
        {"normal": [0, 1]},
        3,
    ],
)
def test_draw_refuses(given):
    with pytest.raises(CurvlabError, match="random: a needs"):
        draw(2, {"a": given})


def test_the_key_is_of_name_version_and_the_whole_configuration():
    cell = Cell("m:f", {"a": 1, "seed": 0})
    assert cell.key == Cell("m:f", {"seed": 0, "a": 1}).key
    others = [
        Cell("m:g", {"a": 1, "seed": 0}),
        Cell("m:f", {"a": 1, "seed": 0}, version=2),
        Cell("m:f", {"a": 1.5, "seed": 0}),
        Cell("m:f", {"a": "1", "seed": 0}),
        Cell("m:f", {"a": 1, "seed": 0, "b": None}),
        Cell("m:f", {"a": 1, "seed": 1}),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 7
    assert cell.point == others[-1].point != others[2].point
    assert len(cell.key) == 32


@pytest.mark.parametrize("value", [math.nan, {1}, np.float64(1) * 1j, Path("x")])
def test_the_key_needs_json(value):
    with pytest.raises(CurvlabError, match="JSON values"):
        _ = Cell("m:f", {"a": value}).key


# Running -------------------------------------------------------------------------------------------------------------


def test_records_come_back_to_the_bit(file):
    assert run(cells("everything", {}), file) == {"done": 1, "failed": 0, "absent": 0, "earlier": 0}
    with reading(file) as store:
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
    with reading(tmp_path / "one.sqlite") as store:
        records = store.records()
    assert {record["threads"] for record in records} == {1}
    assert len({record["torch"] for record in records}) == 12  # a cell draws its own numbers


def test_threads_are_those_asked_for(file):
    run(grid_of("drawn", seed=[0]), file, threads=2)
    with reading(file) as store:
        assert store.records()[0]["threads"] == 2
        assert store.table()["cell.threads"].tolist() == [2]


def test_a_finished_cell_is_not_run_again_and_a_sweep_grows(file):
    work = grid_of("plain", a=[1, 2])
    run(work, file)
    before = contents(file), raw(file)
    assert run(work, file)["done"] == 2
    assert (contents(file), raw(file)) == before
    assert run(grid_of("plain", a=[2, 3]), file) == {"done": 2, "failed": 0, "absent": 0, "earlier": 1}
    with reading(file) as store:
        assert [record["value"] for record in store.records()] == [2 * 0.1, 3 * 0.1]
    assert run(grid_of("plain", a=[3, 2, 1]), file) == {"done": 3, "failed": 0, "absent": 0, "earlier": 0}
    with reading(file) as store:
        assert [record["value"] for record in store.records()] == [3 * 0.1, 2 * 0.1, 0.1]
    assert attempts(file) == [1, 1, 1]


def test_a_new_version_is_computed_anew(file):
    run(cells("plain", {"a": 1}), file)
    assert run(cells("plain", {"a": 1}, version=2), file) == {"done": 1, "failed": 0, "absent": 0, "earlier": 1}


def raw(file):
    with sqlite3.connect(file) as connection:
        return connection.execute("SELECT * FROM cells ORDER BY key").fetchall()


def attempts(file):
    with sqlite3.connect(file) as connection:
        return [n for (n,) in connection.execute("SELECT attempts FROM cells ORDER BY key")]


TROUBLES = {
    "raises": ("raised", "ValueError: one two"),
    "exits": ("raised", "SystemExit: away"),
    "killed": ("killed", "killed (SIGKILL), most likely because memory ran out, with "),
    "crashes": ("killed", "killed (SIGSEGV)"),
    "vanishes": ("killed", "ended with exit code 3 and no records"),
    "sleeps": ("timeout", "not done after 3 seconds"),
    "nan": ("nan", "x is NaN"),
    "nested": ("raised", "'x' is a list; records are flat"),
    "huge": ("raised", "more than 64 bits"),
    "memory": ("raised", "MemoryError"),
    "escapes": ("raised", r"ValueError: \udc80 \x1b[2J"),
    "not UTF-8": ("raised", "'x' is not UTF-8"),
    "named so": ("raised", r"'\udc80' is not UTF-8"),
    "nothing": ("raised", "returned None, not a list of records"),
    "dictionary": ("raised", "returned a dict, not a list of records"),
    "column": ("raised", "'seeds' is a column that the tables have themselves"),
    "prefix": ("raised", "'config.how' is a column that the tables have themselves"),
}


def test_every_way_to_fail_is_told_and_the_rest_goes_on(file):
    work = grid_of("troubled", how=[*TROUBLES, "fine"])
    assert run(work, file, jobs=3, cell_timeout=3) == {"done": 1, "failed": len(TROUBLES), "absent": 0, "earlier": 0}
    with reading(file) as store:
        failed = {cell["axes"]["how"]: cell for cell in store.failed()}
        table, summary = store.table(), store.summary()
        assert store.kinds() == {"killed": 3, "nan": 1, "raised": 12, "timeout": 1}
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
    assert 3 <= failed["sleeps"]["seconds"] < 5
    # In the tables too: what a cell with NaN has returned stays to be seen, and is in no mean.
    assert table["status"].tolist().count("failed") == len(TROUBLES) + 1  # two records of one cell
    (nan,) = (value for value in table["x"] if isinstance(value, float) and math.isnan(value))
    assert math.isnan(nan)
    assert summary["failed"].tolist() == [1] * len(TROUBLES) + [0]
    assert summary["x"].tolist() == [None] * len(TROUBLES) + [1.0]
    time.sleep(0.2)
    assert not [line for line in processes_now() if "sleep 1234" in line]  # what the cell has started is gone too


def test_what_a_cell_has_started_ends_with_it(file):
    assert run(cells("forgetful", {}), file)["done"] == 1
    time.sleep(0.2)
    assert not [line for line in processes_now() if "sleep 4321" in line]


def processes_now():
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_failed_cells_are_run_again_when_asked_and_find_their_checkpoint(file):
    work = cells("counting", {"enough": 3})
    assert run(work, file)["failed"] == 1
    assert run(work, file)["failed"] == 1
    assert (folder_of(file, work[0].key) / "count").read_text() == "1"
    left = folder_of(file, work[0].key) / ".count.0123abcd.tmp"  # as writing leaves it when it is killed
    left.write_text("")
    assert run(work, file, retry_failed=True)["failed"] == 1
    assert not left.exists()
    assert run(work, file, retry_failed=True)["done"] == 1
    with reading(file) as store:
        assert store.records() == [{"count": 3}]
        assert store.failed() == []
    assert attempts(file) == [3]
    assert raw(file)[0][9:12] == (None, None, None)  # no kind, error or traceback is left


def test_a_cell_that_leaves_nothing_has_no_folder(file):
    work = cells("plain", {"a": 1}) + cells("troubled", {"how": "fine"})
    run(work, file)
    assert not folder_of(file, work[0].key).exists()
    assert (folder_of(file, work[1].key) / OUTPUT).read_text() == "heard of fine\n"


def test_what_training_imports_is_there_when_a_cell_begins(file):
    run(cells("imported", {}), file)
    with reading(file) as store:
        assert store.records() == [{"torch._dynamo": True, "sklearn.datasets": True}]


def test_what_a_cell_prints_is_not_printed(file, capfd):
    run(cells("troubled", {"how": "fine"}), file)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("function", ["no_such_module:f", f"{NAME}:no_such", f"{NAME}"])
def test_a_function_that_there_is_not(file, function):
    run([Cell(function, {"a": 1})], file)
    with reading(file) as store:
        assert function in store.failed()[0]["error"]


def test_two_processes_of_one_cell_are_one_after_the_other(file):
    """One of a run that was killed on a cluster may still be at work when the next begins it again."""
    request = {"key": "0" * 32, "function": f"{NAME}:waiting", "config": {"seconds": 0.7}, "offline": False}
    request |= {"folder": str(file.parent / "f"), "cwd": str(file.parent), "data_root": None, "threads": 1}
    whole = json.dumps(request).encode()
    run(cells("plain", {"a": 1}), file)  # the server is there
    started = time.perf_counter()
    answers = []

    def work():
        answers.append(json.loads(processes.run(f"{NAME}:waiting", 1, whole, None, lambda: True).answer))

    both = [threading.Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [answer.get("records") for answer in answers] == [[{"x": 1}]] * 2
    assert time.perf_counter() - started > 1.4


# The store -----------------------------------------------------------------------------------------------------------


def outcome(cell, *records, **others):
    return Outcome(cell.key, records=records, **others)


def test_summary_has_mean_spread_and_seeds(file):
    work = grid_of("plain", lr=[0.1, 0.2], seed=[0, 1, 2])
    with writing(file) as store:
        store.register(work)
        for cell in reversed(work[:5]):
            seed = cell.config["seed"]
            only = {"z": 1.0} if seed == 1 else {}
            store.finish(outcome(cell, {"x": seed / 7, "y": 1.0 if seed else None} | only))
        summary = store.summary()
        assert store.axes() == ["lr"]
        assert store.tally() == {"done": 5, "failed": 0, "absent": 1, "earlier": 0}
    x = [0.0, 1 / 7, 2 / 7]
    assert summary.columns.tolist()[:8] == ["config.lr", "seeds", "failed", "absent", "x", "x_std", "y", "y_std"]
    assert summary.iloc[0, :6].tolist() == [0.1, 3, 0, 0, math.fsum(x) / 3, np.std(x, ddof=1)]
    assert summary.iloc[1, :5].tolist() == [0.2, 2, 0, 1, 1 / 14]
    assert summary["y"].tolist() == [None, None]  # one of the records has no number
    assert summary["z"].tolist() == [None, None]  # or does not have it at all


def test_summary_wants_to_know_what_tells_records_apart(file):
    work = grid_of("steps", seed=[0, 2])
    run(work, file)
    with reading(file) as store:
        with pytest.raises(CurvlabError, match=r"a cell has 3 records of the same group.*--by.*step"):
            store.summary()
        with pytest.raises(CurvlabError, match="no record has 'stp'; they have step, loss"):
            store.summary(by=["stp"])
        summary = store.summary(by=["step"])
        assert summary.columns.tolist() == ["step", "seeds", "failed", "absent", "loss", "loss_std"]
        assert summary["step"].tolist() == [0, 1, 2]
        assert summary["loss"].tolist() == [1.0, 1.1, (0.2 + 2.2) / 2]
        assert store.summary(by=["step"], values=["loss"]).equals(summary)


def test_summary_does_not_mix_a_record_with_a_deviation(file):
    (cell,) = work = cells("plain", {"a": 1})
    with writing(file) as store:
        store.register(work)
        store.finish(outcome(cell, {"loss": 1.0, "loss_std": 2.0}))
        with pytest.raises(CurvlabError, match=r"the records have loss_std, which is what .* of loss is called"):
            store.summary()
        assert store.summary(values=["loss"])["loss"].tolist() == [1.0]
        assert store.summary(values=["loss_std"])["loss_std"].tolist() == [2.0]
        assert store.table()["loss_std"].tolist() == [2.0]


def test_axes_are_of_different_values(file):
    """Not of their first fifteen digits, and not of what is the same in another form."""
    near = 0.30000000000000004
    points = [{"a": 0.3, "b": 1, "c": None, "d": [near]}, {"a": near, "b": 1.0, "c": "", "d": [near]}]
    with writing(file) as store:
        store.register(cells("plain", *points))
        assert store.axes() == ["a", "b", "c"]
        assert store.table()["config.a"].tolist() == [0.3, near]


def test_another_key_of_the_seed_makes_other_points(file):
    configs = [{"seed": 0, "draw": draw} for draw in range(3)]
    with writing(file) as store:
        for seed, rows in (("seed", 3), ("draw", 1)):
            store.register([Cell("m:f", config, seed=seed) for config in configs])
            assert len(store.summary()) == rows
            assert store.table()["config.seed"].tolist() == ([0, 0, 0] if seed == "seed" else [0, 1, 2])


def test_a_store_is_not_continued_with_other_data(file):
    run(cells("plain", {"a": 1}), file, data={"digits": "1"})
    with pytest.raises(CurvlabError, match=r"digits is not what it was for the cells that .*s.sqlite has"):
        run(cells("plain", {"a": 2}), file, data={"mnist": "1", "digits": "2"})
    with reading(file) as store:
        assert store.tally() == {"done": 1, "failed": 0, "absent": 0, "earlier": 0}
    assert run(cells("plain", {"a": 2}), file, data={"mnist": "2", "digits": "1"})["done"] == 1


def test_mean_and_spread_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(50) * 10.0 ** rng.integers(-8, 8, 50)
    for aggregate in (store_module._Mean, store_module._Std):
        found = set()
        for _ in range(20):
            gathered = aggregate()
            for value in rng.permutation(values).tolist():
                gathered.step(value)
            found.add(gathered.finalize())
        assert len(found) == 1


def test_a_finished_cell_is_not_overwritten(file):
    (cell,) = cells("plain", {"a": 1})
    with writing(file) as store:
        store.register([cell])
        store.finish(outcome(cell, {"x": 1}))
        store.finish(outcome(cell, {"x": 2}))
        store.finish(Outcome(cell.key, "raised", "late"))
        assert store.records() == [{"x": 1}]
        assert store.tally()["done"] == 1


def test_a_second_writer_is_refused_and_readers_are_not(file):
    with writing(file) as store:
        store.register(cells("plain", {"a": 1}))
        with pytest.raises(CurvlabError, match=rf"s.sqlite is being written by process {os.getpid()} on "):
            run(cells("plain", {"a": 1}), file)
        with reading(file) as reader:
            assert reader.tally()["absent"] == 1
    assert run(cells("plain", {"a": 1}), file)["done"] == 1


def test_a_store_by_another_name_is_the_same(file):
    link = file.parent / "there" / "link.sqlite"
    link.parent.mkdir()
    link.symlink_to(file)
    with writing(file), pytest.raises(CurvlabError, match="is being written by"):
        run(cells("plain", {"a": 1}), link)
    (cell,) = cells("troubled", {"how": "fine"})
    assert run([cell], link)["done"] == 1
    assert folder_of(link, cell.key) == folder_of(file, cell.key)
    assert (folder_of(file, cell.key) / OUTPUT).exists()


def test_nothing_is_left_beside_a_store(file):
    """Of SQLite's files, by whoever leaves last; a reader changes nothing."""
    with writing(file) as store:
        store.register(cells("plain", {"a": 1}))
    beside = {file.name, f"{file.name}.lock"}
    assert {path.name for path in file.parent.iterdir()} == beside
    before = file.read_bytes()
    with reading(file) as store:
        assert store.tally()["absent"] == 1
        with pytest.raises(CurvlabError, match="readonly"):
            store.register([])
    assert {path.name for path in file.parent.iterdir()} == beside
    assert file.read_bytes() == before
    with reading(file) as reader:
        with writing(file) as store:
            store.register(cells("plain", {"a": 2}))
        assert reader.tally()["absent"] == 1
    assert {path.name for path in file.parent.iterdir()} == beside


def test_a_store_that_there_is_not(file):
    with pytest.raises(CurvlabError, match="there is no store"), reading(file):
        pass


def test_a_damaged_store_is_told_and_left_as_it_is(file):
    run(grid_of("plain", a=list(range(40))), file)
    whole = file.read_bytes()
    for broken in (b"no database at all" * 100, whole[:5000], whole[:8192] + b"\xff" * 12000 + whole[20192:]):
        file.write_bytes(broken)
        for use in (reading, writing):
            with pytest.raises(CurvlabError, match="is damaged or no store"), use(file):
                pass
        assert file.read_bytes() == broken


def test_a_store_of_a_newer_version_and_another_database(file, tmp_path):
    run(cells("plain", {"a": 1}), file)
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 2")
    for use in (reading, writing):
        with (
            pytest.raises(CurvlabError, match=r"newer curvlab \(format 2, this one knows 1\); update curvlab"),
            use(file),
        ):
            pass
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    for use in (reading, writing):
        with pytest.raises(CurvlabError, match="not the store of a sweep"), use(other):
            pass
    with pytest.raises(CurvlabError, match="is a folder"), reading(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    for use in (reading, writing):
        with pytest.raises(CurvlabError, match="no regular file"), use(tmp_path / "pipe"):
            pass


@pytest.mark.parametrize("change", ["DROP TABLE entries", "PRAGMA user_version = 0"])
def test_a_store_that_lacks_something(file, change):
    run(cells("plain", {"a": 1}), file)
    with sqlite3.connect(file) as connection:
        connection.execute(change)
    for use in (reading, writing):
        with pytest.raises(CurvlabError, match=r"is damaged or no store \(it lacks (entries|its version)\)"), use(file):
            pass


@pytest.mark.parametrize("how", ["empty", "without tables"])
def test_a_run_killed_before_its_tables_were_made(file, how):
    with sqlite3.connect(file) as connection:
        if how == "without tables":
            connection.execute("PRAGMA journal_mode = WAL")
    assert run(cells("plain", {"a": 1}), file)["done"] == 1


def test_a_full_disk_is_told_and_what_is_finished_stays(file, monkeypatch):
    work = cells("plain", *({"a": a} for a in range(30)))
    register = store_module.Store.register

    def little(store, cells, data):
        register(store, cells, data)
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages + 1}")

    monkeypatch.setattr(store_module.Store, "register", little)
    monkeypatch.setattr(store_module.Store, "finish", _long(store_module.Store.finish))
    with pytest.raises(CurvlabError, match=r"cannot write .*s.sqlite: there is no space left"):
        run(work, file, jobs=2)
    monkeypatch.undo()
    with reading(file) as store:
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
    run(cells("plain", {"a": 1}), file)
    file.parent.chmod(0o500)
    try:
        with pytest.raises(CurvlabError, match="cannot write"):
            run(cells("plain", {"a": 2}), file)
        with reading(file) as store:
            assert len(store.records()) == 1
    finally:
        file.parent.chmod(0o700)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CurvlabError, match=r"not a folder|cannot write"):
        run(cells("plain", {"a": 1}), tmp_path / "file" / "s.sqlite")


def test_a_store_is_read_where_nothing_can_be_written(file, monkeypatch):
    run(cells("plain", {"a": 1}), file)
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
        with reading(file) as store:
            assert len(store.records()) == 1
    log.write_bytes(b"what is newer")
    with pytest.raises(CurvlabError, match=r"the newest part of .*s.sqlite is in s.sqlite-wal"), reading(file):
        pass


def test_software_is_kept_once_a_state(file):
    work = cells("plain", {"a": 1}, {"a": 2}, {"a": 3})
    with writing(file) as store:
        store.register(work)
        for cell, version in zip(work, ("1", "1", "2"), strict=True):
            store.finish(outcome(cell, {"x": 1}, software={"versions": {"torch": version}}))
        assert [state["versions"] for state in store.software().values()] == [{"torch": "1"}, {"torch": "2"}]
    run(cells("plain", {"a": 4}), file)
    with reading(file) as store:
        ((_, state),) = store.software().items()
    assert state["versions"]["torch"] == torch.__version__.partition("+")[0] or state["versions"]["torch"]
    assert set(state) == {"versions", "git"}


# Killed and started again --------------------------------------------------------------------------------------------


def killed_at_random(tmp_path, number, kills, longest):
    """Kill a sweep at random moments, and require in the end what an undisturbed one gives, and no word beside that."""
    sweep = {"function": f"{NAME}:drawn", "seeds": list(range(number))}
    (tmp_path / "killed.yaml").write_text(json.dumps(sweep))
    source = Path(store_module.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(Path(__file__).parent)])}

    def start():
        command = [sys.executable, "-m", "curvlab.sweep", "run", "killed.yaml", "--jobs", "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)

    run(config.read(tmp_path / "killed.yaml"), tmp_path / "undisturbed.sqlite", jobs=1)
    rng, file, ended = random.Random(0), tmp_path / "killed.sqlite", {}
    counts = []
    for _ in range(kills):
        process = start()
        deadline = time.monotonic() + 60
        before = len(ended)
        while time.monotonic() < deadline and finished(file) <= before:  # it has begun to work
            time.sleep(0.01)
        time.sleep(rng.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = dict(rows(file))
        assert {key: now[key] for key in ended} == ended  # what was finished was not touched
        ended = now
        counts.append(len(ended))
    assert counts[0] < number  # it was not at its end before the kills
    last = start()
    out, err = last.communicate(timeout=600)
    assert (last.returncode, err) == (0, "")
    assert out.splitlines()[0].startswith(f"{number} cells: {number} done, 0 failed, 0 absent; ")
    assert out.splitlines()[1:] == ["In killed.sqlite."]
    assert contents(file) == contents(tmp_path / "undisturbed.sqlite")
    assert set(attempts(file)) == {1}
    assert store_is_whole(file)


def rows(file):
    with sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=30) as connection:
        return connection.execute("SELECT key, ended FROM cells WHERE status = 'done'").fetchall()


def finished(file):
    try:
        return len(rows(file))
    except sqlite3.OperationalError:  # there is no store or no table yet
        return 0


def test_a_sweep_that_is_killed_ends_as_one_that_is_not(tmp_path):
    killed_at_random(tmp_path, number=20, kills=1, longest=0.2)


@pytest.mark.slow
def test_a_large_sweep_that_is_killed_ten_times(tmp_path):
    killed_at_random(tmp_path, number=200, kills=10, longest=0.5)


def test_nothing_is_left_of_a_run_that_is_killed(tmp_path):
    code = f"""
import sys, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it runs in the background
sys.path[:0] = {sys.path!r}
from pathlib import Path
from curvlab.grid import Cell, run
run([Cell("{NAME}:waiting", {{"seconds": 1000 + i}}) for i in range(3)], Path(sys.argv[1]) / "s.sqlite", jobs=2)
"""
    folders = {sign: tmp_path / sign.name for sign in (signal.SIGKILL, signal.SIGINT)}
    started = {
        sign: subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL)
        for sign, folder in folders.items()
    }
    for sign, process in started.items():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(folders[sign].glob(f"s.sqlite.cells/*/{OUTPUT}"))) < 2:
            time.sleep(0.05)
        children = descendants(process.pid)
        assert len(children) == 3  # the server and two cells
        process.send_signal(sign)
        process.wait(20)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(Path(f"/proc/{child}").exists() for child in children):
            time.sleep(0.05)
        assert not [child for child in children if Path(f"/proc/{child}").exists()]


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def test_a_server_that_is_killed_is_started_again(file):
    run(cells("plain", {"a": 1}), file)
    server = processes._servers[1, NAME]
    os.kill(server._process.pid, signal.SIGKILL)
    assert run(cells("plain", {"a": 2}), file)["done"] == 1


@pytest.mark.parametrize("kills", [1, 2])
def test_a_cell_whose_server_is_killed_is_begun_again_once(file, kills):
    (cell,) = cells("twice", {"kills": kills})
    assert run([cell], file)["done" if kills == 1 else "failed"] == 1
    with reading(file) as store:
        if kills == 1:
            assert store.records() == [{"begun": 2}]
        else:
            (failed,) = store.failed()
            assert failed["kind"] == "killed"
            assert failed["error"].startswith("the process that starts the cells was killed, and when this one")


def test_a_server_that_is_importing(tmp_path, monkeypatch, capfd):
    """It is ended all the same, and what a module prints is not for our output."""
    (tmp_path / "sluggish.py").write_text(
        "import time, pathlib; print('here', flush=True); pathlib.Path(__file__).with_suffix('.begun').touch(); "
        "time.sleep(100)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    server = processes.Server(1, ["sluggish"])
    while not (tmp_path / "sluggish.begun").exists():
        time.sleep(0.05)
    started = time.perf_counter()
    server.close()
    assert time.perf_counter() - started < 20
    assert not server.alive()
    assert capfd.readouterr().out == ""
