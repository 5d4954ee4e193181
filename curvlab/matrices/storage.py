"""Reading back what ``CurvatureMatrix.save`` wrote."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.matrices.base import FORMAT, CurvatureMatrix, Info
from curvlab.matrices.composite import Composite
from curvlab.parameters import ParameterSpace


def load(path: str | Path) -> CurvatureMatrix:
    """Read a matrix that ``CurvatureMatrix.save`` wrote, on the CPU.

    Raises:
        CurvlabError: The file is missing, truncated, not a curvlab matrix, not a whole one, or of a newer curvlab.
    """
    path = Path(path)
    if not path.is_file():
        raise CurvlabError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CurvlabError(f"{path} is not a whole safetensors file ({error})") from error
    if "curvlab" not in metadata:
        raise CurvlabError(f"{path} is a safetensors file, but not a matrix that curvlab saved")
    try:
        description = json.loads(metadata["curvlab"])
        newer = description["format"] > FORMAT or not _kinds(description) <= set(CurvatureMatrix.kinds)
        matrix = None if newer else _restore(description, tensors)
    except (CurvlabError, LookupError, TypeError, ValueError) as error:
        raise CurvlabError(f"the header and the tensors of {path} do not make a matrix ({error!r})") from error
    if matrix is None:
        raise CurvlabError(
            f"{path} was saved by a newer curvlab (format {description['format']}, {description['kind']})"
        )
    return matrix


def _kinds(description: Mapping[str, Any]) -> set[str]:
    return {description["kind"]}.union(*(_kinds(part) for part in description.get("parts", ())))


def _restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CurvatureMatrix:
    shapes = {n: tuple(shape) for n, shape in zip(description["names"], description["shapes"], strict=True)}
    space = ParameterSpace(tuple(shapes), tuple(shapes.values()))
    info = Info(**description["info"])
    if description["kind"] != Composite.kind:
        return CurvatureMatrix.kinds[description["kind"]].from_tensors(tensors, space, info)
    parts = [
        _restore(part, {name.removeprefix(f"{i}/"): t for name, t in tensors.items() if name.startswith(f"{i}/")})
        for i, part in enumerate(description["parts"])
    ]
    return Composite(parts, space, info)
