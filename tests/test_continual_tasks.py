import pickle
from functools import partial

import numpy as np
import pytest
import torch

from curvlab import CurvlabError
from curvlab.continual import Task, permuted, rotated
from curvlab.continual.tasks import _rotate
from curvlab.data import Dataset, load


def images(channels=1, height=5, width=5, n=6) -> Dataset:
    x = torch.arange(1.0, n * channels * height * width + 1).reshape(n, channels, height, width)
    y = torch.arange(n) % 3
    return Dataset("images", x, y, x[:3] + 1000, y[:3], classes=("a", "b", "c"))


def vectors() -> Dataset:
    x, y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 1])
    return Dataset("vectors", x, y, x, y, classes=("a", "b"))


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
    # Where pixel 0 goes over 600 orders of 3 places: each place within 4 standard errors of a third.
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
    # A dot far from the centre has its centre of mass where the angle says, to within half a pixel.
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
    with pytest.raises(CurvlabError, match=r"only images .* shape \(3,\); take a permuted stream"):
        rotated(vectors(), tasks=2)
    with pytest.raises(CurvlabError, match="degrees must be a finite number, not inf"):
        rotated(images(), tasks=2, degrees=float("inf"))
