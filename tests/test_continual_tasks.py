import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab import CurvlabError
from curvlab.continual.tasks import Task, _permute, _rotate, disjoint, permuted, rotated, split_classes, split_data
from curvlab.data import Dataset, load


def images(channels=1, height=5, width=5, n=6) -> Dataset:
    x = torch.arange(1.0, n * channels * height * width + 1).reshape(n, channels, height, width)
    y = torch.arange(n) % 3
    return Dataset("images", x, y, x[:3] + 1000, y[:3], classes=("a", "b", "c"))


def vectors() -> Dataset:
    x, y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 1])
    return Dataset("vectors", x, y, x, y, classes=("a", "b"))


def numbered(labels, test_labels=None, classes=4) -> Dataset:
    """Return a data set in which every input is its row (test rows from 1000 on)."""
    y = torch.tensor(labels)
    y_test = torch.arange(classes) if test_labels is None else torch.tensor(test_labels)
    x, x_test = torch.arange(len(y)).float()[:, None], 1000 + torch.arange(len(y_test)).float()[:, None]
    return Dataset("numbered", x, y, x_test, y_test, classes=tuple("abcdefgh"[:classes]))


def rows(samples) -> list[int]:
    return samples[0][:, 0].long().tolist()


EVERY_STREAM = [
    partial(permuted, tasks=3),
    partial(rotated, tasks=3, degrees=40.0),
    partial(disjoint, classes=[(7, 0, 3), (4,), (1, 2)]),
    partial(split_classes, tasks=5),
    partial(split_classes, tasks=5, seed=1),
    partial(split_data, tasks=3),
]


@pytest.mark.parametrize("make", [permuted, rotated])
def test_parts(make):
    data = images()
    for task in make(data, tasks=3, validation=2):
        for (x, y), expected in ((task.train, data.y_train[2:]), (task.validation, data.y_train[:2])):
            assert torch.equal(y, expected)
            assert x.shape == (len(y), 1, 5, 5)
        assert torch.equal(task.test[1], data.y_test)
        whole = make(data, tasks=3)[2].train[0]
        again = make(data, tasks=3, validation=2)[2]
        assert torch.equal(torch.cat([again.validation[0], again.train[0]]), whole)
    (alone,) = make(data, tasks=1)
    assert len(alone.validation[0]) == len(alone.validation[1]) == 0


@pytest.mark.parametrize("make", [permuted, rotated])
def test_the_seed_decides(make):
    data = load("digits")
    stream, same, other = (make(data, tasks=3, seed=seed) for seed in (1, 1, 2))
    longer = make(data, tasks=5, seed=1)
    state = torch.get_rng_state()
    for i in range(3):
        x = stream[i].train[0]
        assert torch.equal(x, same[i].train[0])
        assert torch.equal(x, longer[i].train[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stream[2].train[0], other[2].train[0])
    assert not torch.equal(stream[1].train[0], stream[2].train[0])


def test_permuted_is_one_order_for_every_sample():
    data = images()
    first, second, third = permuted(data, tasks=3, seed=3)
    assert torch.equal(first.train[0], data.x_train)
    order = (second.train[0][0].flatten() - data.x_train[0].min()).long()
    assert sorted(order.tolist()) == list(range(25))
    assert order.tolist() != list(range(25))
    for part, x in ((second.train[0], data.x_train), (second.test[0], data.x_test)):
        for sample, original in zip(part, x, strict=True):
            assert torch.equal(sample.flatten(), original.flatten()[order])
    assert not torch.equal(second.train[0], third.train[0])


def test_permuted_keeps_the_channels_of_a_pixel():
    data = images(channels=3, height=2, width=4)
    x = permuted(data, tasks=2)[1].train[0]
    pixels = {tuple(p) for p in data.x_train[0].flatten(1).T.tolist()}
    assert {tuple(p) for p in x[0].flatten(1).T.tolist()} == pixels
    assert not torch.equal(x, data.x_train)


def test_permuted_vectors():
    stream = permuted(vectors(), tasks=6)
    seen = {tuple(task.train[0][0].tolist()) for task in stream}
    assert seen <= {(a, b, c) for a in (0, 1, 2) for b in (0, 1, 2) for c in (0, 1, 2) if len({a, b, c}) == 3}
    assert len(seen) > 1


def test_orders_are_uniform():
    # Position of pixel 0 in 600 permutations of 3 pixels: each within 4 standard errors of a third.
    orders = [permuted(vectors(), tasks=2, seed=seed)[1].train[0][0].tolist().index(0.0) for seed in range(600)]
    counts = np.bincount(orders, minlength=3)
    assert np.abs(counts - 200).max() < 4 * (600 * 2 / 9) ** 0.5


def test_rotated_turns_counter_clockwise_about_the_centre():
    task = Task("quarter", images(), partial(_rotate, 90.0))
    x = images().x_train
    assert torch.equal(task.train[0], torch.rot90(x, 1, dims=(2, 3)))


def test_angles():
    for seed in range(20):
        names = [task.name for task in rotated(load("digits"), tasks=4, seed=seed, degrees=20.0)]
        angles = [float(name.removeprefix("rotated by ").removesuffix("°")) for name in names]
        for t, angle in enumerate(angles):
            assert 20 * (t - 1) - 0.05 <= angle <= 20 * t + 0.05


def test_rotated_is_by_its_angle():
    # The centre of mass of a dot far from the image centre is rotated by the angle, within half a pixel.
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 19:22, 35:38] = 1.0  # 16 to the right of the centre
    y = torch.zeros(1, dtype=torch.int64)
    data = Dataset("dot", x, y, x, y, classes=("a",))
    for task in rotated(data, tasks=6, seed=5, degrees=30.0):
        angle = np.deg2rad(float(task.name.removeprefix("rotated by ").removesuffix("°")))
        row, column = task.test[0][0, 0].nonzero().double().mean(dim=0).tolist()
        assert np.hypot(column - (20 + 16 * np.cos(angle)), row - (20 - 16 * np.sin(angle))) < 0.5


