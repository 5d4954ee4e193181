"""One cell of a grid: what it is, what it is given, and what becomes of it."""

import hashlib
import json
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curvlab.errors import CurvlabError
from curvlab.files import remove_leftovers

Record = dict[str, Any]

OUTPUT = "output.txt"

# What the tables of a store have beside what is in the records.
_RESERVED = {"cell", "status", "kind", "seeds", "failed", "absent"}
_RESERVED_BEGINNINGS = ("cell.", "config.")
_LONGEST_ERROR, _LONGEST_TRACEBACK, _LONGEST_TEXT = 4_000, 40_000, 1_000_000  # characters
_DEEPEST = 100  # levels of lists and dictionaries in a configuration
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for tab and newline


@dataclass(frozen=True)
class Place:
    """Where a cell works; none of it changes a number.

    Attributes:
        folder: The cell's own, for checkpoints: it is the same when a cell that was stopped begins again, and no other
            process of the same cell is in it.
        data_root: Where data sets are kept; None for the default place.
        offline: Never touch the network.
    """

    folder: Path
    data_root: Path | None = None
    offline: bool = False


@dataclass(frozen=True)
class Cell:
    """A function and the whole configuration that it is called with.

    Attributes:
        function: ``module:name`` of a ``(config, Place) -> list of records``. A record is a flat dictionary of
            numbers, strings, booleans and None; what is not defined is None, for NaN says that the cell has failed.
            Its names are not those that the tables have themselves: ``cell``, ``status``, ``kind``, ``seeds``,
            ``failed``, ``absent``, ``cell.*`` and ``config.*``.
        config: The configuration, of JSON values, every default written out: it is what names the cell.
        name: What the function is called in the store.
        version: Of the function: a new one makes every cell a new one.
        seed: The key of the seed in ``config``; the cells that differ in nothing else are repetitions of each other.
    """

    function: str
    config: Mapping[str, Any]
    name: str = ""
    version: int = 1
    seed: str = "seed"

    @cached_property
    def key(self) -> str:
        """The hash of name, version and configuration.

        Raises:
            CurvlabError: The configuration is not made of JSON values.
        """
        return _digest([self.name or self.function, self.version, self.config])

    @cached_property
    def point(self) -> str:
        """The hash of all but the seed."""
        rest = {name: value for name, value in self.config.items() if name != self.seed}
        return _digest([self.name or self.function, self.version, rest])


def canonical(value: Any) -> str:
    """Return JSON that is the same text for the same value.

    Raises:
        CurvlabError: It is not made of JSON values.
    """
    try:
        _require_json(value, 1)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CurvlabError(f"a configuration is made of JSON values, and this one is not: {error}") from error


def _require_json(value: Any, depth: int) -> None:
    """Refuse what Python would write as JSON, but a store or another program could not give back as it was.

    Raises:
        ValueError: It has keys that are no strings, integers of more than 64 bits, half characters or many levels.
    """
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer has more than 64 bits")
    elif isinstance(value, Mapping | list | tuple):
        if depth > _DEEPEST:
            raise ValueError(f"it is within itself, or more than {_DEEPEST} levels deep")
        for name in value if isinstance(value, Mapping) else ():
            if not isinstance(name, str):
                raise ValueError(f"the key {name!r} is not a string")
            name.encode()
        for item in value.values() if isinstance(value, Mapping) else value:
            _require_json(item, depth + 1)


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        key: Of the cell.
        kind: How it failed: ``raised``, ``killed``, ``timeout`` or ``nan``; None if it did not.
        error: One sentence.
        traceback: What there is to see of an error: the traceback, or the end of what was written to the console.
        records: What it returned.
        seconds: Wall time.
        peak_bytes: The peak of the process's memory, Python and torch included.
        host: The machine.
        threads: Of the process.
        software: Versions and state of the code, as ``curvlab.software.describe_software`` tells them.
    """

    key: str
    kind: str | None = None
    error: str | None = None
    traceback: str | None = None
    records: Sequence[Record] = ()
    seconds: float | None = None
    peak_bytes: int | None = None
    host: str | None = None
    threads: int | None = None
    software: Mapping[str, Any] = field(default_factory=dict)


def find(function: str) -> Callable[[Mapping[str, Any], Place], Sequence[Record]]:
    """Return the function that ``module:name`` names.

    Raises:
        CurvlabError: There is none.
    """
    module, colon, name = function.partition(":")
    if not (module and colon and name):
        raise CurvlabError(f"a function is named as module:name, not {function!r}")
    try:
        found: Callable[[Mapping[str, Any], Place], Sequence[Record]] = attrgetter(name)(import_module(module))
    except ModuleNotFoundError as error:
        raise CurvlabError(f"function {function}: there is no module {error.name!r} to import") from error
    except (Exception, SystemExit) as error:  # of whatever kind: the module runs when it is imported
        raise CurvlabError(f"function {function}: {_sentence(error)}") from error
    return found


def plain(text: str) -> str:
    """Return text that a store and a terminal can take: what is not UTF-8, or controls a terminal, is written out."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


