"""Progress bars, shown on a terminal only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from curvlab.text import to_printable


class Advance(Protocol):
    """Function that advances a progress bar."""

    def __call__(self, steps: float = 1, /, *, note: str = "") -> None:
        """Advance by ``steps`` and show ``note`` beside the bar."""


def no_progress(_: float = 1.0, /, *, note: str = "") -> None:
    """Show nothing; the default ``Advance``."""


@contextmanager
def progress(description: str, total: float | None, enabled: bool = True) -> Iterator[Advance]:
    """Show a progress bar on standard error during a ``with`` block, and yield the function that advances it.

    Args:
        description: Short description of the work.
        total: Number of steps; None if it is unknown.
        enabled: False for no bar; without a terminal there is no bar either.

    Examples:
        >>> with progress("counting", total=3) as advance:
        ...     for _ in range(3):
        ...         advance()
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),  # names of parameters are not markup
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True) as bar:
        task = bar.add_task(to_printable(description), total=total, note="")

        def advance(steps: float = 1, /, *, note: str = "") -> None:
            bar.update(task, advance=steps, note=to_printable(note))

        yield advance