def test_nothing_is_copied_that_can_be_indexed():
    data = images()
    first, second = permuted(data, tasks=2, validation=1)
    for part, tensor in ((first.train[0], data.x_train), (first.train[1], data.y_train), (first.test[0], data.x_test)):
        assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    before = data.x_train.clone()
    second.train[0].zero_()
    assert torch.equal(data.x_train, before)
    assert second.dataset is data


def test_rows_by_index():
    data = images()
    task = Task("odd", data, train_rows=torch.tensor([3, 1]), test_rows=torch.tensor([2]))
    assert torch.equal(task.train[0], data.x_train[[3, 1]])
    assert task.train[1].tolist() == [0, 1]
    assert task.test[1].tolist() == [2]
    assert len(task.validation[0]) == 0


@pytest.mark.parametrize("make", [permuted, rotated])
def test_a_stream_can_be_sent_to_another_process(make):
    stream = make(images(), tasks=2)
    sent = pickle.loads(pickle.dumps(stream))
    assert torch.equal(sent[1].train[0], stream[1].train[0])


@pytest.mark.parametrize("make", [permuted, rotated])
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"tasks": 0}, "tasks must be at least 1, not 0"),
        ({"tasks": 2, "seed": -1}, "seed must be at least 0, not -1"),
        ({"tasks": 2, "validation": 6}, "cannot hold out 6 of the 6 training samples of images: choose 0 to 5"),
        ({"tasks": 2, "validation": -1}, "cannot hold out -1"),
    ],
)
def test_bad_arguments(make, arguments, fragment):
    with pytest.raises(CurvlabError, match=fragment):
        make(images(), **arguments)


def test_only_images_are_rotated():
    with pytest.raises(CurvlabError, match=r"only images .* shape \(3,\); use a permuted stream"):
        rotated(vectors(), tasks=2)
    with pytest.raises(CurvlabError, match="degrees must be a finite number, not inf"):
        rotated(images(), tasks=2, degrees=float("inf"))


# Samples of a task ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY_STREAM)
def test_first_samples_are_held_out_and_the_next_are_for_training(make):
    data = load("digits")
    for whole, task in zip(make(data), make(data, validation=20, samples=50), strict=True):
        for i in (0, 1):
            own = torch.cat([whole.validation[i], whole.train[i]])
            assert torch.equal(task.validation[i], own[:20])
            assert torch.equal(task.train[i], own[20:70])
            assert torch.equal(task.test[i], whole.test[i])
        assert task.sizes == {"train": 50, "validation": 20, "test": len(task.test[1])}


