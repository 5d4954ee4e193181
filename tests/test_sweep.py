"""``python -m curvlab.sweep``: its files, commands and errors, and an analysis as a sweep."""

import csv
import dataclasses
import io
import json
import math
import shlex
import sqlite3
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from runs_under_test import NAME as GRID
from test_grid import light_server

from curvlab.analyze import ANALYSES, Entry
from curvlab.analyze.frame.analysis import Analysis, Preset, Report, Table, Tool
from curvlab.analyze.frame.command import execute
from curvlab.analyze.frame.subject import SubjectConfig
from curvlab.commandline.options import RunOptions
from curvlab.grid import read_store, report
from curvlab.results import Column
from curvlab.sweep import config
from curvlab.sweep.__main__ import main

__all__ = ["light_server"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_server", "light_server")

# An analysis ---------------------------------------------------------------------------------------------------------


class SmallConfig(SubjectConfig):
    """Two numbers."""

    lr: float = 0.1
    """Learning rate."""
    hidden: tuple[int, ...] = (3, 4)
    """Sizes."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds."""


def measure(given, dataset, workspace):
    assert isinstance(given, SmallConfig)
    assert dataset.name == "digits"
    assert workspace.folder.is_dir()
    (seed,) = given.seeds
    return [
        {"parameter": f"w{i}", "value": given.lr * size + seed, "number": seed} for i, size in enumerate(given.hidden)
    ]


def make_report(run):
    return Report(Table("Small", [Column("parameter", "parameter")], run.records["table"]))


ANALYSIS = Analysis(
    SmallConfig,
    "Small.",
    {"default": Preset(SmallConfig()), "other": Preset(SmallConfig(lr=0.5))},
    measure,
    make_report,
    kinds={"table": "value"},
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ANALYSES, "small", Entry("backends", "For tests."))
    monkeypatch.setitem(sys.modules, "curvlab.analyze.backends.small", sys.modules[__name__])


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(shlex.split(line))
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(call):
    """Return a function that requires an error of one sentence and exit code 2, and returns the sentence."""

    def refused(line):
        code, out, err = call(line)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return refused


def write(name="s.yaml", **sweep):
    Path(name).write_text(yaml.safe_dump(sweep))
    return name


def plain(**others):
    return write(**{"function": f"{GRID}:plain", "grid": {"a": [1, 2]}} | others)


# Files ---------------------------------------------------------------------------------------------------------------


def test_axes_of_a_function_in_order():
    name = write(
        function="m:f",
        base={"a": 0, "b": 0},
        points=[{"c": 1}, {"c": 2}],
        grid={"b": [5, 6]},
        random={"count": 2, "ranges": {"r": {"choice": [7]}}},
        seeds=[3, 4],
        version=2,
    )
    specs = config.read(Path(name))
    assert len(specs) == 16
    assert specs[0].config == {"a": 0, "b": 5, "c": 1, "r": 7, "seed": 3}
    assert [spec.config["seed"] for spec in specs[:4]] == [3, 4, 3, 4]
    assert {spec.version for spec in specs} == {2}
    assert len({spec.key for spec in specs}) == 8  # equal draws are one run


def test_every_run_of_an_analysis_has_the_whole_configuration():
    specs = config.read(Path(write(analysis="small", preset="other", grid={"hidden": [[1], [2, 3]]}, seeds=[4, 5])))
    assert [(spec.config["hidden"], spec.config["seeds"]) for spec in specs] == [
        ([1], [4]),
        ([1], [5]),
        ([2, 3], [4]),
        ([2, 3], [5]),
    ]
    assert {spec.config["lr"] for spec in specs} == {0.5}
    assert {(spec.name, spec.version, spec.seed_key) for spec in specs} == {("test_sweep", 1, "seeds")}
    assert len({spec.point for spec in specs}) == 2


def test_without_seeds_the_configuration_has_them():
    assert [spec.config["seeds"] for spec in config.read(Path(write(analysis="small")))] == [[0], [1]]


def test_numbers_with_an_exponent_are_numbers():
    Path("s.yaml").write_text("function: m:f\ngrid: {lr: [1e-3, 1.5E+2, 2e5, -1e-8]}\nbase: {text: e5}")
    specs = config.read(Path("s.yaml"))
    assert [spec.config["lr"] for spec in specs] == [0.001, 150.0, 200000.0, -1e-8]
    assert specs[0].config["text"] == "e5"


def test_a_value_is_the_same_run_in_every_notation():
    keys = set()
    for value in ("0.1", "1e-1", "'0.1'", "+0.10"):
        Path("s.yaml").write_text(f"analysis: small\ngrid: {{lr: [{value}]}}\nseeds: [0]")
        keys |= {spec.key for spec in config.read(Path("s.yaml"))}
    assert len(keys) == 1


def test_numbers_are_those_of_yaml_1_2():
    Path("s.yaml").write_text("function: m:f\ngrid: {a: [017, 1:30, no, 1_000, 0b1, 1e-3, 2020-01-01]}")
    specs = config.read(Path("s.yaml"))
    assert [spec.config["a"] for spec in specs] == [17, "1:30", "no", "1_000", "0b1", 0.001, "2020-01-01"]


CIRCLE = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("sweep", "fragment"),
    [
        ({}, "s.yaml needs either analysis or function"),
        ({"analysis": "small", "function": "m:f"}, "s.yaml needs either analysis or function"),
        ({"analysis": "smal"}, "unknown analysis 'smal'; did you mean 'small'?"),
        ({"analysis": "doctor"}, "the analysis doctor has no runs to sweep"),
        ({"analysis": "small", "preset": "othr"}, "unknown preset 'othr'; did you mean 'other'?"),
        ({"analysis": "small", "base": {"lrr": 1}}, "s.yaml: unknown option 'lrr'; did you mean 'lr'?"),
        ({"analysis": "small", "grid": {"lr": ["x"]}}, "s.yaml: lr should be a valid number"),
        ({"function": "m:f", "gird": {}}, "s.yaml: unknown option 'gird'; did you mean 'grid'?"),
        ({"function": "m:f", "grid": {"a": 1}}, "s.yaml: grid.a should be a valid list"),
        ({"function": "m:f", "grid": {"a": []}}, "s.yaml: the grid needs a list of values for 'a'"),
        (
            {"function": "m:f", "grid": {"a": [1, 1]}},
            "s.yaml: the grid's list for 'a' has 1 twice; equal values are",
        ),
        (
            {"function": "m:f", "grid": {"a": [1, True]}},
            "s.yaml: the grid's list for 'a' has 1 and True, which are",
        ),
        ({"function": "m:f", "points": [{"a": 1}, {"a": 1}]}, "s.yaml: the list of points has {'a': 1} twice"),
        (
            {"function": "m:f", "base": {"a": 1}, "points": [{}, {"a": 1}]},
            "s.yaml: the combinations 1 and 2 are equal, {'a': 1}; remove one of them",
        ),
        ({"analysis": "small", "grid": {"lr": [0.1, "0.1"]}, "seeds": [0]}, "the combinations 1 and 2 are equal"),
        (
            {"function": "m:f", "random": {"count": 1, "ranges": {"a": {"uniform": [-1.7e308, 1.7e308]}}}},
            "finite diff",
        ),
        ({"function": "m:f", "base": {"a": 10**400}}, "s.yaml is not YAML: '1000"),
        ({"function": "m:f", "base": {"a": {1: 2}}}, "s.yaml is not YAML: the key 1 is not a string"),
        ({"function": "m:f", "random": {"count": 1, "ranges": {"a": {"normal": [0, 1]}}}}, "s.yaml: random: a needs"),
        (
            {"function": "m:f", "random": {"count": 1, "ranges": {"a": {"uniform": 3}}}},
            "random.ranges.a.uniform should",
        ),
        ({"function": "m:f", "seeds": [-1]}, "s.yaml: seeds should be greater than or equal to 0"),
        ({"function": "m:f", "seeds": [0, 0, 1]}, "s.yaml: seeds needs one or more different values"),
        ({"function": "m:f", "seeds": []}, "s.yaml: seeds needs one or more different values"),
        ({"function": "m:f", "seeds": [True]}, "s.yaml: seeds should be a valid integer, not True"),
        ({"function": "m:f", "seeds": ["3"]}, "s.yaml: seeds should be a valid integer, not '3'"),
        ({"function": "m:f", "seeds": [5], "grid": {"seed": [0, 1]}}, "s.yaml: 'seed' is set by seeds and by grid"),
        ({"function": "m:f", "seeds": [5], "base": {"seed": 0}}, "s.yaml: 'seed' is set by seeds and by base"),
        ({"function": "m:f", "seeds": [5], "points": [{"seed": 0}]}, "'seed' is set by seeds and by points"),
        (
            {"function": "m:f", "seeds": [5], "random": {"count": 1, "ranges": {"seed": {"integers": [0, 9]}}}},
            "s.yaml: 'seed' is set by seeds and by random",
        ),
        ({"analysis": "small", "seeds": [5], "base": {"seeds": [0]}}, "'seeds' is set by seeds and by base"),
        ({"analysis": "small", "base": {"seeds": []}}, "s.yaml has no runs: seeds is empty"),
        ({"analysis": "small", "version": 2}, "s.yaml: version applies to function and not to analysis"),
        ({"function": "m:f", "preset": "cpu"}, "s.yaml: preset applies to analysis and not to function"),
        (
            {"function": "m:f", "base": {"a": math.nan}},
            "s.yaml: base: 'a': a configuration must consist of JSON",
        ),
        ({"function": "m:f", "points": [{"a": CIRCLE}]}, "s.yaml is not YAML: the anchor 'id001' contains itself"),
        ({"function": f"{GRID}:plane"}, f"function {GRID}:plane: "),
        ({"function": "no_such:f"}, "function no_such:f: cannot import 'no_such'"),
    ],
)
def test_an_invalid_sweep(refused, sweep, fragment):
    assert fragment in refused(f"run {write(**sweep)}")
    assert not Path("s.sqlite").exists()


