"""The analysis ``dlcft``: its runs, its search for hyper-parameters, its claims, and its report."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from curvlab.analyze.dlcft import dlcft as analysis
from curvlab.analyze.dlcft.claims import list_claims
from curvlab.analyze.dlcft.conditions import has_scale, list_conditions, list_deviations, published_tables
from curvlab.analyze.dlcft.dlcft import ANALYSIS, SEARCH, add_published, report, summarise
from curvlab.analyze.dlcft.methods import METHODS, SETTINGS, adapt, list_steps, split
from curvlab.analyze.dlcft.network import load_data, pretrain
from curvlab.analyze.dlcft.options import LISTS, PRESETS, DlcftConfig
from curvlab.analyze.dlcft.table5 import make_table5
from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.published import read_published
from curvlab.analyze.frame.search import choose, run_trial
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.values import where
from curvlab.continual import run as learn
from curvlab.continual.metrics import acc
from curvlab.continual.strategies import Joint, LinearProbe, Oracle
from curvlab.data import load
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.linearize import Linearized
from curvlab.models import build
from curvlab.training import Training

SINGLE: dict[str, Any] = {
    "nonlinear_lrs": (3e-3,),
    "linear_lrs": (1e-2,),
    "lwf_strengths": (1.0,),
    "ewc_strengths": (1.0,),
    "mas_strengths": (0.1,),
    "osla_strengths": (1.0,),
    "der_alphas": (0.1,),
    "dlcft_strengths": (1.0,),
    "si_strengths": (0.1,),
}
DIGITS = Subject("digits", (1, 8, 8), 6, 300, 60)
MNIST = Subject("mnist", (1, 28, 28), 6, 2400, 3000)


def tiny(**options: Any) -> DlcftConfig:
    small: dict[str, Any] = {
        "hidden": (8,),
        "source_steps": 5,
        "steps": 2,
        "long_steps": 1,
        "long_tasks": 12,
        "stream_samples": 300,
        "test_samples": 60,
        "buffer_size": 10,
        "seeds": (0,),
    }
    return DlcftConfig(**small | SINGLE | options)


def run(config: DlcftConfig, folder: Path) -> list[dict[str, Any]]:
    return list(ANALYSIS.execute(config.model_dump(mode="json"), Place(folder)))


# Networks, streams, methods -------------------------------------------------------------------------------------------


def test_the_network_keeps_what_it_was_pre_trained_to_be_but_for_its_last_layer(tmp_path):
    config = tiny()
    data = load_data(config, Place(tmp_path))
    assert data.source is not None
    assert sorted(data.source.y_train.unique().tolist()) == [0, 1, 2, 3]
    assert sorted(data.y_train.unique().tolist()) == [0, 1, 2, 3, 4, 5]
    assert data.classes == ("4", "5", "6", "7", "8", "9")
    whole = load("digits")
    row = data.x_train[0]
    (place,) = [i for i, x in enumerate(whole.x_train) if torch.equal(x, row)]
    assert whole.y_train[place] == data.y_train[0] + 4
    model, start = (pretrain(config, data, 0, steps=steps) for steps in (None, 0))
    assert isinstance(model.get_submodule("relu1"), nn.LeakyReLU)
    assert torch.equal(model.fc2.weight, start.fc2.weight)
    assert not torch.equal(model.fc1.weight, start.fc1.weight)
    assert model.training


def test_a_smaller_stream_is_a_part_of_a_larger_one(tmp_path):
    small, large = (load_data(tiny(stream_samples=count), Place(tmp_path)) for count in (50, 300))
    assert torch.equal(small.x_train, large.x_train[:50])


def test_weights_from_a_file_take_the_place_of_the_pre_training(tmp_path):
    config = tiny()
    data = load_data(config, Place(tmp_path))
    model = pretrain(config, data, 0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = tiny(weights=Path("weights.pt"), source_classes=(), classes=(4, 5, 6, 7), class_tasks=2)
    values = other.model_dump(mode="json")
    (record, *_) = ANALYSIS.execute({**values, "settings": ["task"], "methods": ["ewc"]}, Place(tmp_path, tmp_path))
    assert 0 <= record["acc"] <= 1
    found = tiny(weights=tmp_path / "weights.pt", source_classes=(), classes=(4, 5, 6, 7), class_tasks=2)
    again = pretrain(found, load_data(found, Place(tmp_path)), 1)
    assert torch.equal(again.fc1.weight, model.fc1.weight)
    assert again.fc2.weight.shape[0] == 4


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_method_of_a_setting_learns_its_stream(setting, tmp_path):
    names = [name for name, method in METHODS.items() if setting in method.settings]
    config = tiny(settings=(setting,), seeds=(1,), methods=tuple(METHODS))
    records = run(config, tmp_path)
    runs = [record for record in records if "acc" in record]
    assert [record["method"] for record in runs] == [name for name in config.methods if name in names]
    assert all(0 <= record["acc"] <= 1 for record in runs)
    tasks = {"data": 10, "data_long": 12}.get(setting, 3)
    for record in runs:
        curve = [r for r in records if "after" in r and r["method"] == record["method"]]
        joint = record["method"].startswith("joint")
        assert [r["after"] for r in curve] == ([tasks] if joint else list(range(1, tasks + 1)))
        assert curve[-1]["accuracy"] == pytest.approx(record["acc"])
    again = run(config.model_copy(update={"methods": (names[-1],)}), tmp_path)
    assert _drop_seconds(again) == _drop_seconds([r for r in records if r["method"] == names[-1]])
    assert not list(tmp_path.rglob("*.pt"))


def _drop_seconds(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_linear_methods_have_a_linear_network_and_their_structure(tmp_path):
    config = tiny()
    data = load_data(config, Place(tmp_path))
    model = pretrain(config, data, 0, steps=0)
    for name, method in METHODS.items():
        assert isinstance(adapt(model, method), Linearized) == (name.startswith("dlcft") or name == "joint_linear")
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


def test_strategies_of_methods_that_the_publications_do_not_have():
    config = tiny(samples=7)
    assert METHODS["si"].make(config, "data", 0.3).strength == 0.3
    imm = METHODS["imm"].make(config, "data", 0.0)
    assert (imm.mode, imm.curvature["samples"]) == ("mode", 7)
    assert isinstance(METHODS["oracle"].make(config, "data", 0.0), Oracle)
    assert isinstance(METHODS["linear_probe"].make(config, "data", 0.0), LinearProbe)
    for preset in PRESETS.values():
        assert not {"si", "imm", "linear_probe", "oracle"} & {*preset.config.methods}


def test_parts_of_the_data_are_random_or_have_few_classes(tmp_path):
    data = load_data(tiny(), Place(tmp_path))
    shares = {}
    for parts in ("random", "skewed"):
        stream = split(tiny(data_parts=parts, validation=0), data, "data", 3)
        largest = [float(task.train[1].bincount(minlength=6).sort().values[-2:].sum()) for task in stream]
        shares[parts] = sum(largest) / sum(task.sizes["train"] for task in stream)
    assert shares["skewed"] > 0.9 > 0.7 > shares["random"]
    assert all(preset.config.data_parts == "random" for name, preset in PRESETS.items() if name != "default")


def test_joint_training_is_repeated_with_half_of_its_steps_in_runs_of_the_table(tmp_path):
    config = tiny(settings=("data",), data_tasks=3, methods=("joint", "fine_tuning"), steps=5)
    joint, tuned = (record for record in run(config, tmp_path) if "acc" in record)
    half = config.model_copy(update={"methods": ("joint",), "steps": 2})
    # A whole run of 2 steps per task has 8 steps in all; half of 5 per task has 10.
    assert list_steps(config, "joint", "data", half=True)[-1] == 10
    assert joint["acc_half"] is not None
    assert tuned["acc_half"] is None
    data = load_data(config, Place(tmp_path))
    whole = learn_joint(config.model_copy(update={"methods": ("joint",)}), data, 10)
    assert joint["acc_half"] == whole
    (trial, *_) = SEARCH.measure(half, data, Workspace(Place(tmp_path)))
    assert trial["acc_half"] is None


def learn_joint(config: DlcftConfig, data: Any, steps: int) -> float:
    result = learn(
        split(config, data, "data", 0),
        pretrain(config, data, 0),
        Joint(),
        training=Training(
            optimizer="adam", lr=3e-3, weight_decay=1e-5, schedule="linear", steps=[10, 5, steps], batch_size=64, seed=0
        ),
        progress=False,
    )
    return acc(result.accuracy)


def test_joint_training_has_all_steps_at_the_end(tmp_path):
    config = tiny()
    assert list_steps(config, "ewc", "class") == [4, 2, 2]
    assert list_steps(config, "joint", "class") == [4, 2, 8]
    data = load_data(config, Place(tmp_path))
    assert [t.classes for t in split(config, data, "class", 1)] == [(0, 1), (2, 3), (4, 5)]
    first, second = (split(config, data, "task", seed) for seed in (0, 1))
    assert [t.classes for t in first] != [t.classes for t in second]
    assert all(task.sizes["validation"] == 40 for task in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("er",), "settings": ("data",)}, "none of the methods er is run in data"),
        ({"source_classes": ()}, "set weights, or source_classes"),
        ({"source_classes": (0,), "weights": Path("x.pt")}, "leave source_classes empty"),
        ({"class_tasks": 4}, "cannot be split equally"),
        ({"settings": ("task",), "class_tasks": 6}, "has a single active output with head 'masked'"),
        ({"validation": 2, "linear_lrs": (0.1, 0.2)}, "hyper-parameters are chosen on held-out samples: hold out 10"),
        ({"validation": 2, "evaluation": "validation"}, "the table is measured on held-out samples: hold out 10"),
        ({"dlcft_strengths": (1.0, 1.0)}, "dlcft_strengths"),
        ({"source_classes": (0, 4)}, "class 4 is both in source_classes"),
        ({"classes": "all"}, "class 0 is both in source_classes"),
        ({"linear_lrs": (0.1, 0.2), "evaluation": "validation", "seeds": (0, 1000)}, "no common value"),
        ({"linear_lrs": (0.1, 0.2), "selection_seeds": (7, 7)}, "selection_seeds"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message, tmp_path):
    config = tiny(**options)
    with pytest.raises(CurvlabError, match=message):
        analysis.check(config, load_data(config, Place(tmp_path)))


# Hyper-parameters -----------------------------------------------------------------------------------------------------


def test_a_long_stream_takes_what_is_chosen_in_the_short_one():
    config = DlcftConfig(settings=("data", "data_long"), methods=("lwf", "fine_tuning"))
    config = config.model_copy(update={"nonlinear_lrs": (3e-3,), "lwf_strengths": (1.0, 10.0), "linear_lrs": (0.5,)})
    trials = SEARCH.trials(config)
    assert [(t.group["setting"], t.candidate["strength"]) for t in trials] == [("data", 1.0), ("data", 10.0)]
    assert trials[0].config.evaluation == "validation"
    assert trials[0].config.linear_lrs == DlcftConfig().linear_lrs  # an unused option
    tried = [
        {**t.group, **t.candidate, "seed": 1000, "validation_acc": acc, "note": ""}
        for t, acc in zip(trials, (0.6, 0.7), strict=True)
    ]
    runs = SEARCH.runs(config, choose(SEARCH, config, tried))
    assert [(r.settings[0], r.methods[0]) for r in runs] == [
        ("data", "lwf"),
        ("data", "fine_tuning"),
        ("data_long", "lwf"),
        ("data_long", "fine_tuning"),
    ]
    assert runs[0].lwf_strengths == runs[2].lwf_strengths == (10.0,)
    assert {r.nonlinear_lrs for r in runs} == {(3e-3,)}
    assert SEARCH.trials(config.model_copy(update={"settings": ("data_long",)}))[0].group["setting"] == "data_long"


def test_a_candidate_that_diverges_is_recorded_and_a_run_of_the_table_fails(tmp_path):
    config = tiny(settings=("task",), methods=("ewc",), nonlinear_optimizer="sgd", ewc_strengths=(1e30, 1e31))
    data = load_data(config, Place(tmp_path))
    record = run_trial(SEARCH, ANALYSIS.measure, SEARCH.trials(config)[0], data, Workspace(Place(tmp_path)))
    assert record["validation_acc"] is None
    assert any(word in record["note"] for word in ("finite", "inf", "nan"))
    with pytest.raises(CurvlabError, match=r"finite|inf|nan"):
        run(config.model_copy(update={"ewc_strengths": (1e30,)}), tmp_path)


def test_a_run_with_several_candidates_chooses_the_best_on_held_out_samples(tmp_path):
    config = tiny(settings=("data",), data_tasks=2, methods=("fine_tuning",), nonlinear_lrs=(1e-9, 0.03), steps=20)
    found = run(config, tmp_path)
    assert {record["lr"] for record in found} == {0.03}
    single = config.model_copy(update={"nonlinear_lrs": (0.03,)})
    assert _drop_seconds(run(single, tmp_path)) == _drop_seconds(found)


def test_compared_methods_have_equally_many_candidates_in_all_presets():
    for preset in PRESETS.values():
        counts = {name: len(METHODS[name].candidates(preset.config)) for name in METHODS}
        assert len({counts[name] for name in counts if METHODS[name].strengths}) == 1
        assert len({counts[name] for name in counts if not METHODS[name].strengths}) == 1
        assert min(counts.values()) >= 2


# Claims ---------------------------------------------------------------------------------------------------------------


def records_with(**accuracies: float) -> list[dict[str, Any]]:
    """Return records of three seeds, ``SETTING__METHOD=accuracy``; with ``__bwt`` the backward transfer."""
    records: dict[tuple[str, str, int], dict[str, Any]] = {}
    for key, value in accuracies.items():
        setting, method, *kind = key.split("__")
        for seed in range(3):
            names = {"setting": setting, "method": method, "seed": seed, "lr": 1e-3, "strength": 1.0}
            empty = {"acc": None, "bwt": None, "bytes": 10, "seconds": 1.0}
            record = records.setdefault((setting, method, seed), names | empty)
            record[kind[0] if kind else "acc"] = value + 0.001 * seed
    return list(records.values())


def judge(samples: int = 3000, **accuracies: float) -> dict[str, Any]:
    """Return the claims by their texts, judged under the conditions of the preset cpu."""
    data = Subject("mnist", (1, 28, 28), 6, 2400, samples)
    return {claim.text: claim for claim in list_claims(records_with(**accuracies), PRESETS["cpu"].config, data)}


LINEAR = "the linear network with squared error has higher accuracy than the non-linear one with cross-entropy"
JOINT = ", each minus its own joint training"


def linear_cases():
    """Return text, values with which it holds, and values with which it does not, of a linear and a non-linear arm."""
    arms = [
        ("data", "data-IL: with diagonal curvature {}", "dlcft_diag", "ewc"),
        ("data", "data-IL: with K-FAC curvature {}", "dlcft_kfac", "osla"),
        ("data", "data-IL: with TK-FAC curvature {}", "dlcft_tkfac", "osla_tkfac"),
        ("data_long", "data-IL, long: with K-FAC curvature {}", "dlcft_kfac", "osla"),
        ("data_long", "data-IL, long: with TK-FAC curvature {}", "dlcft_tkfac", "osla_tkfac"),
        ("task", "task-IL: DLCFT has higher accuracy than OSLA", "dlcft_tkfac", "osla"),
        ("class", "class-IL: with K-FAC curvature and replay {}", "dlcft_kfac", "osla"),
        ("class", "class-IL: with TK-FAC curvature and replay {}", "dlcft_tkfac", "osla_tkfac"),
        (
            "class",
            "class-IL: with K-FAC curvature and replay {}, without regularisation of the classifier",
            "dlcft_kfac_no_regularization",
            "osla",
        ),
        (
            "class",
            "class-IL: with TK-FAC curvature and replay {}, without regularisation of the classifier",
            "dlcft_no_regularization",
            "osla_tkfac",
        ),
    ]
    for setting, text, better, worse in arms:
        text = text.format(LINEAR)
        extra = {"task__ewc": 0.5} if setting == "task" else {}
        high, low = {f"{setting}__{better}": 0.8, **extra}, {f"{setting}__{better}": 0.6, **extra}
        other = {f"{setting}__{worse}": 0.7}
        yield text, high | other, low | other
        place = "data" if setting == "data_long" else setting
        # Joint training gains 0.05, or 0.2: more than the arms are apart.
        joint = {f"{place}__joint": 0.75, f"{place}__joint_linear": 0.8}
        far = {f"{place}__joint": 0.75, f"{place}__joint_linear": 0.95}
        yield text + JOINT, high | other | joint, high | other | far


def other_cases():
    joint = {"data__joint": 0.7, "data__joint_linear": 0.846}
    yield (
        "data-IL: no method exceeds joint training by more than half a point (best mean of 2 methods, minus the better "
        "of the two joint trainings)",
        {"data__osla": 0.85, "data__ewc": 0.8, "data__oracle": 0.9, **joint},
        {"data__osla": 0.852, "data__ewc": 0.8, **joint},
    )
    ewc = {"task__ewc": 0.7, "task__ewc__bwt": -0.1}
    for name, label in (("lwf", "LwF"), ("er", "ER"), ("der", "DER"), ("derpp", "DER++")):
        below, above = ({f"task__{name}": 0.8, "task__dlcft_tkfac": acc, **ewc} for acc in (0.79, 0.81))
        yield f"task-IL: DLCFT has higher accuracy than {label}", above, below
    yield (
        "task-IL: OSLA is not worse than EWC by one test image or more",
        {**ewc, "task__osla": 0.7},
        {**ewc, "task__osla": 0.6995},
    )
    yield (
        "task-IL: DLCFT forgets less than EWC (backward transfer more than 2 points higher)",
        {**ewc, "task__dlcft_tkfac__bwt": -0.07},
        {**ewc, "task__dlcft_tkfac__bwt": -0.09},
    )
    yield (
        "task-IL: LwF forgets almost nothing (backward transfer at least -3 points)",
        {**ewc, "task__lwf__bwt": -0.02},
        {**ewc, "task__lwf__bwt": -0.04},
    )
    for text, better, worse in (
        ("with replay", "dlcft_tkfac", "dlcft_no_regularization"),
        ("without replay", "dlcft_no_replay", "dlcft_neither"),
    ):
        yes, no = ({f"class__{better}": acc, f"class__{worse}": 0.5} for acc in (0.56, 0.54))
        yield f"class-IL: regularising the classifier gains 5 points or more, {text}", yes, no
    for name, label in (("er", "ER"), ("der", "DER"), ("derpp", "DER++")):
        below, above = ({f"class__{name}": 0.6, "class__dlcft_tkfac": acc} for acc in (0.59, 0.61))
        yield f"class-IL: DLCFT has higher accuracy than {label}", above, below


CASES = [*linear_cases(), *other_cases()]


@pytest.mark.parametrize(("text", "holds", "fails"), CASES, ids=[case[0] for case in CASES])
def test_a_claim_can_be_reproduced_and_can_fail(text, holds, fails):
    assert judge(**holds)[text].verdict == "reproduced"
    assert judge(**fails)[text].verdict == "not reproduced"
    assert judge(**holds)[text].scope.startswith("direction, at data mnist, classes 6")


def test_every_claim_has_its_cases():
    names = {f"{setting}__{name}": 0.5 for name, method in METHODS.items() for setting in method.settings}
    texts = {text.replace("of 12 methods", "of 2 methods") for text in judge(**names)}
    assert texts == {text for text, _, _ in CASES}


def test_claims_are_not_tested_on_other_data_or_after_few_steps():
    found = records_with(data__dlcft_kfac=0.8, data__osla=0.7)
    (claim,) = [c for c in list_claims(found, tiny(), DIGITS) if c.text == f"data-IL: with K-FAC curvature {LINEAR}"]
    assert claim.verdict == "not tested"
    assert claim.reason.startswith("data is digits, cifar100 or mnist is needed; training samples of a stream is 180")
    assert "steps per task is 2, at least 20 is needed" in claim.reason
    assert claim.ours == pytest.approx(0.1)


def test_published_differences_are_of_the_table_that_is_cited():
    found = judge(
        data__ewc=0.5, data_long__osla=0.5, class__der=0.5, task__er=0.5, data__joint=0.5, data__joint_linear=0.5
    )
    published = {text: claim.published for text, claim in found.items()}
    assert published[f"data-IL: with diagonal curvature {LINEAR}"] == pytest.approx(0.8217 - 0.7888)
    # The table of the poster has 73.10 for OSLA, its ablation 73.51.
    assert published[f"data-IL, long: with K-FAC curvature {LINEAR}"] == pytest.approx(0.7592 - 0.7351)
    assert published["class-IL: DLCFT has higher accuracy than DER"] == pytest.approx(0.0191)
    assert published["class-IL: DLCFT has higher accuracy than DER++"] == pytest.approx(0.0669)
    assert published["task-IL: DLCFT has higher accuracy than LwF"] == pytest.approx(0.0363)
    assert published["task-IL: DLCFT has higher accuracy than ER"] == pytest.approx(0.1665)
    assert any(value == pytest.approx(-0.0087) for text, value in published.items() if "half a point" in text)


def test_claims_are_not_tested_where_methods_cannot_be_told_apart():
    text = f"data-IL: with K-FAC curvature {LINEAR}"
    found = judge(400, data__dlcft_kfac=0.802, data__osla=0.8)
    assert found[text].reason == "they differ by less than one of 400 test images"
    assert judge(600, data__dlcft_kfac=0.802, data__osla=0.8)[text].verdict == "reproduced"
    found = judge(data__dlcft_kfac=0.99, data__osla=0.975, class__der=0.98, class__dlcft_tkfac=0.975)
    assert found[text].reason == "both are above 0.97"
    assert found["class-IL: DLCFT has higher accuracy than DER"].reason == "both are above 0.97"
    equal = {"data__joint": 0.75, "data__joint_linear": 0.85}
    found = judge(data__dlcft_kfac=0.8, data__osla=0.7, **equal)
    assert found[text + JOINT].reason == "they differ by less than one of 3,000 test images"


def test_claims_on_task_il_are_judged_only_where_something_is_forgotten():
    values = {"task__osla": 0.85, "task__dlcft_tkfac": 0.9, "task__lwf__bwt": -0.05}
    found = judge(**values, task__ewc=0.98, task__ewc__bwt=-0.2)
    assert {claim.verdict for claim in found.values()} == {"not tested"}
    assert all("almost nothing is forgotten" in claim.reason for claim in found.values())
    found = judge(**values)
    assert all("EWC, which shows whether tasks are forgotten, has no value" in claim.reason for claim in found.values())


def test_networks_are_not_compared_while_joint_training_still_rises():
    text = f"data-IL: with K-FAC curvature {LINEAR}"
    arms = {"data__dlcft_kfac": 0.8, "data__osla": 0.7, "data__joint": 0.75, "data__joint_linear": 0.8}
    for gain, verdict in ((0.009, "reproduced"), (0.011, "not tested")):
        found = [*records_with(**arms), *records_with(data__ewc=0.6, data_long__osla=0.7, data_long__dlcft_kfac=0.8)]
        for record in found:
            if record["method"] == "joint":
                record["acc_half"] = record["acc"] - gain
        claims = {claim.text: claim for claim in list_claims(found, PRESETS["cpu"].config, MNIST)}
        assert {claims[text].verdict, claims[text + JOINT].verdict} == {verdict}
        long = claims[f"data-IL, long: with K-FAC curvature {LINEAR}"]
        assert long.verdict == verdict  # the joint training of data-IL
        assert any("half a point" in text and claim.verdict != "not tested" for text, claim in claims.items())
        notes = report(Results(PRESETS["cpu"].config, MNIST, {"table": found, "curves": []}, total=9)).notes
        assert any("joint training still rises by 0.011" in note for note in notes) == (gain > 0.01)
    reason = "joint training of the non-linear network still rises by 0.011 from half of its steps to all of them"
    assert claims[text].reason == long.reason == reason


# The report -----------------------------------------------------------------------------------------------------------


def test_published_numbers_stand_beside_runs_of_the_published_data_alone():
    found = records_with(data__osla=0.8, task__dlcft_tkfac=0.9, class__dlcft_no_replay=0.5)
    paper = PRESETS["paper"].config
    cifar = Subject("cifar100", (3, 32, 32), 100, 50000, 10000)
    osla, task, other = add_published(summarise(found), paper, cifar)
    assert (osla["published_acc"], osla["published_value"]) == ("0.7923", pytest.approx(0.7923))
    # It is printed as "DLCFT (Ours)".
    assert (task["published_acc"], task["published_bwt"]) == ("0.9579†", "-0.0058†")
    assert other["published_value"] is None
    for data in (MNIST, Subject("cifar100", (3, 32, 32), 20, 1000, 400)):
        assert not has_scale(paper, data, "data")
        rows = add_published(summarise(found), paper, data)
        assert not any("published_acc" in row or row["published_value"] for row in rows)


def test_published_tables_have_conditions_and_methods_that_there_are():
    tables = [
        table
        for name, table in read_published("dlcft").items()
        if name.startswith(("table5", "table6", "poster", "ablation"))
    ]
    assert len(tables) == 10
    for table in tables:
        assert set(table["rows"]) <= set(METHODS)
        assert set(table.get("direction", {})) <= set(table["conditions"])
    assert published_tables("data", MNIST)[0]["source"] == "Table 5"
    assert all(published_tables(setting, MNIST) for setting in SETTINGS)


def test_table5_has_curvatures_in_rows_and_networks_in_columns():
    names = {f"data__{name}": 0.7 for name in ("ewc", "osla", "osla_tkfac", "dlcft_diag", "dlcft_kfac", "dlcft_tkfac")}
    rows = add_published(summarise(records_with(**names | {"data__dlcft_kfac": 0.8})), PRESETS["cpu"].config, MNIST)
    (table,) = make_table5(rows, PRESETS["cpu"].config, MNIST, "title", "three seeds")
    assert [column.header for column in table.columns] == [
        "curvature",
        "non-linear, cross-entropy",
        "linear, squared error",
    ]
    assert [row["curvature"] for row in table.records] == ["EWC (diagonal)", "K-FAC", "TK-FAC"]
    assert table.records[1]["linear_acc"] == pytest.approx(0.801)
    cifar = Subject("cifar100", (3, 32, 32), 100, 50000, 10000)
    (table,) = make_table5(rows, PRESETS["paper"].config, cifar, "title", "three seeds")
    texts = [[column.cell(row) for column in table.columns] for row in table.records]
    assert [row[2] for row in texts] == ["0.7888", "0.7923", "–"]
    assert [row[4] for row in texts] == ["0.8217", "0.8195", "0.8270"]
    assert not make_table5(where(rows, setting="task"), PRESETS["cpu"].config, MNIST, "", "")


# An image folder ------------------------------------------------------------------------------------------------------


def write_images(root: Path, classes: int, train: int, test: int) -> Path:
    """Write a folder of PNG files, one colour per class with noise: ROOT/train/CLASS/*.png and ROOT/test/CLASS."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 200, (classes, 3))
    for part, count in (("train", train), ("test", test)):
        for label, colour in enumerate(colours):
            folder = root / part / f"scene{label:02}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = (colour + rng.integers(0, 50, (8, 8, 3))).astype(np.uint8)
                Image.fromarray(image).save(folder / f"{number}.png")
    return root


def test_a_folder_of_images_is_learned_in_parts_of_all_its_classes(tmp_path):
    folder = write_images(tmp_path / "scenes", 67, 4, 1)
    weights = tmp_path / "weights.pt"
    torch.save(build("mlp", (3, 8, 8), 5, hidden=(8,), seed=0).state_dict(), weights)
    config = tiny(
        data=str(folder),
        classes="all",
        weights=weights,
        source_classes=(),
        settings=("data",),
        methods=("fine_tuning", "dlcft_kfac"),
        data_tasks=4,
        stream_samples=None,
        test_samples=None,
        data_parts="random",
        validation=0,
    )
    data = load_data(config, Place(tmp_path))
    analysis.check(config, data)
    stream = split(config, data, "data", 0)
    assert [task.sizes["train"] for task in stream] == [67] * 4
    assert all(len(task.train[1].unique()) > 30 for task in stream)
    records = run(config, tmp_path)
    assert [record["method"] for record in records if "acc" in record] == ["fine_tuning", "dlcft_kfac"]
    subject = Subject.of(data)
    assert list_conditions(config, subject, "data")["data"] == "MIT-67"
    # Not the published number of test images, so that nothing published is shown.
    assert not any("published_acc" in row for row in add_published(summarise(summaries(records)), config, subject))


def summaries(records):
    return [record for record in records if "acc" in record]


def test_published_numbers_of_mit67_stand_beside_67_classes_alone():
    config = PRESETS["paper-mit67"].config
    mit, other = (Subject("scenes", (3, 224, 224), classes, 5360, 1340) for classes in (67, 66))
    found = records_with(data__osla=0.6, data__dlcft_kfac=0.7, data__joint=0.7)
    rows = add_published(summarise(found), config, mit)
    assert [row["published_acc"] for row in rows] == ["0.6408†", "0.7055†", "0.7440†"]
    assert not any("published_acc" in row for row in add_published(summarise(found), config, other))
    cifar = Subject("cifar100", (3, 32, 32), 67, 5360, 1340)  # 67 classes of other data
    assert not any("published_acc" in row for row in add_published(summarise(found), config, cifar))
    assert all("Table 5" not in column.header for t in make_table5(rows, config, mit, "", "") for column in t.columns)
    claims = {claim.text: claim for claim in list_claims(found, config, mit)}
    claim = claims[f"data-IL: with K-FAC curvature {LINEAR}"]
    assert (claim.verdict, claim.source) == ("reproduced", "poster, data-IL (Seq-MIT-67)")
    assert claim.published == pytest.approx(0.7055 - 0.6408)
    assert {claim.verdict for claim in list_claims(found, config, other)} == {"not tested"}


# ----------------------------------------------------------------------------------------------------------------------


def test_seconds_are_the_median():
    found = records_with(data__osla=0.8)
    for record, seconds in zip(found, (1.0, 50.0, 2.0), strict=True):
        record["seconds"] = seconds
    assert summarise(found)[0]["seconds"] == 2.0


def test_deviations_are_those_of_the_configuration():
    config = tiny(settings=("data",), methods=("osla", "dlcft_kfac"))
    common, steps, objective, _, given, _ = list_deviations(config, DIGITS)
    assert "classes 6 (100); training samples of a stream 180 (50,000); test samples 60 (10,000)" in common
    assert "optimizer of the linear network" not in common
    assert "learning rate of the linear network 0.01 (0.0001)" in common
    assert steps == "data-IL: parts skewed (random); steps per task 2 (10000 to 50000)."  # ten tasks, as published
    assert "DLCFT" in objective
    assert given == ("Not tuned, only one value given: nonlinear_lrs, osla_strengths, linear_lrs, dlcft_strengths.")
    default = list_deviations(DlcftConfig(methods=("dlcft_kfac",)), DIGITS)
    assert "learning rate of the linear network 0.01 or 0.03 (0.0001)" in default[0]
    assert not any("not chosen" in line or "OSLA" in line for line in default)
    assert {name for name in LISTS if name.endswith("lrs")} == {"nonlinear_lrs", "linear_lrs"}


def finished(**accuracies: float) -> Results[DlcftConfig]:
    found = records_with(**accuracies)
    curves = [
        {**{key: r[key] for key in ("setting", "method", "seed")}, "after": after, "accuracy": r["acc"] - 0.1 / after}
        for r in found
        for after in ((1, 2, 3) if not r["method"].startswith("joint") else (3,))
    ]
    return Results(DlcftConfig(), MNIST, {"table": found, "curves": curves}, total=9)


def test_the_report_has_a_table_and_a_panel_a_setting():
    made = report(finished(data__osla=0.8, data__dlcft_kfac=0.9, task__joint=0.95))
    assert [table.title.split(",")[0] for table in made.tables] == ["data-IL", "task-IL", "Table 5"]
    assert all("published" not in column.key for column in made.summary.columns)
    points, curves = (made.figures[name]() for name in ("accuracies", "accuracy_curves"))
    assert [axes.get_title() for axes in points.axes] == ["data-IL", "task-IL"]
    assert [axes.get_title() for axes in curves.axes] == ["data-IL", "task-IL"]
    lines = curves.axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["--", "-"]
    assert lines[1].get_ydata()[0] == pytest.approx(0.801)
    assert [line.get_linestyle() for line in curves.axes[1].lines] == [":"]


def test_figures_of_all_methods_fit_a_page():
    made = report(finished(**{f"{s}__{name}": 0.5 for name, method in METHODS.items() for s in method.settings}))
    for name, draw in made.figures.items():
        figure = draw()
        width, height = figure.get_size_inches()
        assert (width, height) <= (7.3, 7.0), name
        (legend,) = figure.legends
        assert len(legend.get_texts()) <= 9
