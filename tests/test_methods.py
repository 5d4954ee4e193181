"""The analysis ``methods``: its candidates and cells, the choice on held-out samples, tables, claims, its run."""

import json
import math
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from curvlab import CurvlabError
from curvlab.analyze.__main__ import main
from curvlab.analyze.regimes import methods as analysis
from curvlab.analyze.regimes import methods_claims as table2
from curvlab.analyze.regimes.methods import ANALYSIS, figures, summarise
from curvlab.analyze.regimes.methods_options import LISTS, PRESETS, MethodsConfig, candidates, single, trials
from curvlab.analyze.regimes.methods_run import dataset_of, tasks_of
from curvlab.continual import metrics, permuted, run, split_classes
from curvlab.continual.strategies import ER, EWC, Joint, Naive
from curvlab.grid import Place, Store, processes
from curvlab.models import build

ALL = ("naive", "ewc", "agem", "er", "stable", "joint")
pytestmark = pytest.mark.usefixtures("one_server", "cells_here", "no_figures")

TINY = (
    "--hidden 6 --tasks 2 --epochs 1 --task-samples 96 --validation 60 --test-samples 90 --streams permuted "
    "--batch-sizes 16 --replay-batch-size 8 --ewc-lrs 0.1 --ewc-strengths 1 --stable-lrs 0.1 --decays 0.8"
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(analysis.__file__).parents[2]))


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(["methods", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


def read(*path):
    return json.loads(Path(*path).read_text(), parse_constant=pytest.fail)


def tiny(**changes):
    values = {
        "hidden": (6,),
        "tasks": 2,
        "epochs": 1,
        "task_samples": 96,
        "validation": 60,
        "test_samples": 90,
        "streams": ("permuted",),
        "batch_sizes": (16,),
        "replay_batch_size": 8,
        "ewc_strengths": (1.0,),
        "decays": (0.8,),
        "seeds": (0,),
    }
    return MethodsConfig(**values | changes)


# Candidates and cells.


def test_every_method_has_as_many_candidates():
    """And they are all combinations of its lists, so that none of a preset's values is left out by chance."""
    for name, config in PRESETS.items():
        assert {len(candidates(config, method)) for method in ALL} == {config.trials}, name
        for method in ALL:
            assert math.prod(len(getattr(config, field)) for field in LISTS[method].values()) == config.trials, name


def test_candidates_are_all_combinations_or_draws_of_them():
    config = MethodsConfig(lrs=(0.1, 0.01), batch_sizes=(10, 64), decays=(0.9, 0.5), dropouts=(0.1, 0.2), trials=8)
    assert candidates(config, "naive") == [{"lr": lr, "batch_size": size} for lr in (0.1, 0.01) for size in (10, 64)]
    every = [
        {"lr": 0.1, "batch_size": size, "decay": decay, "dropout": dropout}
        for size in (10, 64)
        for decay in (0.9, 0.5)
        for dropout in (0.1, 0.2)
    ]
    assert candidates(config, "stable") == every
    drawn = [candidates(config.model_copy(update={"trials": n}), "stable") for n in range(1, 9)]
    assert [len(few) for few in drawn] == list(range(1, 9))
    assert all(candidate in more for few, more in pairwise(drawn) for candidate in few)
    assert drawn[3] != every[:4]


def keys(config, stream="permuted"):
    parts = [single(config, stream, method, candidates(config, method)[0], 0, "test") for method in ALL]
    return dict(zip(ALL, [cell.key for cell in ANALYSIS.cells(parts)], strict=True))


@pytest.mark.parametrize(
    ("change", "stream", "changed"),
    [
        ({"ewc_strengths": (7.0, 1.0)}, "permuted", {"ewc"}),
        ({"ewc_lrs": (0.07,)}, "permuted", {"ewc"}),
        ({"samples": 50, "structure": "kfac"}, "permuted", {"ewc"}),
        ({"per_class": 2}, "permuted", {"agem", "er"}),
        ({"decays": (0.3,), "dropouts": (0.0,)}, "permuted", {"stable"}),
        ({"lrs": (0.07,)}, "permuted", {"naive", "agem", "er", "joint"}),
        ({"lrs": (0.1, 0.07), "batch_sizes": (10, 3), "selection_seeds": (5,), "trials": 50}, "permuted", set()),
        ({"degrees": 3.0}, "permuted", set()),
        ({"degrees": 3.0}, "rotated", set(ALL)),
        ({"momentum": 0.5}, "permuted", set(ALL)),
    ],
)
def test_what_has_no_part_in_a_cell_does_not_name_it(change, stream, changed):
    before, after = keys(MethodsConfig(), stream), keys(MethodsConfig(**change), stream)
    assert {method for method in ALL if before[method] != after[method]} == changed


def test_the_cells_of_the_candidates_are_of_held_out_samples_and_other_seeds():
    config = MethodsConfig(selection_seeds=(7, 8))
    parts = trials(config, "rotated", "ewc")
    assert len(parts) == 2 * len(candidates(config, "ewc"))
    assert {part.evaluation for part in parts} == {"validation"}
    assert {part.seeds for part in parts} == {(7,), (8,)}
    assert trials(config.model_copy(update={"trials": 1}), "rotated", "ewc") == []
    assert len({cell.key for cell in ANALYSIS.cells(parts)}) == len(parts)


def test_samples_are_in_another_order_always_the_same(tmp_path):
    x = np.arange(60, dtype=np.float32)[:, None].repeat(3, 1)
    np.savez("sorted.npz", x_train=x, y_train=np.arange(60) // 20, x_test=x, y_test=np.arange(60) // 20)
    config = MethodsConfig(data="sorted.npz", test_samples=30)
    data, again = (dataset_of(config, Place(tmp_path)) for _ in range(2))
    assert data.fingerprint() == again.fingerprint()
    assert sorted(data.x_train[:, 0].tolist()) == list(range(60))
    assert (data.y_train == data.x_train[:, 0] // 20).all()
    assert len(data.y_test.unique()) == 3
    assert len(data.x_test) == 30
    (first, _) = tasks_of(config.model_copy(update={"tasks": 2, "validation": 10}), data, "permuted", 0)
    assert first.sizes == {"train": 50, "validation": 10, "test": 30}


def expected(config, method, seed, evaluation="test", **candidate):
    """What ``curvlab.continual.run`` gives with the same options, written out."""
    data = dataset_of(config, Place(Path()))
    tasks = permuted(data, tasks=2, seed=seed, validation=60, samples=96)
    strategy = {"ewc": EWC(1.0, samples=config.samples), "er": ER(20, batch_size=8), "joint": Joint()}.get(
        method, Naive()
    )
    result = run(
        tasks,
        build("mlp", (1, 8, 8), 10, hidden=(6,), dropout=0.25 if method == "stable" else 0.0, seed=seed),
        strategy,
        momentum=0.8,
        epochs=1,
        batch_size=16,
        seed=seed,
        evaluation=evaluation,
        progress=False,
        **candidate,
    )
    return metrics.summary(result.accuracy), result


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("naive", {"lr": 0.1}),
        ("ewc", {"lr": 0.1}),
        ("er", {"lr": 0.1}),
        ("joint", {"lr": 0.1}),
        ("stable", {"lr": 0.1 * 0.8, "lr_decay": 0.8, "min_lr": 5e-5}),
    ],
)
def test_a_cell_is_a_run_of_the_loop(tmp_path, method, options):
    config = tiny(methods=(method,), lrs=(0.1,), samples=50, seeds=(3,))
    record, *accuracies = ANALYSIS.cell(config, Place(tmp_path / "place"))
    summary, result = expected(config, method, 3, **options)
    for key in ("acc", "forgetting", "learning_accuracy", "bwt"):
        assert record[key] == (None if math.isnan(summary[key]) else summary[key]), key
    assert record["bytes"] == result.tasks[-1]["bytes"]
    assert (record["lr"], record["batch_size"], record["evaluation"]) == (0.1, 16, "test")
    assert (record["decay"], record["dropout"]) == ((0.8, 0.25) if method == "stable" else (None, None))
    matrix = result.accuracy.tolist()
    measured = [(2, 1), (2, 2)] if method == "joint" else [(1, 1), (2, 1), (2, 2)]
    assert [(r["after"], r["task"]) for r in accuracies] == measured
    assert all(r["accuracy"] == matrix[r["after"] - 1][r["task"] - 1] for r in accuracies)
    assert not list((tmp_path / "place").rglob("*.pt"))  # what was in it is in the records


def test_split_tasks_have_outputs_of_their_own(tmp_path):
    config = tiny(streams=("split",), tasks=5, methods=("naive",), lrs=(0.1,), validation=10, task_samples=100)
    record, *_ = ANALYSIS.cell(config, Place(tmp_path))
    data = dataset_of(config, Place(tmp_path))
    result = run(
        split_classes(data, tasks=5, seed=0, validation=10, samples=100),
        build("mlp", (1, 8, 8), 10, hidden=(6,), seed=0),
        Naive(),
        head="masked",
        lr=0.1,
        momentum=0.8,
        batch_size=16,
        progress=False,
    )
    assert record["acc"] == metrics.acc(result.accuracy)


def test_a_cell_of_several_candidates_takes_the_best(tmp_path):
    config = tiny(methods=("naive",), lrs=(1e-4, 0.1, 1e30), selection_seeds=(9,))
    record, *_ = ANALYSIS.cell(config, Place(tmp_path))
    scores = {lr: expected(config, "naive", 9, "validation", lr=lr)[0]["acc"] for lr in (1e-4, 0.1)}
    best = max(scores, key=scores.__getitem__)
    assert (record["lr"], record["evaluation"]) == (best, "test")
    assert record["acc"] == expected(config, "naive", 0, lr=best)[0]["acc"]


# What is made of them.


def of_methods(stream="permuted", **changes):
    """Records of three seeds in the paper's order of methods, with the published numbers."""
    rows = table2.published()["rows"][stream]
    return [
        {"stream": stream, "method": method, "seed": seed, "bytes": 1000, "seconds": 2.0, "learning_accuracy": 0.9}
        | {"acc": rows[method]["acc"] / 100 + 0.01 * seed, "forgetting": rows[method].get("forgetting")}
        | changes.get(method, {})
        for method in ALL
        for seed in range(3)
    ]


@pytest.mark.parametrize("stream", ["permuted", "rotated", "split"])
def test_the_published_numbers_are_as_the_claims_say(stream):
    claims = table2.claims(of_methods(stream))
    assert len(claims) == 7
    assert {claim.verdict for claim in claims} == {"reproduced"}
    for claim in claims:
        assert claim.ours == pytest.approx(claim.published, abs=1e-9)


@pytest.mark.parametrize(
    ("stream", "changes", "lost"),
    [
        ("permuted", {"joint": {"acc": 0.80}}, {0}),
        ("permuted", {"ewc": {"acc": 0.81}}, {1, 2}),
        ("permuted", {"ewc": {"acc": 0.444}}, {1, 3}),
        ("rotated", {"ewc": {"acc": 0.46}}, {1, 3}),
        ("rotated", {"ewc": {"acc": 0.5}, "naive": {"acc": 0.5}}, {1}),
        ("permuted", {"naive": {"acc": 0.71}, "ewc": {"acc": 0.75}}, {4}),
        ("rotated", {"naive": {"acc": 0.60}, "ewc": {"acc": 0.61}}, set()),
        ("rotated", {"naive": {"acc": 0.64}, "ewc": {"acc": 0.65}}, {4}),
        ("split", {"naive": {"acc": 0.58}, "ewc": {"acc": 0.59}}, set()),
        ("permuted", {"agem": {"acc": 0.81}}, {5}),
        ("permuted", {"er": {"acc": 0.81}}, {5}),
        ("permuted", {"ewc": {"forgetting": 0.08}}, {6}),
        ("permuted", {"er": {"forgetting": 0.08}}, set()),
    ],
)
def test_claims(stream, changes, lost):
    claims = table2.claims(of_methods(stream, **changes))
    assert {n for n, claim in enumerate(claims) if claim.verdict == "not reproduced"} == lost


def test_claims_where_cells_are_missing():
    without = [record for record in of_methods() if record["method"] != "ewc"]
    assert [claim.verdict for claim in table2.claims(without)] == [
        *("reproduced", *["not tested"] * 3, "reproduced", "reproduced", "not tested")
    ]
    failed = [record for record in of_methods() if (record["method"], record["seed"]) != ("joint", 1)]
    assert [claim.verdict for claim in table2.claims(failed)] == ["not tested", *["reproduced"] * 6]
    assert {claim.verdict for claim in table2.claims(of_methods()[::3])} == {"not tested"}  # one seed


def test_the_order_of_a_stream_seed_by_seed():
    ewc = dict(zip(range(3), (0.75, 0.82, 0.30), strict=True))
    found = [record | ({"acc": ewc[record["seed"]]} if record["method"] == "ewc" else {}) for record in of_methods()]
    rows = table2.order([*found, *of_methods("rotated")])
    assert [(row["stream"], row["seed"], row["holds"]) for row in rows] == [
        *(("permuted", 0, True), ("permuted", 1, False), ("permuted", 2, False)),
        *(("rotated", seed, True) for seed in range(3)),
    ]
    differences = [[row[key] for key in ("stable-ewc", "ewc-naive", "stable-naive", "smallest")] for row in rows[:3]]
    np.testing.assert_allclose(differences[0], [0.051, 0.306, 0.357, 0.051])
    np.testing.assert_allclose(differences[1], [-0.009, 0.366, 0.357, -0.009])
    np.testing.assert_allclose(differences[2], [0.521, -0.164, 0.357, -0.164])
    gone = [record for record in found if (record["method"], record["seed"]) != ("ewc", 1)]
    assert [row["holds"] for row in table2.order(gone)] == [True, None, False]
    assert table2.order([record for record in found if record["method"] != "ewc"]) == []


def test_a_value_at_an_end_of_those_tried():
    rows = [
        {"stream": "permuted", "method": "stable", "lr": lr, "batch_size": size, "decay": decay, "dropout": 0.0}
        for lr in (0.1, 0.2, 0.3)
        for size in (1, 64)
        for decay in (0.5, 1.0)
    ]
    other = {**rows[0], "stream": "rotated", "lr": 7.0}
    ends = {(row["lr"], row["batch_size"], row["decay"]): analysis.at_an_end(row, [*rows, other]) for row in rows}
    assert ends[0.2, 1, 1.0] == []  # no batch is smaller and no rate rises
    assert ends[0.1, 64, 0.5] == ["lr", "batch_size", "decay"]
    assert ends[0.3, 1, 0.5] == ["lr", "decay"]


def test_deviations_are_those_of_the_configuration():
    mnist = PRESETS["paper"].model_copy(update={"task_samples": None, "methods": ("naive", "stable")})
    same = {"batch_sizes": (10,), "validation": 0}
    lines = table2.deviations(mnist.model_copy(update=same), dict.fromkeys(mnist.streams, (60_000, 10_000)))
    assert [line.partition(":")[0] for line in lines] == ["All methods"]
    lines = table2.deviations(PRESETS["cpu"], dict.fromkeys(mnist.streams, (10_000, 2000)))
    assert lines[0] == (
        "permuted, rotated: training samples a task 10,000 (60,000); test samples 2,000 (10,000); batch size 10 or 64 "
        "(10); seeds 3 (5)."
    )
    assert lines[1].startswith("EWC: empirical_fisher, diag, of 1,000 random samples")
    split, *_ = table2.deviations(PRESETS["cpu-cifar100"], {"split": (200, 2000)})
    for text in ("passes 3 (1)", "resnet20_cifar10-12fca82f.th, BatchNorm frozen (narrow ResNet-18", "SGD 0 (0.1)"):
        assert text in split
    digits, rotated, *_ = table2.deviations(MethodsConfig(), dict.fromkeys(mnist.streams, (1237, 360)))
    assert "data digits (mnist); tasks 5 (20)" in digits
    assert "degrees a task 40 (10)" in rotated


def test_summary_beside_the_published_numbers():
    table = summarise(of_methods())
    assert [row["label"] for row in table] == [
        *("Naive SGD", "EWC", "A-GEM", "ER-Reservoir", "Stable SGD", "multi-task (joint)")
    ]
    assert table[0]["acc"] == pytest.approx(0.454)
    assert table[0]["acc_std"] == pytest.approx(0.01)
    assert table[5]["forgetting"] is None
    slow = [record | {"seconds": 100.0 if record["seed"] == 1 else 2.0} for record in of_methods()]
    assert {row["seconds"] for row in summarise(slow)} == {2.0}
    beside = table2.beside_published(table, "mnist", 20)
    assert beside[4]["published_acc"] == pytest.approx(0.801)
    assert beside[4]["published_acc_std"] == pytest.approx(0.0051)
    assert beside[4]["published_forgetting"] == 0.09
    assert "published_forgetting" not in beside[5]
    for data, tasks in (("digits", 20), ("mnist", 5), ("cifar100", 20)):
        assert not any("published_acc" in row for row in table2.beside_published(table, data, tasks))


def test_figures():
    accuracies = [
        {"stream": stream, "method": method, "seed": seed, "after": after, "task": task}
        | {"accuracy": 0.9 - 0.1 * (after - task) + 0.01 * seed}
        for stream in ("permuted", "rotated")
        for method in ("naive", "joint")
        for seed in range(3)
        for after in (1, 2, 3)
        for task in range(1, after + 1)
        if method == "naive" or after == 3
    ]
    table = table2.beside_published(summarise(of_methods()), "mnist", 20)
    drawn = figures(accuracies, table, "title")
    curves, bars = drawn["accuracy_curves"], drawn["accuracy_and_forgetting"]
    mean, first = curves.axes[0], curves.axes[2]
    np.testing.assert_allclose(mean.lines[0].get_xydata(), [[1, 0.91], [2, 0.86], [3, 0.81]])
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[1, 0.91], [2, 0.81], [3, 0.71]])
    np.testing.assert_allclose(mean.lines[1].get_xydata(), [[1, 0.81], [3, 0.81]])
    labels = [text.get_text() for text in curves.legends[0].get_texts()]
    assert labels == ["Naive SGD", "multi-task (joint)", "mean and range of 3 seeds"]
    heights = [patch.get_height() for patch in bars.axes[0].patches]
    np.testing.assert_allclose(heights, [row["acc"] for row in table])
    diamonds = [line.get_ydata()[0] for line in bars.axes[0].lines if line.get_marker() == "D"]
    np.testing.assert_allclose(diamonds, [row["published_acc"] for row in table])
    assert len(bars.axes[1].patches) == 5  # joint training has no forgetting
    labels = [text.get_text() for text in bars.legends[0].get_texts()]
    assert labels == ["standard deviation of 3 seeds", "published mean"]


