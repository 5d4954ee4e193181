"""YAML by the rules of its version 1.2 (the core schema), from files that anybody may have written.

PyYAML, whose parser this uses, goes by version 1.1, where ``no`` is False, ``017`` is 15, ``1:30`` is 90 and ``1e-3``
is a string. What is read here is what JSON has: null, true and false, numbers, strings, lists, and mappings whose keys
are strings. Beyond the core schema there is ``<<``, which merges mappings.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from curvlab.errors import CurvlabError

_MOST_BYTES = 4 << 20
_MOST_VALUES = 1_000_000  # each counted as often as aliases repeat it
_DEEPEST = 100

_TAG = "tag:yaml.org,2002:"
_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_INFINITE = r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
# The type of a scalar -> its pattern, how it begins, and its value. The first that fits is taken.
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


class _Refused(Exception):
    """What a text holds cannot be read."""


def read(file: Path) -> Any:
    """Return what a file holds.

    Raises:
        CurvlabError: It cannot be read, or is not what ``loads`` takes.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # the latter: a name with a null byte
        raise CurvlabError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > _MOST_BYTES:
        raise CurvlabError(f"{file} is larger than {_MOST_BYTES >> 20} MB, which no configuration is")
    try:
        return loads(content.decode("utf-8"))
    except (CurvlabError, UnicodeDecodeError) as error:
        raise CurvlabError(f"{file} is not YAML: {error}") from error


def loads(text: str) -> Any:
    """Return what a text holds.

    Raises:
        CurvlabError: It is not YAML, or has what JSON does not have: tags and keys of other types, aliases in a circle.
            So does one of more than a million values or a hundred levels, a key that is there twice, and an integer of
            more than 64 bits.

    Examples:
        >>> loads("{a: no, b: 017, c: 1:30, d: 1e-3, e: 0x1F, f: ~}")
        {'a': 'no', 'b': 17, 'c': '1:30', 'd': 0.001, 'e': 31, 'f': None}
    """
    try:
        return _document(yaml.parse(text, Loader=yaml.SafeLoader))
    except (ValueError, OverflowError) as error:
        raise CurvlabError("an escape is of no character, or a directive is not right") from error
    except (yaml.YAMLError, _Refused) as error:
        mark = getattr(error, "problem_mark", None)
        reason = str(error) if mark is None else f"{getattr(error, 'problem', error)}, line {mark.line + 1}"
        raise CurvlabError(" ".join(reason.split())) from error


def dumps(value: Any) -> str:
    """Return a value as YAML that ``loads``, and a reader by version 1.1, give back as it is.

    Args:
        value: Of what JSON has.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either version of YAML would take for something else; repeats instead of aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _name, (_pattern, _first, _) in _SCALARS.items():
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern.pattern})$"), list(_first))


def _document(events: Iterator[Any]) -> Any:
    anchors: dict[str, tuple[Any, int] | None] = {}
    value = None
    for number, event in enumerate(event for event in events if not isinstance(event, yaml.StreamStartEvent)):
        if isinstance(event, yaml.StreamEndEvent):
            break
        if number:
            _refuse(event, "there is a second document")
        if event.version is not None and event.version < (1, 2):
            _refuse(event, f"it says that it is YAML {event.version[0]}.{event.version[1]}, and 1.2 is read")
        value, _ = _value(next(events), events, anchors, 1)
        next(events)  # the end of the document
    return value


def _value(
    event: Any, events: Iterator[Any], anchors: dict[str, tuple[Any, int] | None], depth: int
) -> tuple[Any, int]:
    """Return the value that begins with an event, and how many values it is made of."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            _refuse(event, f"there is no anchor {event.anchor!r} before this")
        found = anchors[event.anchor]
        if found is None:
            _refuse(event, f"the anchor {event.anchor!r} is within itself")
        return found
    if depth > _DEEPEST:
        _refuse(event, f"it is more than {_DEEPEST} levels deep")
    if event.anchor is not None:
        anchors[event.anchor] = None  # until it is whole
    value: Any
    size = 1
    if isinstance(event, yaml.ScalarEvent):
        value = _scalar(event)
    elif isinstance(event, yaml.SequenceStartEvent):
        _require_tag(event, "seq")
        value = []
        while not isinstance(part := next(events), yaml.SequenceEndEvent):
            item, count = _value(part, events, anchors, depth + 1)
            value.append(item)
            size = _counted(part, size + count)
    else:
        _require_tag(event, "map")
        value = {}
        merged: dict[str, Any] = {}
        while not isinstance(part := next(events), yaml.MappingEndEvent):
            merge = isinstance(part, yaml.ScalarEvent) and part.value == "<<" and part.implicit[0]
            key, _ = _value(part, events, anchors, depth + 1)
            item, count = _value(next(events), events, anchors, depth + 1)
            size = _counted(part, size + count + 1)
            if merge:
                merged = _merged(part, item) | merged
            elif not isinstance(key, str):
                _refuse(part, f"the key {key!r} is not a string; write it in quotes")
            elif key in value:
                _refuse(part, f"the key {key!r} is there twice")
            else:
                value[key] = item
        value = {**merged, **value}
    if event.anchor is not None:
        anchors[event.anchor] = value, size
    return value, size


def _merged(event: Any, given: Any) -> dict[str, Any]:
    """Return the mapping of ``<<``: one, or several, of which the first that has a key wins."""
    merged: dict[str, Any] = {}
    for mapping in given if isinstance(given, list) else [given]:
        if not isinstance(mapping, dict):
            _refuse(event, "<< needs a mapping or a list of mappings")
        merged = mapping | merged
    return merged


def _scalar(event: Any) -> Any:
    text: str = event.value
    if event.tag == "!" or (event.tag is None and not event.implicit[0]):  # the latter: in quotes
        name = "str"
    elif event.tag is None:
        name = next((name for name, (pattern, *_) in _SCALARS.items() if pattern.fullmatch(text)), "str")
    else:
        name = event.tag.removeprefix(_TAG)
        if name != "str" and not (name in _SCALARS and _SCALARS[name][0].fullmatch(text)):
            _refuse(event, f"{_shown(text)} is no {_shown(name)} of YAML 1.2")
    if name == "str":
        return _string(event)
    too_long = name == "int" and len(text.lstrip("-+0ox")) > 64  # Python refuses to read one of thousands of digits
    value = math.inf if too_long else _SCALARS[name][2](text)
    if name == "int" and not -(2**63) <= value < 2**63:
        _refuse(event, f"{_shown(text)} is an integer of more than 64 bits")
    if name == "float" and math.isinf(value) and "inf" not in text.lower():
        _refuse(event, f"{_shown(text)} is too large for a number of 64 bits")
    return value


def _string(event: Any) -> str:
    """Return the text, in which two escapes may be the halves of one character, as in JSON."""
    try:
        return str(event.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        _refuse(event, f"{event.value!r} has half of a character (a lone surrogate)")


def _require_tag(event: Any, name: str) -> None:
    if event.tag not in (None, "!", _TAG + name):
        _refuse(event, f"the tag {_shown(event.tag.removeprefix(_TAG))} is none that is read here")


def _counted(event: Any, size: int) -> int:
    if size > _MOST_VALUES:
        _refuse(event, f"it has more than {_MOST_VALUES:,} values, with what its aliases repeat")
    return size


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _refuse(event: Any, reason: str) -> NoReturn:
    raise _Refused(f"{reason}, line {event.start_mark.line + 1}")
