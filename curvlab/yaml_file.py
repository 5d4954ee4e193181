"""Reading and writing of YAML 1.2 (core schema), also from untrusted files.

PyYAML, whose parser this module uses, implements version 1.1, where ``no`` is False, ``017`` is 15, ``1:30`` is 90 and
``1e-3`` is a string. Only JSON values are read: null, booleans, numbers, strings, lists, and mappings with string
keys. In addition to the core schema, ``<<`` merges mappings.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from curvlab.errors import CurvlabError

_MAX_BYTES = 4 << 20
_MAX_VALUES = 1_000_000  # aliases count as often as they repeat a value
_MAX_LEVELS = 100

_TAG = "tag:yaml.org,2002:"
_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_INFINITE = r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
# Type of a scalar -> its pattern, its possible first characters, and its conversion. The first match is used.
_SCALARS: dict[str, tuple[re.Pattern[str], str, Callable[[str], Any]]] = {
    "null": (re.compile(r"null|Null|NULL|~|"), "nN~", lambda _: None),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF", lambda text: text[0] in "tT"),
    "int": (
        re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
        "-+0123456789",
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        re.compile(f"{_NUMBER}|{_INFINITE}"),
        "-+.0123456789",
        lambda text: float(re.sub(r"\.(?=[a-z])", "", text.lower())),
    ),
}


class _InvalidError(Exception):
    """The text is YAML that is not supported here."""


def read(file: Path) -> Any:
    """Return the value in a YAML file.

    Raises:
        CurvlabError: The file cannot be read, is larger than 4 MB, or is not accepted by ``loads``.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise CurvlabError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > _MAX_BYTES:
        raise CurvlabError(f"{file} is larger than {_MAX_BYTES >> 20} MB, the limit for a configuration; shorten it")
    try:
        return loads(content.decode("utf-8"))
    except (CurvlabError, UnicodeDecodeError) as error:
        raise CurvlabError(f"{file} is not YAML: {error}") from error


def loads(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        CurvlabError: The text is not YAML; it has tags or keys of types that JSON lacks, recursive aliases, a duplicate
            key, more than a million values or a hundred levels, or an integer of more than 64 bits.

    Examples:
        >>> loads("{a: no, b: 017, c: 1:30, d: 1e-3, e: 0x1F, f: ~}")
        {'a': 'no', 'b': 17, 'c': '1:30', 'd': 0.001, 'e': 31, 'f': None}
    """
    try:
        return _read_document(yaml.parse(text, Loader=yaml.SafeLoader))
    except (ValueError, OverflowError) as error:
        raise CurvlabError("an escape sequence or a directive is invalid") from error
    except (yaml.YAMLError, _InvalidError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = str(error) if mark is None else f"{getattr(error, 'problem', error)}, line {mark.line + 1}"
        raise CurvlabError(" ".join(reason.split())) from error


def dumps(value: Any) -> str:
    """Return a value as YAML text that ``loads`` and parsers of YAML 1.1 read back unchanged.

    Args:
        value: JSON value.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings which either version of YAML would read as another type, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _name, (_pattern, _first, _) in _SCALARS.items():
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern.pattern})$"), list(_first))


def _read_document(events: Iterator[Any]) -> Any:
    anchors: dict[str, tuple[Any, int] | None] = {}
    value = None
    for number, event in enumerate(event for event in events if not isinstance(event, yaml.StreamStartEvent)):
        if isinstance(event, yaml.StreamEndEvent):
            break
        if number:
            _refuse(event, "there is a second document; give one")
        if event.version is not None and event.version < (1, 2):
            _refuse(event, f"it is declared as YAML {event.version[0]}.{event.version[1]}, and only 1.2 is supported")
        value, _ = _read_value(next(events), events, anchors, 1)
        next(events)  # the end of the document
    return value


