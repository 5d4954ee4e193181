"""Reading back what ``CurvatureMatrix.save`` wrote."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.files import to_path
from curvlab.matrices.base import CurvatureMatrix
from curvlab.matrices.composite import Composite
from curvlab.matrices.entries import check_tensors
from curvlab.matrices.file_format import FORMAT, checksum
from curvlab.matrices.info import Info
from curvlab.parameters import ParameterSpace

_KEYS = {"kind", "names", "shapes", "info"}  # of the description of a matrix; a composite one has "parts" also


def load(path: str | Path) -> CurvatureMatrix:
    """Read a matrix that ``CurvatureMatrix.save`` wrote, on the CPU.

    A file has a checksum of all that it says and holds, which is compared (files of format 1 have none).

    Raises:
        CurvlabError: The file is missing, truncated, changed since it was written, not a curvlab matrix, not a whole
            one, or of a newer curvlab.
    """
    file = to_path(path)
    metadata, tensors = _read(file)
    if "curvlab" not in metadata:
        raise CurvlabError(f"{file} is a safetensors file, but not a matrix that curvlab saved")
    try:
        description = json.loads(metadata["curvlab"])
        newer = _newer(description)
        matrix = None if newer else _checked(description, tensors)
    except (CurvlabError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, CurvlabError) else repr(error)
        raise CurvlabError(f"the header and the tensors of {file} do not make a matrix ({_line(reason)})") from error
    if matrix is None:
        raise CurvlabError(f"{file} was saved by a newer curvlab ({_line(newer)})")
    return matrix


def _read(file: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    try:
        if not file.exists():
            raise CurvlabError(f"there is no file {file}")
        if not file.is_file():
            raise CurvlabError(f"{file} is a folder, a device or a pipe, not a file with a matrix")
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CurvlabError(f"{file} is not a whole safetensors file ({error})") from error


def _newer(description: Mapping[str, Any]) -> str:
    """Return what of a description this curvlab does not know; nothing if it knows all."""
    version = description["format"]
    _require(type(version) is int and version >= 1, "the format is no whole number from 1")
    if version > FORMAT:
        return f"format {version}"
    unknown = sorted(_kinds(description) - set(CurvatureMatrix.kinds))
    return f"a matrix of kind {', '.join(unknown)}" if unknown else ""


def _kinds(description: Mapping[str, Any]) -> set[str]:
    _require(isinstance(description["kind"], str), "a kind is no name")
    return {description["kind"]}.union(*(_kinds(part) for part in description.get("parts", ())))


def _checked(description: dict[str, Any], tensors: Mapping[str, Tensor]) -> CurvatureMatrix:
    """Return the matrix of a file whose checksum is right, and whose entries are finite."""
    if description["format"] > 1:
        written = description.pop("checksum")
        _require(written == checksum(description, tensors), "the checksum differs: the file was changed or damaged")
    check_tensors(tensors.values())
    _require(all(bool(t.isfinite().all()) for t in tensors.values()), "an entry is NaN or infinite")
    del description["format"]
    matrix = _restore(description, tensors)
    _require(matrix.tensors().keys() == tensors.keys(), "there are tensors that belong to no matrix")
    return matrix


def _restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CurvatureMatrix:
    composite = description["kind"] == Composite.kind
    keys = _KEYS | {"parts"} if composite else _KEYS
    _require(set(description) == keys, f"a matrix is described by {sorted(keys)}, not by {sorted(description)}")
    space, info = _space(description["names"], description["shapes"]), Info(**description["info"])
    if not composite:
        return CurvatureMatrix.kinds[description["kind"]].from_tensors(tensors, space, info)
    parts = [
        _restore(part, {name.removeprefix(f"{i}/"): t for name, t in tensors.items() if name.startswith(f"{i}/")})
        for i, part in enumerate(description["parts"])
    ]
    return Composite(parts, space, info)


def _space(names: Any, shapes: Any) -> ParameterSpace:
    _require(isinstance(names, list) and all(isinstance(name, str) for name in names), "a parameter's name is no text")
    _require(len(set(names)) == len(names), "two parameters have the same name")
    _require(
        isinstance(shapes, list)
        and all(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) for shape in shapes),
        "a shape is no list of whole numbers from 0",
    )
    _require(len(names) == len(shapes), "there are not as many names as shapes")
    return ParameterSpace(tuple(names), tuple(map(tuple, shapes)))


def _line(text: str) -> str:
    """Return a line that can be printed, of names that anyone may have written."""
    return " ".join(text[:1000].encode("utf-8", "backslashreplace").decode().split())


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CurvlabError(otherwise)
