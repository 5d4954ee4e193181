"""The analysis ``methods``: its candidates and runs, the choice on held-out samples, tables, claims."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from curvlab import CurvlabError
from curvlab.analyze.__main__ import main
from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.search import find_boundary_values
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.regimes import table2
from curvlab.analyze.regimes.method_list import METHODS, PAPER, Method
from curvlab.analyze.regimes.methods import ANALYSIS, SEARCH, load_dataset, make_tasks, report, summarise
from curvlab.analyze.regimes.methods_options import PRESETS, MethodsConfig, candidates, single_run
from curvlab.continual import metrics, permuted, run, split_classes
from curvlab.continual.strategies import ER, EWC, IMM, MAS, SI, Joint, LinearProbe, Naive, Oracle
from curvlab.grid import Place
from curvlab.models import build

ALL = tuple(METHODS)
CPU = PRESETS["cpu"].config
MNIST = Subject("mnist", (1, 28, 28), 10, 60_000, 2000)
CIFAR = Subject("cifar100", (3, 32, 32), 100, 50_000, 2000)
DIGITS = Subject("digits", (1, 8, 8), 10, 1437, 360)


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
        "si_strengths": (3.0,),
        "mas_strengths": (0.2,),
        "decays": (0.8,),
        "seeds": (0,),
    }
    return MethodsConfig(**values | changes)


# Candidates and runs.


def test_the_methods_of_the_paper_are_run_unless_others_are_named():
    assert set(MethodsConfig().methods) == set(table2.published_rows("permuted"))
    for preset in PRESETS.values():
        assert preset.config.methods == MethodsConfig().methods


def test_every_method_has_as_many_candidates():
    """And they are all combinations of its lists, so that none of a preset's values is left out by chance."""
    for name, preset in PRESETS.items():
        config = preset.config
        assert {len(candidates(config, method)) for method in ALL} == {config.trials}, name
        for method in ALL:
            assert (
                math.prod(len(getattr(config, field)) for field in METHODS[method].hyper_parameters.values())
                == config.trials
            ), name


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
    parts = [
        single_run(config, {"stream": stream, "method": method}, candidates(config, method)[0]).model_copy(
            update={"seeds": (0,), "evaluation": "test"}
        )
        for method in ALL
    ]
    return dict(zip(ALL, [spec.key for spec in ANALYSIS.run_specs(parts)], strict=True))


@pytest.mark.parametrize(
    ("change", "stream", "changed"),
    [
        ({"ewc_strengths": (7.0, 1.0)}, "permuted", {"ewc"}),
        ({"si_strengths": (7.0, 1.0)}, "permuted", {"si"}),
        ({"mas_strengths": (7.0, 1.0)}, "permuted", {"mas"}),
        ({"ewc_lrs": (0.07,)}, "permuted", {"ewc", "si", "mas"}),
        ({"structure": "kfac"}, "permuted", {"ewc", "imm"}),
        ({"samples": 50}, "permuted", {"ewc", "mas", "imm"}),
        ({"per_class": 2}, "permuted", {"agem", "er"}),
        ({"decays": (0.3,), "dropouts": (0.0,)}, "permuted", {"stable"}),
        ({"lrs": (0.07,)}, "permuted", {"naive", "agem", "er", "joint", "imm", "linear_probe", "oracle"}),
        ({"lrs": (0.1, 0.07), "batch_sizes": (10, 3), "selection_seeds": (5,), "trials": 50}, "permuted", set()),
        ({"degrees": 3.0}, "permuted", set()),
        ({"degrees": 3.0}, "rotated", set(ALL)),
        ({"momentum": 0.5}, "permuted", set(ALL)),
    ],
)
def test_what_has_no_part_in_a_run_does_not_name_it(change, stream, changed):
    before, after = keys(MethodsConfig(), stream), keys(MethodsConfig(**change), stream)
    assert {method for method in ALL if before[method] != after[method]} == changed


def test_candidates_are_judged_on_held_out_samples_with_other_seeds():
    config = MethodsConfig(selection_seeds=(7, 8), streams=("rotated",), methods=("ewc",))
    trials = SEARCH.trials(config)
    assert len(trials) == 2 * len(candidates(config, "ewc"))
    assert {trial.config.evaluation for trial in trials} == {"validation"}
    assert {trial.config.seeds for trial in trials} == {(7,), (8,)}
    assert SEARCH.trials(config.model_copy(update={"trials": 1})) == []
    assert len({spec.key for spec in ANALYSIS.trial_specs(config)}) == len(trials)