# The run.


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_run_and_the_same_again(call, monkeypatch, with_figures):
    line = f"{TINY} --lrs 0.0001 0.1 --dropouts 0 0.25 --seeds 0 --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    assert {name for name in files("run") if not name.startswith("sweep.sqlite")} == {
        *("config.yaml", "table.json", "table.csv", "table.md", "table.tex", "accuracies.json", "selection.json"),
        *("claims.json", "order.json", "provenance.json", "accuracy_curves.png", "accuracy_curves.pdf"),
        *("accuracy_and_forgetting.png", "accuracy_and_forgetting.pdf"),
    }
    table, selection = read("run/table.json"), read("run/selection.json")
    assert [(r["method"], r["seed"]) for r in table] == [(method, 0) for method in ALL]
    assert len(pd.read_csv("run/table.csv")) == 6
    assert {r["evaluation"] for r in table} == {"test"}
    tried = {method: [row for row in selection if row["method"] == method] for method in ALL}
    assert {method: len(rows) for method, rows in tried.items()} == dict.fromkeys(ALL, 2) | {"ewc": 1}
    for method, rows in tried.items():
        (best,) = (row for row in rows if row["chosen"])
        assert best.get("validation_acc") == max((row["validation_acc"] for row in rows if len(rows) > 1), default=None)
        for record in (r for r in table if r["method"] == method):
            assert all(record[name] == best[name] for name in LISTS[method])
    config = tiny()
    (row,) = (row for row in tried["naive"] if row["lr"] == 0.1)
    assert row["validation_acc"] == expected(config, "naive", 1000, "validation", lr=0.1)[0]["acc"]
    accuracies = read("run/accuracies.json")
    assert len(accuracies) == 5 * 3 + 2
    assert len(read("run/claims.json")) == 7
    assert len(read("run/order.json")) == 1
    for text in ("Methods after 2 tasks of digits", "Hyper-parameters", "seed 1000", "another code", "Saved in run"):
        assert text in out
    assert "Table 2, beside ours" not in out  # these are not the paper's data
    assert " 0.094 " in out
    assert Path("run/table.tex").read_text().isascii()
    origin = read("run/provenance.json")
    assert set(origin["seconds"]) == {"data", "selection", "cells", "figures"}
    assert origin["cells"]["done"] == 2 * 5 + 6

    # Of the store the order is written anew, in which the candidates come first.
    before = {name: Path("run", name).read_bytes() for name in files("run") if not name.startswith("sweep.sqlite")}
    with monkeypatch.context() as no_cell:
        no_cell.setattr("curvlab.grid.running.supervised", None)  # a finished run is only printed again
        assert call(line) == (0, out, "")
    assert {name: Path("run", name).read_bytes() for name in before} == before


