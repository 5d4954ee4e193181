"""Run directories: the folder of one command, in which every file is complete or absent."""

import dataclasses
import io
import json
import math
import reprlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from curvlab import yaml_file
from curvlab.errors import CurvlabError
from curvlab.files import is_leftover, make_writable_folder, remove_leftovers, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = "config.yaml"
_MARK = "# curvlab analyze "  # start of its first line
RUNS = Path("runs")


class RunDirectory:
    """Folder with the results of one command; each write method writes a complete file or raises.

    Attributes:
        path: The folder.
        resumed: Whether it existed before with the same configuration, so that earlier work can be continued.
    """

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._written: set[str] = set()

    @property
    def written(self) -> set[str]:
        """Names of the files written since the directory was opened."""
        return set(self._written)

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file and return its path.

        Raises:
            CurvlabError: The file cannot be written; this holds for all write methods.
        """
        path = self.path / name
        write_whole(path, content)
        self._written.add(name)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write text as UTF-8; lone surrogates, which UTF-8 cannot encode, are written as escapes."""
        return self.write_bytes(name, text.encode(errors="backslashreplace"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON in full precision; NaN and infinities, which JSON cannot represent, become null.

        Args:
            name: The file.
            value: Numbers, strings, paths, times, arrays, tensors, dataclasses, and lists or mappings of them.
        """
        return self.write_text(name, to_json(value))

    def write_figure(self, stem: str, figure: "Figure") -> tuple[Path, Path]:
        """Write ``<stem>.png`` (300 dpi) and ``<stem>.pdf``."""
        contents = {}
        for kind in ("png", "pdf"):
            buffer = io.BytesIO()
            # Without the date, equal figures give equal files.
            metadata = {"CreationDate": None} if kind == "pdf" else None
            figure.savefig(buffer, format=kind, dpi=300, bbox_inches="tight", metadata=metadata)
            contents[kind] = buffer.getvalue()
        # Both are drawn before the first is written.
        return (
            self.write_bytes(f"{stem}.png", contents["png"]),
            self.write_bytes(f"{stem}.pdf", contents["pdf"]),
        )

    def discard(self, *others: str) -> None:
        """Remove the files written since the directory was opened; a resumed directory is not changed.

        Args:
            *others: Patterns of names of other files and folders that the command has made.
        """
        if self.resumed:
            return
        entries = [self.path / name for name in self._written]
        entries += [entry for pattern in others for entry in self.path.glob(pattern)]
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        for folder in self._made:
            with suppress(OSError):  # keep folders that are not empty
                folder.rmdir()

    def discard_if_empty(self) -> None:
        """Remove the directory if no file has been written since it was opened."""
        if self._written <= {CONFIG}:
            self.discard()


def open_run(out: Path | None, analysis: str, config: str | Mapping[str, Any]) -> RunDirectory:
    """Create a run directory, or resume one, and check that it is writable.

    A folder that is neither empty nor a run directory of the same analysis and configuration is refused.

    Args:
        out: The folder; None for a new one, ``runs/<analysis>-<YYYYmmdd-HHMMSS>``.
        analysis: Name of the analysis.
        config: The whole configuration, as a mapping or as YAML. It is written to ``config.yaml``, below a comment that
            names the analysis.

    Raises:
        CurvlabError: The folder contains anything else, or is not writable.
    """
    text = config if isinstance(config, str) else yaml_file.dumps(_to_jsonable(config))
    if not text.startswith(_MARK):
        text = f"{_MARK}{analysis}\n{text}"
    try:
        values = yaml_file.loads(text)
    except CurvlabError as error:
        raise CurvlabError(f"the configuration cannot be written as {CONFIG}: {error}") from error
    path = _new_name(analysis) if out is None else Path(out)
    resumed = _can_resume(path, analysis, values)
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


def read_analysis_name(folder: Path) -> str:
    """Return the name of the analysis of a run directory; an empty string if the directory does not name it.

    Raises:
        CurvlabError: The folder has no readable configuration.
    """
    try:
        first = (folder / CONFIG).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, ValueError) as error:
        raise CurvlabError(f"{folder} is not a run directory: {error}") from error
    return first.removeprefix(_MARK) if first.startswith(_MARK) else ""


def _new_name(analysis: str) -> Path:
    stem = f"{analysis}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    path, number = RUNS / stem, 1
    while path.exists():
        number += 1
        path = RUNS / f"{stem}-{number}"
    return path


def _can_resume(path: Path, analysis: str, ours: Any) -> bool:
    """Return whether a folder is a run directory of this configuration; False if it is missing or empty.

    Raises:
        CurvlabError: The folder contains anything else.
    """
    file = path / CONFIG
    try:
        names = sorted(entry.name for entry in path.iterdir() if not is_leftover(entry))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: the name is not a valid path
        raise CurvlabError(f"{path} cannot be read ({error}); choose another --out") from error
    if not names:
        return False
    if CONFIG not in names:
        raise CurvlabError(
            f"{path} contains {names[0]}{' and other files' * (len(names) > 1)}, but is not a run directory of "
            f"{analysis}; choose an --out that is empty or does not exist"
        )
    if not file.is_file():  # reading a pipe would block
        raise CurvlabError(f"{file} is not a file; choose another --out")
    try:
        theirs = yaml_file.read(file)
        first = file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, CurvlabError) as error:
        raise CurvlabError(f"{error}; choose another --out") from error
    # Run directories of earlier versions do not name the analysis.
    found = first.removeprefix(_MARK) if first.startswith(_MARK) else analysis
    if found != analysis:
        raise CurvlabError(f"{path} is a run directory of {found}, not of {analysis}; choose another --out")
    if theirs == ours:
        return True
    if not isinstance(theirs, dict):
        raise CurvlabError(f"{file} is not a configuration; choose another --out")
    key = next(key for key in {**ours, **theirs} if theirs.get(key, ...) != ours.get(key, ...))
    raise CurvlabError(
        f"{path} has another configuration ({key} is {_shorten(theirs, key)} there and "
        f"{_shorten(ours, key)} here); repeat its own command to continue it, or choose another --out"
    )


def _shorten(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, "absent")
    return (value if isinstance(value, str) else reprlib.repr(value))[:200]


def to_json(value: Any) -> str:
    """Return JSON in full precision, as ``RunDirectory.write_json`` writes it."""
    return json.dumps(_to_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _to_jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return _to_jsonable(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _to_jsonable({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    return value