def test_samples_are_in_another_order_always_the_same(tmp_path):
    x = np.arange(60, dtype=np.float32)[:, None].repeat(3, 1)
    np.savez(tmp_path / "sorted.npz", x_train=x, y_train=np.arange(60) // 20, x_test=x, y_test=np.arange(60) // 20)
    config = MethodsConfig(data=str(tmp_path / "sorted.npz"), test_samples=30)
    data, again = (load_dataset(config, Place(tmp_path)) for _ in range(2))
    assert data.fingerprint() == again.fingerprint()
    assert sorted(data.x_train[:, 0].tolist()) == list(range(60))
    assert (data.y_train == data.x_train[:, 0] // 20).all()
    assert len(data.y_test.unique()) == 3
    assert len(data.x_test) == 30
    (first, _) = make_tasks(config.model_copy(update={"tasks": 2, "validation": 10}), data, "permuted")
    assert first.sizes == {"train": 50, "validation": 10, "test": 30}


def measure(config, folder):
    return ANALYSIS.execute(config.model_dump(mode="json"), Place(folder))


def expected(config, method, seed, evaluation="test", **candidate):
    """The result equals ``curvlab.continual.run`` with the same options."""
    data = load_dataset(config, Place(Path()))
    tasks = permuted(data, tasks=2, seed=seed, validation=60, samples=96)
    strategies = {
        "ewc": EWC(1.0, samples=config.samples),
        "er": ER(20, batch_size=8),
        "joint": Joint(),
        "si": SI(3.0),
        "mas": MAS(0.2, samples=config.samples),
        "imm": IMM("mode", quantity="empirical_fisher", samples=config.samples),
        "linear_probe": LinearProbe(),
        "oracle": Oracle(),
    }
    strategy = strategies.get(method, Naive())
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
        ("si", {"lr": 0.1}),
        ("mas", {"lr": 0.1}),
        ("imm", {"lr": 0.1}),
        ("linear_probe", {"lr": 0.1}),
        ("oracle", {"lr": 0.1}),
        ("stable", {"lr": 0.1 * 0.8, "lr_decay": 0.8, "min_lr": 5e-5}),
    ],
)
def test_a_run_is_one_of_the_loop(tmp_path, method, options):
    config = tiny(methods=(method,), lrs=(0.1,), samples=50, seeds=(3,))
    record, *accuracies = measure(config, tmp_path / "place")
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
    assert not list((tmp_path / "place").rglob("*.pt"))  # its content is in the records


def test_split_tasks_have_outputs_of_their_own(tmp_path):
    config = tiny(streams=("split",), tasks=5, methods=("naive",), lrs=(0.1,), validation=10, task_samples=100)
    record, *_ = measure(config, tmp_path)
    data = load_dataset(config, Place(tmp_path))
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


def test_of_several_candidates_the_best_is_taken(tmp_path):
    config = tiny(methods=("naive",), lrs=(1e-4, 0.1, 1e30), selection_seeds=(9,))
    record, *_ = measure(config, tmp_path)
    scores = {lr: expected(config, "naive", 9, "validation", lr=lr)[0]["acc"] for lr in (1e-4, 0.1)}
    best = max(scores, key=scores.__getitem__)
    assert (record["lr"], record["evaluation"]) == (best, "test")
    assert record["acc"] == expected(config, "naive", 0, lr=best)[0]["acc"]


