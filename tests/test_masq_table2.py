"""Table 2 of Gepperth and Wiech: which claims are judged, and when."""

import pytest
import torch

from curvlab.analyze.frame.analysis import Results
from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.frame.workspace import Workspace
from curvlab.analyze.masq import streams, table2
from curvlab.analyze.masq.fim_diagonality import ANALYSIS
from curvlab.analyze.masq.fim_diagonality_options import PRESETS, FimDiagonalityConfig
from curvlab.commandline.options import RunOptions
from curvlab.grid import Place

MNIST = Subject("mnist", (1, 28, 28), 10, 28000, 10000)
NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias")


def found(**numbers):
    """Return records of three seeds, each with the same numbers for every tensor."""
    own = {"mean_ratio": 20.0, "paper_mean_ratio": 30.0, "sum_ratio": 2.0, "test_accuracy": 0.98} | numbers
    return [{"parameter": name, "seed": seed} | own for seed in range(3) for name in NAMES]


def paper(**changed):
    config = PRESETS["paper"].config.model_copy(update=changed)
    return table2.conditions(config, MNIST, found())


@pytest.mark.parametrize(
    ("beginning", "numbers", "verdict"),
    [
        (("W1: the off", "b1: the off", "W2: the off", "b2: the off"), {"sum_ratio": 1.01}, "reproduced"),
        (("W1: the off", "b1: the off", "W2: the off", "b2: the off"), {"sum_ratio": 0.99}, "not reproduced"),
        (("W3: diagonal", "b1: diagonal", "b2: diagonal"), {"mean_ratio": 10.0}, "reproduced"),
        (("W3: diagonal", "b1: diagonal", "b2: diagonal"), {"mean_ratio": 9.9}, "not reproduced"),
        (("W3: on average", "b1: on average", "b2: on average"), {"mean_ratio": 1000.0}, "reproduced"),
        (("W3: on average", "b1: on average", "b2: on average"), {"mean_ratio": 999.0}, "not reproduced"),
    ],
)
def test_every_claim_can_go_either_way(beginning, numbers, verdict):
    claims = [claim for claim in table2.claims(found(**numbers), paper()) if claim.text.startswith(beginning)]
    assert len(claims) == len(beginning)
    assert {claim.verdict for claim in claims} == {verdict}


def test_there_is_no_other_claim():
    assert len(table2.claims(found(), paper())) == 10


def test_a_run_of_other_data_tests_nothing_and_says_why():
    digits = table2.conditions(FimDiagonalityConfig(), Subject("digits", (1, 8, 8), 10, 720, 360), found())
    claims = table2.claims(found(), digits)
    assert {claim.verdict for claim in claims} == {"not tested"}
    assert {claim.reason for claim in claims} == {
        "data is digits, published: mnist; network is 64-30-30-10 network, published: 784-30-30-10 network; "
        "steps is 500, at least 1,000 is needed"
    }
    assert table2.identities(found(), digits) == []


def test_a_smaller_run_of_the_same_network_shows_a_direction():
    small = table2.conditions(PRESETS["cpu"].config, MNIST, found())
    (claim, *_) = table2.claims(found(), small)
    assert (claim.verdict, claim.scope) == ("reproduced", "direction, at samples 5,000, steps 1,000")
    (claim, *_) = table2.claims(found(), paper())
    assert (claim.verdict, claim.scope) == ("reproduced", "")


def test_a_network_that_has_learnt_nothing_tests_nothing():
    collapsed = table2.conditions(PRESETS["paper"].config, MNIST, found(test_accuracy=0.22))
    assert {claim.reason for claim in table2.claims(found(), collapsed)} == {
        "test accuracy is 0.22, at least 0.9 is needed"
    }
    untrained = table2.conditions(PRESETS["paper"].config, MNIST, found(test_accuracy=None))
    assert table2.claims(found(), untrained)[0].reason == "test accuracy is none, at least 0.9 is needed"


