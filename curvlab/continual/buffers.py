"""Memories of past samples: a reservoir over the whole stream, and a ring for every task.

References:
    Vitter (1985), Random sampling with a reservoir, algorithm R; Chaudhry et al. (2019), On tiny episodic memories in
    continual learning.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from curvlab.errors import CurvlabError

Rows = Mapping[str, Tensor]


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
        if capacity < 1:
            raise CurvlabError(f"a buffer of {capacity} samples holds nothing: its size must be at least 1")
        self.capacity = capacity
        self.seen = 0
        self.rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, rows: Rows, generator: torch.Generator) -> None:
        """Let rows take the places that chance gives them: the n-th with probability ``capacity / n``.

        Args:
            rows: Tensors ``(N, ...)`` by name, always the same names; copied.
            generator: On the CPU.
        """
        count = len(next(iter(rows.values())))
        if not self.rows:
            self.rows = {name: part.new_zeros((self.capacity, *part.shape[1:])) for name, part in rows.items()}
        # Row n = seen + 1, ... draws a place among 1..n, and has one here if that is at most the capacity.
        order = torch.arange(self.seen, self.seen + count)
        places = (torch.rand(count, generator=generator, dtype=torch.float64) * (order + 1)).long()
        places = torch.where(order < self.capacity, order, places)
        # Of rows with one place the last stays, as if they had come one by one.
        last = {place: row for row, place in enumerate(places.tolist()) if place < self.capacity}
        self.seen += count
        if last:
            of_rows = next(iter(rows.values())).device
            into, taken = torch.tensor(list(last), device=of_rows), torch.tensor(list(last.values()), device=of_rows)
            for name, part in rows.items():
                self.rows[name][into] = part[taken].detach()

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return at most ``count`` rows, drawn without replacement; none from an empty buffer."""
        chosen = torch.randperm(len(self), generator=generator)[:count]
        return {name: part[chosen.to(part.device)] for name, part in self.rows.items()}


class Ring:
    """The last rows of each class of each task, in equal parts.

    Args:
        per_class: Rows of a class that it holds.

    Raises:
        CurvlabError: It is less than 1.
    """

    def __init__(self, per_class: int) -> None:
        if per_class < 1:
            raise CurvlabError(f"a ring of {per_class} samples a class holds nothing: it must be at least 1")
        self.per_class = per_class
        self.rows: dict[str, dict[str, Tensor]] = {}  # by task and class; keys of checkpoints are strings

    def __len__(self) -> int:
        return sum(len(next(iter(part.values()))) for part in self.rows.values())

    def add(self, rows: Rows, labels: Tensor, task: int) -> None:
        """Let rows of one task push out the oldest of their class.

        Args:
            rows: Tensors ``(N, ...)`` by name, always the same names; copied.
            labels: The class of each, ``(N,)``.
            task: The task of all.
        """
        for label in labels.unique().tolist():
            key = f"{task}/{label}"
            new = {name: part[labels == label].detach() for name, part in rows.items()}
            held = self.rows.get(key)
            whole = new if held is None else {name: torch.cat([held[name], part]) for name, part in new.items()}
            self.rows[key] = {name: part[-self.per_class :].clone() for name, part in whole.items()}

    def draw(self, count: int, generator: torch.Generator, before: int | None = None) -> dict[str, Tensor]:
        """Return at most ``count`` rows, drawn without replacement; none if there are none.

        Args:
            count: How many.
            generator: On the CPU.
            before: Only of tasks before this one; None for all.
        """
        parts = [part for key, part in self.rows.items() if before is None or int(key.split("/")[0]) < before]
        if not parts:
            return {}
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        chosen = torch.randperm(len(next(iter(whole.values()))), generator=generator)[:count]
        return {name: part[chosen.to(part.device)] for name, part in whole.items()}