# In the process of the cell -----------------------------------------------------------------------------------------


def work(connection: Connection, output: int) -> None:
    """Receive a request, do it, and answer with the records or what was raised.

    Args:
        connection: On which it is received and answered.
        output: Descriptor that takes what is written to the console.
    """
    request = json.loads(connection.recv_bytes())
    started = time.perf_counter()
    folder = Path(request["folder"])
    answer: dict[str, Any]
    try:
        _alone(folder)
        remove_leftovers(folder)  # of a checkpoint that was being written when the cell was killed
        (folder / OUTPUT).unlink(missing_ok=True)  # of an earlier attempt
        _redirect(output)
        if Path(request["cwd"]).is_dir():
            os.chdir(request["cwd"])
        torch.set_num_threads(request["threads"])
        _seed(request["key"])
        data_root = request["data_root"]
        place = Place(folder, None if data_root is None else Path(data_root), request["offline"])
        answer = {"records": _records(find(request["function"])(request["config"], place))}
    except BaseException as error:  # SystemExit too: the cell has then not given its records
        answer = {
            "error": _shortened(plain(_sentence(error)), _LONGEST_ERROR),
            "traceback": _shortened(plain(traceback.format_exc()), _LONGEST_TRACEBACK),
        }
    answer["seconds"] = time.perf_counter() - started
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    connection.send_bytes(json.dumps(answer).encode())


def _alone(folder: Path) -> None:
    """Make the folder, wait until no other process works in it, and hold it as long as this one lives.

    One whose run was killed may be about to end, or on a cluster not know yet.
    """
    import fcntl  # not on Windows, where sweeps do not run, but this module is imported

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # the other one has left nothing, and removed it
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return
        os.close(descriptor)


def _redirect(output: int) -> None:
    """Write to a descriptor what is written to the console, in Python or below it."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def _seed(key: str) -> None:
    """Make a cell that draws without a generator of its own a function of its configuration."""
    seed = int(key[:8], 16)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CurvlabError) else ": ".join(filter(None, (type(error).__name__, text)))


def _shortened(text: str, most: int) -> str:
    """Return at most about so many characters of a text: its beginning and its end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} [... {len(text) - most:,} characters are left out here ...] {text[-(most // 2) :]}"


def _records(returned: Any) -> list[Record]:
    if isinstance(returned, Mapping) or not isinstance(returned, Iterable):
        what = "None" if returned is None else f"a {type(returned).__name__}"
        raise CurvlabError(f"the function returned {what}, not a list of records; return [{{...}}]")
    return [_flat(record, number) for number, record in enumerate(returned)]


def _flat(record: Any, number: int) -> Record:
    if not isinstance(record, Mapping):
        raise CurvlabError(f"record {number} is a {type(record).__name__}, not a dictionary")
    flat: Record = {}
    for name, value in record.items():
        if isinstance(value, np.generic | torch.Tensor) and not value.shape:
            value = value.item()
        if not (value is None or isinstance(value, bool | int | float | str)) or not isinstance(name, str):
            raise CurvlabError(
                f"record {number}: {name!r} is a {type(value).__name__}; records are flat, of numbers, strings and None"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise CurvlabError(f"record {number}: {name!r} is an integer of more than 64 bits")
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise CurvlabError(
                f"record {number}: {name!r} is a text of {len(value):,} characters, and at most {_LONGEST_TEXT:,} are "
                "stored; write it to a file in place.folder"
            )
        if name in _RESERVED or name.startswith(_RESERVED_BEGINNINGS):
            raise CurvlabError(f"record {number}: {name!r} is a column that the tables have themselves; rename it")
        try:
            f"{name}{value}".encode()
        except UnicodeEncodeError as error:
            raise CurvlabError(f"record {number}: {name!r} is not UTF-8, as names and strings have to be") from error
        flat[name] = value
    return flat