def _read_value(
    event: Any, events: Iterator[Any], anchors: dict[str, tuple[Any, int] | None], depth: int
) -> tuple[Any, int]:
    """Return the value that begins with an event, and the number of values in it."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            _refuse(event, f"there is no anchor {event.anchor!r} before this alias")
        found = anchors[event.anchor]
        if found is None:
            _refuse(event, f"the anchor {event.anchor!r} contains itself")
        return found
    if depth > _MAX_LEVELS:
        _refuse(event, f"it has more than {_MAX_LEVELS} levels")
    if event.anchor is not None:
        anchors[event.anchor] = None  # until the value is complete
    value: Any
    size = 1
    if isinstance(event, yaml.ScalarEvent):
        value = _read_scalar(event)
    elif isinstance(event, yaml.SequenceStartEvent):
        _require_tag(event, "seq")
        value = []
        while not isinstance(part := next(events), yaml.SequenceEndEvent):
            item, count = _read_value(part, events, anchors, depth + 1)
            value.append(item)
            size = _check_size(part, size + count)
    else:
        _require_tag(event, "map")
        value = {}
        merged: dict[str, Any] = {}
        while not isinstance(part := next(events), yaml.MappingEndEvent):
            merge = isinstance(part, yaml.ScalarEvent) and part.value == "<<" and part.implicit[0]
            key, _ = _read_value(part, events, anchors, depth + 1)
            item, count = _read_value(next(events), events, anchors, depth + 1)
            size = _check_size(part, size + count + 1)
            if merge:
                merged = _merge(part, item) | merged
            elif not isinstance(key, str):
                _refuse(part, f"the key {key!r} is not a string; write it in quotes")
            elif key in value:
                _refuse(part, f"the key {key!r} occurs twice")
            else:
                value[key] = item
        value = {**merged, **value}
    if event.anchor is not None:
        anchors[event.anchor] = value, size
    return value, size


def _merge(event: Any, given: Any) -> dict[str, Any]:
    """Return the mapping of ``<<``: one mapping, or a list of mappings in which the first with a key has precedence."""
    merged: dict[str, Any] = {}
    for mapping in given if isinstance(given, list) else [given]:
        if not isinstance(mapping, dict):
            _refuse(event, "<< needs a mapping or a list of mappings")
        merged = mapping | merged
    return merged


def _read_scalar(event: Any) -> Any:
    text: str = event.value
    if event.tag == "!" or (event.tag is None and not event.implicit[0]):  # in quotes
        name = "str"
    elif event.tag is None:
        name = next((name for name, (pattern, *_) in _SCALARS.items() if pattern.fullmatch(text)), "str")
    else:
        name = event.tag.removeprefix(_TAG)
        if name != "str" and not (name in _SCALARS and _SCALARS[name][0].fullmatch(text)):
            _refuse(event, f"{_quote(text)} is not a valid {_quote(name)} of YAML 1.2")
    if name == "str":
        return _read_string(event)
    too_long = name == "int" and len(text.lstrip("-+0ox")) > 64  # Python does not convert thousands of digits
    value = math.inf if too_long else _SCALARS[name][2](text)
    if name == "int" and not -(2**63) <= value < 2**63:
        _refuse(event, f"{_quote(text)} is an integer of more than 64 bits")
    if name == "float" and math.isinf(value) and "inf" not in text.lower():
        _refuse(event, f"{_quote(text)} is too large for a number of 64 bits")
    return value


def _read_string(event: Any) -> str:
    """Return the text of a string, in which two escapes may be a surrogate pair, as in JSON."""
    try:
        return str(event.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        _refuse(event, f"{event.value!r} has a lone surrogate (half of a character)")


def _require_tag(event: Any, name: str) -> None:
    if event.tag not in (None, "!", _TAG + name):
        _refuse(event, f"the tag {_quote(event.tag.removeprefix(_TAG))} is not supported")


def _check_size(event: Any, size: int) -> int:
    if size > _MAX_VALUES:
        _refuse(event, f"it has more than {_MAX_VALUES:,} values, repetitions by aliases included")
    return size


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _refuse(event: Any, reason: str) -> NoReturn:
    raise _InvalidError(f"{reason}, line {event.start_mark.line + 1}")
