"""What is the user's stays: a folder with other files is no place for a run, and a name is only a name."""

import csv
import io
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import curvlab.progress as bars
from curvlab.analyze.__main__ import main
from curvlab.commandline.console import make_console as console
from curvlab.commandline.program import report_errors as told
from curvlab.errors import CurvlabError
from curvlab.grid.report import write_csv
from curvlab.results import Column, open_run, render, write_tables
from curvlab.results.tables import to_csv, to_latex, to_markdown
from curvlab.text import to_printable

CONFIG = {"lr": 1e-9, "hidden": (30, 30)}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Folders


@pytest.mark.parametrize("name", ["table.csv", "notes.txt", ".hidden", "provenance.json", "sub/file", ".x.tmp"])
def test_a_folder_with_other_files_is_refused_and_left(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        CurvlabError, match=rf"contains {name.partition('/')[0]}, but is not a run directory of x; choose an --out"
    ):
        open_run(tmp_path, "x", CONFIG)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["doctor", "estimators", "agreement --steps 0", "fim_diagonality", "methods"])
def test_no_analysis_writes_there(tmp_path, capsys, command):
    (tmp_path / "table.csv").write_text("mine")
    assert main([*command.split(), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: {tmp_path} contains table.csv, but is not a run directory of {command.split()[0]}; "
        "choose an --out that is empty or "
        "does not exist\n",
    )
    assert contents(tmp_path) == {"table.csv": b"mine"}


def test_a_run_of_another_analysis_is_refused(tmp_path):
    open_run(tmp_path, "forgetting_bound", CONFIG).write_text("table.csv", "theirs")
    with pytest.raises(
        CurvlabError, match="is a run directory of forgetting_bound, not of training_regimes; choose another"
    ):
        open_run(tmp_path, "training_regimes", CONFIG)
    assert open_run(tmp_path, "forgetting_bound", CONFIG).resumed


def test_what_a_killed_run_leaves_is_continued(tmp_path):
    (tmp_path / ".probe.0123abcd.tmp").write_bytes(bytes(9))
    (tmp_path / ".config.yaml.0123abcd.tmp").write_text("half")
    assert not open_run(tmp_path, "x", CONFIG).resumed
    assert set(contents(tmp_path)) == {"config.yaml"}
    assert open_run(tmp_path, "x", CONFIG).resumed


def test_a_run_of_an_earlier_version_is_continued(tmp_path):
    """Which did not write whose run it is."""
    run = open_run(tmp_path, "x", CONFIG)
    config = (tmp_path / "config.yaml").read_text()
    assert config.startswith("# curvlab analyze x\n")
    run.write_text("config.yaml", config.partition("\n")[2])
    run.write_text("table.csv", "")
    assert open_run(tmp_path, "x", CONFIG).resumed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"just a text", "is not a configuration; choose another --out"),
        (b"defaults:\n- model\n", r"another configuration \(lr is absent there and 1e-09 here\)"),
        (b"lr: 2020-13-45", "another configuration"),
        (b"lr: !!bool abc", "is not YAML: .*; choose another --out"),
        (b"lr: " + b"[" * 5000, "is not YAML: .*; choose another --out"),
        (b"lr: " + b"9" * 5000, "is not YAML: .*; choose another --out"),
        (b"\xff\xfe\x00", "is not YAML: .*; choose another --out"),
        (b"lr: \x00", "is not YAML: .*; choose another --out"),
        (b"a: &a [*a]", "is not YAML"),
        # A value of which there would be more than memory takes.
        (
            b"a: &a [1,1,1,1,1,1,1,1,1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 9)) for i in range(98, 112))
            + b"lr: *o",
            "is not YAML",
        ),
    ],
)
def test_a_config_of_anything_else_is_refused(tmp_path, content, reason):
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "table.csv").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CurvlabError, match=reason) as told:
        open_run(tmp_path, "x", CONFIG)
    assert len(str(told.value)) < 1000
    assert contents(tmp_path) == before


