"""Buffers of past samples: the reservoir is uniform, and the ring has the most recent samples."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from curvlab.continual.buffers import Reservoir, Ring
from curvlab.continual.checkpoint import count_bytes
from curvlab.errors import CurvlabError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(first: int, count: int) -> dict[str, Tensor]:
    numbers = torch.arange(first, first + count)
    return {"x": numbers[:, None].double() * torch.ones(3), "number": numbers}


@pytest.mark.parametrize("batches", [[1] * 30, [30], [7, 7, 7, 7, 2], [3, 20, 7]])
def test_a_reservoir_is_uniform(batches: list[int]) -> None:
    """Each of 30 rows is equally often among the 5 stored rows, over many seeds and batch sizes."""
    seeds = 1200
    counts = torch.zeros(30)
    for seed in range(seeds):
        memory, source, seen = Reservoir(5), generator(seed), 0
        for size in batches:
            memory.add(numbered(seen, size), source)
            seen += size
        held = memory.rows["number"]
        assert len(held.unique()) == len(memory) == 5
        counts[held] += 1
    # Five of thirty without replacement: the covariance of the counts is singular, which the factor corrects.
    expected = seeds * 5 / 30
    statistic = float(((counts - expected).square() / expected).sum()) * (29 / 25)
    assert stats.chi2.sf(statistic, 29) > 1e-3


def test_places_of_a_reservoir_are_uniform_too() -> None:
    counts = torch.zeros(3, 12)
    for seed in range(3000):
        memory, source = Reservoir(3), generator(seed)
        for first in range(0, 12, 4):
            memory.add(numbered(first, 4), source)
        counts[torch.arange(3), memory.rows["number"]] += 1
    # A row of the first three stays in its place; of the others each has every place as often.
    later = counts[:, 3:]
    assert stats.chi2.sf(float(((later - 250).square() / 250).sum()), 26) > 1e-3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_rows_of_a_reservoir_stay_together(sizes: list[int], capacity: int) -> None:
    memory, seen = Reservoir(capacity), 0
    for size in sizes:
        memory.add(numbered(seen, size), generator(seen))
        seen += size
    assert (len(memory), memory.seen) == (min(capacity, seen), seen)
    drawn = memory.draw(100, generator())
    assert torch.equal(drawn["x"][:, 1].long(), drawn["number"])
    assert len(set(drawn["number"].tolist())) == len(memory)
    assert set(drawn["number"].tolist()) <= set(range(seen))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 4), st.data())
def test_a_ring_keeps_the_last_of_each_class_and_task(
    entries: list[tuple[int, int]], per_class: int, data: st.DataObject
) -> None:
    memory, last = Ring(per_class), defaultdict(list)
    start = 0
    while start < len(entries):
        size = data.draw(st.integers(1, len(entries) - start))
        task, y = torch.tensor(entries[start : start + size]).unbind(1)
        memory.add(numbered(start, size) | {"task": task, "y": y})
        start += size
    for number, key in enumerate(entries):
        last[key].append(number)
    kept = {key: numbers[-per_class:] for key, numbers in last.items()}
    for before in (None, 0, 1, 2, 3):
        expected = sorted(n for (task, _), part in kept.items() if before is None or task < before for n in part)
        drawn = memory.draw(1000, generator(), before)
        assert sorted(drawn["number"].tolist() if drawn else []) == expected
        if drawn:
            assert torch.equal(drawn["x"][:, 1].long(), drawn["number"])
            keys = list(zip(drawn["task"].tolist(), drawn["y"].tolist(), strict=True))
            assert keys == [entries[n] for n in drawn["number"]]
    assert len(memory) == sum(map(len, kept.values()))


@pytest.mark.parametrize("kind", ["reservoir", "ring"])
def test_draws_are_uniform_and_without_replacement(kind: str) -> None:
    rows = numbered(0, 10) | {"task": torch.zeros(10).long(), "y": torch.arange(10) % 2}
    memory: Reservoir | Ring = Reservoir(10) if kind == "reservoir" else Ring(5)
    memory.add(rows, generator())
    counts, source = torch.zeros(10), generator(1)
    for _ in range(2000):
        drawn = memory.draw(3, source)["number"]
        assert len(drawn.unique()) == 3
        counts[drawn] += 1
    assert stats.chi2.sf(float(((counts - 600).square() / 600).sum()) * 9 / 7, 9) > 1e-3


@pytest.mark.parametrize("memory", [Reservoir(4), Ring(2)])
def test_rows_are_copied_and_detached(memory: Reservoir | Ring) -> None:
    x = torch.ones(3, 2, requires_grad=True)
    rows = {"x": x * 2, "y": torch.arange(3), "task": torch.zeros(3).long()}
    assert memory.draw(5, generator()) == {}
    memory.add(rows, generator())
    rows["y"].zero_()
    drawn = memory.draw(5, generator())
    assert sorted(drawn["y"].tolist()) == [0, 1, 2]
    assert not drawn["x"].requires_grad
    drawn["x"].zero_()
    assert bool((memory.draw(5, generator())["x"] == 2).all())


@pytest.mark.parametrize("memory", [Reservoir(10**5), Ring(10**5), Reservoir(150), Ring(25)])
def test_memory_grows_with_the_stored_rows(memory: Reservoir | Ring) -> None:
    """A row of ``numbered`` has 32 bytes, ``task`` and ``y`` 16 more."""
    most = 150 if isinstance(memory, Reservoir) else 6 * 25
    for first in range(0, 1000, 10):
        numbers = torch.arange(first, first + 10)
        memory.add(numbered(first, 10) | {"task": numbers // 5 % 2, "y": numbers % 3}, generator(first))
        whole = (memory.capacity if isinstance(memory, Reservoir) else memory.per_class) == 10**5
        filled = len(memory)
        assert filled == (first + 10 if whole else min(first + 10, most))
        assert 48 * filled <= count_bytes(vars(memory)) <= 48 * (2 * filled if whole else min(2 * filled, most))


def test_draws_do_not_depend_on_how_memory_grows() -> None:
    """The expected values are from a version that allocated all places at the start."""
    memory, source = Reservoir(40), generator(3)
    for first in range(0, 90, 9):
        memory.add(numbered(first, 9), source)
    assert memory.draw(6, source)["number"].tolist() == [75, 57, 85, 18, 28, 29]
    ring = Ring(3)
    for first in range(0, 90, 9):
        numbers = torch.arange(first, first + 9)
        ring.add(numbered(first, 9) | {"task": numbers // 45, "y": numbers * 7 % 4})
    assert ring.draw(6, source)["number"].tolist() == [42, 86, 36, 85, 37, 39]
    assert ring.draw(4, source, before=1)["number"].tolist() == [41, 44, 36, 35]


def test_sizes_are_checked() -> None:
    with pytest.raises(CurvlabError, match="capacity must be a whole number from 1, not 0"):
        Reservoir(0)
    with pytest.raises(CurvlabError, match=r"capacity must be a whole number from 1, not 2\.5"):
        Reservoir(2.5)  # type: ignore[arg-type]
    with pytest.raises(CurvlabError, match="per_class must be a whole number from 1, not -1"):
        Ring(-1)
