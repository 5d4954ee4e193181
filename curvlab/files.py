"""Files that are written whole or not at all."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from curvlab.errors import CurvlabError

_STREAMS = (Path("/proc"), Path("/dev/fd"))  # what lies there belongs to a process, not to a folder
_TEMPORARY = f".*.{'[0-9a-f]' * 8}.tmp"  # pattern of the names of files that are not whole yet
_MOST_LINKS = 40  # of symbolic links one after the other, as on Linux


def to_path(path: object) -> Path:
    """Return a user's path.

    Raises:
        CurvlabError: It is no path: of another type, empty, or with characters that no file's name can have.
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        if not text or not isinstance(text, str) or b"\0" in os.fsencode(text):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise CurvlabError(f"{ascii(path)[:200]} is not the path of a file: give a str or a pathlib.Path") from error
    return Path(text)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it holds all of ``content`` or is what it was before, also if the machine stops.

    A symbolic link stays, and the file that it leads to is written. A file keeps its permissions.

    Raises:
        CurvlabError: The file cannot be written (no space, no permission, no such folder), or the path is that of a
            folder, a device, a pipe or a stream such as ``/dev/stdout``, which a file would take the place of.
    """
    target, mode = _target(path)
    # Beside the target: only within one file system is the final renaming atomic.
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            if mode is not None:
                with suppress(OSError):  # of a file system without permissions
                    temporary.chmod(mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _target(path: Path) -> tuple[Path, int | None]:
    """Return the file that a path leads to, and its permissions if it is there."""
    target = to_path(path)
    try:
        for _ in range(_MOST_LINKS):
            target = target.parent.resolve() / target.name
            if any(streams in target.parents for streams in _STREAMS):
                raise CurvlabError(f"cannot write {path}: it is a stream of a process; choose a file")
            if not target.is_symlink():
                break
            target = target.parent / target.readlink()
        else:
            raise CurvlabError(f"cannot write {path}: its symbolic links lead nowhere; choose a file")
        if not target.parent.is_dir():
            raise CurvlabError(f"cannot write {path}: there is no folder {target.parent}; create it first")
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from error
    if mode is None:
        return target, None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "device, pipe or other special file"
        raise CurvlabError(f"cannot write {path}: it is a {kind}; choose a file")
    return target, stat.S_IMODE(mode)


def is_leftover(file: Path) -> bool:
    """Say whether a file is, by its name, a temporary one that a killed program has left."""
    return file.match(_TEMPORARY)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed programs have left in a folder or one below it."""
    for depth in ("", "*/"):
        for file in folder.glob(depth + _TEMPORARY):
            with suppress(OSError):
                file.unlink()


def make_writable_folder(folder: Path) -> None:
    """Create a folder with its parents where it is missing, and find out now whether files can be written there.

    Raises:
        CurvlabError: It is not a folder, or nothing can be written into it.
    """
    probe = to_path(folder) / f".probe.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # More than a block: a full disk can still take an empty file.
        probe.write_bytes(bytes(1 << 16))
    except FileExistsError as error:
        there = Path(error.filename)  # the folder, or one above it
        what = "a link to nothing" if there.is_symlink() and not there.exists() else "a file"
        raise CurvlabError(f"{there} is {what}, not a folder; choose another place for the results") from error
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _cannot_write(path: Path, error: OSError | RuntimeError) -> CurvlabError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return CurvlabError(f"cannot write {path}: {reason}; choose a folder that is writable and has space")
