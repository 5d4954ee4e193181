"""The analysis ``ewc_modes``: what a run records, which strength is reported, its claims both ways, its figures."""

import math
from dataclasses import replace

import pytest

from curvlab.analyze.frame.analysis import Results, Workspace
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.lecture.ewc_modes import ANALYSIS, PRESETS, measure, report, take_chosen
from curvlab.analyze.lecture.ewc_modes_claims import growth, next_strength_costs
from curvlab.analyze.lecture.ewc_modes_methods import METHODS, EwcModesConfig, candidates, single_run
from curvlab.commandline.options import RunOptions
from curvlab.continual import metrics, permuted, run
from curvlab.continual.strategies import EWC
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.models import build

MNIST = Subject("mnist", (1, 28, 28), 10, 60_000, 2000)
CPU = PRESETS["cpu"].config
SMALL = EwcModesConfig(hidden=(5,), epochs=1, tasks=3, task_samples=60, validation=20, samples=20, seeds=(3,))


def records_of(config, folder):
    return list(measure(config, ANALYSIS.load(config, RunOptions()), Workspace(Place(folder))))


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_run_is_that_of_the_library(tmp_path):
    config = single_run(SMALL, "permuted", "ewc_online", {"strength": 10.0})
    first, *rest = records_of(config, tmp_path)
    data = ANALYSIS.load(config, RunOptions())
    stream = permuted(data, tasks=3, seed=3, validation=20, samples=60)
    model = build("mlp", data.sample_shape, 10, hidden=(5,), seed=3)
    strategy = EWC(10.0, quantity="fisher", samples=20, mode="online", gamma=0.9)
    found = run(stream, model, strategy, optimizer="adam", lr=3e-3, epochs=1, batch_size=32, seed=3, progress=False)
    assert first["acc"] == metrics.acc(found.accuracy)
    assert first["parameters"] == 64 * 5 + 5 + 5 * 10 + 10
    assert first["vectors"] == pytest.approx(2, abs=0.02)
    stored = {r["after"]: r["stored"] for r in rest if "stored" in r}
    assert stored[3] == stored[1] == found.tasks[0]["bytes"] / 4
    seen = {(r["after"], r["task"]): r["accuracy"] for r in rest if "accuracy" in r}
    assert seen == {(t + 1, i + 1): found.accuracy[t, i].item() for t in range(3) for i in range(t + 1)}
    assert not list(tmp_path.iterdir())


def test_class_incremental_counts_the_outputs_so_far(tmp_path):
    config = single_run(SMALL.model_copy(update={"tasks": 5}), "class", "naive", {})
    _, *rest = records_of(config, tmp_path)
    assert next(r["accuracy"] for r in rest if r.get("after") == 1 and "accuracy" in r) > 0.3  # of two outputs


def test_training_that_diverges_is_a_record_without_accuracy(tmp_path):
    config = single_run(SMALL, "permuted", "l2", {"strength": 1e6}, optimizer="sgd", lr=10.0, epochs=10)
    (only,) = records_of(config, tmp_path)
    assert only["acc"] is None
    assert only["note"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ("ewc",)}, "unknown method 'ewc'"),
        ({"class_methods": ("sii",)}, "unknown method 'sii'; did you mean 'si'"),
        ({"validation": 0}, "set validation"),
        ({"si_strengths": ()}, "si_strengths needs one or more different values"),
        ({"structure": "implicit"}, "implicit"),
    ],
)
def test_refusals(changed, message):
    config = EwcModesConfig(**changed)
    with pytest.raises(CurvlabError, match=message):
        ANALYSIS.check(config, ANALYSIS.load(config, RunOptions()))


def test_every_strength_is_run_and_the_best_on_held_out_samples_is_reported():
    config = EwcModesConfig(methods=("naive", "si"), streams=("permuted",))
    runs = ANALYSIS.search.runs(config, [])
    assert [(one.methods, one.si_strengths) for one in runs[:2]] == [(("naive",), ()), (("si",), (0.01,))]
    assert len(runs) == 1 + len(config.si_strengths)
    selection = [
        {"stream": "permuted", "method": "naive", "chosen": True},
        {"stream": "permuted", "method": "si", "strength": 0.1, "chosen": True},
        {"stream": "permuted", "method": "si", "strength": 1.0, "chosen": False},
    ]
    records = [{"stream": "permuted", "method": "si", "strength": s} for s in (0.1, 1.0)]
    records.append({"stream": "permuted", "method": "naive", "strength": None})
    assert [record["strength"] for record in take_chosen(records, selection)] == [0.1, None]


# Claims ---------------------------------------------------------------------------------------------------------------


#: Accuracies with which every claim holds, by stream.
GOOD = {
    "permuted": dict.fromkeys(METHODS, 0.8) | {"naive": 0.5, "l2": 0.7, "ewc_separate": 0.8},
    "class": {"naive": 0.2, "l2": 0.2, "ewc_separate": 0.2, "si": 0.2, "mas": 0.2},
}


