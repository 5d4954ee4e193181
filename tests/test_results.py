"""Run directories, tables, provenance and claims."""

import csv
import io
import json
import math
import os
import resource
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from curvlab import software
from curvlab.errors import CurvlabError
from curvlab.results import (
    Claim,
    Column,
    Stopwatch,
    aggregate,
    collect,
    format_number,
    judge,
    open_run,
    plus_minus,
    render,
    render_claims,
    write_tables,
)

CONFIG = {"lr": 1e-9, "hidden": (30, 30), "classes": None, "data": Path("digits")}


def describe_value(table: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


# Run directories


def test_default_folders_are_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [open_run(None, "spectrum", CONFIG).path for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(path.parent == Path("runs") and path.name.startswith("spectrum-2") for path in paths)


def test_same_config_is_continued_and_another_refused(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    run = open_run(out, "x", CONFIG)
    assert not run.resumed
    run.write_text("table.md", "kept")
    assert open_run(out, "x", CONFIG).resumed
    assert open_run(out, "x", (out / "config.yaml").read_text()).resumed
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CurvlabError, match=rf"{out} has another configuration \(lr is 1e-09 there and 0.1 here"):
        open_run(out, "x", CONFIG | {"lr": 0.1})
    with pytest.raises(CurvlabError, match="seed is absent there and 1 here"):
        open_run(out, "x", CONFIG | {"seed": 1})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "config.yaml").write_text("a: [1,")
    with pytest.raises(CurvlabError, match=r"config\.yaml is not YAML"):
        open_run(out, "x", CONFIG)


def test_out_that_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CurvlabError, match=f"{file} is a file, not a folder"):
        open_run(file, "x", CONFIG)
    with pytest.raises(CurvlabError, match=f"cannot write {file / 'run'}: Not a directory"):
        open_run(file / "run", "x", CONFIG)
    assert file.read_text() == "mine"

    def full(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CurvlabError, match="full: No space left on device"):
        open_run(tmp_path / "deep" / "full", "x", CONFIG)
    assert list(tmp_path.iterdir()) == [file]


def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CurvlabError, match="Permission denied"):
            open_run(tmp_path / "run", "x", CONFIG)
    finally:
        tmp_path.chmod(0o700)


