"""The file format of matrices: safetensors with a description and a checksum."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.files import write_whole

#: Format version; version 1 had no checksum.
FORMAT = 2


def write_file(file: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a matrix to a file; the file is complete or not written at all.

    Args:
        file: The path; an existing file is replaced.
        description: The description of the matrix, which JSON can encode.
        tensors: The entries by name.

    Raises:
        CurvlabError: The entries are not finite, or the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise CurvlabError("a matrix with NaN or infinite entries cannot be saved")
    whole = {"format": FORMAT, **description}
    whole["checksum"] = checksum(whole, tensors)
    write_whole(file, serialise(tensors, metadata={"curvlab": json.dumps(whole)}))


def checksum(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 checksum (hex) of the description and the tensors, which must be on the CPU."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
