"""Atomic writing of files: a file holds its new content completely, or its former content."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from curvlab.errors import CurvlabError

_STREAMS = (Path("/proc"), Path("/dev/fd"))  # their entries are streams of a process
_TEMPORARY = f".*.{'[0-9a-f]' * 8}.tmp"  # pattern for the names of temporary files
_MAX_LINKS = 40  # symbolic links in a chain, as on Linux


def to_path(path: object) -> Path:
    """Return a path given by the user as ``Path``.

    Raises:
        CurvlabError: It is not a path: another type, empty, or with characters that a file name cannot have.
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        if not text or not isinstance(text, str) or b"\0" in os.fsencode(text):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise CurvlabError(f"{ascii(path)[:200]} is not a path of a file: give a str or a pathlib.Path") from error
    return Path(text)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: it holds all of ``content`` or its former content, also after a power failure.

    A symbolic link is kept, and its target is written. The file keeps its permissions.

    Raises:
        CurvlabError: The file cannot be written (no space, no permission, no such folder), or the path is a folder, a
            device, a pipe or a stream such as ``/dev/stdout``, which a file must not replace.
    """
    target, mode = _find_target(path)
    # Beside the target, since renaming is atomic only within a file system.
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            if mode is not None:
                with suppress(OSError):  # on a file system without permissions
                    temporary.chmod(mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _make_write_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _find_target(path: Path) -> tuple[Path, int | None]:
    """Return the file that a path leads to, and its permissions, or None if it does not exist."""
    target = to_path(path)
    try:
        for _ in range(_MAX_LINKS):
            target = target.parent.resolve() / target.name
            if any(streams in target.parents for streams in _STREAMS):
                raise CurvlabError(f"cannot write {path}: it is a stream of a process; choose a file")
            if not target.is_symlink():
                break
            target = target.parent / target.readlink()
        else:
            raise CurvlabError(f"cannot write {path}: its symbolic links form a loop; choose a file")
        if not target.parent.is_dir():
            raise CurvlabError(f"cannot write {path}: the folder {target.parent} does not exist; create it first")
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError) as error:
        raise _make_write_error(path, error) from error
    if mode is None:
        return target, None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "device, pipe or other special file"
        raise CurvlabError(f"cannot write {path}: it is a {kind}; choose a file")
    return target, stat.S_IMODE(mode)


def is_leftover(file: Path) -> bool:
    """Return whether a file has the name of a temporary file that a killed program has left."""
    return file.match(_TEMPORARY)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed programs have left in a folder or its direct subfolders."""
    for depth in ("", "*/"):
        for file in folder.glob(depth + _TEMPORARY):
            with suppress(OSError):
                file.unlink()


def make_writable_folder(folder: Path) -> None:
    """Create a folder with its parents if it does not exist, and test whether files can be written to it.

    Raises:
        CurvlabError: The path is not a folder, or files cannot be written to it.
    """
    probe = to_path(folder) / f".probe.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # More than a block, since an empty file fits on a full disk.
        probe.write_bytes(bytes(1 << 16))
    except FileExistsError as error:
        found = Path(error.filename)  # the folder, or one of its parents
        what = "a broken link" if found.is_symlink() and not found.exists() else "a file"
        raise CurvlabError(f"{found} is {what}, not a folder; choose another folder for the results") from error
    except OSError as error:
        raise _make_write_error(folder, error) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _make_write_error(path: Path, error: OSError | RuntimeError) -> CurvlabError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return CurvlabError(f"cannot write {path}: {reason}; choose a writable folder with free space")