def results(config=CPU, subject=MNIST, last_seed=(), separate=6.0, neighbour=0.6, seeds=3):
    """Return records in which the second strength of every grid is chosen; ``last_seed`` changes the last seed."""
    table, accuracies, memory, selection = [], [], [], []
    for stream, methods in GOOD.items():
        for method, good in methods.items():
            given = candidates(config, method)
            for place, candidate in enumerate(given):
                chosen = place == min(1, len(given) - 1)
                names = {"stream": stream, "method": method, "strength": candidate.get("strength")}
                selection.append({"stream": stream, "method": method, **candidate, "chosen": chosen})
                for seed in range(seeds):
                    acc = dict(last_seed).get((stream, method), good) if seed == seeds - 1 else good
                    row = {**names, "seed": seed, "acc": acc if chosen else neighbour, "parameters": 10, "note": ""}
                    table.append({**row, "forgetting": 0.1, "learning_accuracy": 0.9, "vectors": 2.0})
                    accuracies += [{**names, "seed": seed, "after": t, "task": 1, "accuracy": acc} for t in (1, 2)]
                    after = separate if method == "ewc_separate" else 2.0
                    memory += [{**names, "seed": seed, "after": t, "stored": v} for t, v in ((1, 2.0), (5, after))]
    records = {"table": table, "accuracies": accuracies, "memory": memory}
    return Results(config, subject, records, selection, total=len(table))


def verdicts(**changes):
    return {claim.text: claim.verdict for claim in report(results(**changes)).claims}


def missed(**changes):
    return [text for text, verdict in verdicts(**changes).items() if verdict != "reproduced"]


def test_claims_that_hold():
    assert missed(separate=10.0) == []
    assert len(verdicts()) == 10 + 7 + 3


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"last_seed": {("permuted", "osla"): 0.505}}, ["OSLA is above naive", "OSLA is not below EWC"]),
        ({"last_seed": {("permuted", "l2"): 0.505}}, ["plain L2 is above naive"]),
        ({"last_seed": {("permuted", "l2"): 0.85}}, ["Plain L2 is below EWC"]),
        ({"last_seed": {("permuted", "ewc_average"): 0.77}}, ["The three online forms"]),
        ({"last_seed": {("permuted", "imm_mean"): 0.82}}, ["Mode-IMM is not below"]),
        ({"neighbour": 0.79}, ["EWC is very sensitive"]),
        ({"separate": 3.0}, ["Separate EWC has a linear cost"]),
        ({"last_seed": {("class", "si"): 0.22}}, ["Class-incremental: SI fails"]),
    ],
)
def test_claims_that_fail(changes, begins):
    found = missed(**({"separate": 10.0} | changes))
    assert len(found) == len(begins)
    assert all(text.startswith(begin) for text, begin in zip(found, begins, strict=True))


def test_online_that_grows_fails():
    grown = results(separate=10.0)
    for record in grown.records["memory"]:
        if record["method"] == "ewc_online" and record["after"] == 5:
            record["stored"] = 4.0
    assert [c.text[:10] for c in report(grown).claims if c.verdict != "reproduced"] == ["Online EWC"]


@pytest.mark.parametrize(
    ("subject", "changed", "reason"),
    [
        (Subject("digits", (1, 8, 8), 10, 1437, 360), {}, "data is digits, published: mnist"),
        (MNIST, {"tasks": 2}, "tasks is 2, at least 5 is needed"),
    ],
)
def test_other_conditions_are_not_tested(subject, changed, reason):
    for claim in report(results(CPU.model_copy(update=changed), subject)).claims:
        assert (claim.verdict, claim.reason) == ("not tested", reason)


def test_a_grid_that_is_no_decade_wide_says_nothing_of_sensitivity():
    config = CPU.model_copy(update={"ewc_strengths": (1.0, 2.0, 4.0)})
    reasons = {claim.text[:12]: claim.reason for claim in report(results(config, separate=10.0)).claims}
    assert reasons["EWC is very "] == "ratio of strengths is 2, published: 10"
    assert reasons["Separate EWC"] == ""


def test_the_neighbours_of_an_end_and_of_a_run_that_diverged():
    found = [{"stream": "permuted", "method": "m", "strength": 1.0, "seed": 0, "acc": 0.9}]
    other = {"stream": "permuted", "method": "m", "strength": 10.0, "seed": 0, "acc": 0.5}
    assert next_strength_costs([*found, other], found, "m", (1.0, 10.0), [0]) == pytest.approx([0.4])
    assert math.isnan(next_strength_costs([*found, other | {"acc": None}], found, "m", (1.0, 10.0), [0])[0])
    assert growth([], "m", [0]) == []


def test_a_method_that_diverges_is_named_and_its_figures_are_drawn():
    everything = results()
    table = [{**record, "acc": None, "note": "the loss is nan"} for record in everything.records["table"]]
    made = report(replace(everything, records={**everything.records, "table": table, "accuracies": []}))
    assert any(note.endswith("diverged: the loss is nan") for note in made.notes)
    for draw in made.figures.values():
        draw()


def test_the_figures():
    figures = report(results()).figures
    sensitivity = figures["sensitivity"]()
    assert [axes.get_title() for axes in sensitivity.axes] == ["permuted pixels", "class-incremental"]
    assert all(axes.get_xscale() == "log" for axes in sensitivity.axes)
    assert "LwF" not in [text.get_text() for text in sensitivity.legends[0].get_texts()]
    memory = figures["memory"]()
    published = next(line for line in memory.axes[0].lines if line.get_color() == "black")
    assert published.get_ydata().tolist() == [2, 4, 6, 8, 10]
    # Methods that keep as much are one line.
    names = [text.get_text() for text in memory.legends[0].get_texts()]
    assert [name.split(",")[0] for name in names] == ["naive", "EWC separate", "EWC separate"]
    over = figures["accuracy_over_tasks"]()
    names = [text.get_text() for text in over.legends[0].get_texts()]
    assert names == [*(method.label for method in METHODS.values()), "range of 3 seeds"]
    # A method has one colour in all figures.
    colours = [{line.get_label(): line.get_color() for line in f.legends[0].get_lines()} for f in (over, sensitivity)]
    assert all(colours[0][name] == colour for name, colour in colours[1].items() if name != "naive")