def test_a_run_continues_after_the_last_finished_task(tmp_path, monkeypatch):
    config = tiny(methods=("er",), lrs=(0.1,), tasks=3)
    whole = measure(config, tmp_path / "whole")
    real, left = ER.loss, [15]  # in the third task

    def interrupt(self, learner, batch):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(self, learner, batch)

    with monkeypatch.context() as stop:
        stop.setattr(ER, "loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure(config, tmp_path / "stopped")
    assert list((tmp_path / "stopped").rglob("*.pt"))
    steps = []
    monkeypatch.setattr(ER, "loss", lambda *given: (steps.append(1), real(*given))[1])
    again = measure(config, tmp_path / "stopped")
    assert len(steps) == 6  # of the third task alone
    for record in (whole[0], again[0]):
        del record["seconds"]
    assert again == whole


def test_a_candidate_that_diverges_late_leaves_nothing(tmp_path):
    config = tiny(methods=("ewc",), ewc_lrs=(0.1,), ewc_strengths=(1e9, 1.0))
    first, *_ = ANALYSIS.trial_specs(config)
    (record,) = ANALYSIS.execute_trial(first.config, Place(tmp_path))
    assert record["validation_acc"] is None
    assert "of task 1" in record["note"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("runs_here", "no_figures")
def test_a_new_method_is_one_entry(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "mine", Method("Mine", "", lambda *_: Naive(), options=("per_class",)))
    line = (
        "--hidden 6 --tasks 2 --epochs 1 --task-samples 96 --validation 60 --test-samples 90 --streams permuted "
        f"--batch-sizes 16 --lrs 0.1 0.01 --methods mine --seeds 0 --jobs 1 --out {tmp_path / 'run'}"
    )
    assert main(["methods", *line.split()]) == 0
    out = capsys.readouterr().out
    assert "Mine" in out
    assert "Only two values were tried for lr" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} > {"selection.json", "accuracy_curves.png"}
    found = [record | {"method": "mine"} for record in records_of_methods() if record["method"] == "naive"]
    run = Results(CPU.model_copy(update={"methods": ("mine",)}), MNIST, {"table": found, "accuracies": []})
    assert {claim.verdict for claim in report(run).claims} == {"not tested"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ()}, "methods needs one or more different values"),
        ({"methods": ("naive", "naive")}, "methods needs one or more different values"),
        ({"methods": ("stabel",)}, r"unknown method 'stabel'; did you mean 'stable'\? \(methods: naive, ewc, agem"),
        ({"streams": ("split",), "tasks": 3}, "the 10 classes of digits cannot be split equally into 3 tasks"),
        ({"streams": ("split",), "tasks": 10, "validation": 40}, "has a single active output with head"),
        ({"lrs": ()}, "lrs needs one or more different values"),
        ({"lrs": (0.1, 0.1)}, "lrs needs one or more different values"),
        ({"selection_seeds": ()}, "selection_seeds needs one or more different values"),
        ({"validation": 0}, "are chosen on held-out samples: set validation, or give"),
        ({"evaluation": "validation", "seeds": (1000,)}, "give seeds and selection_seeds no common value"),
        ({"validation": 1437}, "cannot hold out 1437 of the 1437 training samples"),
        ({"task_samples": 1400}, "cannot train on 1400 of the 1437 training samples of digits, of which 200"),
        ({"test_samples": 361}, "361 test samples requested, but the data set has 360"),
        ({"structure": "diagonal"}, "there is no structure 'diagonal'"),
        ({"quantity": "hessien"}, "there is no quantity 'hessien'"),
        ({"model": "cnn"}, "with cnn set dropouts to 0"),
    ],
)
def test_check(tmp_path, values, message):
    config = MethodsConfig(**values)
    with pytest.raises(CurvlabError, match=message):
        ANALYSIS.check(config, load_dataset(config, Place(tmp_path)))


def test_unused_lists_may_be_empty(tmp_path):
    config = tiny(methods=("naive",), lrs=(0.1,), ewc_strengths=(), decays=(), dropouts=())
    ANALYSIS.check(config, load_dataset(config, Place(tmp_path)))


# What is made of the records.


def records_of_methods(stream="permuted", **changes):
    """Records of three seeds in the paper's order of methods, with the published numbers."""
    rows = table2.published_rows(stream)
    return [
        {"stream": stream, "method": method, "seed": seed, "bytes": 1000, "seconds": 2.0, "learning_accuracy": 0.9}
        | {"samples": 10_000}
        | {"acc": rows[method]["acc"] / 100 + 0.01 * seed, "forgetting": rows[method].get("forgetting")}
        | changes.get(method, {})
        for method in PAPER
        for seed in range(3)
    ]


def judge(found, config=None, data=MNIST):
    stream = found[0]["stream"]
    config = config or (PRESETS["cpu-cifar100"].config if stream == "split" else CPU)
    return table2.claims(found, config, CIFAR if stream == "split" else data)


@pytest.mark.parametrize("stream", ["permuted", "rotated", "split"])
def test_the_published_numbers_are_as_the_claims_say(stream):
    claims = judge(records_of_methods(stream))
    assert len(claims) == 7
    assert {claim.verdict for claim in claims} == {"reproduced"}
    for claim in claims:
        assert claim.ours == pytest.approx(claim.published, abs=1e-9)
        assert claim.scope.startswith("direction, at ")


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
    claims = judge(records_of_methods(stream, **changes))
    assert {n for n, claim in enumerate(claims) if claim.verdict == "not reproduced"} == lost


