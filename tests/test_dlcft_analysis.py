"""The analysis ``dlcft``: its cells, its choice, its claims, and its run."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvlab.analyze.__main__ import main
from curvlab.analyze.dlcft import dlcft as analysis
from curvlab.analyze.dlcft.claims import beside_published, claims, published
from curvlab.analyze.dlcft.deviations import deviations
from curvlab.analyze.dlcft.dlcft import PRESETS, DlcftConfig, at_an_end, choose, figures, summarise
from curvlab.analyze.dlcft.methods import METHODS, SETTINGS, network, steps, stream
from curvlab.analyze.dlcft.network import data, pretrained
from curvlab.data import load
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.linearize import Linearized

pytestmark = pytest.mark.usefixtures("one_server", "cells_here", "no_figures")

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


SINGLE: dict[str, Any] = {
    "nonlinear_lrs": (3e-3,),
    "linear_lrs": (1e-2,),
    "lwf_strengths": (1.0,),
    "ewc_strengths": (1.0,),
    "mas_strengths": (0.1,),
    "osla_strengths": (1.0,),
    "der_alphas": (0.1,),
    "dlcft_strengths": (1.0,),
}


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
        **SINGLE | options,
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
    config = tiny(settings=(setting,), seeds=(1,))
    records = analysis.cell(config, Place(tmp_path))
    runs = [record for record in records if "acc" in record]
    assert [record["method"] for record in runs] == list(dict.fromkeys([n for n in config.methods if n in names]))
    assert all(0 <= record["acc"] <= 1 for record in runs)
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
    config = DlcftConfig(settings=("data", "data_long"), methods=("lwf", "fine_tuning"))
    config = config.model_copy(update={"nonlinear_lrs": (3e-3,), "lwf_strengths": (1.0, 10.0)})

    def tried(setting, strength, *of_seeds):
        keys = {"setting": setting, "method": "lwf", "lr": 3e-3, "strength": strength, "note": ""}
        return [{**keys, "seed": 1000 + i, "acc": acc} for i, acc in enumerate(of_seeds)]

    records = [*tried("data", 1.0, 0.8, 0.4), *tried("data", 10.0, 0.7, 0.7), *tried("class", 1.0, 0.9)]
    best = {"nonlinear_lrs": 3e-3, "lwf_strengths": 10.0}
    found = choose(config, records)
    assert found["data", "lwf"] == found["data_long", "lwf"] == best  # the long stream has what is best in the short
    assert found["data", "fine_tuning"] == {"nonlinear_lrs": 3e-3}
    records[2]["acc"] = None  # one of two seeds has diverged
    assert choose(config, records)["data", "lwf"]["lwf_strengths"] == 1.0
    for record in records:
        record["acc"] = None
    with pytest.raises(CurvlabError, match="any of its 2 candidates: lower nonlinear_lrs or lwf_strengths"):
        choose(config, records)


def test_a_candidate_that_diverges_is_recorded_and_a_run_of_the_table_fails(tmp_path):
    config = tiny(settings=("task",), methods=("ewc",), seeds=(0,), nonlinear_optimizer="sgd")
    config = config.model_copy(update={"ewc_strengths": (1e30,)})
    (record,) = analysis.cell(config.model_copy(update={"evaluation": "validation"}), Place(tmp_path))
    assert record["acc"] is None
    assert "finite" in record["note"] or "inf" in record["note"] or "nan" in record["note"]
    with pytest.raises(CurvlabError, match=r"finite|inf|nan"):
        analysis.cell(config, Place(tmp_path))


def test_a_cell_with_several_candidates_chooses_as_the_analysis_does(tmp_path):
    config = tiny(settings=("task",), methods=("fine_tuning",), seeds=(0,))
    config = config.model_copy(update={"nonlinear_lrs": (1e-9, 0.03), "steps": 20})
    found = analysis.cell(config, Place(tmp_path))
    assert {record["lr"] for record in found} == {0.03}
    single = config.model_copy(update={"nonlinear_lrs": (0.03,)})
    assert _without_seconds(analysis.cell(single, Place(tmp_path))) == _without_seconds(found)
    assert not list(tmp_path.iterdir())


def test_compared_arms_have_equally_many_candidates_in_all_presets():
    for preset in PRESETS.values():
        counts = {name: len(METHODS[name].points(preset)) for name in preset.methods}
        assert len({counts[name] for name in preset.methods if METHODS[name].strengths}) == 1
        assert len({counts[name] for name in preset.methods if not METHODS[name].strengths}) == 1
        assert min(counts.values()) >= 2


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


def verdicts(images: int = 10_000, **accuracies: float) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in claims(made(**accuracies), images)}


def test_claims_on_data_il():
    values = {"data__ewc": 0.8, "data__dlcft_diag": 0.82, "data__osla": 0.85, "data__dlcft_kfac": 0.84}
    found = verdicts(**values, data__joint=0.7, data__joint_linear=0.846)
    assert list(found.values()) == ["reproduced", "not reproduced", "not tested", "reproduced"]
    found = verdicts(**values, data__joint=0.7, data__joint_linear=0.844)
    assert list(found.values())[-1] == "not reproduced"
    assert "the best of 4 on average" in list(found)[-1]
    found = verdicts(100, **values, data__joint=0.7, data__joint_linear=0.844)
    assert "half a point is less than one of 100 test images" in list(found)[-1]
    assert list(found.values())[-1] == "not tested"
    (first, *_) = claims(made(**values), 1000)
    assert first.published == pytest.approx(0.8217 - 0.7888)
    assert first.ours == pytest.approx(0.02)


def test_claims_on_task_il_are_judged_only_where_something_is_forgotten():
    values = {"task__osla": 0.85, "task__dlcft_tkfac": 0.9, "task__dlcft_tkfac__bwt": -0.01, "task__lwf__bwt": -0.05}
    found = verdicts(**values, task__ewc=0.8, task__ewc__bwt=-0.02)
    assert list(found.values()) == ["reproduced", "reproduced", "not reproduced", "not reproduced"]
    found = verdicts(**values, task__ewc=0.98, task__ewc__bwt=-0.2)
    assert set(found.values()) == {"not tested"}
    assert all("nothing to judge" in text for text in found)
    found = verdicts(**values)  # without EWC it is not known whether there is something to judge
    assert set(found.values()) == {"not tested"}
    assert all("no value of EWC" in text for text in found)


def test_claims_are_not_judged_where_nothing_can_be_told_apart():
    found = verdicts(50, data__dlcft_kfac=0.85, data__osla=0.84)
    (text,) = [text for text in found if "K-FAC" in text and "less than one of 50 test images" in text]
    assert found[text] == "not tested"
    assert verdicts(110, data__dlcft_kfac=0.85, data__osla=0.84)[text.partition(" (they")[0]] == "reproduced"
    found = verdicts(data__dlcft_kfac=0.99, data__osla=0.975, class__der=0.98, class__dlcft_tkfac=0.975)
    saturated = {text: verdict for text, verdict in found.items() if "both are above 0.97" in text}
    assert len(saturated) == 2
    assert set(saturated.values()) == {"not tested"}


def test_claims_on_class_il():
    found = verdicts(
        class__dlcft_tkfac=0.6,
        class__dlcft_no_regularization=0.56,
        class__dlcft_no_replay=0.5,
        class__dlcft_neither=0.4,
        class__dlcft_kfac=0.6,
        class__dlcft_kfac_no_regularization=0.49,
        class__osla=0.5,
        class__osla_tkfac=0.65,
        class__der=0.61,
    )
    yes, no = "reproduced", "not reproduced"
    assert list(found.values()) == [no, yes, yes, no, no, no, yes]
    like = [verdict for text, verdict in found.items() if "no classifier regularised" in text]
    assert like == [no, no]


def test_published_numbers_stand_beside_ours():
    table = summarise(made(data__osla=0.8, class__dlcft_no_replay=0.5))
    osla, other = beside_published(table)
    assert osla["published_acc"] == pytest.approx(0.7923)
    assert osla["published_read"] is None
    (task,) = beside_published(summarise(made(task__dlcft_tkfac=0.9)))
    assert task["published_read"] == "our reading"  # it is printed as "DLCFT (Ours)"
    assert other.get("published_acc") is None
    rows = published()["rows"]
    assert set(rows) == {*SETTINGS, "mit67"}
    assert all(set(row) <= set(METHODS) for row in rows.values())
    # The poster's ablation is Table 5, and Table 6 has the better of the two curvatures.
    assert rows["data"]["dlcft_tkfac"]["acc"] == 82.70
    assert rows["class"]["dlcft_tkfac"]["acc"] == 59.98


def test_seconds_are_the_median():
    found = made(data__osla=0.8)
    for record, seconds in zip(found, (1.0, 50.0, 2.0), strict=True):
        record["seconds"] = seconds
    assert summarise(found)[0]["seconds"] == 2.0


def test_deviations_are_those_of_the_configuration(tmp_path):
    config = tiny(settings=("data",), methods=("osla", "dlcft_kfac"))
    _, target = data(config, Place(tmp_path))
    differing, objective, _, given, _ = deviations(config, target)
    assert "classes 6 (100); training samples of a stream 180 (50,000); test samples 60 (10,000)" in differing
    assert "tasks" not in differing  # ten, as published
    assert "optimizer of the linear network" not in differing
    assert "learning rate of the linear network 0.01 (0.0001)" in differing
    assert "DLCFT" in objective
    assert (
        given
        == "Given, and not chosen from several values: nonlinear_lrs, osla_strengths, linear_lrs, dlcft_strengths."
    )
    default = deviations(DlcftConfig(methods=("dlcft_kfac",)), target)
    assert "learning rate of the linear network 0.01 or 0.03 (0.0001)" in default[0]
    assert not any("not chosen" in line or "OSLA" in line for line in default)


def test_values_at_an_end_of_their_list_are_told():
    config = DlcftConfig(nonlinear_lrs=(1e-3, 3e-3, 1e-2), ewc_strengths=(1.0, 10.0))
    assert at_an_end(config, "ewc", {"nonlinear_lrs": 1e-2, "ewc_strengths": 1.0}) == ["nonlinear_lrs"]
    assert at_an_end(config, "ewc", {"nonlinear_lrs": 3e-3, "ewc_strengths": 1.0}) == []


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
    (legend,) = drawn["accuracy_curves"].legends
    assert legend.get_texts()[-1].get_text() == "from the lowest to the highest seed"


# The run --------------------------------------------------------------------------------------------------------------


def test_the_run_directory_has_everything_and_is_printed_again(call, tmp_path, with_figures):
    line = f"{TINY} --settings task --methods osla dlcft_kfac --seeds 0 1 --osla-strengths 1 --nonlinear-lrs 1e-3 "
    line += "--linear-lrs 1e-2 --jobs 2 --out run"
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
    assert "runs with seed 1000; the table's have 0, 1" in out
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


def test_a_run_that_diverges_fails_and_is_named_below_the_tables(call, tmp_path):
    line = f"{TINY} --settings task --methods fine_tuning ewc --ewc-strengths 1e30 --nonlinear-lrs 0.01 --seeds 0 "
    code, out, error = call(line + "--nonlinear-optimizer sgd --jobs 1 --out run")
    assert code == 1
    assert "Failed, and in no number above" in out
    assert "Given, and not chosen from several values: nonlinear_lrs, ewc_strengths" in out
    assert "chosen on" not in out
    assert "1 of 2 cells has failed" in error
    assert [r["method"] for r in json.loads((tmp_path / "run" / "table.json").read_text())] == ["fine_tuning"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods er --settings data", "none of the methods er is run in data"),
        ("--source-classes", "give weights, or source_classes"),
        ("--class-tasks 4", "cannot be split equally"),
        ("--settings task --class-tasks 6", "has a single output to choose from with head 'masked'"),
        ("--validation 2", "hold out"),
        ("--stream-samples 100000", "stream_samples is 100,000"),
        ("--seeds 1 1", "seeds"),
        ("--dlcft-strengths 1 1", "dlcft_strengths"),
        ("--source-classes --weights nowhere.pt", "no such file"),
        ("--source-classes 0 4", "pre-trained on class 4"),
        ("--classes all", "pre-trained on class 0"),
        ("--evaluation validation --seeds 0 1000", "no value in common"),
        ("--selection-seeds 7 7", "selection_seeds"),
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
