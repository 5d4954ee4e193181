"""Read matrices that ``CurvatureMatrix.save`` wrote."""

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

_KEYS = {"kind", "names", "shapes", "info"}  # of the description of a matrix; a composite matrix also has "parts"


def load(path: str | Path) -> CurvatureMatrix:
    """Read a matrix that ``CurvatureMatrix.save`` wrote, to the CPU.

    The checksum of the file is compared (files of format 1 have none).

    Raises:
        CurvlabError: The file is missing, truncated, changed since it was written, not a curvlab matrix, or written by
            a newer curvlab.
    """
    file = to_path(path)
    metadata, tensors = _read(file)
    if "curvlab" not in metadata:
        raise CurvlabError(f"{file} is a safetensors file, but not a matrix saved by curvlab")
    try:
        description = json.loads(metadata["curvlab"])
        newer = _unknown_part(description)
        matrix = None if newer else _create_checked(description, tensors)
    except (CurvlabError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, CurvlabError) else repr(error)
        raise CurvlabError(f"the content of {file} is not a valid matrix ({_to_printable_line(reason)})") from error
    if matrix is None:
        raise CurvlabError(f"{file} was saved by a newer curvlab ({_to_printable_line(newer)}): update curvlab")
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
        raise CurvlabError(f"{file} is not a complete safetensors file ({error})") from error


def _unknown_part(description: Mapping[str, Any]) -> str:
    """Return the part of a description that this version of curvlab does not know, or an empty text."""
    version = description["format"]
    _require(type(version) is int and version >= 1, "the format is not a whole number from 1")
    if version > FORMAT:
        return f"format {version}"
    unknown = sorted(_kinds(description) - set(CurvatureMatrix.kinds))
    return f"a matrix of kind {', '.join(unknown)}" if unknown else ""


def _kinds(description: Mapping[str, Any]) -> set[str]:
    _require(isinstance(description["kind"], str), "a kind is not a text")
    return {description["kind"]}.union(*(_kinds(part) for part in description.get("parts", ())))


def _create_checked(description: dict[str, Any], tensors: Mapping[str, Tensor]) -> CurvatureMatrix:
    """Create the matrix of a file after checking the checksum and that the entries are finite."""
    if description["format"] > 1:
        written = description.pop("checksum")
        _require(written == checksum(description, tensors), "the checksum differs: the file was changed or damaged")
    check_tensors(tensors.values())
    _require(all(bool(t.isfinite().all()) for t in tensors.values()), "an entry is NaN or infinite")
    del description["format"]
    matrix = _restore(description, tensors)
    _require(matrix.tensors().keys() == tensors.keys(), "a tensor does not belong to the matrix")
    return matrix


def _restore(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CurvatureMatrix:
    composite = description["kind"] == Composite.kind
    keys = _KEYS | {"parts"} if composite else _KEYS
    _require(set(description) == keys, f"the description must have the keys {sorted(keys)}, not {sorted(description)}")
    space, info = _space(description["names"], description["shapes"]), Info(**description["info"])
    if not composite:
        return CurvatureMatrix.kinds[description["kind"]].from_tensors(tensors, space, info)
    parts = [
        _restore(part, {name.removeprefix(f"{i}/"): t for name, t in tensors.items() if name.startswith(f"{i}/")})
        for i, part in enumerate(description["parts"])
    ]
    return Composite(parts, space, info)


def _space(names: Any, shapes: Any) -> ParameterSpace:
    _require(isinstance(names, list) and all(isinstance(name, str) for name in names), "a parameter name is not a text")
    _require(len(set(names)) == len(names), "two parameters have the same name")
    _require(
        isinstance(shapes, list)
        and all(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) for shape in shapes),
        "a shape is not a list of whole numbers from 0",
    )
    _require(len(names) == len(shapes), "the numbers of names and shapes differ")
    return ParameterSpace(tuple(names), tuple(map(tuple, shapes)))


def _to_printable_line(text: str) -> str:
    """Return one printable line, because the names in a file may contain any character."""
    return " ".join(text[:1000].encode("utf-8", "backslashreplace").decode().split())


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CurvlabError(otherwise)
