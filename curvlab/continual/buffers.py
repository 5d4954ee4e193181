"""Memories of past samples: a reservoir over the whole stream, and a ring for every class of every task.

References:
    Vitter (1985), Random sampling with a reservoir, algorithm R; Chaudhry et al. (2019), On tiny episodic memories in
    continual learning.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from curvlab.errors import CurvlabError

Rows = Mapping[str, Tensor]


def check_sizes(**sizes: int | None) -> None:
    """Require that what is to hold samples holds one.

    Args:
        sizes: By their names; None is right.

    Raises:
        CurvlabError: One is less than 1.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise CurvlabError(f"{name} must be at least 1 sample, not {size}")


class Reservoir:
    """A uniform sample of all rows that it has been given.

    Args:
        capacity: Rows that it holds.

    Raises:
        CurvlabError: The capacity is less than 1.

    Examples:
        >>> memory = Reservoir(2)
        >>> memory.add({"x": torch.zeros(5, 3), "y": torch.arange(5)}, torch.Generator())
        >>> len(memory), memory.seen, memory.draw(8, torch.Generator())["x"].shape
        (2, 5, torch.Size([2, 3]))
    """

    def __init__(self, capacity: int) -> None:
        check_sizes(capacity=capacity)
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
        if not self.rows:
            self.rows = _places(rows, self.capacity)
        # Row n = 1, 2, ... of all draws one of n places, and stays if that is one of those here.
        order = torch.arange(self.seen, self.seen + count)
        drawn = (torch.rand(count, generator=generator, dtype=torch.float64) * (order + 1)).long()
        places = torch.where(order < self.capacity, order, drawn).tolist()
        self.seen += count
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

    Args:
        per_class: Rows that it holds of a class of a task.

    Raises:
        CurvlabError: It is less than 1.

    Examples:
        >>> memory = Ring(2)
        >>> memory.add({"x": torch.arange(5.0), "y": torch.tensor([0, 0, 1, 0, 0]), "task": torch.zeros(5).long()})
        >>> memory.draw(8, torch.Generator())["x"].sort().values
        tensor([2., 3., 4.])
    """

    def __init__(self, per_class: int) -> None:
        check_sizes(per_class=per_class)
        self.per_class = per_class
        #: By task and class: where its ring begins, and how many rows have come.
        self.rings: dict[tuple[int, int], list[int]] = {}
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
        placed = {}
        for row, key in enumerate(zip(rows["task"].tolist(), rows["y"].tolist(), strict=True)):
            ring = self.rings.setdefault(key, [len(self.rings) * self.per_class, 0])
            first, seen = ring
            place = first + seen % self.per_class
            if seen < self.per_class:
                self.filled.setdefault(key[0], []).append(place)
            ring[1] += 1
            placed[place] = row
        missing = len(self.rings) * self.per_class - len(self.rows.get("y", ()))
        if missing:
            more = _places(rows, missing)
            self.rows = {name: torch.cat([self.rows[name], part]) for name, part in more.items()} if self.rows else more
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


def _places(rows: Rows, count: int) -> dict[str, Tensor]:
    return {name: part.new_zeros((count, *part.shape[1:])) for name, part in rows.items()}


def _put(rows: Rows, placed: Mapping[int, int], into: Rows) -> None:
    """Copy rows; ``placed`` gives for a place which row comes there."""
    if placed:
        device = next(iter(rows.values())).device
        places, taken = torch.tensor([list(placed), list(placed.values())], device=device)
        for name, part in rows.items():
            into[name].index_copy_(0, places, part.detach().index_select(0, taken))


def _rows_at(places: Tensor, rows: Rows) -> dict[str, Tensor]:
    return {name: part.index_select(0, places.to(part.device)) for name, part in rows.items()}