def test_discard_removes_only_what_opening_made(tmp_path: Path) -> None:
    run = open_run(tmp_path / "new" / "run", "x", CONFIG)
    run.discard_if_empty()
    assert list(tmp_path.iterdir()) == []
    run = open_run(tmp_path / "new" / "run", "x", CONFIG)
    run.write_text("table.md", "")
    run.discard_if_empty()
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "table.md"}
    (tmp_path / "empty").mkdir()
    open_run(tmp_path / "empty", "x", CONFIG).discard_if_empty()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path, "x", CONFIG)
    run.write_text("table.md", "old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        monkeypatch.setattr(*((os, "fsync") if name == "fsync" else (Path, "replace")), fails)
        with pytest.raises(CurvlabError, match=r"cannot write .*table\.md: No space left on device; choose"):
            run.write_text("table.md", "new")
        monkeypatch.undo()
        assert (tmp_path / "table.md").read_text() == "old"
        assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "table.md"}


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path, "x", CONFIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so the write fails as on a full disk: after a part of it.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CurvlabError, match=r"cannot write .*big\.bin: File too large"):
            run.write_bytes("big.bin", bytes(1 << 21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.write_text("")
    path = open_run(tmp_path / "run", "x", CONFIG).write_text("table.md", "")
    assert path.stat().st_mode == usual.stat().st_mode


def test_json_round_trip(tmp_path: Path) -> None:
    run = open_run(tmp_path, "x", CONFIG)
    path = run.write_json(
        "a.json",
        {
            "z": [1, 0.1 + 0.2, float("nan"), math.inf, None, True, "ü"],
            "numpy": np.float32(np.nan),
            "count": np.int64(3),
            "tensor": torch.tensor([1.5, float("inf")]),
            "path": Path("a/b"),
            "time": datetime(2026, 1, 2, tzinfo=UTC),
            "claim": Claim("c", "T2", 1.0, float("nan"), None, "not tested"),
        },
    )
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "NaN" not in text
    assert list(json.loads(text)) == ["z", "numpy", "count", "tensor", "path", "time", "claim"]
    assert json.loads(text) == {
        "z": [1, 0.1 + 0.2, None, None, None, True, "ü"],
        "numpy": None,
        "count": 3,
        "tensor": [1.5, None],
        "path": "a/b",
        "time": "2026-01-02T00:00:00+00:00",
        "claim": {
            "text": "c",
            "source": "T2",
            "published": 1.0,
            "ours": None,
            "spread": None,
            "verdict": "not tested",
            "reason": "",
            "scope": "",
            "seeds": "",
        },
    }


def test_figures_are_written_as_png_and_pdf(tmp_path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    png, pdf = open_run(tmp_path, "x", CONFIG).write_figure("bars", figure)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "bars.png", "bars.pdf"}


# Tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (np.float64("nan"), "–"),
        (-math.inf, "-∞"),
        (0.0, "0"),
        (553_190_400, "553,190,400"),
        (np.int64(1234), "1,234"),
        (1e-9, "1.000e-9"),
        (-1.23456e-7, "-1.235e-7"),
        (0.000123456, "0.0001235"),
        (0.5, "0.5000"),
        (-12.3456, "-12.35"),
        (999.96, "1,000"),
        (123456.7, "123,457"),
        (999_999.9, "1.000e6"),
        (1.5e9, "1.500e9"),
        (np.float32(0.25), "0.2500"),
        (True, "True"),
        ("W1", "W1"),
    ],
)
def test_significant(value: object, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [
        (0.5, 0.012, "0.500 ± 0.012"),
        (0.5, 0.0997, "0.50 ± 0.10"),
        (97.25, 1.04, "97.2 ± 1.0"),
        (12345.6, 234.5, "12,346 ± 234"),
        (1e-9, 3e-9, "(1.0 ± 3.0)e-9"),
        (2e8, 1e5, "(2.0000 ± 0.0010)e8"),
        (0.5, 0.0, "0.5000 ± 0"),
        (0.5, float("nan"), "0.5000"),
        (None, None, "–"),
    ],
)
def test_plus_minus(mean: float | None, deviation: float | None, text: str) -> None:
    assert plus_minus(mean, deviation) == text


RECORDS = [
    {"parameter": "fc_1.weight", "size": 23520, "share": 1 / 3, "share_std": 0.01, "only": None},
    {"parameter": "a&b|50%", "size": 30, "share": float("nan"), "share_std": None, "extra": 7},
]
COLUMNS = [
    Column("parameter", "tensor_name"),
    Column("size", "#"),
    Column("share", "share", spread="share_std"),
    Column("extra", "[x]", format=lambda x: f"{x}/10"),
]


