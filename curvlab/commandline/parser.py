"""Options made of the fields of a config; what they are given, and what a YAML file holds, is checked alike."""

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import pydantic

from curvlab import yaml_file
from curvlab.commandline.config import C, Config
from curvlab.errors import CurvlabError

NONE = "none"
_WORDS = {"integer": "N", "number": "X", "string": "TEXT", "null": NONE}


class Parser(argparse.ArgumentParser):
    """Makes options of the fields of configs; they keep the strings that they are given, and only those given."""

    def __init__(self, program: str, description: str = "") -> None:
        super().__init__(
            prog=program,
            usage=f"{program} [OPTIONS]",
            description=description,
            add_help=False,  # the help needs the other options
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under its usage."""
        raise CurvlabError(f"{message.removeprefix('argument ')} ({self.prog} --help shows the options)")

    def add(self, values: Config) -> None:
        """Add an option for every field; the help shows the values as defaults."""
        group: Any = self
        for name, schema in type(values).model_json_schema()["properties"].items():
            if name in values.titles:
                group = self.add_argument_group(values.titles[name])
            flags = ["-h", "--help"] if name == "help" else [option_name(name)]
            text = schema["description"].replace("%", "%%")
            if schema.get("type") == "boolean":
                group.add_argument(*flags, action="store_true", help=text)
                continue
            forms = schema.get("anyOf", [schema])
            value = getattr(values, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            group.add_argument(
                *flags,
                nargs="*" if any(form.get("type") == "array" for form in forms) else None,
                metavar="|".join(_word(form) for form in forms),
                help=f"{text} (default: {NONE if value is None else shown})",
            )

    def known(self, arguments: list[str], sections: Iterable[Config]) -> dict[str, Any]:
        """Return what the options were given.

        Raises:
            CurvlabError: An option is unknown.
        """
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise CurvlabError(f"{name!r} belongs to no option ({self.prog} --help shows them all)")
            names = [option_name(field) for values in sections for field in type(values).model_fields]
            raise CurvlabError(
                f"there is no option {name}{did_you_mean(name, names)} ({self.prog} --help shows them all)"
            )
        return vars(known)


def _word(form: Mapping[str, Any]) -> str:
    """Return what stands for a value in the help, from its JSON schema; for a list, what stands for an item."""
    if "items" in form:
        return _word(form["items"])
    if form.get("format") == "path":
        return "PATH"
    choices = form.get("enum") or [form.get("const")]
    return "|".join(choices) if choices != [None] else _WORDS[form["type"]]


def part(given: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return what was given for the fields of a config, as its validation takes it.

    Raises:
        CurvlabError: An option was given an empty value, such as an unset variable of the shell.
    """
    part: dict[str, Any] = {}
    for name, schema in kind.model_json_schema()["properties"].items():
        if name not in given:
            continue
        words: list[str] = given[name] if isinstance(given[name], list) else [given[name]]
        if "" in words:
            raise CurvlabError(f"{option_name(name)} was given an empty value; leave it out, or write what it is to be")
        forms = schema.get("anyOf", ())
        special: dict[str, Any] = {form["const"]: form["const"] for form in forms if "const" in form}
        if {"type": "null"} in forms:
            special[NONE] = None
        part[name] = special[words[0]] if len(words) == 1 and words[0] in special else given[name]
    return part


def validate(kind: type[C], values: Mapping[str, Any], call: Callable[[str], str]) -> C:
    """Make a config.

    Args:
        kind: Of which class.
        values: Its fields, also as strings.
        call: What to call a field in an error.

    Raises:
        CurvlabError: A value is not right; the message names the first such field.
    """
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        faults = error.errors()
        name = _where(faults[0]["loc"])
        # One fault an alternative that the field has, or one an item of a list.
        reasons = (fault["msg"].removeprefix("Input ") for fault in faults if _where(fault["loc"]) == name)
        text = " or ".join(dict.fromkeys(re.split(", (?:unable|got) ", reason)[0] for reason in reasons))
        text = text.replace("should be a valid tuple", f"should be a list, such as [{faults[0]['input']}]")
        raise CurvlabError(f"{call(name)} {text}, not {faults[0]['input']!r}") from error


def _where(location: Iterable[int | str]) -> str:
    """Return field.key.key, without what tells the alternatives of a field or the items of a list apart."""
    return ".".join(part for part in location if isinstance(part, str) and part.isidentifier())


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the options that a file holds.

    Raises:
        CurvlabError: It cannot be read, or holds anything else.
    """
    values = yaml_file.read(file)
    if not isinstance(values, dict):
        raise CurvlabError(f"{file} does not hold options, each a line key: value")
    return values


def change(base: C, values: Mapping[str, Any], file: Path) -> C:
    """Return a config with other values, which a file has.

    Raises:
        CurvlabError: It has no such field, or a value is not right.
    """
    known = type(base).model_fields
    for key in values:
        if key not in known:
            raise CurvlabError(f"{file}: there is no option {key!r}{did_you_mean(str(key), known)}")
    return validate(type(base), {**base.model_dump(), **values}, lambda name: f"{file}: {name}")


def did_you_mean(name: str, names: Collection[str]) -> str:
    """Return the end of an error about an unknown name: the most similar known one, or nothing if none is similar.

    Examples:
        >>> did_you_mean("digit", ["digits", "mnist"]), did_you_mean("x", ["digits", "mnist"])
        ("; did you mean 'digits'?", '')
    """
    similar = get_close_matches(name, names, n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def option_name(name: str) -> str:
    """Return the option of a field."""
    return f"--{name.replace('_', '-')}"