def test_other_training_options_are_named():
    (claim, *_) = table2.claims(found(), paper(weight_decay=0.1, schedule="cosine", dtype="float64"))
    assert claim.scope == "direction, at weight decay 0.1, schedule cosine, precision float64"


def test_claims_about_tensors_need_their_statistics():
    layers = [{**record, "parameter": "fc1"} for record in found()]
    assert table2.claims(layers, paper())[0].reason == "no parameter tensor was measured: add tensor to per"


def test_a_claim_without_a_number_is_not_tested():
    """As a record of a layer without gradients looks when it is read back."""
    claims = table2.claims(found(sum_ratio=None), paper())
    assert {claim.verdict for claim in claims if "exceeds" in claim.text} == {"not tested"}


def test_identities_have_numbers_and_no_verdict():
    rows = table2.identities(found(), paper())
    assert len(rows) == 7
    assert rows[0].values == [2.0] * 3
    assert not hasattr(rows[0], "verdict")


def test_published_numbers_stand_beside_ours():
    (row,) = table2.add_published([{"parameter": "fc3.bias"}, {"parameter": "other"}])
    assert row["published_diag_sum"] == 0.004


# Several streams ------------------------------------------------------------------------------------------------------


def test_the_classes_of_a_stream_are_those_of_its_first_task():
    options = RunOptions()
    digits = {s: ANALYSIS.load(FimDiagonalityConfig(streams=(s,)), options) for s in streams.ALL}
    assert {s: sorted(set(data.y_train.tolist())) for s, data in digits.items()} == {
        "D5-5": [0, 1, 2, 3, 4],
        "D9-1": [*range(9)],
        "DP10-10": [*range(10)],
    }
    plain = ANALYSIS.load(FimDiagonalityConfig(), options)
    assert torch.equal(digits["D5-5"].x_train, plain.x_train)


def test_a_run_of_a_stream_is_that_of_its_classes_but_for_a_key(tmp_path):
    config = FimDiagonalityConfig(hidden=(4,), steps=2, samples=20, seeds=(1,))
    data = ANALYSIS.load(config, RunOptions())
    plain = list(ANALYSIS.measure(config, data, Workspace(Place(tmp_path / "a"))))
    (one,) = ANALYSIS.parts(config.model_copy(update={"streams": ("D5-5",)}))
    mine = list(ANALYSIS.measure(one, data, Workspace(Place(tmp_path / "b"))))
    assert [{**record, "stream": "D5-5"} for record in plain] == mine
    assert ANALYSIS.parts(config) == [config]


def test_published_numbers_are_for_one_stream_and_every_stream_has_verdicts():
    config = PRESETS["streams"].config
    extra = {"size": 9, "samples": 100, "test_accuracy": 0.9, "method": "exact", "ci95": 0.0} | dict.fromkeys(
        ("diag_sum", "diag_mean", "offdiag_abs_sum", "offdiag_abs_mean", "diag_share", "zero_fraction"), 0.5
    )
    extra |= {"paper_diag_mean": 0.5, "paper_offdiag_mean": 0.5}
    table = [{"stream": stream, **row, **extra} for stream in config.streams for row in found()]
    heat = [{"stream": "D9-1", "seed": 0, "zero_rows": 0, "names": ["a"], "counts": [1], "matrix": [[1.0]]}]
    made = ANALYSIS.report(Results(config, MNIST, {"table": table}, artifacts={"heat_map": heat}))
    assert len(made.tables) == 2 * 3 + 1
    assert [claim.text[:4] for claim in made.claims] == ["D5-5"] * 10 + ["D9-1"] * 7 + ["DP10"] * 7
    assert {claim.published for claim in made.claims[10:]} == {None}
    assert {claim.verdict for claim in made.claims if "exceeds" in claim.text} == {"reproduced"}
    assert {claim.verdict for claim in made.claims if "several" in claim.text} == {"not reproduced"}
    assert set(made.figures) == {*(f"sums_and_means_{stream}" for stream in config.streams), "heat_map_D9-1"}
    assert made.summary.columns[0].key == "stream"
