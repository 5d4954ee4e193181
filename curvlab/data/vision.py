"""Reader of torchvision's data sets in the data root, with checksums and download.

Torchvision defines the addresses, checksums and formats. Files on disk are checked first, and the network is used only
if files are missing or damaged.
"""

import contextlib
import gzip
import http.client
import io
import socket
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from curvlab.data.arrays import Array
from curvlab.errors import CurvlabError, first_line

_SETS: dict[str, type[MNIST] | type[CIFAR10]] = {
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "kmnist": KMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}

_TIMEOUT = 10.0  # seconds without an answer from the network


class _IncompleteError(Exception):
    """A file of the data set is missing or damaged; the message names it."""


def read_torchvision(name: str, root: Path, offline: bool) -> dict[str, Array]:
    """Return the arrays of a data set, images as uint8, and the names of its classes.

    Args:
        name: Name of a torchvision data set in ``curvlab.data.NAMES``.
        root: Data root, with the folder layout of torchvision.
        offline: Whether downloads are forbidden.

    Raises:
        CurvlabError: The data set is incomplete on disk, and ``offline`` is set or the download fails.
    """
    way_out = f"put the original files or {name}.npz there, or choose another data root (CURVLAB_DATA)"
    try:
        try:
            return _read(name, root)
        except _IncompleteError as fault:
            if offline:
                raise CurvlabError(
                    f"{name} is incomplete on disk ({fault}) and offline is set; allow the download, {way_out}"
                ) from fault
            try:
                _download(name, root)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                reason = first_line(getattr(error, "reason", None) or error)
                raise CurvlabError(
                    f"{name} is incomplete on disk ({fault}) and the download failed ({reason}); "
                    f"connect to the network, {way_out}"
                ) from error
        return _read(name, root)
    except _IncompleteError as fault:
        raise CurvlabError(
            f"{name} is incomplete after the download ({fault}); delete this file and try again"
        ) from fault
    except OSError as error:
        raise CurvlabError(
            f"the files of {name} cannot be read or unpacked ({error}); check permissions and disk space"
        ) from error


def _read(name: str, root: Path) -> dict[str, Array]:
    source = _SETS[name]
    return _read_cifar(source, root) if issubclass(source, CIFAR10) else _read_mnist(source, root)


def _read_mnist(source: type[MNIST], root: Path) -> dict[str, Array]:
    folder = _mnist_folder(source, root)
    x_train, y_train, x_test, y_test = (_read_idx(folder / file, md5) for file, md5 in source.resources)
    # Torchvision names the classes of MNIST "0 - zero" and so on.
    classes = np.array([name.split(" - ")[0] for name in source.classes])
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, "classes": classes}


def _mnist_folder(source: type[MNIST], root: Path) -> Path:
    return root / source.__name__ / "raw"


def _read_idx(packed: Path, md5: str) -> Array:
    """Read an IDX file of bytes, from its ``.gz`` file if the checksum is correct, else from the unpacked file.

    Reading the ``.gz`` file needs no writable folder, and avoids files that were unpacked incompletely.
    """
    plain = packed.with_suffix("")
    if check_integrity(packed, md5):
        content = gzip.decompress(packed.read_bytes())
    elif plain.is_file():
        content = plain.read_bytes()
    else:
        raise _IncompleteError(_describe_fault(packed))
    # The header: two zero bytes, 8 for unsigned bytes, the number of axes, and their lengths as big-endian integers.
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if not shape or len(content) != start + prod(shape):
        raise _IncompleteError(f"{plain} is truncated or damaged")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_cifar(source: type[CIFAR10], root: Path) -> dict[str, Array]:
    folder, packed = root / source.base_folder, root / source.filename
    files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]

    bad = [folder / file for file, md5 in files if not check_integrity(folder / file, md5)]
    if bad:
        if not check_integrity(packed, source.tgz_md5):
            raise _IncompleteError(_describe_fault(packed if packed.exists() else bad[0]))
        extract_archive(str(packed), str(root))
    # The files are pickles; torchvision opens them only if their checksums are correct.
    train, test = (source(root, train=part) for part in (True, False))
    return {
        "x_train": train.data,
        "y_train": np.array(train.targets),
        "x_test": test.data,
        "y_test": np.array(test.targets),
        "classes": np.array(train.classes),
    }


def _describe_fault(path: Path) -> str:
    return f"{path} is truncated or damaged: its checksum is wrong" if path.exists() else f"{path} is missing"


def _download(name: str, root: Path) -> None:
    """Download the original files, which the reader checks and unpacks; remove empty folders after a failure."""
    source = _SETS[name]
    if issubclass(source, CIFAR10):
        folder = root
        files = [(source.filename, source.tgz_md5, [source.url])]
    else:
        folder = _mnist_folder(source, root)
        files = [(file, md5, [mirror + file for mirror in source.mirrors]) for file, md5 in source.resources]
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _short_timeout(), _silence_output():
            for file, md5, urls in files:
                _fetch(urls, folder, file, md5)
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _fetch(urls: Sequence[str], folder: Path, file: str, md5: str) -> None:
    """Download from the first address that works; raise the error of the last one."""
    for url in urls[:-1]:
        with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
            download_url(url, folder, file, md5)
            return
    download_url(urls[-1], folder, file, md5)


@contextlib.contextmanager
def _short_timeout() -> Iterator[None]:
    """Context with a short network timeout; torchvision would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _silence_output() -> Iterator[None]:
    """Context that hides torchvision's progress bar and prints, unless stderr is a terminal."""
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            sink = io.StringIO()
            stack.enter_context(contextlib.redirect_stderr(sink))
            stack.enter_context(contextlib.redirect_stdout(sink))
        yield