def test_places_that_are_no_folder(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.yaml")
    before = sorted(tmp_path.rglob("*"))
    for path, reason in {
        "/dev/null": "/dev/null is a file, not a folder",
        "/dev/null/run": "cannot write /dev/null/run: Not a directory",
        tmp_path / "link": f"{tmp_path}/link is a broken link, not a folder",
        tmp_path / "link/run": f"{tmp_path}/link is a broken link, not a folder",
        tmp_path / "loop": "loop cannot be read",
        tmp_path / "pipe": "config.yaml is not a file",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "a\0b": "cannot be read",
    }.items():
        with pytest.raises(CurvlabError, match=reason):
            open_run(Path(path), "x", CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_an_empty_folder_is_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    open_run(tmp_path / "link", "x", CONFIG)
    assert set(contents(tmp_path / "there")) == {"config.yaml"}


def test_what_comes_into_the_folder_during_a_run_stays(tmp_path):
    run = open_run(tmp_path / "a" / "run", "x", CONFIG)
    run.write_text("table.md", "")
    (run.path / "store.sqlite").touch()
    (run.path / "store.sqlite.runs").mkdir()
    (run.path / "store.sqlite.runs" / "key").touch()
    (run.path / "notes.txt").write_text("mine")
    run.discard("store.sqlite*")
    assert contents(tmp_path) == {"a/run/notes.txt": b"mine"}
    (run.path / "notes.txt").unlink()
    run.discard()
    assert not any(tmp_path.iterdir())


# Names


#: What a parameter, a data set or a file may be called.
NAMES = (
    "a\x1b[31mred\x1b[0m",
    "two\nlines\tand\rmore",
    "a|b`c`*d*_e_ __init__ fc_1.weight",
    "[red]x[/red] [x](http://y) :fire:",
    "*starred",
    r"100% & #1 $5$ \x{y}^~<z> --lr ?`",
    "=1+1",
    "-2+3",
    "+1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\u202egnp\u2028\x9b31m",
    "\udcff.npz",
    "中文 é",
    "",
)
RECORDS = [{"name": name, name: name, "value": -1.5, "count": -2} for name in NAMES]
COLUMNS = [Column("name", "[name]\x1b[31m"), Column("value", "*\n|")]


def control(text):
    return [c for c in text if not c.isprintable() and c != "\n"]


def test_the_console_shows_names_as_they_are():
    text = io.StringIO()
    Console(file=text, width=200).print(render(RECORDS, COLUMNS, "a\x1b[31m[red]title"))
    assert not control(text.getvalue())
    for part in (r"a\x1b[31mred\x1b[0m", "two lines and more", "[red]x[/red] [x](http://y) :fire:", r"\udcff.npz"):
        assert part in text.getvalue()
    assert r"[name]\x1b[31m" in text.getvalue()
    assert r"a\x1b[31m[red]title" in text.getvalue()
    assert len(text.getvalue().splitlines()) == 3 + len(NAMES)


def test_a_narrow_terminal_shows_wide_letters():
    text = io.StringIO()
    records = [{"name": "中文中文中文", "value": 1.5}]
    Console(file=text, width=9).print(render(records, [Column("name", "n"), Column("value", "v")]), crop=False)
    assert "中文中文中文" in text.getvalue()


def test_a_bar_shows_names_as_they_are(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(bars, "Console", lambda **_: Console(file=text, force_terminal=True, width=200))
    with bars.progress("diagonality of [/red]\x9b", total=1) as advance:
        advance(note="[/x]\x9b")
    assert r"diagonality of [/red]\x9b" in text.getvalue()
    assert r"[/x]\x9b" in text.getvalue()


def test_notes_and_errors_have_no_control_characters(capsys):
    console().print("[red]x :fire: \x1b[31m\nsecond")
    assert capsys.readouterr().out == "[red]x :fire: \\x1b[31m\nsecond\n"

    def fails():
        error = CurvlabError("there is no \x1b[31m\nfile")
        error.add_note("in \x9bx")
        raise error

    assert told(fails, debug=False) == 2
    assert capsys.readouterr().err == "error: there is no \\x1b[31m file\nin \\x9bx\n"


def test_markdown_shows_names_as_they_are():
    text = to_markdown(RECORDS, COLUMNS)
    assert not control(text)
    lines = text.splitlines()
    assert len(lines) == 2 + len(NAMES)
    for line in lines:
        assert len(line.replace(r"\\", "").replace(r"\|", "").split("|")) == 4, line
    assert r"| a\|b\`c\`\*d\*\_e\_ \_\_init\_\_ fc_1.weight |" in text
    assert r"| \[red]x\[/red] \[x](http://y) :fire: |" in text
    assert r"| a\\x1b\[31mred\\x1b\[0m |" in text
    assert to_markdown([{"a": "&lt; a&b"}], [Column("a", "a")]).splitlines()[2] == r"| \&lt; a&b |"


def test_latex_compiles_by_its_rules():
    """No row can be read as an argument or the starred form of the line end before it, nothing is a command."""
    text = to_latex([*RECORDS, {"name": " [2pt]"}], COLUMNS)
    assert not control(text)
    lines = text.splitlines()
    assert lines[2].startswith(r"{}[name]\textbackslash{}x1b[31m & * |".replace("|", r"\textbar{}"))
    for line in lines[2:-2]:
        assert not line.lstrip().startswith(("[", "*")), line
    body = [line for line in lines if line.endswith(r" \\")]
    assert len(body) == 2 + len(NAMES)
    assert all(line.replace(r"\&", "").count("&") == 1 for line in body)
    assert r"{}[red]x[/red]" in text
    assert r"{}*starred & " in text
    assert (
        r"100\% \& \#1 \$5\$ \textbackslash{}x\{y\}\textasciicircum{}\textasciitilde{}"
        r"\textless{}z\textgreater{} -{}-lr ?\`{} & "
    ) in text
    assert to_latex([{"a": "x"}], [Column("a", "a")]).splitlines()[4] == r"x \\"


def test_a_spreadsheet_computes_no_name():
    text = to_csv(RECORDS)
    assert not control(text)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    for name, row in zip(NAMES, rows[1:], strict=True):
        cell = dict(zip(rows[0], row, strict=True))
        shown = to_printable(name)
        safe = f"'{shown}" if shown.strip().startswith(("=", "+", "-", "@")) else shown
        assert cell["name"] == safe
        assert safe in rows[0]
        assert (cell["value"], cell["count"]) == ("-1.5", "-2")  # numbers are numbers
    assert "'=1+1" in rows[0]


def test_nor_one_of_a_sweep():
    text = write_csv(pd.DataFrame({"=name": NAMES, "value": [-1.5] * len(NAMES)}, dtype=object))
    assert not control(text)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["'=name", "value"]
    assert len(rows) == 1 + len(NAMES)
    assert ["'=1+1", "-1.5"] in rows


def test_every_name_is_in_every_file(tmp_path):
    whole = [name for name in NAMES if "\udcff" not in name]
    write_tables(open_run(tmp_path, "x", {"data": whole}), RECORDS, COLUMNS)
    assert json.loads((tmp_path / "table.json").read_text()) == RECORDS
    assert open_run(tmp_path, "x", {"data": whole}).resumed
    with pytest.raises(CurvlabError, match=r"cannot be written as config\.yaml: .* has a lone surrogate"):
        open_run(tmp_path, "x", {"data": NAMES})
    for kind in ("md", "tex", "csv"):
        text = (tmp_path / f"table.{kind}").read_text()
        assert "starred" in text
        assert "udcff.npz" in text


def test_readable():
    assert to_printable("fc1.weight é 中") == "fc1.weight é 中"
    assert to_printable("a\tb\n\x1b\x00\x7f\u202e\ud800\u00a0") == r"a b \x1b\x00\x7f\u202e\ud800 "
