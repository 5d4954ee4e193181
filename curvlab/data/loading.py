"""``load``: from a name or a path to a data set."""

import hashlib
import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from curvlab.data.archive import read_archive
from curvlab.data.arrays import Array, from_arrays
from curvlab.data.dataset import Dataset
from curvlab.errors import CurvlabError

NAMES = ("digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100")


def load(name: str | Path, *, root: str | Path | None = None, offline: bool = False) -> Dataset:
    """Return a data set.

    Args:
        name: One of ``NAMES``, or the path of a user's own data: an ``.npz`` file with the keys ``x_train, y_train,
            x_test, y_test`` (and ``classes``, which may be left out), or a folder ``ROOT/train/CLASS/*.png``,
            ``ROOT/test/CLASS/*.png`` of images of one size. To load a folder that is called like one of the
            names, write ``./mnist``.
        root: The data root, where named sets are looked for and downloaded to; without it the environment variable
            ``CURVLAB_DATA``, else ``~/.cache/curvlab/data``. A plain archive ``<root>/<name>.npz`` is used in place of
            the original files.
        offline: Never touch the network.

    Raises:
        CurvlabError: There is no such data set, it is not whole, it is not right, or it cannot be downloaded.

    Examples:
        >>> digits = load("digits")
        >>> digits.x_train.shape, digits.x_test.shape
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    """
    source, read = _reader(name, root, offline)
    try:
        return from_arrays(str(name), read())
    except CurvlabError as error:
        raise CurvlabError(f"{source}: {error}") from error


def fingerprint(name: str | Path, *, root: str | Path | None = None, offline: bool = False) -> str:
    """Return the SHA-256 (hex) of a file, or of the tensors of a data set that is none.

    Args:
        name: As ``load`` takes it, or of any file, such as one of weights: where it is, here or below the data root.
        root: As for ``load``.
        offline: As for ``load``.

    Raises:
        CurvlabError: There is no such data set or file, or it cannot be read.
    """
    for path in (Path(name).expanduser(), data_root(root) / name):
        if name not in NAMES and path.is_file():
            try:
                with path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CurvlabError(f"cannot read {path}: {error.strerror}") from error
    return load(name, root=root, offline=offline).fingerprint()


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder where data sets and weights are looked for: the one given, or as ``load`` says."""
    return Path(root or os.environ.get("CURVLAB_DATA") or Path.home() / ".cache/curvlab/data").expanduser()


def _reader(name: str | Path, root: str | Path | None, offline: bool) -> tuple[str, Callable[[], dict[str, Array]]]:
    """Return what to call the source in an error, and what reads it.

    scikit-learn and torchvision are imported with the reader that needs them: both take longer to import than most
    data to read.
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
        raise CurvlabError(f"{path}: there is no such file or folder; check the path")
    nearest = get_close_matches(name.lower(), NAMES, n=1, cutoff=0.0)[0]
    raise CurvlabError(
        f"there is no data set {name!r}; the nearest name is {nearest!r} of {', '.join(NAMES)}, "
        "and your own data go by the path of an .npz file or of an image folder"
    )
