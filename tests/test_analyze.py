"""The command line: its options, its errors, what a run leaves behind, and how it is stopped and continued."""

import errno
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from killing import stopped_when_written
from rich.console import Console

from curvlab.__main__ import main as program
from curvlab.analyze import ANALYSES
from curvlab.analyze.__main__ import main
from curvlab.analyze.backends import estimators
from curvlab.analyze.frame import subject
from curvlab.analyze.masq import fim_diagonality
from curvlab.commandline.options import RunOptions
from curvlab.diagonality import records
from curvlab.doctor import cost, probe
from curvlab.errors import CurvlabError
from curvlab.estimators import BACKENDS
from curvlab.grid import read_store
from curvlab.models import build
from curvlab.results import run_directory
from curvlab.results.tables import Column, render

pytestmark = pytest.mark.usefixtures("one_server", "runs_here", "no_figures")

NAME = "fim_diagonality"
TINY = "--hidden 4 --steps 3 --samples 40 --seeds 0 1"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, without the machine's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(fim_diagonality.__file__).parents[3]))


@pytest.fixture
def call(capsys):
    """Return a function that runs ``fim_diagonality`` and gives exit code, standard output and standard error."""

    def call(line):
        code = main([NAME, *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(call, tmp_path):
    """Return a function that requires one sentence, exit code 2 and no file, and gives the sentence."""

    def refused(line):
        before = tree(tmp_path)
        code, out, err = call(line)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert tree(tmp_path) == before
        return err

    return refused


def tree(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def keys(run):
    """Return the keys of the runs, which name their folders, in the order of the seeds."""
    config = yaml.safe_load(Path(run, "config.yaml").read_text())
    return [spec.key for spec in fim_diagonality.ANALYSIS.run_specs([fim_diagonality.FimDiagonalityConfig(**config)])]


def archive(path, **changed):
    x, y = np.random.default_rng(0).random((20, 5), np.float32), np.arange(20) % 3
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | changed
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


# Names, options and values.


def test_lists_the_analyses(capsys):
    assert main([]) == 0
    assert f"\n  {NAME}  " in capsys.readouterr().out


@pytest.mark.parametrize("name", ANALYSES)
def test_help_of_every_analysis(capsys, name):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m curvlab.analyze {name} [OPTIONS]")
    assert main([name, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)


def test_unknown_analysis(capsys):
    assert main(["fim_diag"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown analysis 'fim_diag'; did you mean 'fim_diagonality'?")


def test_program(capsys):
    assert program(["analyze"]) == 0
    assert NAME in capsys.readouterr().out
    assert program(["sweep", "--help"]) == 0
    assert "run CONFIG.yaml" in capsys.readouterr().out
    assert program(["analyse"]) == 2
    assert "'analyse'" in capsys.readouterr().err


def test_help_has_every_option_with_its_default(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = call("--preset paper --help")
    assert code == 0
    text = " ".join(out.split())
    for field in fim_diagonality.FimDiagonalityConfig.model_fields:
        assert f"--{field.replace('_', '-')} " in text
    assert "(default: mnist)" in text
    assert "(default: 5000)" in text
    assert "95 % interval" in text


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--hiden 30", "unknown option --hiden; did you mean '--hidden'?"),
        ("--batch_size=3", "unknown option --batch_size; did you mean '--batch-size'?"),
        ("stray", "unexpected argument 'stray'"),
        ("--preset papr", "unknown preset 'papr'; did you mean 'paper'?"),
        ("--preset=papr", "'papr'"),
        ("--preset", "--preset: expected one argument"),
        ("--steps", "--steps: expected one argument"),
        ("--steps x", "--steps should be a valid integer, not 'x'"),
        ("--steps -1", "--steps should be greater than or equal to 0, not '-1'"),
        ("--optimizer adm", "--optimizer should be 'adam', 'adamw' or 'sgd', not 'adm'"),
        ("--classes", "no class is selected"),
        ("--classes al", "--classes should be a valid integer or should be 'all', not 'al'"),
        ("--classes 77", "there is no class 77"),
        ("--classes 1 1", "class 1 is selected more than once"),
        ("--seeds", "seeds needs one or more different values, not []"),
        ("--seeds 1 1", "not [1, 1]"),
        ("--seeds -1", "--seeds should be greater than or equal to 0"),
        ("--seeds 99999999999999999999", "--seeds should be less than"),
        ("--per tensor tensor", "per needs one or more different values"),
        ("--per tensr", "--per should be 'tensor', 'layer' or 'network', not 'tensr'"),
        ("--samples 0", "--samples should be greater than or equal to 1, not '0'"),
        ("--samples 721", "samples is 721, but there are only 720 training samples"),
        ("--hidden 30 0", "--hidden should be greater than or equal to 1, not '0'"),
        ("--hidden 30,30", "--hidden should be a valid integer, not '30,30'"),
        ("--lr nan", "--lr should be a finite number, not 'nan'"),
        ("--lr=-1e-3", "--lr should be greater than 0, not '-1e-3'"),
        ("--lr inf", "--lr should be a finite number"),
        ("--momentum 0.5", "momentum belongs to sgd"),
        ("--time-budget nan", "--time-budget should be a finite number"),
        ("--quantity fihser", "'fihser'; did you mean 'fisher'?"),
        ("--quantity fisher:samples=0", "samples of fisher must be a whole number from 1, not 0"),
        ("--quantity masq:norm=x", "norm of masq must be"),
        ("--device banana", "device must be cpu, cuda or cuda:N, not 'banana'"),
        ("--device cuda:99", "device 'cuda:99' is not available"),
        ("--out ''", "--out has an empty value"),
        ("--classes ''", "--classes has an empty value"),
        ("--model resnet20", "resnet20 takes images of shape (3, 32, 32)"),
        ("--model cn", "did you mean 'cnn'?"),
        ("--validation 1437", "cannot hold out 1437"),
        ("--data digts", "did you mean 'digits'?"),
        ("--data mnist --offline", "mnist is incomplete on disk"),
        ("--quantity hessian --hidden 100 --steps 1", "the Hessian of fc1.weight, with 6,400 parameters"),
        (f"--hidden {10**30}", "--hidden should be less than 2**63, not ['1000"),
        ("--hidden 9000000000000000", "not enough memory for an array of 2304000000000000000 bytes; use a"),
        ("--jobs 0", "--jobs should be greater than or equal to 1, not '0'"),
        ("--scheduler tcp://127.0.0.1:x", "cannot reach a Dask scheduler at tcp://127.0.0.1:x"),
    ],
)
def test_bad_value(refused, line, fragment):
    assert fragment in refused(line)


def test_debug_shows_the_traceback(call):
    code, _, err = call("--steps x --debug")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.endswith("error: --steps should be a valid integer, not 'x'\n")


def test_what_is_a_bug_is_not_hidden(call, monkeypatch):
    monkeypatch.setattr(subject, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("")


# Configuration files.


@pytest.mark.parametrize("line", ["", "--preset paper", "--classes all --hidden --per layer network --lr 1e-5"])
def test_config_round_trip(call, line):
    _, first, _ = call(f"{line} --print-config")
    Path("my config.yaml").write_text(first)
    code, second, _ = call("--config 'my config.yaml' --print-config")
    assert code == 0
    assert second == first


def test_options_win_over_the_file_and_the_file_over_the_preset(call):
    Path("a.yaml").write_text("hidden: [7]\nsteps: 9\nlr: 1e-2\nweights: w.pt\n")
    _, out, _ = call("--preset paper --config a.yaml --hidden=1 --weights none --print-config")
    config = yaml.safe_load(out)
    picked = {key: config[key] for key in ("data", "hidden", "steps", "lr", "weights")}
    assert picked == {"data": "mnist", "hidden": [1], "steps": 9, "lr": 0.01, "weights": None}


def test_one_value_in_the_place_of_a_list(call):
    Path("a.yaml").write_text("seeds: 3\n")
    code, _, err = call("--config a.yaml --print-config")
    assert (code, err) == (2, "error: a.yaml: seeds should be a list, such as [3], not 3\n")


def test_of_two_files_the_last_counts(call):
    Path("a.yaml").write_text("steps: 1\n")
    Path("b.yaml").write_text("lr: 0.5\n")
    _, out, _ = call("--config a.yaml --config b.yaml --print-config")
    assert yaml.safe_load(out)["lr"] == 0.5
    assert yaml.safe_load(out)["steps"] == 500


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"a: [1\n", "c.yaml is not YAML: expected ',' or ']', but got '<stream end>', line 2"),
        (b"\xff\xfe\x00", "c.yaml is not YAML"),
        (b"data: 2020-13-45\n", "there is no data set '2020-13-45'"),
        (b"- 1\n", "c.yaml is not a mapping of options"),
        (b"", "c.yaml is not a mapping of options"),
        (b"hiden: [3]\n", "c.yaml: unknown option 'hiden'; did you mean 'hidden'?"),
        (b"steps: many\n", "c.yaml: steps should be a valid integer, not 'many'"),
        (b"lr: .nan\n", "c.yaml: lr should be a finite number"),
    ],
)
def test_bad_config_file(refused, content, fragment):
    Path("c.yaml").write_bytes(content)
    assert fragment in refused("--config c.yaml")


def test_config_that_cannot_be_read(refused):
    assert "cannot read none.yaml: No such file" in refused("--config none.yaml")
    assert "cannot read .: Is a directory" in refused("--config .")


# Data and weights.


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"y_test": None}, "the archive has no y_test"),
        ({"x_test": np.zeros((20, 4), np.float32)}, "a sample of x_train has shape (5,)"),
        ({"y_train": np.arange(20) % 3 - 1}, "y_train has the label -1"),
        ({"y_train": np.zeros(20)}, "y_train is float64"),
        ({"x_train": np.full((20, 5), np.nan, np.float32)}, "x_train holds 100 NaN"),
    ],
)
def test_bad_archive(refused, changed, fragment):
    archive("my data.npz", **changed)
    message = refused("--data 'my data.npz'")
    assert message.startswith("error: my data.npz: ")
    assert fragment in message


