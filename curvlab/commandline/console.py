"""Console for tables."""

from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from curvlab.text import to_printable

_PIPE_WIDTH = 150  # characters; a pipe has no width, and the widest table needs this many


def make_console() -> Console:
    """Return a console on standard output."""
    # Names must not be interpreted as markup or emoji.
    make = partial(_Console, markup=False, emoji=False)
    terminal = make()
    return terminal if terminal.is_terminal else make(width=_PIPE_WIDTH)


class _Console(Console):
    """A console that escapes control characters, and raises where rich would end the program."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Return the text of a string, with control characters escaped."""
        return super().render_str("\n".join(map(to_printable, text.split("\n"))), **how)

    def on_broken_pipe(self) -> None:
        """Raise ``BrokenPipeError``, as ``print`` does."""
        raise BrokenPipeError
