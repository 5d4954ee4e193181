"""String forms of small frozen dataclasses: ``name`` or ``name:key=value,key=value``."""

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol, TypeVar, get_args

from curvlab.checks import describe_value
from curvlab.errors import CurvlabError
from curvlab.text import did_you_mean


class Named(Protocol):
    """A frozen dataclass with a ``name``; the other fields are its options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """The text before the colon."""


T = TypeVar("T")


def string_form(value: Named) -> str:
    """Return the string form of a value; options with their default values are left out."""
    given = {f.name: getattr(value, f.name) for f in _options(value) if getattr(value, f.name) != f.default}
    options = [f"{key}={'none' if option is None else option}" for key, option in given.items()]
    return f"{value.name}:{','.join(options)}" if options else value.name


def parse_form(text: str, what: str, kinds: Mapping[str, type[T]]) -> T:
    """Parse a string form.

    The value of an option is an int if its field has an int type, else text; ``none`` is None if the field can be None.

    Args:
        text: The string form.
        what: The noun for error messages, such as ``quantity``.
        kinds: Name -> frozen dataclass, which checks its arguments.

    Raises:
        CurvlabError: The name or an option is unknown, an option is given twice, or a value is not valid.
    """
    if not isinstance(text, str):
        raise CurvlabError(f"a {what} is a name, such as {next(iter(kinds))!r}, not {describe_value(text)}")
    name, _, rest = text.partition(":")
    if name not in kinds:
        raise CurvlabError(unknown_name_message(what, name, kinds))
    known = {f.name: f for f in _options(kinds[name])}
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            allowed = ", ".join(sorted(known)) or "none"
            raise CurvlabError(f"{name} has no option {part!r}; its options are: {allowed}, written as key=value")
        if key in options:
            raise CurvlabError(f"{name} has the option {key} twice; give it once")
        if value == "none" and type(None) in get_args(known[key].type):
            options[key] = None
        elif int in (known[key].type, *get_args(known[key].type)):
            try:
                options[key] = int(value)
            except ValueError:
                raise CurvlabError(f"option {key} of {name} must be a whole number, not {value!r}") from None
        else:
            options[key] = value
    return kinds[name](**options)


def unknown_name_message(what: str, name: str, names: Mapping[str, object] | tuple[str, ...]) -> str:
    """Return the error message for an unknown name, with the most similar known name and the list of all names."""
    hint = did_you_mean(name, names)
    return f"there is no {what} {name!r}{f'{hint} Available' if hint else '; available'}: {', '.join(names)}"


def _options(value: Any) -> list[Field[Any]]:
    return [f for f in fields(value) if f.name != "name"]