def test_truncated_archive(refused):
    archive("a.npz")
    Path("a.npz").write_bytes(Path("a.npz").read_bytes()[:300])
    assert "a.npz: the file is not a complete .npz archive" in refused("--data a.npz")


def test_truncated_mnist(refused):
    raw = Path("root/MNIST/raw")
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(20))
    message = refused("--data mnist --offline --data-root root")
    assert "train-images-idx3-ubyte is truncated or damaged" in message


def test_weights(refused):
    model = build("mlp", (1, 8, 8), 10, hidden=(30, 30))
    torch.save(build("mlp", (1, 8, 8), 10, hidden=(20,)).state_dict(), "other.pt")
    torch.save({**model.state_dict(), "fc2.bias": torch.full((30,), torch.nan)}, "nan.pt")
    torch.save(model.state_dict(), "half.pt")
    Path("half.pt").write_bytes(Path("half.pt").read_bytes()[:5000])
    assert "weights file gone.pt not found" in refused("--weights gone.pt")
    assert "half.pt cannot be read as weights" in refused("--weights half.pt")
    assert "other.pt belongs to another architecture" in refused("--weights other.pt")
    assert "nan.pt: fc2.bias holds NaN" in refused("--weights nan.pt")


@pytest.mark.parametrize("line", ["--samples 1 --steps 0", "--classes 3", "--data one.npz --classes 0", "--hidden"])
def test_smallest_inputs(call, line):
    archive("one.npz", x_train=np.ones((1, 5), np.float32), y_train=np.zeros(1, int))
    code, _, err = call(f"--steps 2 --seeds 0 --hidden 4 {line} --out run")
    assert (code, err) == (0, "")


