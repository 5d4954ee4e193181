"""Buffers of past samples: a reservoir over the whole stream, and a ring buffer for every class of every task.

References:
    Vitter (1985), Random sampling with a reservoir, algorithm R; Chaudhry et al. (2019), On tiny episodic memories in
    continual learning.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from curvlab.continual.options import check_whole

Rows = Mapping[str, Tensor]


class Reservoir:
    """Uniform random sample of all rows that were added.

    The allocated memory grows with the stored rows, to at most twice their size.

    Args:
        capacity: Maximum number of stored rows.

    Attributes:
        seen: Number of rows that were added.
        rows: Allocated tensors ``(M, ...)`` by name, of which the first ``len(self)`` rows are in use.

    Raises:
        CurvlabError: The capacity is not a whole number from 1.

    Examples:
        >>> memory = Reservoir(2)
        >>> memory.add({"x": torch.zeros(5, 3), "y": torch.arange(5)}, torch.Generator())
        >>> len(memory), memory.seen, memory.draw(8, torch.Generator())["x"].shape
        (2, 5, torch.Size([2, 3]))
    """

    def __init__(self, capacity: int) -> None:
        check_whole("capacity", capacity)
        self.capacity = capacity
        self.seen = 0
        self.rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, rows: Rows, generator: torch.Generator) -> None:
        """Add rows; the n-th row of all is stored with probability ``capacity / n``, at a random place.

        Args:
            rows: Tensors ``(N, ...)`` by name, with the same names in every call; they are copied.
            generator: Random generator on the CPU.
        """
        count = len(next(iter(rows.values())))
        # Row n = 1, 2, ... of all draws one of n places, and is stored if the place is below the capacity.
        order = torch.arange(self.seen, self.seen + count)
        drawn = (torch.rand(count, generator=generator, dtype=torch.float64) * (order + 1)).long()
        places = torch.where(order < self.capacity, order, drawn).tolist()
        self.seen += count
        self.rows = _grow(self.rows, rows, len(self), self.capacity)
        # If several rows have the same place, the last one stays, as if they were added one by one.
        _copy_rows(rows, {place: row for row, place in enumerate(places) if place < self.capacity}, self.rows)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return at most ``count`` rows, drawn without replacement; an empty dictionary if the buffer is empty.

        Args:
            count: Maximum number of rows.
            generator: Random generator on the CPU.
        """
        return _select_rows(torch.randperm(len(self), generator=generator)[:count], self.rows)


class Ring:
    """The most recent rows of each class of each task.

    The allocated memory grows with the stored rows, to at most twice their size.

    Args:
        per_class: Maximum number of stored rows per class of a task.

    Raises:
        CurvlabError: ``per_class`` is not a whole number from 1.

    Examples:
        >>> memory = Ring(2)
        >>> memory.add({"x": torch.arange(5.0), "y": torch.tensor([0, 0, 1, 0, 0]), "task": torch.zeros(5).long()})
        >>> memory.draw(8, torch.Generator())["x"].sort().values
        tensor([2., 3., 4.])
    """

    def __init__(self, per_class: int) -> None:
        check_whole("per_class", per_class)
        self.per_class = per_class
        #: For each task and class: the places of its ring.
        self.rings: dict[tuple[int, int], list[int]] = {}
        #: For each task and class: the number of rows that were added.
        self.seen: dict[tuple[int, int], int] = {}
        #: For each task: the places in use.
        self.filled: dict[int, list[int]] = {}
        self.rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return sum(map(len, self.filled.values()))

    def add(self, rows: Rows, generator: torch.Generator | None = None) -> None:
        """Add rows; they replace the oldest rows of their class and task.

        Args:
            rows: Tensors ``(N, ...)`` by name, with the same names in every call; they are copied. ``y`` is the class
                and ``task`` the task of each row.
            generator: Not used; accepted so that both buffers have the same interface.
        """
        del generator
        placed, held = {}, len(self)
        for row, key in enumerate(zip(rows["task"].tolist(), rows["y"].tolist(), strict=True)):
            ring, seen = self.rings.setdefault(key, []), self.seen.get(key, 0)
            if seen < self.per_class:
                ring.append(held)
                self.filled.setdefault(key[0], []).append(held)
                held += 1
            placed[ring[seen % self.per_class]] = row
            self.seen[key] = seen + 1
        self.rows = _grow(self.rows, rows, held, len(self.rings) * self.per_class)
        _copy_rows(rows, placed, self.rows)

    def draw(self, count: int, generator: torch.Generator, before: int | None = None) -> dict[str, Tensor]:
        """Return at most ``count`` rows, drawn without replacement; an empty dictionary if there are none.

        Args:
            count: Maximum number of rows.
            generator: Random generator on the CPU.
            before: Draw only from tasks before this one; None for all tasks.
        """
        places = [place for task, filled in self.filled.items() if before is None or task < before for place in filled]
        if not places:
            return {}
        chosen = torch.randperm(len(places), generator=generator)[:count].tolist()
        return _select_rows(torch.tensor([places[i] for i in chosen]), self.rows)


def _grow(places: dict[str, Tensor], rows: Rows, needed: int, most: int) -> dict[str, Tensor]:
    """Return tensors with room for ``needed`` rows; the size is doubled, so that rows are rarely copied."""
    have = len(next(iter(places.values()))) if places else 0
    if needed <= have:
        return places
    missing = min(max(needed, 2 * have), most) - have
    more = {name: part.new_zeros((missing, *part.shape[1:])) for name, part in rows.items()}
    return {name: torch.cat([places[name], part]) for name, part in more.items()} if places else more


def _copy_rows(rows: Rows, placed: Mapping[int, int], into: Rows) -> None:
    """Copy rows in place; ``placed`` maps a place to the index of its row."""
    if placed:
        device = next(iter(rows.values())).device
        places, taken = torch.tensor([list(placed), list(placed.values())], device=device)
        for name, part in rows.items():
            into[name].index_copy_(0, places, part.detach().index_select(0, taken))


def _select_rows(places: Tensor, rows: Rows) -> dict[str, Tensor]:
    return {name: part.index_select(0, places.to(part.device)) for name, part in rows.items()}