def test_a_duplicate_key(refused):
    Path("s.yaml").write_text("function: m:f\ngrid:\n  lr: [1]\n  lr: [2]\n")
    assert "s.yaml is not YAML: the key 'lr' occurs twice, line 4" in refused("run s.yaml")
    Path("s.yaml").write_text("function: m:f\nbase: &b {a: 1, b: 1}\npoints: [{<<: *b, a: 2}, {<<: *b, b: 3}]\n")
    assert [spec.config for spec in config.read(Path("s.yaml"))] == [{"a": 2, "b": 1}, {"a": 1, "b": 3}]


# Commands ------------------------------------------------------------------------------------------------------------


def test_lists_the_commands(call):
    descriptions = set()
    for line in ("", "--help"):
        code, out, _ = call(line)
        assert code == 0
        for command in ("run", "status", "failed", "export"):
            assert f"\n  {command} " in out
            code, shown, _ = call(f"{command} --help")
            assert code == 0
            descriptions.add(shown.split("\n\n")[1])
            assert "Exit codes: 0 done; 1 done, but runs have failed;" in " ".join(shown.split())
    assert len(descriptions) == 4


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("rn s.yaml", "unknown command 'rn'; did you mean 'run'?"),
        ("run", "needs CONFIG.yaml"),
        ("run no.yaml", "cannot read no.yaml: No such file"),
        ("status no.sqlite", "there is no store no.sqlite"),
        ("status", "needs STORE"),
        ("status a b", "unexpected argument 'b'"),
        ("run s.yaml --job 2", "unknown option --job; did you mean '--jobs'?"),
        ("run s.yaml --jobs 0", "--jobs should be greater than or equal to 1"),
        ("run s.yaml --run-timeout 0", "--run-timeout should be greater than 0"),
        ("export x.sqlite --by step", "--by and --values need --summary"),
    ],
)
def test_an_invalid_command(refused, line, fragment):
    plain()
    assert fragment in refused(line)


