"""Reader of image folders: ``ROOT/train/CLASS/*.png`` and ``ROOT/test/CLASS/*.png``."""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from curvlab.data.arrays import Array
from curvlab.errors import CurvlabError

_GRAY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")


def read_folder(root: Path) -> dict[str, Array]:
    """Return the images as uint8 ``(N, H, W, 1)`` if all are grey, else ``(N, H, W, 3)``, and the class names.

    Raises:
        CurvlabError: A folder is missing or has no images, train and test have different classes, images have
            different sizes, or an image cannot be read.
    """
    train, test = _scan(root, "train"), _scan(root, "test")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise CurvlabError(f"only one of train and test has the class {', '.join(odd)}; use the same classes in both")
    files = [Path(file) for file, _ in train.samples + test.samples]
    images = [_read(file, root) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            raise CurvlabError(
                f"{file.relative_to(root)} is {_size(image)} but {files[0].relative_to(root)} is {_size(images[0])}; "
                "resize the images to one size"
            )
    channels = max(image.shape[2] for image in images)
    x = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    split = len(train.samples)
    return {
        "x_train": x[:split],
        "y_train": np.array(train.targets),
        "x_test": x[split:],
        "y_test": np.array(test.targets),
        "classes": np.array(train.classes),
    }


def _scan(root: Path, split: str) -> ImageFolder:
    if not (root / split).is_dir():
        raise CurvlabError(f"the folder has no subfolder {split!r}; put the images into train/CLASS and test/CLASS")
    try:
        return ImageFolder(root / split)
    except OSError as error:
        raise CurvlabError(f"{split} has no class, or a class without images ({error}); add images") from error


def _read(file: Path, root: Path) -> Array:
    """Return uint8 ``(H, W, 1)`` or ``(H, W, 3)``."""
    try:
        with Image.open(file) as image:
            # Pillow would clip images with more bits to 8 bits without a warning.
            if image.mode not in _GRAY + _COLOUR:
                raise CurvlabError(
                    f"{file.relative_to(root)} is an image of mode {image.mode}; save it with 8 bits per channel, "
                    "or store the data as float32 in an .npz file"
                )
            if image.mode in _GRAY:
                return np.asarray(image.convert("L"))[..., np.newaxis]
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CurvlabError(
            f"{file.relative_to(root)} cannot be read as an image (truncated, or another format); replace or delete it"
        ) from error


def _size(image: Array) -> str:
    """Return the size as width x height."""
    return f"{image.shape[1]}x{image.shape[0]}"
