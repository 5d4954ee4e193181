"""Command-line options from the fields of a config; values from options and from YAML files are validated alike."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pydantic

from curvlab import yaml_file
from curvlab.commandline.config import NO_EFFECT, C, Config
from curvlab.errors import CurvlabError
from curvlab.text import did_you_mean

NONE = "none"
_WORDS = {"integer": "N", "number": "X", "string": "TEXT", "null": NONE}


class Parser(argparse.ArgumentParser):
    """Argument parser whose options are the fields of configs; it returns the strings of the given options only."""

    def __init__(self, program: str, description: str = "") -> None:
        super().__init__(
            prog=program,
            usage=f"{program} [OPTIONS]",
            description=description,
            add_help=False,  # the help depends on other options
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the error that argparse would print.

        Raises:
            CurvlabError: Always.
        """
        raise CurvlabError(f"{message.removeprefix('argument ')} ({self.prog} --help shows the options)")

    def add(self, values: Config) -> None:
        """Add an option for every field of a config; the help shows its values as defaults."""
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
            shown = " ".join(map(str, value)) or "no value" if isinstance(value, tuple) else str(value)
            group.add_argument(
                *flags,
                nargs="*" if any(form.get("type") == "array" for form in forms) else None,
                metavar="|".join(_placeholder(form) for form in forms),
                help=f"{text} (default: {NONE if value is None else shown})",
            )

    def parse_options(self, arguments: list[str], sections: Iterable[Config]) -> dict[str, Any]:
        """Return the given options: name of the field -> string, list of strings, or True.

        Args:
            arguments: Arguments of the command line.
            sections: Configs whose fields are suggested for an unknown option.

        Raises:
            CurvlabError: An option is unknown.
        """
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise CurvlabError(f"unexpected argument {name!r} ({self.prog} --help shows the options)")
            names = [option_name(field) for values in sections for field in type(values).model_fields]
            raise CurvlabError(
                f"unknown option {name}{did_you_mean(name, names)} ({self.prog} --help shows all options)"
            )
        return vars(known)


def _placeholder(form: Mapping[str, Any]) -> str:
    """Return the placeholder of a value in the help, from its JSON schema; for a list, that of an item."""
    if "items" in form:
        return _placeholder(form["items"])
    if form.get("format") == "path":
        return "PATH"
    choices = form.get("enum") or [form.get("const")]
    return "|".join(choices) if choices != [None] else _WORDS[form["type"]]


def select_fields(given: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return the given options that are fields of a config, for ``validate``.

    Raises:
        CurvlabError: An option has an empty value, as from an unset variable of the shell.
    """
    fields: dict[str, Any] = {}
    for name, schema in kind.model_json_schema()["properties"].items():
        if name not in given:
            continue
        words: list[str] = given[name] if isinstance(given[name], list) else [given[name]]
        if "" in words:
            raise CurvlabError(f"{option_name(name)} has an empty value; remove the option, or give a value")
        forms = schema.get("anyOf", ())
        special: dict[str, Any] = {form["const"]: form["const"] for form in forms if "const" in form}
        if {"type": "null"} in forms:
            special[NONE] = None
        fields[name] = special[words[0]] if len(words) == 1 and words[0] in special else given[name]
    return fields


def validate(kind: type[C], values: Mapping[str, Any], call: Callable[[str], str]) -> C:
    """Return a validated config.

    Args:
        kind: Class of the config.
        values: Values of the fields; strings are converted.
        call: Returns the name of a field for an error message.

    Raises:
        CurvlabError: A value is invalid; the message names the first such field.
    """
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        faults = error.errors()
        name = _field_path(faults[0]["loc"])
        if faults[0]["type"] == NO_EFFECT:
            raise CurvlabError(f"{call(name)} {faults[0]['msg']}") from error
        # There is one fault per alternative type of the field, or per item of a list.
        reasons = (fault["msg"].removeprefix("Input ") for fault in faults if _field_path(fault["loc"]) == name)
        text = " or ".join(dict.fromkeys(re.split(", (?:unable|got) ", reason)[0] for reason in reasons))
        text = text.replace("should be a valid tuple", f"should be a list, such as [{faults[0]['input']}]")
        one = " (write it without a list)" if len(faults[0]["loc"]) > 1 and f"'{faults[0]['input']}'" in text else ""
        raise CurvlabError(f"{call(name)} {text}, not {faults[0]['input']!r}{one}") from error


def _field_path(location: Iterable[int | str]) -> str:
    """Return field.key.key, without the parts for alternative types and items of lists."""
    return ".".join(part for part in location if isinstance(part, str) and part.isidentifier())


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the options in a YAML file.

    Raises:
        CurvlabError: The file cannot be read, or is not a mapping.
    """
    values = yaml_file.read(file)
    if not isinstance(values, dict):
        raise CurvlabError(f"{file} is not a mapping of options; write one line key: value per option")
    return values


def replace_values(base: C, values: Mapping[str, Any], file: Path) -> C:
    """Return a config with some values replaced by those of a file.

    Raises:
        CurvlabError: A key is not a field of the config, or a value is invalid.
    """
    known = type(base).model_fields
    for key in values:
        if key not in known:
            raise CurvlabError(f"{file}: unknown option {key!r}{did_you_mean(str(key), known)}")
    return validate(type(base), {**base.model_dump(), **values}, lambda name: f"{file}: {name}")


def option_name(name: str) -> str:
    """Return the option for a field."""
    return f"--{name.replace('_', '-')}"
