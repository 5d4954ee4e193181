"""Progress bars: shown on a terminal, silent in a pipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from curvlab.text import readable


class Advance(Protocol):
    """What a progress bar gives to the work under it."""

    def __call__(self, steps: float = 1, /, *, note: str = "") -> None:
        """Move on by ``steps`` and show ``note`` beside the bar."""


def silent(_: float = 1.0, /, *, note: str = "") -> None:
    """Show nothing: an ``Advance`` for those who do not ask for one."""


@contextmanager
def progress(description: str, total: float | None, enabled: bool = True) -> Iterator[Advance]:
    """Show a bar on standard error while the block runs, and yield the function that advances it.

    Args:
        description: What is being done, a few words.
        total: The number of steps; None for work of unknown length.
        enabled: False for no bar at all; without a terminal there is none either.

    Examples:
        >>> with progress("counting", total=3) as advance:
        ...     for _ in range(3):
        ...         advance()
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),  # the name of a parameter is none
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True) as bar:
        task = bar.add_task(readable(description), total=total, note="")

        def advance(steps: float = 1, /, *, note: str = "") -> None:
            bar.update(task, advance=steps, note=readable(note))

        yield advance
