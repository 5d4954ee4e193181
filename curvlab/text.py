"""Text for the eyes: whatever names and messages hold, it does no more than stand there."""


def readable(text: str) -> str:
    r"""Return a text of one line without control characters, which could move a cursor or colour a terminal.

    Line ends, tabs and other white space become spaces; what else cannot be printed becomes its escape.

    Examples:
        >>> readable("fc\t1.\x1b[31mweight\n")
        'fc 1.\\x1b[31mweight '
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