# The run directory.


def test_a_run_and_the_same_again(call, with_figures):
    line = "--hidden 1 --steps 3 --samples 40 --seeds 0 1 --per tensor network --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "Saved in run: " in out
    assert tree("run") == {
        *("config.yaml", "table.json", "table.csv", "table.md", "table.tex", "claims.json", "provenance.json"),
        *("sums_and_means.png", "sums_and_means.pdf", "heat_map.png", "heat_map.pdf"),
        *("sweep.sqlite", "sweep.sqlite.lock", "sweep.sqlite.runs"),
        "heat_map.json",
        *(f"sweep.sqlite.runs/{key}{name}" for key in keys("run") for name in ("", "/checkpoint.pt", "/heat_map.json")),
    }
    assert len(keys("run")) == 2
    records = json.loads(Path("run/table.json").read_text(), parse_constant=pytest.fail)
    assert len(records) == len(pd.read_csv("run/table.csv")) == 2 * 5
    wanted = "parameter size diag_sum diag_mean diag_max offdiag_abs_sum offdiag_abs_mean offdiag_abs_max "
    wanted += "offdiag_signed_sum frobenius diag_share zero_fraction mean_ratio sum_ratio method ci95"
    assert list(records[0])[:16] == wanted.split()
    assert records[1]["parameter"] == "fc1.bias"
    assert records[1]["offdiag_abs_mean"] is None  # one entry: there is none off the diagonal
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["hidden"], config["per"]) == ([1], ["tensor", "network"])
    provenance = json.loads(Path("run/provenance.json").read_text())
    assert {"command", "versions", "seeds", "data_hash", "git", "machine", "seconds"} <= set(provenance)
    assert set(provenance["seconds"]) == {"data", "runs", "figures"}
    assert provenance["runs_by_status"] == {"done": 2, "failed": 0, "absent": 0, "earlier": 0}
    assert provenance["continued"] is False
    claims = json.loads(Path("run/claims.json").read_text())
    assert {claim["verdict"] for claim in claims} == {"not tested"}
    assert Path("run/table.tex").read_text().isascii()

    before = contents("run")
    code, again, _ = call(line)
    assert (code, again) == (0, out)
    assert contents("run") == before


