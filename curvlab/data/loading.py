"""Loading of data sets by name or path."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from curvlab.data.archive import read_archive
from curvlab.data.arrays import Array, from_arrays
from curvlab.data.dataset import Dataset
from curvlab.errors import CurvlabError
from curvlab.forms import unknown_name_message

NAMES = ("digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100")


def load(name: str | Path, *, root: str | Path | None = None, offline: bool = False) -> Dataset:
    """Load a data set.

    Args:
        name: One of ``NAMES``, or the path of your own data: an ``.npz`` file with the keys ``x_train, y_train,
            x_test, y_test`` (and optionally ``classes``), or a folder ``ROOT/train/CLASS/*.png``,
            ``ROOT/test/CLASS/*.png`` of images of the same size. For a folder with one of these names, write
            ``./mnist``.
        root: Data root, where data sets are searched by name and downloaded to; by default the environment variable
            ``CURVLAB_DATA``, else ``~/.cache/curvlab/data``. An archive ``<root>/<name>.npz`` takes precedence over the
            original files.
        offline: Whether downloads are forbidden.

    Raises:
        CurvlabError: The data set does not exist, is incomplete or invalid, or cannot be downloaded.

    Examples:
        >>> digits = load("digits")
        >>> digits.x_train.shape, digits.x_test.shape
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    """
    source, read = _find_reader(name, root, offline)
    try:
        return from_arrays(str(name), read())
    except CurvlabError as error:
        raise CurvlabError(f"{source}: {error}") from error


def fingerprint(name: str | Path, *, root: str | Path | None = None, offline: bool = False) -> str:
    """Return the SHA-256 (hex) of a file, or of the tensors of a data set that is not a file.

    Args:
        name: Name or path as for ``load``, or the path of any file, such as a weight file, in the working directory or
            in the data root.
        root: Data root, as for ``load``.
        offline: Whether downloads are forbidden.

    Raises:
        CurvlabError: The data set or file does not exist or cannot be read.
    """
    for path in (Path(name).expanduser(), data_root(root) / name):
        if name not in NAMES and path.is_file():
            try:
                with path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CurvlabError(f"cannot read {path} ({error.strerror}); check its permissions") from error
    return load(name, root=root, offline=offline).fingerprint()


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder of data sets and weights: ``root``, or the default of ``load``."""
    return Path(root or os.environ.get("CURVLAB_DATA") or Path.home() / ".cache/curvlab/data").expanduser()


def _find_reader(
    name: str | Path, root: str | Path | None, offline: bool
) -> tuple[str, Callable[[], dict[str, Array]]]:
    """Return the name of the source for error messages, and the function that reads it.

    scikit-learn and torchvision are imported only by their readers, because their import takes longer than reading most
    data sets.
    """
    if name == "digits":
        from curvlab.data.digits import read_digits

        return name, read_digits
    if isinstance(name, str) and name in NAMES:
        base = data_root(root)
        archive = base / f"{name}.npz"
        if archive.exists():
            return str(archive), partial(read_archive, archive)
        from curvlab.data.vision import read_torchvision

        return str(base), partial(read_torchvision, name, base, offline)
    path = Path(name).expanduser()
    if path.is_dir():
        from curvlab.data.folder import read_folder

        return str(path), partial(read_folder, path)
    if path.exists():
        return str(path), partial(read_archive, path)
    if isinstance(name, Path) or path.suffix == ".npz" or len(path.parts) > 1:
        raise CurvlabError(f"{path}: no such file or folder; check the path")
    raise CurvlabError(f"{unknown_name_message('data set', name, NAMES)}, and paths of .npz files and image folders")
