"""What the process of a run does: receive a request, call the function, and send its records or the error."""

import json
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curvlab.errors import CurvlabError
from curvlab.files import remove_leftovers
from curvlab.grid.functions import find_function, to_sentence
from curvlab.grid.run_spec import Place, Record

OUTPUT = "output.txt"

# Columns that the tables of a store have beside the keys of the records.
_RESERVED = {"run", "status", "kind", "seeds", "failed", "absent"}
_RESERVED_PREFIXES = ("run.", "config.")
_MAX_ERROR, _MAX_TRACEBACK, _MAX_TEXT = 4_000, 40_000, 1_000_000  # characters
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # except tab and newline


def escape_controls(text: str) -> str:
    """Return text with control characters, and characters that UTF-8 cannot encode, as escape sequences."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def execute_request(connection: Connection, output: int) -> None:
    """Receive a request, execute it, and send the records or the error.

    Args:
        connection: Connection for the request and the answer.
        output: Descriptor for the console output of the run.
    """
    request = json.loads(connection.recv_bytes())
    started = time.perf_counter()
    folder = Path(request["folder"])
    answer: dict[str, Any]
    try:
        _lock_folder(folder)
        remove_leftovers(folder)  # a checkpoint that was being written when the run was killed
        (folder / OUTPUT).unlink(missing_ok=True)  # of an earlier attempt
        _redirect(output)
        if Path(request["cwd"]).is_dir():
            os.chdir(request["cwd"])
        torch.set_num_threads(request["threads"])
        _seed(request["key"])
        data_root = request["data_root"]
        place = Place(folder, None if data_root is None else Path(data_root), request["offline"])
        answer = {"records": _check_records(find_function(request["function"])(request["config"], place))}
    except BaseException as error:  # SystemExit too: the run has not returned its records
        answer = {
            "error": _shorten(escape_controls(to_sentence(error)), _MAX_ERROR),
            "traceback": _shorten(escape_controls(traceback.format_exc()), _MAX_TRACEBACK),
        }
    answer["seconds"] = time.perf_counter() - started
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    connection.send_bytes(json.dumps(answer).encode())


def _lock_folder(folder: Path) -> None:
    """Make the folder, wait until no other process uses it, and lock it until this process ends.

    After a sweep was killed, a process of the same run may still be ending, or on a cluster still be working.
    """
    import fcntl  # missing on Windows, where sweeps do not run but this module can be imported

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # the other process has left nothing and removed the folder
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return
        os.close(descriptor)


def _redirect(output: int) -> None:
    """Send all console output, of Python and of native code, to a descriptor."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def _seed(key: str) -> None:
    """Seed the global generators from the key, so that a run depends on its configuration alone."""
    seed = int(key[:8], 16)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _shorten(text: str, most: int) -> str:
    """Return about ``most`` characters of a text at most: its beginning and its end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} [... {len(text) - most:,} characters are left out here ...] {text[-(most // 2) :]}"


def _check_records(returned: Any) -> list[Record]:
    if isinstance(returned, Mapping) or not isinstance(returned, Iterable):
        what = "None" if returned is None else f"a {type(returned).__name__}"
        raise CurvlabError(f"the function returned {what}, not a list of records; return [{{...}}]")
    return [_check_record(record, number) for number, record in enumerate(returned)]


def _check_record(record: Any, number: int) -> Record:
    """Return a record with NumPy and torch scalars as Python numbers.

    Raises:
        CurvlabError: The store cannot hold a key or a value, or a key is reserved.
    """
    if not isinstance(record, Mapping):
        raise CurvlabError(f"record {number} is a {type(record).__name__}, not a dictionary")
    checked: Record = {}
    for name, value in record.items():
        if isinstance(value, np.generic | torch.Tensor) and not value.shape:
            value = value.item()
        if not (value is None or isinstance(value, bool | int | float | str)) or not isinstance(name, str):
            raise CurvlabError(
                f"record {number}: {name!r} is a {type(value).__name__}; records are flat dictionaries of numbers, "
                "strings and None"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise CurvlabError(f"record {number}: {name!r} is an integer of more than 64 bits; store a float or a str")
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise CurvlabError(
                f"record {number}: {name!r} is a text of {len(value):,} characters, and at most {_MAX_TEXT:,} are "
                "stored; write it to a file in place.folder"
            )
        if name in _RESERVED or name.startswith(_RESERVED_PREFIXES):
            raise CurvlabError(f"record {number}: {name!r} is a column that the tables have themselves; rename it")
        try:
            f"{name}{value}".encode()
        except UnicodeEncodeError as error:
            raise CurvlabError(
                f"record {number}: {name!r} cannot be encoded as UTF-8; escape the lone surrogates"
            ) from error
        checked[name] = value
    return checked