def test_the_default_folder(call):
    code, _, _ = call("--hidden --steps 0 --samples 20 --seeds 0")
    assert code == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("fim_diagonality-2")


def test_folder_of_another_configuration(call, refused):
    assert call(f"{TINY} --out run")[0] == 0
    assert "run has another configuration (lr is 0.001 there and 0.1 here)" in refused(f"{TINY} --lr 0.1 --out run")


@pytest.mark.parametrize("what", ["data", "weights"])
def test_files_that_have_changed_since(call, what):
    archive("a.npz")
    torch.save(build("mlp", (5,), 3, hidden=(4,), seed=1).state_dict(), "w.pt")
    line = "--data a.npz --weights w.pt --classes all --hidden 4 --steps 1 --out run --seeds 0"
    assert call(line)[0] == 0
    before = contents("run")
    if what == "data":
        archive("a.npz", y_test=np.zeros(20, int))
    else:
        torch.save(build("mlp", (5,), 3, hidden=(4,), seed=2).state_dict(), "w.pt")
    code, out, err = call(line)
    assert (code, out) == (2, "")
    file = {"data": "a.npz", "weights": "w.pt"}[what]
    assert err.startswith("error: the runs in ")
    assert f"run/sweep.sqlite have read other data of {file}, and one table" in err
    assert contents("run") == before