@pytest.mark.parametrize("make", EVERY_STREAM)
def test_no_held_out_sample_is_a_training_sample_of_any_task(make):
    stream = make(load("digits"), validation=30)
    learnt = {row for task in stream for row in task._rows["train"].tolist()}
    held_out = {row for task in stream for row in task._rows["validation"].tolist()}
    assert len(learnt) > 30
    assert len(held_out) >= 30
    assert not learnt & held_out


@pytest.mark.parametrize("make", [permuted, rotated])
def test_samples_are_those_of_a_shortened_data_set(make):
    data = load("digits")
    short = replace(data, x_train=data.x_train[:300], y_train=data.y_train[:300])
    for task, same in zip(make(data, tasks=3, samples=300), make(short, tasks=3), strict=True):
        assert torch.equal(task.train[0], same.train[0])
        assert torch.equal(task.train[1], same.train[1])


def test_take_is_a_part_of_train():
    data = images(n=12)
    index = torch.tensor([4, 0, 4])
    odd = Task("odd", data, torch.neg, train_rows=torch.arange(12) % 2 == 1)
    for task in (*permuted(data, tasks=2, validation=3), odd):
        x, y = task.take(index)
        assert torch.equal(x, task.train[0][index])
        assert torch.equal(y, task.train[1][index])


# Classes --------------------------------------------------------------------------------------------------------------


def test_disjoint():
    data = numbered([0, 1, 2, 3, 0, 1, 2, 3, 3, 1], test_labels=[3, 2, 1, 0, 0])
    first, second = disjoint(data, classes=[(3, 1), [0]], validation=1)
    assert (first.name, first.classes) == ("classes 3, 1", (3, 1))
    assert (rows(first.validation), rows(first.train), rows(first.test)) == ([1], [3, 5, 7, 8, 9], [1000, 1002])
    assert first.train[1].tolist() == [3, 1, 3, 3, 1]
    assert (second.name, second.classes) == ("class 0", (0,))
    assert (rows(second.validation), rows(second.train), rows(second.test)) == ([0], [4], [1003, 1004])


def test_the_lists_of_gepperth_and_wiech():
    data = load("digits")
    for lists in ([range(5), range(5, 10)], [range(9), [9]]):
        for task, present in zip(disjoint(data, classes=lists), lists, strict=True):
            assert task.classes == tuple(present)
            selected = data.select(list(present))
            assert torch.equal(task.train[0], selected.x_train)
            assert torch.equal(task.train[1], selected.y_train)
            assert torch.equal(task.test[0], selected.x_test)
            assert torch.equal(task.test[1], selected.y_test)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=20, max_size=60), st.sampled_from([1, 2, 3, 6]), st.sampled_from([None, 3]))
