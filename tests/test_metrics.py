"""The metrics of a stream against hand-computed matrices and one plain loop."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab import CurvlabError, UnsupportedError
from curvlab.continual.metrics import (
    acc,
    average_accuracy,
    bwt,
    forgetting,
    forgetting_per_task,
    fwt,
    learning_accuracy,
    summary,
)

NAN = math.nan
HAND = torch.tensor([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.75, 0.6, 1.0]], dtype=torch.float64)
INITIAL = torch.tensor([0.3, 0.1, 0.05], dtype=torch.float64)


def close(value, expected):
    return math.isclose(value, expected, rel_tol=0, abs_tol=1e-12)


@st.composite
def matrices(draw, smallest=1):
    size = draw(st.integers(smallest, 6))
    row = st.lists(st.floats(0, 1), min_size=size, max_size=size)
    return torch.tensor(draw(st.lists(row, min_size=size, max_size=size)), dtype=torch.float64)


def lower(a):
    """Return the accuracies of a run that evaluates only the tasks so far."""
    return torch.where(torch.ones_like(a).tril().bool(), a, torch.nan)


def test_by_hand():
    assert torch.allclose(
        average_accuracy(HAND), torch.tensor([0.9, 0.75, 2.35 / 3], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert close(acc(HAND), 2.35 / 3)
    assert close(bwt(HAND), ((0.75 - 0.9) + (0.6 - 0.8)) / 2)
    assert close(fwt(HAND, INITIAL), ((0.2 - 0.1) + (0.3 - 0.05)) / 2)
    assert close(forgetting(HAND), ((0.9 - 0.75) + (0.8 - 0.6)) / 2)
    assert close(learning_accuracy(HAND), (0.9 + 0.8 + 1.0) / 3)
    found = summary(HAND, INITIAL)
    assert found == {
        "acc": acc(HAND),
        "bwt": bwt(HAND),
        "fwt": fwt(HAND, INITIAL),
        "forgetting": forgetting(HAND),
        "learning_accuracy": learning_accuracy(HAND),
    }
    assert {type(value) for value in found.values()} == {float}


def test_the_best_is_not_always_the_first():
    a = torch.tensor([[0.5, NAN, NAN], [0.9, 0.6, NAN], [0.7, 0.8, 0.9]], dtype=torch.float64)
    assert close(forgetting(a), ((0.9 - 0.7) + (0.6 - 0.8)) / 2)
    assert close(forgetting(a, include_last=True), (0.9 - 0.7) / 2)
    assert close(bwt(a), ((0.7 - 0.5) + (0.8 - 0.6)) / 2)


@settings(deadline=None)
@given(matrices(smallest=2))
def test_equal_to_plain_loops(a):
    last, size, values = len(a) - 1, len(a), a.tolist()
    assert close(acc(a), sum(values[last]) / size)
    assert close(bwt(a), sum(values[last][i] - values[i][i] for i in range(last)) / last)
    zero = torch.zeros(size)
    assert close(fwt(a, zero), sum(values[i - 1][i] for i in range(1, size)) / last)
    best = [max(values[t][i] for t in range(i, last)) for i in range(last)]
    assert close(forgetting(a), sum(best[i] - values[last][i] for i in range(last)) / last)
    best = [max(values[t][i] for t in range(i, size)) for i in range(last)]
    assert close(forgetting(a, include_last=True), sum(best[i] - values[last][i] for i in range(last)) / last)
    assert close(learning_accuracy(a), sum(values[i][i] for i in range(size)) / size)
    for t, value in enumerate(average_accuracy(a).tolist()):
        assert close(value, sum(values[t][: t + 1]) / (t + 1))


@settings(deadline=None)
@given(matrices(smallest=2))
def test_relations(a):
    assert close(acc(a), float(average_accuracy(a)[-1]))
    assert -bwt(a) <= forgetting(a) + 1e-12  # the best is at least the first
    assert forgetting(a, include_last=True) >= max(forgetting(a), 0) - 1e-12
    # ACC = LA + BWT (T - 1) / T
    assert close(acc(a), learning_accuracy(a) + bwt(a) * (len(a) - 1) / len(a))
    two = a[:2, :2]
    assert close(forgetting(two), -bwt(two))
    for include_last in (False, True):
        of_tasks = forgetting_per_task(a, include_last=include_last)
        assert (of_tasks.shape, of_tasks.dtype) == ((len(a),), torch.float64)
        assert of_tasks.isnan().tolist() == [False] * (len(a) - 1) + [True]
        assert close(float(of_tasks[:-1].mean()), forgetting(a, include_last=include_last))


@settings(deadline=None)
@given(matrices(smallest=2), st.randoms(use_true_random=False), st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_another_order_and_more_rows_are_the_same_metrics(a, random, evaluations):
    """Tasks learnt in another order, with evaluations during each task, against the plain matrix."""
    count, initial = len(a), torch.linspace(0, 1, len(a)).double()
    order = random.sample(range(count), count)
    rows, tasks = [], []
    for t, task in enumerate(order):
        for left in reversed(range(evaluations[t])):
            row = torch.rand(count).double() if left else torch.empty(count).double()
            if not left:
                row[order] = a[t]
            rows.append(row)
            tasks.append(task)
    matrix, moved = torch.stack(rows), torch.empty(count).double()
    moved[order] = initial
    found = summary(matrix, moved, tasks=tasks)
    for name, value in summary(a, initial).items():
        assert close(found[name], value), name
    assert close(forgetting(matrix, include_last=True, tasks=tasks), forgetting(a, include_last=True))
    assert torch.allclose(forgetting_per_task(matrix, tasks=tasks)[order], forgetting_per_task(a), equal_nan=True)
    means = average_accuracy(matrix, tasks=torch.tensor(tasks).tolist())
    for r, row in enumerate(matrix):
        assert close(float(means[r]), float(row[list(set(tasks[: r + 1]))].mean()))


@settings(deadline=None)
@given(matrices(smallest=2))
def test_accuracies_before_a_task_is_learnt_matter_to_forward_transfer_only(a):
    measured = lower(a)
    found, expected = summary(measured, torch.zeros(len(a))), summary(a)
    assert math.isnan(found.pop("fwt"))
    del expected["fwt"]
    assert found == expected
    assert torch.equal(average_accuracy(measured), average_accuracy(a))


NEEDED = {
    "acc": lambda t, i, last: t == last,
    "bwt": lambda t, i, last: i < last and t in (i, last),
    "fwt": lambda t, i, last: t == i - 1,
    "forgetting": lambda t, i, last: i < last and t >= i,
    "learning_accuracy": lambda t, i, last: t == i,
}


@pytest.mark.parametrize("t", range(4))
@pytest.mark.parametrize("i", range(4))
def test_a_missing_accuracy_makes_only_metrics_that_need_it_nan(t, i):
    a = torch.rand(4, 4, dtype=torch.float64)
    initial = torch.rand(4).double()
    expected = summary(a, initial)
    a[t, i] = NAN
    for name, value in summary(a, initial).items():
        if NEEDED[name](t, i, 3):
            assert math.isnan(value), name
        else:
            assert value == expected[name], name
    assert average_accuracy(a).isnan().tolist() == [t == row and i <= t for row in range(4)]


def test_a_task_that_is_learnt_again():
    a = torch.tensor([[0.9, 0.2], [0.5, 0.8], [0.95, 0.6], [0.7, 0.75]], dtype=torch.float64)
    tasks = [0, 1, 0, 1]
    assert average_accuracy(a, tasks=tasks).tolist() == pytest.approx([0.9, 0.65, 0.775, 0.725], abs=1e-12)
    assert close(acc(a, tasks=tasks), 0.725)
    assert close(forgetting(a, tasks=tasks), 0.95 - 0.7)  # of task 0, the best before the end
    assert forgetting_per_task(a, tasks=tasks).isnan().tolist() == [False, True]
    assert close(forgetting(a[:3], tasks=tasks[:3]), 0.8 - 0.6)
    assert close(fwt(a, torch.tensor([0.0, 0.1], dtype=torch.float64), tasks=tasks), 0.2 - 0.1)
    for metric in (bwt, learning_accuracy):
        with pytest.raises(UnsupportedError, match="task 0 is learnt several times: use acc or forgetting"):
            metric(a, tasks=tasks)
    found = summary(a, torch.tensor([0.0, 0.1], dtype=torch.float64), tasks=tasks)
    assert {name for name, value in found.items() if math.isnan(value)} == {"bwt", "learning_accuracy"}


def test_a_stream_that_stopped_early():
    measured = HAND[:2]
    assert torch.equal(average_accuracy(measured), average_accuracy(HAND)[:2])
    assert fwt(measured, INITIAL) == fwt(HAND, INITIAL)  # which never uses the last row
    for metric in (acc, bwt, forgetting, forgetting_per_task, learning_accuracy):
        with pytest.raises(UnsupportedError, match="after all 3 tasks, but no row is after task 2: leave out"):
            metric(measured)
    for few in (HAND[:1], HAND[[0, 0]]):
        with pytest.raises(UnsupportedError, match="fwt is defined after all 3 tasks"):
            fwt(few, INITIAL, tasks=[0] * len(few))
    with pytest.raises(UnsupportedError, match="no row is after task 1"):
        fwt(HAND[:1], INITIAL)
    found = summary(measured, INITIAL)
    assert close(found.pop("fwt"), fwt(HAND, INITIAL))
    assert all(math.isnan(value) for value in found.values())
    assert summary(measured[:, :2], INITIAL[:2])["acc"] == 0.75  # the way out


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ([0, 1], r"tasks must give the task of each of the 3 rows, a whole number below 3, not \[0, 1\]"),
        (3, "whole number below 3, not 3"),
        ([0, 1, 3], r"not \[0, 1, 3\]"),
        ([0, 1, -1], "a task of a row must be a whole number from 0, not -1"),
        ([0, 1, 1.5], "a task of a row must be a whole number from 0, not 1.5"),
    ],
)
def test_tasks_that_do_not_fit(tasks, told):
    for metric in (average_accuracy, acc, bwt, partial(fwt, initial=INITIAL), forgetting, learning_accuracy, summary):
        with pytest.raises(CurvlabError, match=told):
            metric(HAND, tasks=tasks)


@pytest.mark.parametrize("i", range(4))
def test_a_missing_initial_accuracy(i):
    initial = torch.rand(4)
    initial[i] = NAN
    assert math.isnan(fwt(torch.rand(4, 4), initial)) == (i > 0)


def test_joint_training_has_its_last_row_only():
    a = torch.full((3, 3), NAN)
    a[-1] = torch.tensor([0.5, 0.75, 1.0])
    found = summary(a)
    assert found.pop("acc") == 0.75
    assert all(math.isnan(value) for value in found.values())
    assert average_accuracy(a).isnan().tolist() == [True, True, False]


def test_one_task():
    found = summary(torch.tensor([[0.5]]), torch.tensor([0.1]))
    assert (found.pop("acc"), found.pop("learning_accuracy")) == (0.5, 0.5)
    assert all(math.isnan(value) for value in found.values())
    assert math.isnan(forgetting(torch.tensor([[0.5]]), include_last=True))


def test_without_initial_accuracies_forward_transfer_is_unknown():
    assert math.isnan(summary(HAND)["fwt"])


def test_single_precision_and_whole_numbers():
    assert close(acc(torch.tensor([[1, 0], [0, 1]])), 0.5)
    assert average_accuracy(HAND.float()).dtype == torch.float64
    assert close(bwt(torch.tensor([[100, 0], [40, 90]])), -60)
    before = HAND.clone()
    summary(HAND, INITIAL)
    assert torch.equal(HAND, before)


@pytest.mark.parametrize(
    ("accuracy", "fragment"),
    [
        (torch.rand(3), r"accuracy must be a matrix \(T, T\).* not of shape \(3,\)"),
        ([[0.5]], r"not \[\[0\.5\]\]"),
        (torch.rand(3, 2), r"accuracy has 3 rows for 2 tasks: give the task of each row"),
        (torch.rand(0, 0), r"not of shape \(0, 0\)"),
        (torch.tensor([[math.inf]]), "an accuracy is infinite; use NaN for accuracies that were not measured"),
    ],
)
@pytest.mark.parametrize(
    "metric",
    [
        average_accuracy,
        acc,
        bwt,
        partial(fwt, initial=INITIAL),
        forgetting,
        forgetting_per_task,
        learning_accuracy,
        summary,
    ],
)
def test_invalid_accuracy_matrices_are_refused(metric, accuracy, fragment):
    with pytest.raises(CurvlabError, match=fragment):
        metric(accuracy)


@pytest.mark.parametrize("initial", [torch.rand(2), torch.rand(3, 1), torch.tensor(0.1), [0.1] * 3])
def test_initial_accuracies_that_do_not_fit(initial):
    with pytest.raises(CurvlabError, match=r"one accuracy per task, shape \(3,\), not"):
        summary(HAND, initial)
