"""Errors that a user can fix. Each message says in one sentence what is wrong and what would work."""


class CurvlabError(Exception):
    """The request, the data or the environment is not valid; the message says what is wrong and what to do."""


class UnsupportedError(CurvlabError):
    """A correct result is not possible for this model; the message names the module, the backend and an alternative."""


def first_line(error: BaseException | str, length: int = 160) -> str:
    r"""Return the first line of an error message, for use inside another message.

    Args:
        error: An error of another library, or its text. If the text is empty, the name of the error's type is used.
        length: Longer lines are cut to this many characters.

    Examples:
        >>> first_line(RuntimeError("it does not fit\nHere is how to report it ..."))
        'it does not fit'
        >>> first_line(KeyboardInterrupt())
        'KeyboardInterrupt'
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= length else line[: length - 4] + " ..."


def type_and_line(error: BaseException, length: int = 160) -> str:
    """Return the type of an error and the first line of its message, or only the type if the message is empty.

    Examples:
        >>> type_and_line(ValueError("too many")), type_and_line(StopIteration())
        ('ValueError: too many', 'StopIteration')
    """
    name, line = type(error).__name__, first_line(error, length)
    return name if line == name else f"{name}: {line}"
