"""A few cases of benchmarks/peers, the test cases of other libraries, and that its comparison can fail."""

import pytest

from benchmarks.peers.__main__ import count, records
from benchmarks.peers.compare import run
from benchmarks.peers.reference import Reference
from benchmarks.peers.suites import KFAC, laplace

FEW = [
    ("curvlinops", "linear, one sample, cross entropy, sum"),
    ("curvlinops", "cross entropy, inputs by name"),
    ("backpack", "BatchNorm1d, classes"),
    ("eigenthings", "linear, classification"),
    ("laplace", "small, regression, one sample"),
]


@pytest.mark.parametrize(("suite", "words"), FEW)
def test_is_right_as_it_is(suite: str, words: str) -> None:
    record = next(records(suite, words))
    assert record["way"] == "as it is"
    assert record["right"] > 5
    assert "wrong" not in record


def test_what_the_peer_refuses() -> None:
    (record,) = records("curvlinops", "dropout")
    assert record["right"] == 1


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "second_moment", lambda _, vectors, empirical: 0.5 * vectors)
    found = run(next(iter(laplace.cases())), [("fisher", KFAC)])
    wrong = [label for labels in found["wrong"].values() for label in labels]
    assert wrong == ["ggn", "fisher", "empirical_fisher"]
    assert found["right"] == 5  # the Hessian, the diagonals, the factors and the Monte Carlo Fisher


def test_the_table() -> None:
    record = {"way": "as it is", "right": 3, "refused": {"why": ["a", "b"]}, "wrong": {"t = 9": ["c"]}}
    found = count([record, {"way": "rewritten", "not_run": "no package"}])
    assert (found["cases"], found["instances"], found["as it is"], found["refused"], found["wrong"]) == (1, 6, 3, 2, 1)
