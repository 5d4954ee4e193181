"""The analysis ``agreement``: its numbers against closed forms, and what becomes of backends that cannot."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from torch import nn

from curvlab.analyze.__main__ import main
from curvlab.analyze.backends import agreement
from curvlab.analyze.backends.agreement import compare, difference, make_sketch, make_vectors, summarise
from curvlab.estimators import BACKENDS, estimate
from curvlab.matrices import Diagonal, Info
from curvlab.parameters import ParameterSpace
from curvlab.plots import difference_maps
from curvlab.problem import Problem

pytestmark = pytest.mark.usefixtures("no_figures", "runs_here")

TINY = "--hidden 3 --steps 2 --samples 10"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(["agreement", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


def problem(model, samples=6):
    dtype = next(model.parameters()).dtype
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Problem(model, "cross_entropy", (x, torch.arange(samples) % 3))


def compute(of, structure, backend, params=None):
    return agreement._compute(of, "fisher", structure, backend, params)


# The numbers.


def test_difference_of_diagonals_is_that_of_their_norms():
    a, b = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([3.0, 2.0, 0.0])
    space, info = ParameterSpace(("w",), ((3,),)), Info("", "diag", "", "", 1)
    first, second = (Diagonal.from_tensors({"entries": e}, space, info) for e in (a, b))
    products = [make_sketch(matrix @ make_vectors(matrix)) for matrix in (first, second)]
    assert difference(*products) == pytest.approx(5**0.5 / 13**0.5)


def test_difference_of_nothing():
    assert difference(np.zeros(3), np.zeros(3)) == 0
    assert difference(np.zeros(3), np.ones(3)) == 1
    assert difference(2.0, 1.0) == 0.5
    assert difference(None, np.ones(3)) is None


def test_a_sketch_keeps_norms():
    """Of 512 rows, a norm is right to a few percent, and a zero difference is zero."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(20_000, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    ratio = (make_sketch(a) - make_sketch(b)).norm() / (a - b).norm()
    assert abs(float(ratio) - 1) < 4 / (2 * 512 * 8) ** 0.5
    assert difference(make_sketch(a), make_sketch(a.clone())) == 0
    few = torch.randn(512, 8)
    assert torch.equal(make_sketch(few), few.double())


def test_a_wrong_backend_stands_out():
    v = np.ones((5, 2))
    names = {"quantity": "fisher", "structure": "diag", "seed": 0}
    sketches = [{**names, "backend": name, "sketch": v * (2 if name == "hooks" else 1)} for name in BACKENDS]
    found = [
        {**names, "backend": name, "supported": "yes", "seconds": 1.0, "peak_mb": 1.0}
        | {"trace": 8.0 if name == "hooks" else 4.0}
        for name in BACKENDS
    ]
    found[list(BACKENDS).index("backpack")] |= {"supported": "no", "trace": None}
    sketches[list(BACKENDS).index("backpack")]["sketch"] = None
    rows = {row["backend"]: row for row in summarise(found, sketches)}
    assert (rows["hooks"]["reference_difference"], rows["hooks"]["reference_trace_difference"]) == (0.5, 0.5)
    assert rows["nngeometry"]["reference_difference"] == 0
    assert "backpack" not in rows
    pairs = {(r["first"], r["second"]): r["difference"] for r in compare(sketches, list(BACKENDS))}
    assert len(pairs) == len(BACKENDS) * (len(BACKENDS) - 1) // 2
    assert pairs["hooks", "torch"] == 0.5
    assert pairs["backpack", "torch"] is None


# What a backend gives.


@pytest.mark.parametrize(("structure", "params"), [("diag", None), ("kfac", ["2.*"]), ("implicit", None)])
def test_a_record_is_what_estimate_gives(structure, params):
    of = problem(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    record, sketch = compute(of, structure, "torch", params)
    matrix = estimate(of, "fisher", structure, backend="torch", params=params)
    np.testing.assert_allclose(sketch, matrix @ make_vectors(matrix), rtol=1e-10, atol=1e-12)
    assert record["supported"] == "yes"
    assert record["seconds"] > 0
    assert record["peak_mb"] is None or record["peak_mb"] >= 0
    assert (record["trace"] is None) == (structure == "implicit")


def test_what_a_backend_cannot():
    of = problem(nn.Sequential(nn.Linear(4, 3), nn.GELU()))
    record, sketch = compute(of, "tkfac", "backpack")
    assert (record["supported"], sketch) == ("absent", None)
    assert record["obstacle"] == "backend backpack does not compute fisher as tkfac"
    record, sketch = compute(of, "diag", "backpack")
    assert (record["supported"], sketch) == ("no", None)
    assert "GELU" in record["obstacle"]
    assert "backend hooks" in record["obstacle"]


def test_a_library_that_fails_in_its_own_way(monkeypatch):
    monkeypatch.setattr(agreement, "estimate", lambda *_, **__: 1 / 0)
    record, _ = compute(problem(nn.Linear(4, 3)), "diag", "hooks")
    assert record["obstacle"] == "backend hooks fails: ZeroDivisionError: division by zero"


# The run.


def test_a_run(call):
    line = f"{TINY} --dtype float64 --quantities fisher:samples=1 hessian --structures diag kfac implicit --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    records = json.loads(Path("run/table.json").read_text())
    assert len(records) == 2 * 3 * len(BACKENDS)
    for record in records:
        assert (record["seconds"] is not None) == (record["supported"] == "yes")
        assert bool(record["obstacle"]) == (record["supported"] != "yes")
    differences = json.loads(Path("run/differences.json").read_text())
    known = [row["difference"] for row in differences if row["difference"] is not None]
    assert len(known) > 8
    assert max(known) <= 1e-10
    refused = [record for record in records if record["supported"] == "no"]
    assert out.count("\nno: ") == len({record["obstacle"] for record in refused})


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--structures kfc", "'kfc'"),
        ("--structures diag diag", "structures needs one or more different values"),
        ("--quantities fihser", "did you mean 'fisher'"),
        ("--backends hook", "unknown backend 'hook'; backends: hooks"),
        ("--params fc7", "no trainable parameter matches 'fc7'"),
    ],
)
def test_refused(call, line, fragment):
    code, out, err = call(f"{TINY} {line} --out run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert fragment in err
    assert not Path("run").exists()


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
