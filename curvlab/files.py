"""Files that are written whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from curvlab.errors import CurvlabError

_TEMPORARY = f".*.{'[0-9a-f]' * 8}.tmp"  # pattern of the names


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it holds all of ``content`` or is what it was before, also if the machine stops.

    Raises:
        CurvlabError: The file cannot be written (no space, no permission, no such folder).
    """
    # Beside the target: only within one file system is the final renaming atomic.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


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
    probe = folder / f".probe.{secrets.token_hex(4)}.tmp"
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


def _cannot_write(path: Path, error: OSError) -> CurvlabError:
    return CurvlabError(
        f"cannot write {path}: {error.strerror or error}; choose a folder that is writable and has space"
    )