def same_results(first, second):
    for name in ("accuracies.json", "selection.json", "claims.json", "accuracy_curves.pdf"):
        assert Path(first, name).read_bytes() == Path(second, name).read_bytes()
    one, other = (
        [{key: value for key, value in r.items() if key != "seconds"} for r in read(folder, "table.json")]
        for folder in (first, second)
    )
    assert one == other


@pytest.mark.parametrize("done", [1, 3])
def test_interrupted_and_continued(call, monkeypatch, done):
    """While the candidates are trained, and while the chosen ones are."""
    line = f"{TINY} --methods stable --dropouts 0 0.25 --seeds 0 1 --jobs 1"
    assert call(f"{line} --out undisturbed")[0] == 0
    real, left = Store.finish, [done]

    def interrupted(self, outcome):
        real(self, outcome)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(Store, "finish", interrupted)
        code, out, err = call(f"{line} --out run")
    assert (code, out) == (130, "")
    assert err == f"interrupted\ncells done in run: {done}; the same command with --out run continues there\n"
    assert call(f"{line} --out run --jobs 2")[0] == 0
    same_results("run", "undisturbed")
    assert read("run/provenance.json")["continued"] is True


def test_a_cell_continues_after_the_last_finished_task(tmp_path, monkeypatch):
    config = tiny(methods=("er",), lrs=(0.1,), tasks=3)
    whole = ANALYSIS.cell(config, Place(tmp_path / "whole"))
    real, left = ER.loss, [15]  # in the third task

    def interrupted(self, learner, batch):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(self, learner, batch)

    with monkeypatch.context() as stop:
        stop.setattr(ER, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ANALYSIS.cell(config, Place(tmp_path / "stopped"))
    assert list((tmp_path / "stopped").rglob("*.pt"))
    steps = []
    monkeypatch.setattr(ER, "loss", lambda *given: (steps.append(1), real(*given))[1])
    again = ANALYSIS.cell(config, Place(tmp_path / "stopped"))
    assert len(steps) == 6  # of the third task alone
    for record in (whole[0], again[0]):
        del record["seconds"]
    assert again == whole


def test_a_candidate_that_diverges_is_not_chosen(call):
    line = f"{TINY} --methods naive --lrs 1e30 0.1 --seeds 0 --out run"
    code, out, err = call(line)
    assert (code, err) == (0, "")
    first, second = read("run/selection.json")
    assert (first["lr"], first["chosen"], first["validation_acc"]) == (1e30, False, None)
    assert "loss is nan" in first["note"]
    assert (second["lr"], second["chosen"], second["note"]) == (0.1, True, "")
    (row,) = [
        line.split("│") for line in out.splitlines() if line.startswith("permuted │ Naive SGD") and " 0.1* " in line
    ]
    assert [cell.strip() for cell in row[-2:]] == ["2", "1"]


def test_a_candidate_that_diverges_late_leaves_nothing(tmp_path):
    config = tiny(methods=("ewc",), ewc_lrs=(0.1,), ewc_strengths=(1e9,), evaluation="validation")
    (record,) = ANALYSIS.cell(config, Place(tmp_path))
    assert "of task 1" in record["note"]
    assert not files(tmp_path)


def test_candidates_that_all_diverge(call):
    code, out, err = call(f"{TINY} --methods naive --lrs 1e30 1e29 --seeds 0 --out run")
    assert (code, out) == (2, "")
    assert err.startswith("error: naive fails on the permuted stream with every one of its 2 candidates (the training")
    assert "give lower values with --lrs\n" in err


def test_a_cell_that_fails_is_told(call):
    code, out, err = call(f"{TINY} --methods naive stable --lrs 1e30 --dropouts 0 --seeds 0 --out run")
    assert code == 1
    assert err.startswith("error: 1 of 2 cells has failed, the first (seed 0) so: the training loss is nan")
    assert {r["method"] for r in read("run/table.json")} == {"stable"}
    assert {claim["verdict"] for claim in read("run/claims.json")} == {"not tested"}
    assert "Failed, and in no number above" in out


def test_a_candidate_whose_cell_is_lost_ends_the_run(call, monkeypatch):
    monkeypatch.setattr(processes, "run", lambda *_: processes.Ended(None, 0, None, 1.0, "timeout"))
    code, out, err = call(f"{TINY} --methods naive --lrs 0.1 0.2 --seeds 0 --cell-timeout 1 --out run")
    assert (code, out) == (1, "")
    assert "2 of 2 cells have failed" in err


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--tasks 1", "--tasks should be greater than or equal to 2, not '1'"),
        ("--methods", "methods needs one value or several different ones"),
        ("--methods naive naive", "methods needs one value or several different ones"),
        ("--methods sgd", "--methods should be 'naive'"),
        ("--streams split", "the 10 classes of digits cannot be split equally into 3 tasks"),
        ("--streams split --tasks 10 --validation 40", "has a single output to choose from with head 'masked'"),
        ("--lrs", "lrs needs one value or several different ones"),
        ("--lrs 0.1 0.1", "lrs needs one value or several different ones"),
        ("--lrs 0", "--lrs should be greater than 0"),
        ("--decays 1.5", "--decays should be less than or equal to 1"),
        ("--dropouts 1", "--dropouts should be less than 1"),
        ("--selection-seeds", "selection_seeds needs one value or several different ones"),
        ("--validation 0", "are chosen on held-out samples: set validation, or give"),
        ("--evaluation validation --seeds 1000", "give seeds and selection_seeds no value in common"),
        ("--validation 1437", "cannot hold out 1437 of the 1437 training samples"),
        ("--task-samples 1400", "cannot learn from 1400 of the 1437 training samples of digits, of which 200"),
        ("--test-samples 361", "test_samples is 361, but there are 360 test samples"),
        ("--structure diagonal", "there is no structure 'diagonal'"),
        ("--quantity hessien", "there is no quantity 'hessien'"),
        ("--ewc-mode onlin", "--ewc-mode should be 'separate' or 'online'"),
        ("--per-class 0", "--per-class should be greater than or equal to 1"),
        ("--model cnn", "with cnn set dropouts to 0"),
        ("--fine-tune", "fine_tune is for weights from a file: set weights"),
        ("--weights gone.pt", "gone.pt: there is no such file of weights"),
        ("--normalize imagenet", "normalize=imagenet is for images with three channels"),
        ("--device cuda:99", "there is no GPU 'cuda:99' here"),
        ("--lr 0.1", "there is no option --lr; the nearest is --lrs"),
    ],
)
def test_bad_value(call, line, fragment, tmp_path):
    code, out, err = call(f"--tasks 3 {line} --out run")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert list(tmp_path.iterdir()) == []


