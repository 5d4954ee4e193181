"""Reader of ``.npz`` archives without pickled objects."""

import zipfile
from pathlib import Path

import numpy as np

from curvlab.data.arrays import KEYS, Array
from curvlab.errors import CurvlabError


def read_archive(path: Path) -> dict[str, Array]:
    """Return the arrays under ``x_train, y_train, x_test, y_test`` and, if present, ``classes``.

    Raises:
        CurvlabError: The file is not a complete archive, a key is missing, or an array contains Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.removesuffix(".npy"): member for member in archive.namelist()}
            missing = [key for key in KEYS if key not in members]
            if missing:
                raise CurvlabError(
                    f"the archive has no {', '.join(missing)}, only {', '.join(members) or 'no arrays'}; "
                    f"name the arrays {', '.join(KEYS)}"
                )
            return {key: _read(archive, members[key], key) for key in (*KEYS, "classes") if key in members}
    except OSError as error:
        raise CurvlabError(f"the file cannot be read ({error.strerror or error}); check its permissions") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CurvlabError(
            "the file is not a complete .npz archive (truncated, or another format); copy or save it again"
        ) from error


def _read(archive: zipfile.ZipFile, member: str, key: str) -> Array:
    try:
        with archive.open(member) as file:
            array: Array = np.lib.format.read_array(file, allow_pickle=False)
            file.read()  # read to the end, where the checksum is compared
            return array
    except MemoryError as error:
        raise CurvlabError(f"{key} is damaged or does not fit into memory; store fewer samples") from error
    except Exception as error:  # a damaged member can make zipfile, zlib and NumPy fail in many ways
        if "allow_pickle" in str(error):
            raise CurvlabError(
                f"{key} contains Python objects, and reading them could run code; save numbers or strings instead"
            ) from error
        raise CurvlabError(
            f"{key} is damaged or was not written by numpy.savez; copy or save the archive again"
        ) from error
