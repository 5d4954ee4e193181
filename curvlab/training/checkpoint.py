"""Checkpoint files of training runs; each file stores which run it belongs to."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import CurvlabError
from curvlab.files import write_whole
from curvlab.training.samples import Samples

FORMAT = "curvlab training checkpoint 1"


def fingerprint(options: dict[str, Any], model: nn.Module, **data: Samples | None) -> dict[str, Any]:
    """Return a description of a run; two runs are the same if and only if their descriptions are equal.

    The values of the weights are not part of it: a continued run takes them from the checkpoint.

    Args:
        options: Hyper-parameters by name.
        model: Its parameters and buffers are described by name, shape, dtype, device type and whether they are trained.
        data: Samples by their role (``training``, ``evaluation``), described by a hash of all their bytes.
    """
    description = dict(options)
    for name, parameter in model.named_parameters():
        description[f"parameter {name}"] = f"{_kind(parameter)} {parameter.device.type}" + (
            "" if parameter.requires_grad else " frozen"
        )
    for name, buffer in model.named_buffers():
        description[f"buffer {name}"] = _kind(buffer)
    for name, samples in data.items():
        description[f"{name} data"] = None if samples is None else " ".join(_hash(part) for part in samples)
    return description


@dataclass(frozen=True)
class CheckpointFile:
    """File with the state of one run.

    Args:
        path: Path of the file.
        fingerprint: Result of ``fingerprint`` for this run.
    """

    path: Path
    fingerprint: dict[str, Any]

    def write(self, states: dict[str, Any]) -> None:
        """Write tensors, numbers, strings and lists or dictionaries of them; the file is complete or not written.

        Raises:
            CurvlabError: The file cannot be written.
        """
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "fingerprint": self.fingerprint, **states}, buffer)
        write_whole(self.path, buffer.getvalue())

    def read(self, map_location: str | None = "cpu") -> dict[str, Any] | None:
        """Return the last state that was written; None if there is no file.

        Args:
            map_location: Device of the tensors; None for the devices they were saved from.

        Raises:
            CurvlabError: The file cannot be read, or belongs to another run; the message names the differences.
        """
        if not self.path.exists():
            return None
        try:
            states = torch.load(self.path, map_location=map_location, weights_only=True)
        except Exception as error:  # a broken file can make the unpickler fail in any way
            raise CurvlabError(
                f"checkpoint {self.path} cannot be read (truncated, or not a checkpoint): "
                "delete it or choose another file"
            ) from error
        if not isinstance(states, dict) or states.get("format") != FORMAT:
            raise CurvlabError(f"{self.path} is not a curvlab training checkpoint; choose another file")
        theirs = states["fingerprint"]
        differences = [
            f"{key} is {theirs.get(key, 'absent')} there and {self.fingerprint.get(key, 'absent')} here"
            for key in {**self.fingerprint, **theirs}
            if theirs.get(key, "absent") != self.fingerprint.get(key, "absent")
        ]
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise CurvlabError(
                f"checkpoint {self.path} belongs to another run: {', '.join(differences[:3])}{more}; "
                "delete it or choose another file"
            )
        return states


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, without copying; includes non-persistent buffers."""
    parameters = {f"parameter {name}": parameter.detach() for name, parameter in model.named_parameters()}
    return parameters | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{_kind(tensor)} {hashlib.sha256(flat.numpy().data).hexdigest()[:16]}"