def test_out_is_a_file(refused):
    Path("file").touch()
    assert "file is a file, not a folder" in refused("--out file")
    assert "cannot write file/run: Not a directory" in refused("--out file/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_is_not_writable(refused):
    Path("closed").mkdir(mode=0o500)
    assert "cannot write closed/run: Permission denied" in refused("--out closed/run")


def test_a_failure_leaves_what_was_in_the_folder(refused):
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    refused("--scheduler tcp://127.0.0.1:x --out mine")


# The grid.


def test_the_number_of_jobs_changes_no_bit(starter):
    line = "--hidden 8 --steps 50 --samples 60 --seeds 4 0 2 --per tensor network --quantity fisher:samples=2"
    for jobs in (1, 3):
        program = starter.start(["-m", "curvlab.analyze", NAME, *shlex.split(f"{line} --jobs {jobs} --out run{jobs}")])
        assert program.wait()[::2] == (0, "")
    for name in ("table.json", "table.csv", "table.md", "table.tex", "claims.json", "heat_map.pdf"):
        assert Path("run1", name).read_bytes() == Path("run3", name).read_bytes()


def test_records_are_what_the_functions_give(call):
    assert call("--hidden 40 --steps 3 --samples 40 --time-budget 1e-6 --seeds 0 1 --out run")[0] == 0
    config = fim_diagonality.FimDiagonalityConfig(hidden=(40,), steps=3, samples=40, seeds=(1,))
    data = subject.load_dataset(config, RunOptions())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, accuracy = subject.train_network(config, data, 1)
        rows = list(records(subject.problem(config, data, model), "empirical_fisher", time_budget=1e-6, seed=1))
    finally:
        torch.set_num_threads(threads)
    with read_store(Path("run/sweep.sqlite")) as store:
        found = [record for record in store.records() if record["seed"] == 1]
    assert len(found) == len(rows) == 4
    assert rows[0]["method"] == "sampled"  # by the seed
    for record, row in zip(found, rows, strict=True):
        n = row["size"]
        assert record == row | {
            "paper_diag_mean": row["diag_sum"] / n**2,
            "paper_offdiag_mean": row["offdiag_abs_sum"] / n**4,
            "paper_mean_ratio": n**2 / row["sum_ratio"],
            "seed": 1,
            "samples": 40,
            "test_accuracy": accuracy,
        }


def test_every_run_fails(call):
    code, out, err = call("--lr 1e30 --steps 200 --seeds 0 1 --out run")
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("error: 2 of 2 runs failed; the first (seed 0): the training loss is nan at step 2")
    assert second == "runs done in run: 0; the same command with --out run --retry-failed continues there"
    assert not Path("run/table.json").exists()
    assert call("--lr 1e30 --steps 200 --seeds 0 1 --out run") == (code, out, err)


def test_a_run_fails(call, with_figures):
    assert call(f"{TINY} --out whole")[0] == 0
    bad = Path("run/sweep.sqlite.runs", keys("whole")[0], "checkpoint.pt")
    bad.parent.mkdir(parents=True)
    shutil.copy("whole/config.yaml", "run")
    bad.write_bytes(b"of another program")
    code, out, err = call(f"{TINY} --out run")
    assert code == 1
    assert err.splitlines()[0].startswith("error: 1 of 2 runs failed; the first (seed 0): checkpoint ")
    assert err.splitlines()[1].startswith("runs done in run: 1; ")
    assert "over the seeds that did not fail" in " ".join(out.split())
    footer = out.splitlines()[-2:]
    assert footer[0] == "Failed runs (not included above):"
    assert footer[1].startswith(f"{keys('run')[0][:8]}  raised   seed=0: ")
    whole = json.loads(Path("whole/table.json").read_text())
    assert json.loads(Path("run/table.json").read_text()) == [record for record in whole if record["seed"] == 1]
    assert Path("run/table.md").read_text().splitlines()[0].endswith("| seeds |")
    assert Path("run/heat_map.png").exists()
    assert Path("run/sums_and_means.png").read_bytes() != Path("whole/sums_and_means.png").read_bytes()
    assert json.loads(Path("run/provenance.json").read_text())["runs_by_status"]["failed"] == 1

    bad.unlink()
    assert call(f"{TINY} --out run") == (code, out, err)
    code, _, err = call(f"{TINY} --out run --retry-failed")
    assert (code, err) == (0, "")
    for name in ("table.json", "table.csv", "table.md", "table.tex", "heat_map.pdf"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    assert json.loads(Path("run/provenance.json").read_text())["runs_by_status"]["failed"] == 0


def test_a_network_that_is_on_another_machine_has_no_heat_map(call):
    assert call(f"{TINY} --out run")[0] == 0
    for key in keys("run"):
        Path("run/sweep.sqlite.runs", key, "heat_map.json").unlink()
    Path("run/heat_map.png").unlink()
    assert call(f"{TINY} --out run")[0] == 0
    assert not Path("run/heat_map.png").exists()


def test_full_disk_at_the_figures(call, monkeypatch):
    whole = run_directory.write_whole

    def full(path, content):
        if path.name == "heat_map.png":
            raise CurvlabError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}")
        whole(path, content)

    with monkeypatch.context() as disk:
        disk.setattr(run_directory, "write_whole", full)
        code, _, err = call(f"{TINY} --out run")
    assert code == 2
    assert err.splitlines() == [
        "error: cannot write run/heat_map.png: No space left on device",
        "runs done in run: 2; the same command with --out run continues there",
    ]
    before = Path("run/table.json").read_bytes()
    assert call(f"{TINY} --out run")[0] == 0
    assert Path("run/table.json").read_bytes() == before
    assert json.loads(Path("run/provenance.json").read_text())["continued"] is True


@pytest.mark.parametrize("kilobytes", [40, 96, 220])
def test_full_disk(call, tmp_path, kilobytes, in_processes, with_figures):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        code, _, err = call("--seeds 0 --steps 5 --out disk/run")
        if kilobytes == 220:  # enough for the checkpoint, and not for what a run saves beside its records
            assert code == 1
            assert err.startswith("error: 1 of 1 runs failed; the first (seed 0): cannot write ")
        else:
            assert code == 2
            assert err.startswith(("error: cannot write disk/run", f"error: cannot write {disk}/run"))
        assert "o space left" in err
        assert not list(disk.rglob(".*"))
        if kilobytes == 40:
            assert tree(disk) == set()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Stopping and continuing.


@pytest.mark.parametrize("where", ["load", "check_subject"])
def test_interrupted_before_the_work(call, monkeypatch, where):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, where, stop)
    code, _, err = call("--out run")
    assert (code, err) == (130, "interrupted\n")
    assert not Path("run").exists()