def test_split_classes_deals_out_all_samples(labels, tasks, seed):
    data = numbered(labels + list(range(6)), labels + list(range(6)), classes=6)
    stream = split_classes(data, tasks=tasks, seed=seed)
    assert sorted(label for task in stream for label in task.classes) == list(range(6))
    assert {len(task.classes) for task in stream} == {6 // tasks}
    assert sorted(row for task in stream for row in rows(task.train)) == list(range(len(data.y_train)))
    assert sorted(row for task in stream for row in rows(task.test)) == [1000 + i for i in range(len(data.y_test))]
    for task in stream:
        for y in (task.train[1], task.test[1]):
            assert set(y.tolist()) == set(task.classes)


def test_order_of_the_classes():
    data = load("digits")
    assert [task.classes for task in split_classes(data, tasks=2)] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    orders = {tuple(task.classes for task in split_classes(data, tasks=5, seed=seed)) for seed in range(20)}
    assert len(orders) == 20
    # The order of the classes does not depend on the number of tasks.
    fives = split_classes(data, tasks=2, seed=4)
    ones = split_classes(data, tasks=10, seed=4)
    assert fives[0].classes == tuple(sorted(task.classes[0] for task in ones[:5]))


def test_class_orders_are_uniform():
    data = numbered([0, 1, 2, 3])
    first = [split_classes(data, tasks=4, seed=seed)[0].classes[0] for seed in range(400)]
    assert np.abs(np.bincount(first, minlength=4) - 100).max() < 4 * (400 * 3 / 16) ** 0.5


def test_names_of_class_tasks():
    data = load("digits")
    names = [task.name for task in disjoint(data, classes=[(9, 1, 4, 3, 0, 2), (5, 6), (7,)])]
    assert names == ["classes 9, 1, 4, ..., 2", "classes 5, 6", "class 7"]
    assert split_classes(data, tasks=1)[0].name == "classes 0 to 9"


def test_streams_of_whole_data_sets_name_no_classes():
    for make in (permuted, rotated, split_data):
        assert {task.classes for task in make(load("digits"), tasks=2)} == {None}


# Split by data --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(2, 40), st.data())
def test_split_data_deals_out_all_samples(n, draw):
    tasks = draw.draw(st.integers(1, n))
    data = numbered([i % 4 for i in range(n)])
    skew = draw.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    stream = split_data(data, tasks=tasks, seed=draw.draw(st.integers(0, 5)), skew=skew)
    assert sorted(row for task in stream for row in rows(task.train)) == list(range(n))
    sizes = {task.sizes["train"] for task in stream}
    assert max(sizes) - min(sizes) <= 1
    for task in stream:
        assert rows(task.test) == [1000, 1001, 1002, 1003]
        assert task.train[1].tolist() == [row % 4 for row in rows(task.train)]


def test_split_data_is_drawn():
    data = numbered([0] * 50 + [1] * 50)  # grouped by class, which does not matter here
    first, other = split_data(data, tasks=5, seed=1), split_data(data, tasks=5, seed=2)
    assert rows(first[0].train) == rows(split_data(data, tasks=5, seed=1)[0].train) != rows(other[0].train)
    for task in split_data(data, tasks=5, seed=1, validation=8):
        assert set(task.validation[1].tolist()) == {0, 1}
    # Each sample is in the first of five tasks for a fifth of the seeds.
    times = sum(0 in rows(split_data(data, tasks=5, seed=seed)[0].train) for seed in range(200))
    assert abs(times - 40) < 4 * (200 * 4 / 25) ** 0.5


@pytest.mark.parametrize(("skew", "own"), [(1.0, 50), (0.8, 42)])
def test_skewed_parts_have_their_share_of_few_classes(skew, own):
    data = numbered([i % 4 for i in range(200)])
    stream = split_data(data, tasks=4, seed=3, skew=skew)
    most = [task.train[1].bincount(minlength=4) for task in stream]
    # The share of a part is one class (40 of 50 samples), the others are of all classes in equal numbers.
    assert [int(counts.max()) for counts in most] == pytest.approx([own] * 4, abs=0 if skew == 1 else 10)
    assert sorted(int(counts.argmax()) for counts in most) == [0, 1, 2, 3]
    again = split_data(data, tasks=4, seed=4, skew=skew)
    assert [rows(task.train) for task in stream] != [rows(task.train) for task in again]


def test_the_held_out_samples_of_a_skewed_part_have_its_classes():
    data = numbered([i % 4 for i in range(200)])
    for task in split_data(data, tasks=4, skew=0.8, validation=20):
        shares = [y.bincount(minlength=4) / len(y) for _, y in (task.train, task.validation)]
        assert shares[0].argmax() == shares[1].argmax()
        assert float((shares[0] - shares[1]).abs().max()) < 0.35


def test_skew_is_a_share():
    with pytest.raises(CurvlabError, match=r"skew must be between 0 and 1, not 1\.5"):
        split_data(numbered([0, 1]), tasks=2, skew=1.5)


# What is shared -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY_STREAM)
def test_tasks_hold_the_data_set_and_rows_only(make):
    data = load("digits")
    state = torch.get_rng_state()
    for task in make(data):
        assert task.dataset is data
        held = [value for value in vars(task).values() if isinstance(value, torch.Tensor)] + [*task._rows.values()]
        assert all(tensor.dtype == torch.int64 and tensor.ndim == 1 for tensor in held)
    assert torch.equal(torch.get_rng_state(), state)


def test_shares():
    data = load("digits")
    first, second = split_data(data, tasks=2)
    assert first.shares(second, "test")
    assert not first.shares(second, "train")
    again = split_data(data, tasks=2)[0]
    assert first.shares(again, "train")
    assert not first.shares(split_data(load("digits"), tasks=2)[0], "test")
    plain, turned = permuted(data, tasks=2)
    assert plain.shares(first, "test")
    assert not plain.shares(turned, "test")
    assert turned.shares(turned, "test")


# Fingerprints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY_STREAM)
def test_equal_streams_have_equal_fingerprints(make):
    stream, same = make(load("digits")), make(load("digits"))
    fingerprints = [task.fingerprint() for task in stream]
    assert fingerprints == [task.fingerprint() for task in same]
    assert fingerprints == [replace(task, name="other").fingerprint() for task in stream]
    assert fingerprints == [task.fingerprint() for task in pickle.loads(pickle.dumps(stream))]
    assert len(set(fingerprints)) == len(stream)


def test_other_streams_have_other_fingerprints():
    data = load("digits")
    brighter = replace(data, x_train=torch.cat([data.x_train[:-1], data.x_train[-1:] + 0.5]))
    last = [
        permuted(data, tasks=2),
        permuted(data, tasks=2, seed=1),
        permuted(data, tasks=3),
        permuted(data, tasks=2, validation=1),
        permuted(data, tasks=2, samples=100),
        permuted(brighter, tasks=2),
        rotated(data, tasks=4),
        rotated(data, tasks=4, degrees=20.0),
        disjoint(data, classes=[(0, 1), (2, 3)]),
        disjoint(data, classes=[(0, 1), (3, 2)]),
        split_classes(data, tasks=5, seed=0),
        split_classes(data, tasks=5, seed=1),
        split_data(data, tasks=2),
        split_data(data, tasks=2, seed=1),
        (Task("any", data),),
        (Task("any", data, lambda x: -x),),
        (Task("any", data, lambda x: 2 * x),),
        (Task("any", data, test_rows=slice(1, None)),),
        (Task("any", data, classes=tuple(range(10))),),
    ]
    assert len({stream[-1].fingerprint() for stream in last}) == len(last)


def test_permutations_of_blank_samples_have_different_fingerprints():
    x, y = torch.zeros(200, 9), torch.arange(200) % 2
    x[0, 0] = x[150, 1] = 1.0
    data = Dataset("blank", x, y, x, y, classes=("a", "b"))
    orders = (torch.arange(9), torch.tensor([0, 2, 1, 3, 4, 5, 6, 7, 8]))
    assert len({Task("a", data, partial(_permute, order)).fingerprint() for order in orders}) == 2


def test_the_form_of_the_rows_does_not_matter():
    data = images()
    forms = (slice(1, 4), torch.tensor([1, 2, 3]), torch.tensor([False, True, True, True, False, False]))
    assert len({Task("a", data, train_rows=form).fingerprint() for form in forms}) == 1
    assert (
        Task("a", data, train_rows=torch.tensor([3, 2, 1])).fingerprint()
        != Task("a", data, train_rows=forms[0]).fingerprint()
    )


def test_a_data_set_is_hashed_once_and_not_kept(monkeypatch):
    from curvlab.continual.task import _FINGERPRINTS

    hashed = []
    own = Dataset.fingerprint
    monkeypatch.setattr(Dataset, "fingerprint", lambda self: hashed.append(self.name) or own(self))
    data = images()
    before = len(_FINGERPRINTS)
    for task in permuted(data, tasks=4):
        task.fingerprint()
    assert hashed == ["images"]
    assert len(_FINGERPRINTS) == before + 1
    del task, data
    hashed.clear()
    assert len(_FINGERPRINTS) == before


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY_STREAM)
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"validation": -1}, r"cannot hold out -1 of the \d+ training samples of digits"),
        ({"validation": 1437}, r"cannot hold out 1437 of the (\d+) training samples of digits.*: choose 0 to \d+"),
        ({"samples": 0}, r"cannot train on 0 of the (\d+) training samples of digits.*: choose 1 to \1"),
        ({"validation": 9, "samples": 1429}, r"train on 1429 of .* digits.*, of which 9 are held out: choose 1 to"),
    ],
)
def test_bad_sizes(make, arguments, fragment):
    with pytest.raises(CurvlabError, match=fragment):
        make(load("digits"), **arguments)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (partial(disjoint, classes=[]), "classes has no lists; give one list for each task"),
        (partial(disjoint, classes=[(0,), ()]), "list of classes of task 2 is empty"),
        (partial(disjoint, classes=[(0,), (1, 10)]), "there is no class 10; digits has the classes 0 to 9"),
        (partial(disjoint, classes=[(0,), (-1,)]), "there is no class -1"),
        (partial(disjoint, classes=["01"]), "there is no class 0; digits"),
        (partial(disjoint, classes=[(0, 3), (1, 3)]), r"class 3 is given twice \(task 1 and task 2\)"),
        (partial(disjoint, classes=[(0, 0)]), r"class 0 is given twice \(task 1 and task 1\)"),
        (partial(disjoint, classes=[range(5)], samples=4), "task 'classes 0 to 4' has no training sample of class"),
        (
            partial(disjoint, classes=[(0,), (1,)], samples=144),
            r"cannot train on 144 of the 142 training samples of digits in task 'class 0': choose 1 to 142",
        ),
        (
            partial(split_classes, tasks=20),
            r"the 10 classes .* cannot be split equally into 20 tasks: choose 1, 2,",
        ),
        (
            partial(split_classes, tasks=3),
            "equally into 3 tasks: choose 1, 2, 5, 10, or give disjoint.* lists of classes",
        ),
        (partial(split_classes, tasks=0), "tasks must be at least 1, not 0"),
        (partial(split_classes, tasks=2, seed=-1), "seed must be at least 0, not -1"),
        (partial(split_data, tasks=0), "tasks must be at least 1, not 0"),
        (partial(split_data, tasks=2, seed=-1), "seed must be at least 0, not -1"),
        (partial(split_data, tasks=1438), "cannot split the 1437 training samples of digits into 1438 tasks"),
        (partial(split_data, tasks=10, validation=143), "hold out 143 of the 143 training samples of digits in part 8"),
    ],
)
def test_bad_splits(make, fragment):
    with pytest.raises(CurvlabError, match=fragment):
        make(load("digits"))


