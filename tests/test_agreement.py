"""The analysis ``agreement``: its numbers against closed forms, what it writes, and what becomes of cells that fail."""

import json
import os
import pickle
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import Rectangle
from torch import nn

from curvlab.analyze.__main__ import main
from curvlab.analyze.backends import agreement
from curvlab.analyze.backends.agreement import _Cell, _difference, _measured, _records, _vectors
from curvlab.estimators import BACKENDS, estimate
from curvlab.matrices import Diagonal, Info
from curvlab.parameters import ParameterSpace
from curvlab.problem import Problem
from curvlab.results.plots import difference_maps

TINY = "--hidden 3 --steps 2 --samples 10"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(agreement.__file__).parents[2]))


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(["agreement", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


def given(model, samples=6, params=None):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
    return pickle.dumps((model, "cross_entropy", (x, torch.arange(samples) % 3), params))


class Dying:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


# The numbers.


def test_difference_of_diagonals_is_that_of_their_norms():
    a, b = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([3.0, 2.0, 0.0])
    space, info = ParameterSpace(("w",), ((3,),)), Info("", "diag", "", "", 1)
    first, second = (Diagonal.from_tensors({"entries": e}, space, info) for e in (a, b))
    products = [(matrix @ _vectors(matrix)).numpy() for matrix in (first, second)]
    assert _difference(*products) == pytest.approx(5**0.5 / 13**0.5)


def test_difference_of_nothing():
    assert _difference(np.zeros(3), np.zeros(3)) == 0
    assert _difference(np.zeros(3), np.ones(3)) == 1
    assert _difference(2.0, 1.0) == 0.5
    assert _difference(None, np.ones(3)) is None


def test_a_wrong_backend_stands_out():
    v = np.ones((5, 2))
    cells = {name: _Cell(seconds=1.0, trace=4.0, products=v) for name in BACKENDS}
    cells["hooks"] = _Cell(seconds=1.0, trace=8.0, products=2 * v)
    cells["backpack"] = _Cell("it cannot")
    records = {record["backend"]: record for record in _records("fisher", "diag", cells)}
    assert (records["hooks"]["reference_difference"], records["hooks"]["reference_trace_difference"]) == (0.5, 0.5)
    assert records["nngeometry"]["reference_difference"] == 0
    assert (records["backpack"]["supported"], records["backpack"]["reference_difference"]) == ("no", None)
    found = {(r["first"], r["second"]): r["difference"] for r in agreement._differences("fisher", "diag", cells)}
    assert len(found) == len(BACKENDS) * (len(BACKENDS) - 1) // 2
    assert found["hooks", "torch"] == 0.5
    assert found["backpack", "torch"] is None


# A cell in a process of its own.


@pytest.mark.parametrize(("structure", "params"), [("diag", None), ("kfac", ["2.*"]), ("implicit", None)])
def test_a_cell_is_what_estimate_gives(structure, params):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    cell = _measured(given(model, params=params), "fisher", structure, "torch")
    _, loss, data, _ = pickle.loads(given(model))
    matrix = estimate(Problem(model, loss, data), "fisher", structure, backend="torch", params=params)
    expected = (matrix @ _vectors(matrix)).numpy()
    np.testing.assert_allclose(cell.products, expected, rtol=1e-10, atol=1e-12)
    assert cell.seconds > 0
    assert cell.peak_bytes is None or cell.peak_bytes >= 0
    assert (cell.trace is None) == (structure == "implicit")


def test_the_peak_is_that_of_the_cell():
    model = nn.Linear(4, 3)
    wide = nn.Sequential(nn.Linear(4, 500), nn.Linear(500, 3))
    small, large = (_measured(given(m, 8), "empirical_fisher", "dense", "hooks").peak_bytes for m in (model, wide))
    if small is not None:
        matrix = 4 * sum(p.numel() for p in wide.parameters()) ** 2
        assert small < 0.2 * matrix
        assert matrix < large < 5 * matrix


def test_cells_that_come_to_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    assert _measured(given(model), "fisher", "tkfac", "backpack") == _Cell(
        "backend backpack does not compute fisher as tkfac", absent=True
    )
    told = _measured(given(model), "fisher", "diag", "backpack").obstacle
    assert "GELU" in told
    assert "backend hooks" in told
    assert "killed (3)" in _measured(pickle.dumps(Dying()), "fisher", "diag", "hooks").obstacle
    assert _measured(pickle.dumps((1, 2)), "fisher", "diag", "hooks").obstacle.startswith(
        "backend hooks fails: ValueError: not enough values"
    )


# The run.


def test_a_run(call):
    line = f"{TINY} --dtype float64 --quantities fisher:samples=1 hessian --structures diag kfac implicit --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    figures = {f"agreement-{name}.{kind}" for name in ("fisher-samples-1", "hessian") for kind in ("png", "pdf")}
    tables = {"table.json", "table.csv", "table.md", "table.tex", "differences.json"}
    assert {p.name for p in Path("run").iterdir()} == figures | tables | {
        "config.yaml",
        "claims.json",
        "provenance.json",
    }
    records = json.loads(Path("run/table.json").read_text())
    assert len(records) == 2 * 3 * len(BACKENDS) == len(pd.read_csv("run/table.csv"))
    for record in records:
        if record["supported"] == "yes":
            assert record["reference_difference"] <= 1e-10, record
            assert record["seconds"] > 0
        else:
            assert record["obstacle"]
            assert record["seconds"] is None
    kinds = {(r["quantity"], r["structure"], r["backend"]): r["supported"] for r in records}
    assert kinds["fisher:samples=1", "kfac", "hooks"] == "yes"
    assert kinds["hessian", "kfac", "hooks"] == "absent"
    assert "Saved in run" in out
    differences = json.loads(Path("run/differences.json").read_text())
    pair = {"first": "hooks", "second": "torch", "quantity": "fisher:samples=1", "structure": "kfac"}
    (value,) = [d["difference"] for d in differences if d.items() >= pair.items()]
    assert value <= 1e-10


def test_what_is_refused_is_said(call):
    code, out, _ = call("--model cnn --steps 0 --samples 4 --quantities empirical_fisher --structures kfac --out run")
    assert code == 0
    assert "no: empirical_fisher as kfac: backend backpack cannot" in out


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--quantities fihser", "did you mean 'fisher'"),
        ("--structures kfca", "did you mean 'kfac'"),
        ("--quantities", "quantities needs one value or several different ones, not []"),
        ("--structures diag diag", "structures needs one value or several different ones"),
        ("--params 'fc9.*'", "no trainable parameter matches 'fc9.*'"),
        ("--samples 100000", "samples is 100,000, but there are 1,437"),
        ("--seed -1", "--seed should be greater than or equal to 0"),
        ("--device cuda:99", "there is no GPU 'cuda:99' here"),
        ("--weights gone.pt", "gone.pt: there is no such file"),
        ("--structur diag", "there is no option --structur; the nearest is --structures"),
    ],
)
def test_bad_value(call, line, fragment, tmp_path):
    code, out, err = call(f"--steps 0 {line}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cells", [0, 7])
def test_interrupted(call, monkeypatch, cells):
    left = [cells]

    def interrupted(*_):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return _Cell("not now")

    monkeypatch.setattr(agreement, "_measured", interrupted)
    code, out, err = call(f"{TINY} --out run")
    assert (code, out) == (130, "")
    if cells:
        assert err == f"interrupted\n{len(BACKENDS)} finished cells in run\n"
        assert len(json.loads(Path("run/table.json").read_text())) == len(BACKENDS)
    else:
        assert err == "interrupted\n"
        assert not Path("run").exists()


# The figure.


def test_the_map_has_a_cell_a_pair():
    values = np.full((3, 3), np.nan)
    values[1, 0], values[2, 0] = 0.0, 3.2e-7
    figure = difference_maps({"diag": values, "kfac": values}, ["a", "b", "c"], "title")
    for axes in figure.axes[:2]:
        assert [text.get_text() for text in axes.texts] == ["0", "3e-7"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c"]
        (hatched,) = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
        assert (hatched.get_x(), hatched.get_y()) == (0.5, 0.5)