def test_table_files(tmp_path: Path) -> None:
    write_tables(open_run(tmp_path, "x", CONFIG), RECORDS, COLUMNS)
    records = json.loads((tmp_path / "table.json").read_text())
    assert records == [RECORDS[0], RECORDS[1] | {"share": None}]
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert list(rows[0]) == ["parameter", "size", "share", "share_std", "only", "extra"]
    assert float(rows[0]["share"]) == 1 / 3
    assert (tmp_path / "table.csv").read_text().splitlines()[2] == "a&b|50%,30,,,,7"
    assert (tmp_path / "table.md").read_text() == (
        "| tensor_name | # | share | \\[x] |\n"
        "| :--- | ---: | ---: | ---: |\n"
        "| fc_1.weight | 23,520 | 0.333 ± 0.010 | – |\n"
        "| a&b\\|50% | 30 | – | 7/10 |\n"
    )
    assert (tmp_path / "table.tex").read_text() == (
        "\\begin{tabular}{lrrr}\n\\toprule\n"
        "tensor\\_name & \\# & share & [x] \\\\\n\\midrule\n"
        "fc\\_1.weight & $23{,}520$ & $0.333 \\pm 0.010$ & -- \\\\\n"
        "a\\&b\\textbar{}50\\% & $30$ & -- & 7/10 \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_latex_of_special_characters_and_exponents(tmp_path: Path) -> None:
    records = [{"name": r"\x{y}^~$<z>", "value": -1.5e-9, "mean": 2e-9, "std": 1e-10}]
    columns = [Column("name", "n"), Column("value", "v"), Column("mean", "m", spread="std")]
    write_tables(open_run(tmp_path, "x", CONFIG), records, columns)
    row = (tmp_path / "table.tex").read_text().splitlines()[4]
    assert row == (
        r"\textbackslash{}x\{y\}\textasciicircum{}\textasciitilde{}\$\textless{}z\textgreater{}"
        r" & $-1.500 \times 10^{-9}$ & $(2.00 \pm 0.10) \times 10^{-9}$ \\"
    )


def test_console_table_shows_brackets_as_they_are() -> None:
    text = describe_value(render(RECORDS, COLUMNS))
    assert "[x]" in text
    assert "0.333 ± 0.010" in text


def test_aggregate() -> None:
    records = [
        {"w": w, "seed": seed, "x": x, "y": y}
        for w, seed, x, y in (
            ("b", 0, 1.0, 5.0),
            ("a", 0, 7.0, None),
            ("b", 1, 2.0, 5.0),
            ("b", 2, 6.0, float("nan")),
        )
    ]
    assert aggregate(records, by=["w"], values=["x", "y"]) == [
        {"w": "b", "seeds": 3, "x": 3.0, "x_std": pytest.approx(7**0.5), "y": None, "y_std": None},
        {"w": "a", "seeds": 1, "x": 7.0, "x_std": None, "y": None, "y_std": None},
    ]


# Claims and provenance


def test_judge() -> None:
    def below_half(value: float) -> bool:
        return value < 0.5

    assert judge([0.1, 0.2, 0.3], below_half) == "reproduced"
    assert judge([0.1, 0.2, 0.5], below_half) == "not reproduced"
    claim = Claim.of("it is below a half", "ours", [0.1, 0.2, 0.5], below_half)
    assert describe_value(render_claims([claim])).count("not reproduced: holds for 2 of 3 seeds") == 1
    assert judge([0.1, 0.2], below_half) == "not tested"
    assert judge([0.1, 0.2, float("nan")], below_half) == "not tested"


def test_claims_on_the_console() -> None:
    text = describe_value(render_claims([Claim("[W1] is diagonal", "Table 2", "–", 0.123456, 0.0042, "reproduced")]))
    for part in ("[W1] is diagonal", "Table 2", "0.1235 ± 0.0042", "reproduced"):
        assert part in text


def test_stopwatch_adds_up_also_after_an_error() -> None:
    stages = Stopwatch()
    with stages("a"):
        pass
    first = stages.seconds["a"]
    with pytest.raises(ValueError, match="x"), stages("a"):
        raise ValueError("x")
    assert stages.seconds["a"] > first > 0
    assert stages.started.tzinfo is not None


def test_provenance_is_complete_and_json(tmp_path: Path) -> None:
    stages = Stopwatch()
    with stages("train"):
        pass
    record = collect(seeds=range(2), data_hash="abc", stages=stages.seconds, started=stages.started)
    run = open_run(tmp_path, "x", CONFIG)
    assert json.loads(run.write_json("provenance.json", record).read_text()) == record
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["seeds"] == [0, 1]
    assert record["seconds"].keys() == {"train"}
    assert record["started"] <= record["ended"]
    assert record["started"].endswith("+00:00")
    assert 10 * 2**20 < record["peak_rss_bytes"] < record["machine"]["memory_bytes"]
    assert record["machine"]["cores"] >= 1


def test_git_state_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package outside any checkout: the user's own checkout is what can be named."""
    package = tmp_path / "site-packages"
    package.mkdir()
    monkeypatch.setattr(software, "__file__", str(package / "software.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert software._git() is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        answer = subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True)
        return answer.stdout.strip()

    git("init", "-q")
    assert software._git() is None
    (work / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    assert software._git() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (work / "a").write_text("2")
    assert software._git()["dirty"] is True
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    assert software._git() is None