def test_claims_where_runs_are_missing():
    without = [record for record in records_of_methods() if record["method"] != "ewc"]
    assert [claim.verdict for claim in judge(without)] == [
        *("reproduced", *["not tested"] * 3, "reproduced", "reproduced", "not tested")
    ]
    failed = [record for record in records_of_methods() if (record["method"], record["seed"]) != ("joint", 1)]
    assert [claim.verdict for claim in judge(failed)] == ["not tested", *["reproduced"] * 6]
    assert {claim.verdict for claim in judge(records_of_methods()[::3])} == {"not tested"}  # one seed


def test_the_order_of_a_stream_seed_by_seed():
    ewc = dict(zip(range(3), (0.75, 0.82, 0.30), strict=True))
    found = [
        record | ({"acc": ewc[record["seed"]]} if record["method"] == "ewc" else {}) for record in records_of_methods()
    ]
    rows = table2.compare_in_order([*found, *records_of_methods("rotated")])
    assert [(row["stream"], row["seed"], row["holds"]) for row in rows] == [
        *(("permuted", 0, True), ("permuted", 1, False), ("permuted", 2, False)),
        *(("rotated", seed, True) for seed in range(3)),
    ]
    differences = [[row[key] for key in ("stable-ewc", "ewc-naive", "stable-naive", "smallest")] for row in rows[:3]]
    np.testing.assert_allclose(differences[0], [0.051, 0.306, 0.357, 0.051])
    np.testing.assert_allclose(differences[1], [-0.009, 0.366, 0.357, -0.009])
    np.testing.assert_allclose(differences[2], [0.521, -0.164, 0.357, -0.164])
    gone = [record for record in found if (record["method"], record["seed"]) != ("ewc", 1)]
    assert [row["holds"] for row in table2.compare_in_order(gone)] == [True, None, False]
    assert table2.compare_in_order([record for record in found if record["method"] != "ewc"]) == []


def test_no_batch_is_smaller_and_no_rate_rises():
    rows = [
        {"lr": lr, "batch_size": size, "decay": decay, "dropout": 0.0}
        for lr in (0.1, 0.2, 0.3)
        for size in (1, 10, 64)
        for decay in (0.5, 0.7, 1.0)
    ]
    tuned = list(METHODS["stable"].hyper_parameters)
    ends = {
        (row["lr"], row["batch_size"], row["decay"]): find_boundary_values(SEARCH, row, rows, tuned) for row in rows
    }
    assert ends[0.2, 1, 1.0] == []
    assert ends[0.1, 64, 0.5] == ["lr", "batch_size", "decay"]
    assert ends[0.3, 1, 0.5] == ["lr", "decay"]


@pytest.mark.parametrize(
    ("change", "data", "samples", "reason"),
    [
        ({}, DIGITS, 10_000, "data is digits, published: mnist"),
        ({"tasks": 5}, MNIST, 10_000, "tasks is 5, published: 20"),
        ({}, MNIST, 5000, "training samples per task is 5,000, at least 10,000 is needed"),
        ({"hidden": (100, 100)}, MNIST, 10_000, "network is 784-100-100-10 network"),
        ({"degrees": 40.0}, MNIST, 10_000, "degrees a task is 40, published: 10"),
    ],
)
def test_claims_are_not_tested_on_other_conditions(change, data, samples, reason):
    found = [record | {"samples": samples} for record in records_of_methods("rotated")]
    claims = judge(found, CPU.model_copy(update=change), data)
    assert {claim.verdict for claim in claims} == {"not tested"}
    assert all(reason in claim.reason for claim in claims)


