"""The folder of one run: opened before the work, filled with files that are whole or absent."""

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
_MARK = "# curvlab analyze "  # begins the first line of it
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
        self._written: set[str] = set()

    @property
    def written(self) -> set[str]:
        """Names of the files that were written since the run was opened."""
        return set(self._written)

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file of this name and return its path.

        Raises:
            CurvlabError: It cannot be written; so for all methods that write.
        """
        path = self.path / name
        write_whole(path, content)
        self._written.add(name)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write text as UTF-8; what UTF-8 does not have, half a pair of surrogates, becomes its escape."""
        return self.write_bytes(name, text.encode(errors="backslashreplace"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON in full precision; NaN and infinities, which JSON does not have, become null.

        Args:
            name: The file.
            value: Numbers, strings, paths, times, arrays, tensors, dataclasses, and lists or mappings of them.
        """
        return self.write_text(name, to_json(value))

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

    def discard(self, *others: str) -> None:
        """Remove the files that were written since the run was opened; of a run that was opened again, nothing.

        Args:
            *others: Patterns of names of further files and folders that the run has made.
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
            with suppress(OSError):  # a folder that holds something stays
                folder.rmdir()

    def discard_if_empty(self) -> None:
        """Remove what opening the run has made, if no file has been written since."""
        if self._written <= {CONFIG}:
            self.discard()


def open_run(out: Path | None, analysis: str, config: str | Mapping[str, Any]) -> RunDirectory:
    """Create the folder of a run, or open it again, and find out before the work whether it can be written to.

    A folder that is neither empty nor a run of the same analysis and configuration is refused: its files are others'.

    Args:
        out: The folder; None for a new one, ``runs/<analysis>-<YYYYmmdd-HHMMSS>``.
        analysis: Name of the analysis.
        config: The whole configuration, as a mapping or as YAML; written as ``config.yaml``, whose first line, a
            comment, names the analysis.

    Raises:
        CurvlabError: The folder holds anything else than this run, or nothing can be written into it.
    """
    text = config if isinstance(config, str) else yaml_file.dumps(_jsonable(config))
    if not text.startswith(_MARK):
        text = f"{_MARK}{analysis}\n{text}"
    try:
        values = yaml_file.loads(text)
    except CurvlabError as error:
        raise CurvlabError(f"the configuration cannot be written as {CONFIG}: {error}") from error
    path = _new_name(analysis) if out is None else Path(out)
    resumed = _is_begun(path, analysis, values)
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
    """Return the name of the analysis that a folder is a run of; nothing if it does not say.

    Raises:
        CurvlabError: It holds no configuration of a run.
    """
    try:
        first = (folder / CONFIG).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, ValueError) as error:
        raise CurvlabError(f"{folder} is not the folder of a run: {error}") from error
    return first.removeprefix(_MARK) if first.startswith(_MARK) else ""


def _new_name(analysis: str) -> Path:
    stem = f"{analysis}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    path, number = RUNS / stem, 1
    while path.exists():
        number += 1
        path = RUNS / f"{stem}-{number}"
    return path


def _is_begun(path: Path, analysis: str, ours: Any) -> bool:
    """Say whether a folder holds this run, begun before; False where there is no folder, or nothing in it.

    Raises:
        CurvlabError: It holds anything else.
    """
    file = path / CONFIG
    try:
        names = sorted(entry.name for entry in path.iterdir() if not is_leftover(entry))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # the latter: no system has such a name
        raise CurvlabError(f"{path} cannot be read ({error}); choose another --out") from error
    if not names:
        return False
    if CONFIG not in names:
        raise CurvlabError(
            f"{path} holds {names[0]}{' and other files' * (len(names) > 1)}, and is no run of {analysis}; "
            "choose an --out that is empty or does not exist"
        )
    if not file.is_file():  # a pipe would never end
        raise CurvlabError(f"{file} is not a file; choose another --out")
    try:
        theirs = yaml_file.read(file)
        first = file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, CurvlabError) as error:
        raise CurvlabError(f"{error}; choose another --out") from error
    # Runs of earlier versions do not say whose they are.
    of = first.removeprefix(_MARK) if first.startswith(_MARK) else analysis
    if of != analysis:
        raise CurvlabError(f"{path} holds a run of {of}, not of {analysis}; choose another --out")
    if theirs == ours:
        return True
    if not isinstance(theirs, dict):
        raise CurvlabError(f"{file} is not the configuration of a run; choose another --out")
    key = next(key for key in {**ours, **theirs} if theirs.get(key, ...) != ours.get(key, ...))
    raise CurvlabError(
        f"{path} holds a run with another configuration ({key} is {_brief(theirs, key)} there and "
        f"{_brief(ours, key)} here); repeat that run's own command to continue it, or choose another --out"
    )


def _brief(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, "absent")
    return (value if isinstance(value, str) else reprlib.repr(value))[:200]


def to_json(value: Any) -> str:
    """Return JSON in full precision, as ``RunDirectory.write_json`` writes it."""
    return json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