def wait_for(appears, process):
    deadline = time.monotonic() + 600
    while not Path(appears).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_training_and_continued(call, starter, sign):
    """In the second run, at its first checkpoint, after 500 steps."""
    line = "--hidden 8 --seeds 0 1 --steps 600 --samples 40 --jobs 1"
    assert call(f"{line} --out undisturbed")[0] == 0
    _, second = keys("undisturbed")
    command = ["curvlab.analyze", NAME, *shlex.split(line), "--out", "run"]
    code, out, err = stopped_when_written(starter, command, "run", "checkpoint.pt", 2, sign)
    assert out == ""
    if sign == signal.SIGINT:
        assert code == 130
        assert err == "interrupted\nruns done in run: 1; the same command with --out run continues there\n"
    else:
        assert code == -signal.SIGKILL
    with read_store(Path("run/sweep.sqlite")) as store:
        assert store.tally() == {"done": 1, "failed": 0, "absent": 1, "earlier": 0}
        assert {record["seed"] for record in store.records()} == {0}
    assert not Path("run/table.json").exists()

    left = Path(f"run/sweep.sqlite.runs/{second}/.checkpoint.pt.0123abcd.tmp")
    left.touch()  # what a killed program leaves
    Path("run/.mine.tmp").touch()
    code, _, err = call(f"{line} --out run")
    assert (code, err) == (0, "")
    assert not left.exists()
    Path("run/.mine.tmp").unlink()
    assert tree("run") == tree("undisturbed")
    for name in ("table.json", "table.csv", "table.md", "table.tex"):
        assert Path("run", name).read_bytes() == Path("undisturbed", name).read_bytes()
    assert json.loads(Path("run/provenance.json").read_text())["continued"] is True
    with read_store(Path("run/sweep.sqlite")) as store:
        assert store.table()["run.seconds"].nunique() == 2


