"""Table 2 of Gepperth and Wiech: which claims are judged, and when."""

import pytest

from curvlab.analyze.frame.subject import Subject
from curvlab.analyze.masq import table2
from curvlab.analyze.masq.fim_diagonality_options import PRESETS, FimDiagonalityConfig

MNIST = Subject("mnist", (1, 28, 28), 10, 28000, 10000)
NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias")


def found(**numbers):
    """Return records of three seeds, each with the same numbers for every tensor."""
    own = {"mean_ratio": 20.0, "paper_mean_ratio": 30.0, "sum_ratio": 2.0} | numbers
    return [{"parameter": name, "seed": seed} | own for seed in range(3) for name in NAMES]


def paper(**changed):
    config = PRESETS["paper"].config.model_copy(update=changed)
    return table2.conditions(config, MNIST)


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
    digits = table2.conditions(FimDiagonalityConfig(), Subject("digits", (1, 8, 8), 10, 720, 360))
    claims = table2.claims(found(), digits)
    assert {claim.verdict for claim in claims} == {"not tested"}
    assert {claim.reason for claim in claims} == {
        "data is digits, published: mnist; network is 64-30-30-10 network, published: 784-30-30-10 network; "
        "steps is 500, at least 1,000 is needed"
    }
    assert table2.identities(found(), digits) == []


def test_a_smaller_run_of_the_same_network_shows_a_direction():
    small = table2.conditions(PRESETS["cpu"].config, MNIST)
    (claim, *_) = table2.claims(found(), small)
    assert (claim.verdict, claim.scope) == ("reproduced", "direction, at samples 5,000, steps 1,000")
    (claim, *_) = table2.claims(found(), paper())
    assert (claim.verdict, claim.scope) == ("reproduced", "")


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
