"""The console that tables are printed on."""

from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from curvlab.text import readable

_PIPE_WIDTH = 150  # characters; a pipe has no width of its own, and the widest table needs so many


def make_console() -> Console:
    """Return a console on standard output."""
    # Names are no markup, nor is :fire: in one an emoji.
    make = partial(_Console, markup=False, emoji=False)
    terminal = make()
    return terminal if terminal.is_terminal else make(width=_PIPE_WIDTH)


class _Console(Console):
    """Prints no control characters that a name may hold, and raises where rich would end the program."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Make text of a string."""
        return super().render_str("\n".join(map(readable, text.split("\n"))), **how)

    def on_broken_pipe(self) -> None:
        """Leave it to the caller, as ``print`` does."""
        raise BrokenPipeError
