"""Errors that a user can mend: each says in one sentence what is wrong and what would work."""


class CurvlabError(Exception):
    """Something in the request, the data or the environment is not right; the message says what and the way out."""


class UnsupportedError(CurvlabError):
    """A backend cannot compute this right for this model; the message names the module, the backend and what would."""


def first_line(error: BaseException | str, length: int = 160) -> str:
    r"""Return the first line of what an error of other code says, for a clause of a message; cut where it is long.

    The type of an error that says nothing stands for it.

    Examples:
        >>> first_line(RuntimeError("it does not fit\nHere is how to report it ..."))
        'it does not fit'
        >>> first_line(KeyboardInterrupt())
        'KeyboardInterrupt'
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= length else line[: length - 4] + " ..."


def type_and_line(error: BaseException, length: int = 160) -> str:
    """Return the type of an error of other code and the first line of what it says, or the type alone.

    Examples:
        >>> type_and_line(ValueError("too many")), type_and_line(StopIteration())
        ('ValueError: too many', 'StopIteration')
    """
    name, line = type(error).__name__, first_line(error, length)
    return name if line == name else f"{name}: {line}"