def test_stopped_before_anything_is_done(starter):
    """Just before the first run starts, which waits until it is no longer wanted."""
    before = """
import os, signal, time
from pathlib import Path
from curvlab.grid import processes

run = processes.run

def stopped(*given):
    assert Path("run/sweep.sqlite.lock").exists()
    os.kill(PROGRAM, signal.SIGINT)
    while given[-1]():
        time.sleep(0.01)
    return run(*given)

processes.run = stopped
"""
    program = starter.start(["-m", "curvlab.analyze", NAME, *shlex.split(TINY), "--out", "run", "--jobs", "1"], before)
    assert program.wait() == (130, "", "interrupted\n")
    assert not Path("run").exists()


LOADING = "from pathlib import Path; import time; Path('loading').touch(); time.sleep(60)"


@pytest.mark.parametrize("program", [["curvlab.analyze", "eigenvalues"], ["curvlab.sweep", "run"], ["curvlab"]])
def test_interrupted_while_it_is_loaded(program):
    Path("torch.py").write_text(LOADING)
    with subprocess.Popen([sys.executable, "-m", *program], stderr=subprocess.PIPE, text=True) as process:
        wait_for("loading", process)
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=20)[1], process.returncode) == ("interrupted\n", 130)


def test_a_script_that_loads_the_package_is_interrupted_as_python_has_it():
    Path("torch.py").write_text(LOADING)
    Path("script.py").write_text("try:\n import curvlab\nexcept KeyboardInterrupt:\n raise SystemExit(7)")
    with subprocess.Popen([sys.executable, "script.py"], stderr=subprocess.PIPE, text=True) as process:
        wait_for("loading", process)
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=20)[1], process.returncode) == ("", 7)


@pytest.mark.parametrize("line", ["--help", "--hidden --steps 0 --samples 20 --seeds 0"])
def test_nobody_reads_the_output(starter, line):
    program = starter.start(["-m", "curvlab.analyze", NAME, *shlex.split(line)], unread=True)
    assert program.wait() == (0, "", "")


