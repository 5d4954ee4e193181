"""The folder of one run: opened before the work, filled with files that are whole or absent."""

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder, remove_leftovers, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = "config.yaml"
RUNS = Path("runs")


class RunDirectory:
    """A folder that holds the files of one run; every method that writes, writes whole files or raises.

    Attributes:
        path: The folder.
        resumed: Whether it was there before, with the same configuration: earlier work can be taken up.
    """

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._before: set[str] = set()
        self._before = {entry.name for entry in self._written()}

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file of this name and return its path.

        Raises:
            CurvlabError: It cannot be written; so for all methods that write.
        """
        path = self.path / name
        write_whole(path, content)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write text as UTF-8."""
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON in full precision; NaN and infinities, which JSON does not have, become null.

        Args:
            name: The file.
            value: Numbers, strings, paths, times, arrays, tensors, dataclasses, and lists or mappings of them.
        """
        return self.write_text(name, json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_figure(self, stem: str, figure: "Figure") -> tuple[Path, Path]:
        """Write ``<stem>.png`` (300 dots an inch) and ``<stem>.pdf``."""
        contents = {}
        for kind in ("png", "pdf"):
            buffer = io.BytesIO()
            # Without the date, the same figure is the same file.
            metadata = {"CreationDate": None} if kind == "pdf" else None
            figure.savefig(buffer, format=kind, dpi=300, bbox_inches="tight", metadata=metadata)
            contents[kind] = buffer.getvalue()
        # Drawn both before either is written.
        return (
            self.write_bytes(f"{stem}.png", contents["png"]),
            self.write_bytes(f"{stem}.pdf", contents["pdf"]),
        )

    def discard(self) -> None:
        """Remove what has been written since the run was opened; of a run that was opened again, nothing."""
        if self.resumed:
            return
        with suppress(OSError):
            for entry in self._written():
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        for folder in self._made:
            with suppress(OSError):  # a folder that holds something stays
                folder.rmdir()

    def discard_if_empty(self) -> None:
        """Remove what opening the run has made, if no file has been written since."""
        with suppress(OSError):
            files = [file.name for entry in self._written() for file in (entry, *entry.rglob("*")) if file.is_file()]
            if files in ([], [CONFIG]):
                self.discard()

    def _written(self) -> list[Path]:
        try:
            return [entry for entry in self.path.iterdir() if entry.name not in self._before]
        except OSError:  # there is no such folder, or it may not be read
            return []


def open_run(out: Path | None, analysis: str, config: str | Mapping[str, Any]) -> RunDirectory:
    """Create the folder of a run, or open it again, and find out before the work whether it can be written to.

    Args:
        out: The folder; None for a new one, ``runs/<analysis>-<YYYYmmdd-HHMMSS>``.
        analysis: Name of the analysis.
        config: The whole configuration, as a mapping or as YAML; written as ``config.yaml``.

    Raises:
        CurvlabError: The folder holds results of another configuration, or nothing can be written into it.
    """
    text = config if isinstance(config, str) else yaml.safe_dump(_jsonable(config), sort_keys=False, allow_unicode=True)
    path = _new_name(analysis) if out is None else Path(out)
    resumed = _same_config(path / CONFIG, yaml.safe_load(text))
    run = RunDirectory(path, resumed)
    try:
        make_writable_folder(path)
        remove_leftovers(path)
        if not resumed:
            run.write_text(CONFIG, text)
    except BaseException:
        run.discard_if_empty()
        raise
    return run


def _new_name(analysis: str) -> Path:
    stem = f"{analysis}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    path, number = RUNS / stem, 1
    while path.exists():
        number += 1
        path = RUNS / f"{stem}-{number}"
    return path


def _same_config(file: Path, ours: Any) -> bool:
    """Say whether the file holds this configuration; False if there is none.

    Raises:
        CurvlabError: It holds another one.
    """
    try:
        theirs = yaml.safe_load(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CurvlabError(f"{file} cannot be read ({str(error).splitlines()[0]}); choose another --out") from error
    if theirs == ours:
        return True
    what = ""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        key = next(key for key in {**ours, **theirs} if theirs.get(key, ...) != ours.get(key, ...))
        what = f" ({key} is {theirs.get(key, 'absent')} there and {ours.get(key, 'absent')} here)"
    raise CurvlabError(
        f"{file.parent} holds a run with another configuration{what}; "
        "repeat that run's own command to continue it, or choose another --out"
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return _jsonable(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    return value
