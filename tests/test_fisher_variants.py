"""The analysis ``fisher_variants``: its importances and retrainings, claims both ways, figures, notes."""

import pytest
import torch

from curvlab import Problem, estimate
from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.workspace import Workspace
from curvlab.analyze.masq import fisher_variants as analysis
from curvlab.analyze.masq import streams
from curvlab.analyze.masq.fisher_variants import ANALYSIS, PRESETS, FisherVariantsConfig
from curvlab.commandline.options import RunOptions
from curvlab.errors import CurvlabError
from curvlab.grid import Place

MNIST = Subject("mnist", (1, 28, 28), 10, 20_000, 2000)


@pytest.fixture(scope="module")
def small():
    config = FisherVariantsConfig(
        hidden=(6,),
        steps=6,
        streams=("D5-5",),
        seeds=(2,),
        train_samples=400,
        quantities=("fisher", "masq:batch_size=10,norm=mean"),
        subsets=(20,),
        strengths=(1.0, 1e9),
        dtype="float64",
    )
    return config, ANALYSIS.load(config, RunOptions())


def test_importances_are_those_of_the_reference(small):
    config, data = small
    task = streams.make_tasks(config, data, "D5-5", 2)[0]
    model = streams.train_first(config, data, task, 2)
    found = analysis.importances(config, model, task)
    x, y = task.train[0].double(), task.train[1]
    assert list(found) == ["exact", "batched, 10", "exact, 20 samples"]
    for name, (quantity, count) in {
        "exact": ("fisher", None),
        "batched, 10": (config.quantities[1], None),
        "exact, 20 samples": ("fisher", 20),
    }.items():
        problem = Problem(model, "cross_entropy", (x[:count], y[:count]))
        expected = estimate(problem, quantity, "diag", backend="torch").diagonal()
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-15)


def test_the_records_of_a_run(small, tmp_path):
    config, data = small
    records = list(analysis.measure(config, data, Workspace(Place(tmp_path))))
    kinds = ("exact", "batched, 10", "exact, 20 samples")
    assert [(r["variant"], r["scale"], r["strength"]) for r in records] == [
        (kind, scale, strength) for kind in kinds for scale in ("raw", "trace") for strength in (1.0, 1e9)
    ]
    assert all(0 <= r[key] <= 1 for r in records for key in ("validation", "accuracy", "D1", "D2"))
    exact = [r for r in records if r["variant"] == "exact"]
    assert len({r["trace"] for r in exact}) == 1


def test_one_scale_is_another_strength(small, tmp_path):
    """Importances scaled to a trace give what the estimated ones do at the strength times the factor."""
    config, data = small
    one = config.model_copy(update={"quantities": ("fisher",), "subsets": (), "strengths": (50.0,)})
    records = list(analysis.measure(one, data, Workspace(Place(tmp_path / "a"))))
    trace = records[0]["trace"]
    scaled = one.model_copy(update={"strengths": (50.0 * config.trace / trace,)})
    again = list(analysis.measure(scaled, data, Workspace(Place(tmp_path / "b"))))
    for key in ("validation", "accuracy", "D1", "D2"):
        assert records[1][key] == again[0][key]


def test_too_large_a_subset_is_refused(small):
    config, data = small
    with pytest.raises(CurvlabError, match="subsets has 900, more than the"):
        ANALYSIS.check(config.model_copy(update={"subsets": (900,)}), data)


# What is made of the records ------------------------------------------------------------------------------------------


def synthetic(seeds=3, batched=None, empirical=None, traced=None):
    """Return records with which every claim is reproduced, but for the test accuracies changed in the last seed.

    As estimated, the batched Fisher needs a hundred times the strength of the others.
    """
    best = {"exact": 10.0, "empirical": 10.0, "batched, 128": 1000.0}
    found = []
    for seed in range(seeds):
        for scale in ("raw", "trace"):
            for kind, own in best.items():
                for strength in (1.0, 10.0, 1000.0, 1e4):
                    right = strength == (own if scale == "raw" else 10.0)
                    accuracy = 0.8 if right else 0.5
                    if seed == seeds - 1:
                        if (kind, scale, strength) == ("batched, 128", "raw", 10.0) and batched is not None:
                            accuracy = batched
                        if (kind, scale, right) == ("empirical", "raw", True) and empirical is not None:
                            accuracy = empirical
                    held_out = 0.8 if right else 0.5
                    if (kind, scale) == ("batched, 128", "trace") and traced is not None:
                        held_out = {1000.0: 0.9}.get(strength, held_out)
                        accuracy = {1000.0: traced}.get(strength, accuracy)
                    keys = {"stream": "D5-5", "seed": seed, "variant": kind, "scale": scale, "strength": strength}
                    found.append(
                        {**keys, "trace": 5.0, "validation": held_out, "accuracy": accuracy, "D1": 1.0, "D2": 1.0}
                    )
    return found


def report(found, data=MNIST):
    config = PRESETS["cpu"].config.model_copy(update={"streams": ("D5-5",), "strengths": (1.0, 10.0, 1000.0, 1e4)})
    return ANALYSIS.report(Results(config, data, {"table": found}))


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, set()),
        ({"empirical": 0.77}, {0}),
        ({"empirical": 0.83}, {0}),
        ({"batched": 0.79}, {2}),
        ({"traced": 0.9}, {3}),
    ],
)
def test_every_claim_goes_either_way(changed, missed):
    claims = report(synthetic(**changed)).claims
    assert len(claims) == 4
    assert {place for place, claim in enumerate(claims) if claim.verdict == "not reproduced"} == missed
    assert [claim.verdict for claim in claims].count("reproduced") == 4 - len(missed)


def test_no_verdict_elsewhere():
    assert {claim.verdict for claim in report(synthetic(seeds=2)).claims} == {"not tested"}
    digits = report(synthetic(), Subject("digits", (1, 8, 8), 10, 1437, 360))
    assert {claim.verdict for claim in digits.claims} == {"not tested"}


def test_the_table_the_figures_and_the_notes():
    made = report(synthetic())
    rows = {(row["scale"], row["variant"]): row for row in made.summary.records}
    assert (rows["raw", "batched, 128"]["strength"], rows["raw", "batched, 128"]["shared"]) == (1000.0, 0.5)
    assert rows["trace", "batched, 128"]["shared"] == pytest.approx(0.8)
    assert set(made.figures) == {"as_estimated", "one_trace"}
    figure = made.figures["as_estimated"]()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["exact", "empirical", "batched, 128"]
    assert len(made.notes) == 1
    at_end = report([{**r, "validation": float(r["strength"] == 1e4)} for r in synthetic()])
    assert "D5-5, exact, as estimated" in at_end.notes[1]