def test_unused_lists_may_be_empty(call):
    code, out, err = call(f"{TINY} --methods naive --lrs 0.1 --seeds 0 --ewc-strengths --decays --dropouts --out run")
    assert (code, err) == (0, "")
    for text in ("chosen on", "Candidates were", "* The smallest", "Stable SGD above EWC above"):
        assert text not in out  # nothing was chosen, and these were not run


def test_a_seed_that_failed_in_every_row(call, monkeypatch):
    line = f"{TINY} --methods naive --lrs 0.1 --seeds 0 1 2 --out run"
    assert "over 3 seeds" in call(line)[1]
    real = analysis.gridded.run

    def without_one(*given):
        records, _ = real(*given)
        return [record for record in records if record["seed"] != 1], [{}]

    monkeypatch.setattr("curvlab.analyze.gridded.run", without_one)
    as_published = {**table2.published(), "data": {"permuted": "digits"}, "tasks": 2}
    monkeypatch.setattr(table2, "published", lambda: as_published)
    out = call(line)[1]
    for text in ("0.444 ± 0.025", "0.53 ± 0.03"):  # no digits that were not printed
        assert text in out
    assert "over the seeds that did not fail" in out
    assert out.splitlines()[1].split()[-1] == "seeds"


def test_what_the_options_say():
    fields = MethodsConfig.model_fields
    assert all(field.description for field in fields.values())
    with pytest.raises(CurvlabError):
        ANALYSIS.cell(tiny(lrs=()), Place(Path()))
