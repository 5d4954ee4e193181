"""Reading back what ``CurvatureMatrix.save`` wrote."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from curvlab.errors import CurvlabError
from curvlab.matrices.base import FORMAT, CurvatureMatrix, Info
from curvlab.parameters import ParameterSpace


def load(path: str | Path) -> CurvatureMatrix:
    """Read a matrix that ``CurvatureMatrix.save`` wrote, on the CPU.

    Raises:
        CurvlabError: The file is missing, truncated, not a curvlab matrix, or of a newer version of curvlab.
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
    description = json.loads(metadata["curvlab"])
    if description["format"] > FORMAT or description["kind"] not in CurvatureMatrix.kinds:
        raise CurvlabError(
            f"{path} was saved by a newer curvlab (format {description['format']}, {description['kind']})"
        )
    space = ParameterSpace(tuple(description["names"]), tuple(tuple(shape) for shape in description["shapes"]))
    return CurvatureMatrix.kinds[description["kind"]].from_tensors(tensors, space, Info(**description["info"]))