def test_output_without_unicode_and_closed_output(call, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert call(f"{TINY} --out run")[0] == 0
    assert b" ? " in output.buffer.getvalue()  # the plus-minus sign
    monkeypatch.setattr(sys, "stdout", None)
    assert call(f"{TINY} --out run")[0] == 0


# What is printed.


def test_a_narrow_terminal_loses_no_digit(capsys):
    values = {"name": "fc1.weight", "a": 2.345678e-11, "b": 4.6e-12, "c": 123456.0}
    columns = [Column("name", "parameter"), Column("a", "off-diag. sum", spread="b"), Column("c", "n")]
    Console(width=20).print(render([values], columns, "A title with [brackets]"), crop=False)
    words = capsys.readouterr().out.split()
    for word in ("fc1.weight", "(2.35", "0.46)e-11", "123,456", "[brackets]"):
        assert word in words


def test_a_ratio_that_is_not_finite():
    records = [{"parameter": "b", "size": 1, "mean_ratio": ratio, "method": "exact"} for ratio in (math.inf, 1.0)]
    (row,) = fim_diagonality.summarise(records)
    assert (row["mean_ratio"], row["mean_ratio_std"]) == (None, None)


# Doctor and estimators.


@pytest.fixture
def hasty_doctor(monkeypatch):
    """Try two backends, once."""
    few = {name: BACKENDS[name] for name in ("hooks", "nngeometry")}
    monkeypatch.setattr(cost, "_QUICK", 0.0)
    monkeypatch.setattr(probe, "BACKENDS", few)
    monkeypatch.setattr(sys.modules["curvlab.doctor"], "BACKENDS", few)


def test_doctor(hasty_doctor, capsys):
    line = "--hidden 3 --samples 20 --quantities fisher:samples=1 masq:batch_size=5 --params fc2.*"
    assert main(["doctor", *line.split()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Sequential of 40 parameters in float32, cross_entropy, 20 samples in one batch.")
    assert "\nfisher:samples=1 " in out
    assert "\nmasq:batch_size=5 " in out
    assert tree(".") == set()

    assert main(["doctor", *line.split(), "--out", "run"]) == 0
    assert "Saved in run: table" in capsys.readouterr().out
    names = {
        "config.yaml",
        "findings.json",
        "provenance.json",
        *(f"table.{kind}" for kind in ["json", "csv", "md", "tex"]),
    }
    assert tree("run") == names
    records = json.loads(Path("run/table.json").read_text())
    assert {record["supported"] for record in records} == {"yes", "absent"}
    assert {record["obstacle"] for record in records if record["supported"] == "yes"} == {""}


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--quantity fisher", "unknown option --quantity; did you mean '--quantities'?"),
        ("--quantities fihser", "did you mean 'fisher'"),
        ("--quantities ggn ggn", "quantities needs one or more different values"),
        ("--params fc7", "no trainable parameter matches 'fc7'"),
        ("--samples 99999", "samples is 99,999, but there are only 1,437 training samples"),
        ("--weights gone.pt", "weights file gone.pt not found"),
        ("--device cuda:99", "device 'cuda:99' is not available"),
        ("--steps 5", "unknown option --steps"),
        ("--out /dev/null/x", "cannot write /dev/null/x"),
    ],
)
def test_doctor_refuses(hasty_doctor, capsys, line, fragment):
    assert main(["doctor", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert fragment in err
    assert tree(".") == set()


def test_cells_are_the_registry():
    table = estimators.list_combinations()
    for backend in BACKENDS.values():
        of_backend = {(row["quantity"], row["structure"]) for row in table if row[backend.name] == "yes"}
        assert of_backend == {
            (kind.name, structure) for kind, names in backend.structures.items() for structure in names
        }


SUPPORT = Path(fim_diagonality.__file__).parents[3] / "docs" / "reference" / "support.md"


@pytest.mark.slow
def test_the_support_page_is_what_the_code_says(capsys):
    """If this fails: python -m curvlab.analyze estimators --format markdown > docs/reference/support.md."""
    assert main(["estimators", "--format", "markdown"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == SUPPORT.read_text()


def test_a_part_of_the_support_page_is_what_the_code_says(monkeypatch, capsys):
    """All text and combinations, and every sixth module."""
    some = estimators.MODULES[::6]
    names = {name for name, *_ in estimators.MODULES} - {name for name, *_ in some}
    monkeypatch.setattr(estimators, "MODULES", some)
    assert main(["estimators", "--format", "markdown"]) == 0
    lines = [_cells(line) for line in SUPPORT.read_text().splitlines()]
    assert [_cells(line) for line in capsys.readouterr().out.splitlines()] == [
        cells for cells in lines if len(cells) < 3 or cells[1] not in names
    ]


def _cells(line):
    """Return the cells of a row, without the spaces and hyphens that depend on the other rows."""
    return [cell.strip(" -") for cell in line.split("|")]


def test_estimators_on_the_console(monkeypatch, capsys):
    monkeypatch.setattr(estimators, "MODULES", estimators.MODULES[:2])
    assert main(["estimators", "--out", "run"]) == 0
    out = capsys.readouterr().out
    for title in ("Quantity and structure", "Diagonal: supported modules", "K-FAC: supported modules"):
        assert title in out
    assert tree("run") == {"config.yaml", "support.md"}
    assert main(["estimators", "--format", "html"]) == 2
    assert "--format should be 'console' or 'markdown', not 'html'" in capsys.readouterr().err


def test_a_module_is_differentiated_through():
    """Every network of the table has parameters before the module, if it can."""
    for name, make, shape in estimators.MODULES:
        problem = estimators.make_network(make, shape)
        first = problem.space.names[0].partition(".")[0]
        assert first == "0", name
        assert problem.num_samples == 4
