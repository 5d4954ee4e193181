"""Memories of past samples: a reservoir over the whole stream, and a ring for every class of every task.

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
    """A uniform sample of all rows that it has been given.

    Memory grows with the rows that are held: there are at most twice as many places as rows.

    Args:
        capacity: Rows that it holds.

    Raises:
        CurvlabError: The capacity is no whole number from 1.

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
        """Let rows take the places that chance gives them: the n-th has one with probability ``capacity / n``.

        Args:
            rows: Tensors ``(N, ...)`` by name, always the same names; copied.
            generator: On the CPU.
        """
        count = len(next(iter(rows.values())))
        # Row n = 1, 2, ... of all draws one of n places, and stays if that is one of those here.
        order = torch.arange(self.seen, self.seen + count)
        drawn = (torch.rand(count, generator=generator, dtype=torch.float64) * (order + 1)).long()
        places = torch.where(order < self.capacity, order, drawn).tolist()
        self.seen += count
        self.rows = _grown(self.rows, rows, len(self), self.capacity)
        # Of rows with one place the last stays, as if they had come one by one.
        _put(rows, {place: row for row, place in enumerate(places) if place < self.capacity}, self.rows)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return at most ``count`` rows, drawn without replacement; no names if there are no rows.

        Args:
            count: How many.
            generator: On the CPU.
        """
        return _rows_at(torch.randperm(len(self), generator=generator)[:count], self.rows)


class Ring:
    """The last rows of each class of each task.

    Memory grows with the rows that are held: there are at most twice as many places as rows.

    Args:
        per_class: Rows that it holds of a class of a task.

    Raises:
        CurvlabError: It is no whole number from 1.

    Examples:
        >>> memory = Ring(2)
        >>> memory.add({"x": torch.arange(5.0), "y": torch.tensor([0, 0, 1, 0, 0]), "task": torch.zeros(5).long()})
        >>> memory.draw(8, torch.Generator())["x"].sort().values
        tensor([2., 3., 4.])
    """

    def __init__(self, per_class: int) -> None:
        check_whole("per_class", per_class)
        self.per_class = per_class
        #: By task and class: the places of its ring.
        self.rings: dict[tuple[int, int], list[int]] = {}
        #: By task and class: how many rows have come.
        self.seen: dict[tuple[int, int], int] = {}
        #: By task: the places that hold a row.
        self.filled: dict[int, list[int]] = {}
        self.rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return sum(map(len, self.filled.values()))

    def add(self, rows: Rows, generator: torch.Generator | None = None) -> None:
        """Let rows push out the oldest ones of their class and task.

        Args:
            rows: Tensors ``(N, ...)`` by name, always the same names; copied. Classes are ``y``, tasks are ``task``.
            generator: Nothing is drawn.
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
        self.rows = _grown(self.rows, rows, held, len(self.rings) * self.per_class)
        _put(rows, placed, self.rows)

    def draw(self, count: int, generator: torch.Generator, before: int | None = None) -> dict[str, Tensor]:
        """Return at most ``count`` rows, drawn without replacement; no names if there are no rows.

        Args:
            count: How many.
            generator: On the CPU.
            before: Only rows of tasks before this one; None for all.
        """
        places = [place for task, filled in self.filled.items() if before is None or task < before for place in filled]
        if not places:
            return {}
        chosen = torch.randperm(len(places), generator=generator)[:count].tolist()
        return _rows_at(torch.tensor([places[i] for i in chosen]), self.rows)


def _grown(places: dict[str, Tensor], rows: Rows, needed: int, most: int) -> dict[str, Tensor]:
    """Return places for ``needed`` rows, those that are there if they are enough; doubled, so that few are copied."""
    have = len(next(iter(places.values()))) if places else 0
    if needed <= have:
        return places
    missing = min(max(needed, 2 * have), most) - have
    more = {name: part.new_zeros((missing, *part.shape[1:])) for name, part in rows.items()}
    return {name: torch.cat([places[name], part]) for name, part in more.items()} if places else more


def _put(rows: Rows, placed: Mapping[int, int], into: Rows) -> None:
    """Copy rows; ``placed`` gives for a place which row comes there."""
    if placed:
        device = next(iter(rows.values())).device
        places, taken = torch.tensor([list(placed), list(placed.values())], device=device)
        for name, part in rows.items():
            into[name].index_copy_(0, places, part.detach().index_select(0, taken))


def _rows_at(places: Tensor, rows: Rows) -> dict[str, Tensor]:
    return {name: part.index_select(0, places.to(part.device)) for name, part in rows.items()}
