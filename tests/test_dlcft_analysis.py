"""The analysis ``dlcft``: its cells, its choice, its claims, and its run."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvlab.analyze import dlcft as analysis
from curvlab.analyze.__main__ import main
from curvlab.analyze.dlcft import PRESETS, DlcftConfig, choose, figures, summarise
from curvlab.analyze.dlcft_claims import beside_published, claims, published
from curvlab.analyze.dlcft_methods import METHODS, SETTINGS, network, steps, stream
from curvlab.analyze.dlcft_network import data, pretrained
from curvlab.data import load
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.linearize import Linearized

pytestmark = pytest.mark.usefixtures("one_server")

TINY = (
    "--hidden 8 --source-steps 5 --steps 2 --long-steps 1 --long-tasks 12 --stream-samples 300 --test-samples 60 "
    "--buffer-size 10"
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(analysis.__file__).parents[2]))


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(["dlcft", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return call


def tiny(**options: Any) -> DlcftConfig:
    return DlcftConfig(
        hidden=(8,),
        source_steps=5,
        steps=2,
        long_steps=1,
        long_tasks=12,
        stream_samples=300,
        test_samples=60,
        buffer_size=10,
        **options,
    )


# Networks, streams, methods -------------------------------------------------------------------------------------------


def test_the_network_keeps_what_it_was_pre_trained_to_be_but_for_its_last_layer(tmp_path):
    config = tiny()
    source, target = data(config, Place(tmp_path))
    assert source is not None
    assert sorted(source.y_train.unique().tolist()) == [0, 1, 2, 3]
    assert sorted(target.y_train.unique().tolist()) == [0, 1, 2, 3, 4, 5]
    assert target.classes == ("4", "5", "6", "7", "8", "9")
    whole = load("digits")
    row = target.x_train[0]
    (place,) = [i for i, x in enumerate(whole.x_train) if torch.equal(x, row)]
    assert whole.y_train[place] == target.y_train[0] + 4
    model, start = (pretrained(config, source, target, 0, trained=trained) for trained in (True, False))
    assert isinstance(model.get_submodule("relu1"), nn.LeakyReLU)
    assert torch.equal(model.fc2.weight, start.fc2.weight)
    assert not torch.equal(model.fc1.weight, start.fc1.weight)
    assert model.training


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_method_of_a_setting_learns_its_stream(setting, tmp_path):
    names = [name for name, method in METHODS.items() if setting in method.settings]
    config = tiny(settings=(setting,), seeds=(1,), lwf_strengths=(1.0,), ewc_strengths=(1.0,), mas_strengths=(0.1,))
    config = config.model_copy(update={"osla_strengths": (1.0,), "der_alphas": (0.1,), "dlcft_strengths": (1.0,)})
    records = analysis.cell(config, Place(tmp_path))
    runs = [record for record in records if "acc" in record]
    assert [record["method"] for record in runs] == list(dict.fromkeys([n for n in config.methods if n in names]))
    assert all(0 <= record["acc"] <= 1 and 0 <= record["validation_acc"] <= 1 for record in runs)
    for record in runs:
        after = [r["after"] for r in records if "after" in r and r["method"] == record["method"]]
        tasks = {"data": 10, "data_long": 12}.get(setting, 3)
        assert after == ([tasks] if record["method"].startswith("joint") else list(range(1, tasks + 1)))
        last = [r["accuracy"] for r in records if r.get("after") == tasks and r["method"] == record["method"]]
        assert last == [pytest.approx(record["acc"])]
    again = analysis.cell(config.model_copy(update={"methods": (names[-1],)}), Place(tmp_path))
    assert _without_seconds(again) == _without_seconds([r for r in records if r["method"] == names[-1]])
    assert not list(tmp_path.iterdir())  # no checkpoint stays


def _without_seconds(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_linear_methods_have_a_linear_network_and_their_structure(tmp_path):
    config = tiny()
    source, target = data(config, Place(tmp_path))
    model = pretrained(config, source, target, 0, trained=False)
    for name, method in METHODS.items():
        assert isinstance(network(method, model), Linearized) == ("dlcft" in name or "linear" in name)
    assert METHODS["dlcft_neither"].make(config, "class", 1.0).buffer_size is None
    assert METHODS["dlcft_no_replay"].make(config, "class", 1.0).classifier_regularization
    assert METHODS["dlcft_tkfac"].make(config, "class", 1.0).buffer_size == 10
    assert METHODS["dlcft_tkfac"].make(config, "task", 1.0).buffer_size is None
    assert not METHODS["osla"].make(config, "class", 1.0).classifier_regularization
    structures = {
        name: METHODS[name].make(config, "data", 2.0).curvature["structure"]
        for name in ("ewc", "osla", "osla_tkfac", "dlcft_diag", "dlcft_kfac", "dlcft_tkfac")
    }
    tkfac = "tkfac:variant=rescaled"
    assert list(structures.values()) == ["diag", "kfac", tkfac, "diag", "kfac", tkfac]
    assert METHODS["osla"].make(config, "data", 2.0).strength == 2.0
    assert METHODS["der"].head("class") == "single" != METHODS["er"].head("class")


def test_joint_training_has_all_steps_at_the_end(tmp_path):
    config = tiny()
    assert steps(config, "ewc", "class") == [4, 2, 2]
    assert steps(config, "joint", "class") == [4, 2, 8]
    _, target = data(config, Place(tmp_path))
    assert [t.classes for t in stream(config, target, "class", 1)] == [(0, 1), (2, 3), (4, 5)]
    first, second = (stream(config, target, "task", seed) for seed in (0, 1))
    assert [t.classes for t in first] != [t.classes for t in second]
    assert all(task.sizes["validation"] == 40 for task in first)


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def test_the_best_on_held_out_samples_is_chosen():
    config = DlcftConfig(settings=("data", "data_long"), methods=("lwf", "fine_tuning"), lwf_strengths=(1.0, 10.0))
    tried = [
        {"setting": "data", "method": "lwf", "lr": 3e-3, "strength": 1.0, "validation_acc": 0.5},
        {"setting": "data", "method": "lwf", "lr": 3e-3, "strength": 10.0, "validation_acc": 0.7},
        {"setting": "class", "method": "lwf", "lr": 3e-3, "strength": 1.0, "validation_acc": 0.9},
    ]
    best = {"nonlinear_lrs": 3e-3, "lwf_strengths": 10.0}
    found = choose(config, tried)
    assert found["data", "lwf"] == found["data_long", "lwf"] == best  # the long stream has what is best in the short
    assert found["data", "fine_tuning"] == {"nonlinear_lrs": 3e-3}
    for record in tried:
        record["validation_acc"] = None
    with pytest.raises(CurvlabError, match="lower nonlinear_lrs or lwf_strengths"):
        choose(config, tried)


def test_a_run_that_diverges_is_recorded_as_such(tmp_path):
    config = tiny(settings=("task",), methods=("ewc",), seeds=(0,), ewc_strengths=(1e30,), nonlinear_optimizer="sgd")
    (record,) = analysis.cell(config, Place(tmp_path))
    assert record["acc"] is None
    assert "finite" in record["note"] or "inf" in record["note"] or "nan" in record["note"]


# Tables and claims ----------------------------------------------------------------------------------------------------


def made(**accuracies: float) -> list[dict[str, Any]]:
    """Return records of three seeds, ``SETTING__METHOD=accuracy``; with ``__bwt`` the backward transfer."""
    records: dict[tuple[str, str, int], dict[str, Any]] = {}
    for key, value in accuracies.items():
        setting, method, *of = key.split("__")
        for seed in range(3):
            names = {"setting": setting, "method": method, "seed": seed, "lr": 1e-3, "strength": 1.0}
            empty = {"acc": None, "bwt": None, "bytes": 10, "seconds": 1.0}
            record = records.setdefault((setting, method, seed), names | empty)
            record[of[0] if of else "acc"] = value + 0.001 * seed
    return list(records.values())


def verdicts(**accuracies: float) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in claims(made(**accuracies))}


def test_claims_on_data_il():
    values = {"data__ewc": 0.8, "data__dlcft_diag": 0.82, "data__osla": 0.85, "data__dlcft_kfac": 0.84}
    found = verdicts(**values, data__joint=0.7, data__joint_linear=0.846)
    assert list(found.values()) == ["reproduced", "not reproduced", "not tested", "reproduced"]
    found = verdicts(**values, data__joint=0.7, data__joint_linear=0.844)
    assert list(found.values())[-1] == "not reproduced"
    (first, *_) = claims(made(**values))
    assert first.published == pytest.approx(0.8217 - 0.7888)
    assert first.ours == pytest.approx(0.02)


def test_claims_on_task_il_are_judged_only_where_something_is_forgotten():
    values = {"task__osla": 0.85, "task__dlcft_tkfac": 0.9, "task__dlcft_tkfac__bwt": -0.01, "task__lwf__bwt": -0.05}
    found = verdicts(**values, task__ewc=0.8, task__ewc__bwt=-0.02)
    assert list(found.values()) == ["reproduced", "reproduced", "not reproduced", "not reproduced"]
    found = verdicts(**values, task__ewc=0.98, task__ewc__bwt=-0.2)
    assert set(found.values()) == {"not tested"}
    assert all("nothing to judge" in text for text in found)


def test_claims_on_class_il():
    found = verdicts(
        class__dlcft_tkfac=0.6,
        class__dlcft_no_regularization=0.56,
        class__dlcft_no_replay=0.5,
        class__dlcft_neither=0.4,
        class__dlcft_kfac=0.6,
        class__osla=0.5,
        class__osla_tkfac=0.65,
        class__der=0.61,
    )
    assert list(found.values()) == ["not reproduced", "reproduced", "reproduced", "not reproduced", "reproduced"]


def test_published_numbers_stand_beside_ours():
    table = summarise(made(data__osla=0.8, class__dlcft_no_replay=0.5))
    osla, other = beside_published(table)
    assert osla["published_acc"] == pytest.approx(0.7923)
    assert osla["published_read"] is None
    assert other.get("published_acc") is None
    rows = published()["rows"]
    assert set(rows) == {*SETTINGS, "mit67"}
    assert all(set(row) <= set(METHODS) for row in rows.values())
    # The poster's ablation is Table 5, and Table 6 has the better of the two curvatures.
    assert rows["data"]["dlcft_tkfac"]["acc"] == 82.70
    assert rows["class"]["dlcft_tkfac"]["acc"] == 59.98


def test_figures_show_every_setting():
    found = made(data__osla=0.8, data__dlcft_kfac=0.9, task__joint=0.95)
    curves = [
        {**{key: r[key] for key in ("setting", "method", "seed")}, "after": after, "accuracy": r["acc"] - 0.1 / after}
        for r in found
        for after in ((1, 2, 3) if r["method"] != "joint" else (3,))
    ]
    drawn = figures(summarise(found), curves, "title")
    assert [axes.get_title() for axes in drawn["accuracies"].axes] == ["data-IL", "task-IL"]
    assert [axes.get_title() for axes in drawn["accuracy_curves"].axes] == ["data-IL", "task-IL"]
    lines = drawn["accuracy_curves"].axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["--", "-"]
    assert lines[1].get_ydata()[0] == pytest.approx(0.801)


# The run --------------------------------------------------------------------------------------------------------------


def test_the_run_directory_has_everything_and_is_printed_again(call, tmp_path):
    line = f"{TINY} --settings task --methods osla dlcft_kfac --seeds 0 1 --osla-strengths 1 --jobs 2 --out run"
    code, out, error = call(line)
    assert (code, error) == (0, "")
    assert "task-IL, 3 tasks" in out
    assert "Claims" in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {"table.json", "table.csv", "table.md", "table.tex", "selection.json", "curves.json", "claims.json"}
    assert wanted | {"provenance.json", "accuracies.png", "accuracy_curves.pdf", "config.yaml"} <= names
    found = json.loads((tmp_path / "run" / "table.json").read_text())
    assert [(r["method"], r["seed"]) for r in found] == [(m, s) for m in ("osla", "dlcft_kfac") for s in (0, 1)]
    tried = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert [(r["method"], r["strength"]) for r in tried] == [
        ("osla", 1.0),
        ("dlcft_kfac", 1.0),
        ("dlcft_kfac", 10.0),
    ]
    of_method = [record for record in tried if record["method"] == "dlcft_kfac"]
    best = max(of_method, key=lambda record: record["validation_acc"])
    assert [record["strength"] for record in of_method if record["chosen"]] == [best["strength"]]
    assert {record["strength"] for record in found if record["method"] == "dlcft_kfac"} == {best["strength"]}
    before = (tmp_path / "run" / "provenance.json").read_bytes()
    assert call(line) == (0, out, "")
    assert (tmp_path / "run" / "provenance.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods er --settings data", "none of the methods er is run in data"),
        ("--source-classes", "give weights, or source_classes"),
        ("--class-tasks 4", "cannot be split equally"),
        ("--validation 2", "hold out"),
        ("--stream-samples 100000", "stream_samples is 100,000"),
        ("--seeds 1 1", "seeds"),
        ("--dlcft-strengths 1 1", "dlcft_strengths"),
        ("--source-classes --weights nowhere.pt", "no such file"),
        ("--settings classes", "settings"),
        ("--device gpu", "device"),
        ("--normalize imagenet", "three channels"),
    ],
)
def test_bad_options_are_one_sentence_and_nothing_is_written(call, tmp_path, options, message):
    code, out, error = call(f"{TINY} {options} --out run")
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_presets_can_be_read_back(call):
    for name, preset in PRESETS.items():
        code, out, _ = call(f"--preset {name} --print-config")
        assert code == 0
        assert out == preset.to_yaml()