def test_deviations_are_those_of_the_configuration():
    whole = Subject("mnist", (1, 28, 28), 10, 60_000, 10_000)
    paper = PRESETS["paper"].config.model_copy(update={"methods": ("naive", "stable"), "batch_sizes": (10,)})
    lines = table2.deviations(paper, whole, dict.fromkeys(paper.streams, 60_000))
    assert [line.partition(":")[0] for line in lines] == ["All methods"]
    lines = table2.deviations(CPU, MNIST, dict.fromkeys(CPU.streams, 10_000))
    assert lines[0] == (
        "permuted, rotated: training samples per task 10,000 (60,000); test samples 2,000 (10,000); batch size 32 or "
        "64 (10); seeds 3 (5)."
    )
    assert lines[1].startswith("EWC: empirical_fisher, diag, on 1,000 random samples")
    split, *_ = table2.deviations(PRESETS["cpu-cifar100"].config, CIFAR, {"split": 200})
    for text in ("passes 3 (1)", "resnet20_cifar10-12fca82f.th, BatchNorm frozen (narrow ResNet-18", "SGD 0 (0.1)"):
        assert text in split
    assert table2.deviations(MethodsConfig(), DIGITS, dict.fromkeys(CPU.streams, 1237)) == []


def test_summary_beside_the_published_numbers():
    table = summarise(records_of_methods())
    assert [row["label"] for row in table] == [
        *("Naive SGD", "EWC", "A-GEM", "ER-Reservoir", "Stable SGD", "multi-task (joint)")
    ]
    assert table[0]["acc"] == pytest.approx(0.454)
    assert table[0]["acc_std"] == pytest.approx(0.01)
    assert table[5]["forgetting"] is None
    slow = [record | {"seconds": 100.0 if record["seed"] == 1 else 2.0} for record in records_of_methods()]
    assert {row["seconds"] for row in summarise(slow)} == {2.0}
    beside = table2.add_published(table, CPU, MNIST)
    assert beside[4]["published_acc"] == pytest.approx(0.801)
    assert beside[4]["published_acc_std"] == pytest.approx(0.0051)
    assert beside[4]["published_forgetting"] == 0.09
    assert "published_forgetting" not in beside[5]
    for data, tasks in ((DIGITS, 20), (MNIST, 5), (CIFAR, 20)):
        config = CPU.model_copy(update={"tasks": tasks})
        assert not any("published_acc" in row for row in table2.add_published(table, config, data))


def test_report():
    def make(config, data):
        return report(Results(config, data, {"table": records_of_methods(), "accuracies": []}))

    found = make(CPU, MNIST)
    assert [len(table.records) for table in found.tables] == [6, 6, 3]
    printed = [(row["printed_acc"], row["printed_forgetting"]) for row in found.tables[1].records]
    assert printed[0] == ("0.444 ± 0.025", "0.53 ± 0.03")  # no digits that were not printed
    assert printed[-1] == ("0.865 ± 0.002", None)
    assert not any("published" in column.key for column in found.summary.columns)
    assert len(found.claims) == 7
    assert len(found.deviations) == 3
    assert any("seed 1000" in note for note in found.notes)
    digits = make(PRESETS["default"].config, DIGITS)
    assert [len(table.records) for table in digits.tables] == [6, 3]
    assert digits.deviations == []
    assert {claim.verdict for claim in digits.claims} == {"not tested"}


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
    found = {"table": records_of_methods(), "accuracies": accuracies}
    drawn = {name: draw() for name, draw in report(Results(CPU, MNIST, found)).figures.items()}
    table = summarise(records_of_methods())
    curves, dots = drawn["accuracy_curves"], drawn["accuracy_and_forgetting"]
    mean, first = ([line for line in curves.axes[n].lines if line.get_linewidth() > 1] for n in (0, 2))
    assert len(curves.axes[0].lines) == 2 * (1 + 3)  # the mean and each seed
    np.testing.assert_allclose(mean[0].get_xydata(), [[1, 0.91], [2, 0.86], [3, 0.81]])
    np.testing.assert_allclose(first[0].get_xydata(), [[1, 0.91], [2, 0.81], [3, 0.71]])
    np.testing.assert_allclose(mean[1].get_xydata(), [[1, 0.81], [3, 0.81]])
    labels = [text.get_text() for text in curves.legends[0].get_texts()]
    assert labels == ["Naive SGD", "multi-task (joint)", "one of 3 seeds (thick: mean)"]
    accuracy, forgetting = dots.axes[:2]
    ours = [container.lines[0].get_ydata()[0] for container in accuracy.containers]
    np.testing.assert_allclose(ours, [row["acc"] for row in table])
    diamonds = [line.get_ydata()[0] for line in accuracy.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(diamonds, [row["acc"] / 100 for row in table2.published_rows("permuted").values()])
    assert len(forgetting.containers) == 5  # joint training has no forgetting
    labels = [text.get_text() for text in dots.legends[0].get_texts()]
    assert labels == ["mean and standard deviation of 3 seeds", "published mean"]
