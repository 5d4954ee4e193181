"""One run of a sweep: its function and configuration, where it works, and its outcome."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from curvlab.errors import CurvlabError

Record = dict[str, Any]

_MAX_LEVELS = 100  # levels of lists and dictionaries in a configuration


@dataclass(frozen=True)
class Place:
    """Where a run works; none of this changes a number.

    Attributes:
        folder: Folder of this run alone, for checkpoints. A run that was stopped gets the same folder when it starts
            again, and two processes of the same run never use it at the same time.
        data_root: Folder of the data sets; None for the default one.
        offline: Whether the network must not be used.
    """

    folder: Path
    data_root: Path | None = None
    offline: bool = False


@dataclass(frozen=True)
class RunSpec:
    """Specification of a run: a function and the whole configuration that it is called with.

    Attributes:
        function: ``module:name`` of a ``(config, Place) -> list of records``. A record is a flat dictionary of
            numbers, strings, booleans and None. Write None for an undefined value: NaN marks the run as failed.
            These keys are reserved for the tables: ``run``, ``status``, ``kind``, ``seeds``, ``failed``, ``absent``,
            ``run.*`` and ``config.*``.
        config: The configuration as JSON values, with every default written out; it identifies the run.
        name: Name of the function in the store; empty for ``function`` itself.
        version: Version of the function. Every run of a new version has a new key.
        seed_key: Key of the seed in ``config``. Runs that differ in nothing else are repetitions of each other.
    """

    function: str
    config: Mapping[str, Any]
    name: str = ""
    version: int = 1
    seed_key: str = "seed"

    @cached_property
    def key(self) -> str:
        """Hash of name, version and configuration.

        Raises:
            CurvlabError: The configuration contains other than JSON values.
        """
        return _hash([self.name or self.function, self.version, self.config])

    @cached_property
    def point(self) -> str:
        """Hash of the same without the seed."""
        rest = {name: value for name, value in self.config.items() if name != self.seed_key}
        return _hash([self.name or self.function, self.version, rest])


def canonical(value: Any) -> str:
    """Return JSON text that is identical for equal values.

    Raises:
        CurvlabError: The value contains other than JSON values.
    """
    try:
        _require_json(value, 1)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CurvlabError(f"a configuration must consist of JSON values, and this one does not: {error}") from error


def _require_json(value: Any, depth: int) -> None:
    """Refuse values that Python writes as JSON but that a store or another program may read back differently.

    Raises:
        ValueError: A key is not a string, an integer has more than 64 bits, a string has a lone surrogate, or the
            value has too many levels.
    """
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer has more than 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a number is {value}")
    elif isinstance(value, Mapping | list | tuple):
        if depth > _MAX_LEVELS:
            raise ValueError(f"it contains itself, or has more than {_MAX_LEVELS} levels")
        for name in value if isinstance(value, Mapping) else ():
            if not isinstance(name, str):
                raise ValueError(f"the key {name!r} is not a string")
            name.encode()
        for item in value.values() if isinstance(value, Mapping) else value:
            _require_json(item, depth + 1)


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Attributes:
        key: Key of the run.
        kind: Kind of failure: ``raised``, ``killed``, ``timeout`` or ``nan``; None for a run that is done.
        error: One sentence.
        traceback: Traceback of the error, or the end of the console output.
        records: Records that the function returned.
        seconds: Wall time.
        peak_bytes: Peak memory of the process, Python and torch included.
        host: Name of the machine.
        threads: Number of threads of the process.
        software: Versions and state of the code, as returned by ``curvlab.software.describe_software``.
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