def test_run_status_failed_and_export(call):
    name = write(function=f"{GRID}:troubled", grid={"how": ["fine", "raises", "nan"]}, seeds=[0, 1])
    code, out, err = call(f"run {name}")
    assert (code, err) == (1, "")
    assert "6 runs: 2 done, 4 failed (2 nan, 2 raised), 0 absent" in out
    assert "how=raises seed=1: ValueError: one two" in out
    assert call("status s.sqlite")[1].startswith("6 runs: 2 done, 4 failed (2 nan, 2 raised), 0 absent")
    lines = call("failed s.sqlite")[1].splitlines()
    assert len(lines) == 4
    key = next(line for line in lines if "how=raises seed=1" in line).split()[0]
    code, one, _ = call(f"failed s.sqlite {key}")
    assert 'raise ValueError("one\\ntwo")' in one
    assert "heard of" not in one
    table = list(csv.DictReader(io.StringIO(call("export s.sqlite")[1])))
    assert [row["status"] for row in table] == ["done"] * 2 + ["failed"] * 6
    assert [row["x"] for row in table] == ["1.0", "1.0", "", "", "1.0", "nan", "1.0", "nan"]
    summary = list(csv.DictReader(io.StringIO(call("export s.sqlite --summary")[1])))
    assert [(row["seeds"], row["failed"], row["x"]) for row in summary] == [
        ("2", "0", "1.0"),
        ("0", "2", ""),
        ("0", "2", ""),
    ]