def test_classes_without_samples():
    data = numbered([0, 2, 0, 2], test_labels=[0, 1])
    with pytest.raises(CurvlabError, match="numbered has no training sample of class 1; remove it from the lists"):
        split_classes(data, tasks=2)
    with pytest.raises(CurvlabError, match="task 'class 2' has no test sample"):
        disjoint(data, classes=[(0,), (2,)])


@pytest.mark.parametrize("arguments", [{"validation": 2}, {"samples": 4}])
@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
def test_first_samples_of_a_grouped_data_set_are_refused(labels, arguments):
    data = numbered(labels, classes=2)
    for make in (partial(permuted, tasks=2), partial(disjoint, classes=[(0, 1)])):
        with pytest.raises(CurvlabError, match=r"training samples of numbered.* are grouped by class.*: shuffle"):
            make(data, **arguments)
        assert make(data)[0].sizes["train"] == 6
    assert split_classes(data, tasks=2, validation=1)[0].sizes["validation"] == 1
    mixed = numbered(labels + labels[:1], classes=2)
    assert rows(permuted(mixed, tasks=1, samples=3)[0].train) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"validation_rows": slice(2)}, "task 'own' has 2 samples in train_rows and in validation_rows; remove them"),
        ({"train_rows": slice(0)}, "task 'own' has no train sample"),
        ({"test_rows": torch.zeros(4, dtype=torch.bool)}, "task 'own' has no test sample"),
        ({"train_rows": torch.tensor([8])}, r"train_rows of task 'own' must be .* a mask of 8 samples \("),
        ({"train_rows": torch.tensor([0.5])}, "train_rows of task 'own' must be a slice, indices or a mask"),
        (
            {"validation_rows": slice(None, None, -1)},
            "validation_rows of task 'own' must be a slice, indices or a mask",
        ),
        ({"test_rows": torch.ones(3, dtype=torch.bool)}, "test_rows of task 'own' must be .* a mask of 4 samples"),
        ({"test_rows": 2}, "test_rows of task 'own' must be .* of 4 samples, not 2"),
        ({"classes": ()}, r"classes of task 'own' must be distinct and from 0 to 3, not \(\)"),
        ({"classes": (0, 1, 2, 3, 3)}, "must be distinct"),
        ({"classes": (0, 1, 2, 3, 4)}, "must be distinct and from 0 to 3"),
        ({"classes": (0, 1, 2)}, "has train samples of class 3, which is not in its classes; remove .* train_rows"),
        (
            {"classes": (0, 1, 2), "train_rows": torch.tensor([0, 1, 2])},
            "has test samples of class 3, which is not in its classes; remove them from test_rows",
        ),
        ({"classes": (0, 1, 2, 3), "train_rows": slice(3)}, "has no training sample of class 3; add samples of it"),
    ],
)
def test_bad_tasks(arguments, fragment):
    with pytest.raises(CurvlabError, match=fragment):
        Task("own", numbered([0, 1, 2, 3, 0, 1, 2, 3]), **arguments)
