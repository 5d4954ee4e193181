"""The peak memory of a computation in this process."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch


class Peak:
    """Peak memory since construction: of the process (on Linux), or of the tensors on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide new allocations
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _read_status("VmRSS")
        except OSError:
            self.before = None

    def bytes(self) -> int | None:
        """Return the peak minus the initial memory in bytes; None if the system does not report it."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _read_status("VmHWM") - self.before


def _read_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