def test_output_that_cannot_be_written(call, monkeypatch, capsys):
    call(f"run {plain()}")
    for line in ("status s.sqlite", "export s.sqlite", "run --help", ""):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            code, _, err = call(line)
            assert (code, err) == (2, "error: cannot write the output: No space left on device\n")
        monkeypatch.setattr(sys, "stdout", None)
        assert call(line)[::2] == (0, "")


def test_a_key_without_a_failed_run(call, refused):
    call(f"run {plain()}")
    assert "no failed runs of s.sqlite have a key that begins with 'zz'" in refused("failed s.sqlite zz")


def test_path_of_the_store(call):
    Path("in").mkdir()
    plain(name="in/a.yaml")
    assert call("run in/a.yaml")[0] == 0
    assert Path("in/a.sqlite").exists()
    assert call("run in/a.yaml --out there/deep")[0] == 0
    assert Path("there/deep/a.sqlite").exists()


def test_a_repetition_executes_nothing_and_prints_the_same(call):
    name = plain()
    first = call(f"run {name} --jobs 1")
    assert first[0] == 0
    with sqlite3.connect("s.sqlite") as connection:
        before = connection.execute("SELECT * FROM runs").fetchall()
    assert call(f"run {name} --jobs 2") == first
    with sqlite3.connect("s.sqlite") as connection:
        assert connection.execute("SELECT * FROM runs").fetchall() == before


def test_export_keeps_every_digit_and_type(call):
    call(f"run {write(function=f'{GRID}:everything')}")
    (row, _) = csv.DictReader(io.StringIO(call("export s.sqlite")[1]))
    assert float(row["third"]) == 1 / 3
    assert float(row["tiny"]) == 5e-324
    assert (row["inf"], row["no"], row["none"], row["yes"], row["large"]) == ("inf", "-inf", "", "True", str(2**62))
    assert row["text"] == "naïve ½"
    pytest.importorskip("pyarrow")
    assert call("export s.sqlite --to t.parquet")[:2] == (0, "")
    table = pd.read_parquet("t.parquet")
    with read_store(Path("s.sqlite")) as store:
        first, _ = store.records()
    assert {name: table[name][0] for name in first if first[name] is not None} == {
        name: value for name, value in first.items() if value is not None
    }
    assert table["other"][1] == 1
    assert call("export s.sqlite --to t.csv")[0] == 0
    assert Path("t.csv").read_text() == call("export s.sqlite")[1]


def test_parquet_distinguishes_nan_from_none_and_accepts_mixed_columns():
    parquet = pytest.importorskip("pyarrow.parquet")
    frame = pd.DataFrame({"x": [1.0, math.nan, None], "m": [1, "a", None], "i": [1, None, 3]}, dtype=object)
    table = parquet.read_table(io.BytesIO(report.write_parquet(frame))).to_pydict()
    assert table["x"][0] == 1.0
    assert math.isnan(table["x"][1])
    assert table["x"][2] is None
    assert table["m"] == ["1", "a", None]
    assert table["i"] == [1, None, 3]


def test_invalid_exports(call, refused, monkeypatch):
    call(f"run {plain()}")
    assert "cannot export a table to t.txt: give a file that ends in" in refused("export s.sqlite --to t.txt")
    assert "cannot write no/t.csv" in refused("export s.sqlite --to no/t.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "Parquet needs pyarrow: pip install 'curvlab[parquet]'" in refused("export s.sqlite --to t.parquet")
    assert "no record has 'stp'" in refused("export s.sqlite --summary --by stp")


# An analysis as a sweep ---------------------------------------------------------------------------------------------


@pytest.fixture
def in_servers(monkeypatch, tmp_path):
    """Let the processes of runs import the analysis."""
    monkeypatch.setattr(Analysis, "run_specs", _as_test_module(Analysis.run_specs))


def _as_test_module(specs):
    def changed(self, *arguments):
        found = specs(self, *arguments)
        return [dataclasses.replace(spec, function=f"{__name__}:ANALYSIS.execute") for spec in found]

    return changed


def test_an_analysis_is_run_as_a_sweep(call, in_servers):
    name = write(analysis="small", grid={"lr": [0.1, 0.2]}, seeds=[0, 2])
    assert call(f"run {name}")[0] == 0
    rows = list(csv.DictReader(io.StringIO(call("export s.sqlite --summary")[1])))
    assert [(row["config.lr"], row["parameter"], row["seeds"]) for row in rows] == [
        ("0.1", "w0", "2"),
        ("0.1", "w1", "2"),
        ("0.2", "w0", "2"),
        ("0.2", "w1", "2"),
    ]
    assert [float(row["value"]) for row in rows] == pytest.approx([1.3, 1.4, 1.6, 1.8])


def test_the_options_of_an_analysis(in_servers, capsys, tmp_path):
    assert execute(ANALYSIS, ["--out", "here", "--jobs", "2", "--seeds", "0", "1", "2"], "x") == 0
    assert capsys.readouterr().out.count("w1") == 3
    with read_store(Path("here/sweep.sqlite")) as store:
        assert [json.loads(json.dumps(record))["parameter"] for record in store.records()] == ["w0", "w1"] * 3
    assert execute(ANALYSIS, ["--help"], "x") == 0
    assert "--scheduler" in capsys.readouterr().out


def test_a_tool_has_none_of_these_options(capsys, refused):
    tool = Tool(SmallConfig, "None.", {"default": Preset(SmallConfig())}, lambda *given: print(type(given[1]).__name__))
    assert execute(tool, ["--jobs", "2"], "x") == 2
    assert execute(tool, [], "x") == 0
    assert capsys.readouterr().out == f"{RunOptions.__name__}\n"
    assert "the analysis doctor has no runs to sweep" in refused(f"run {write(analysis='doctor')}")
