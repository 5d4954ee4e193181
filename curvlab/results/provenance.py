"""The provenance of results: command, versions, code, machine and time."""

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from curvlab.software import describe_software


class Stopwatch:
    """Wall time by stage; repeated stages are summed.

    Attributes:
        started: Time of construction.
        seconds: Seconds per stage.

    Examples:
        >>> stages = Stopwatch()
        >>> with stages("train"):
        ...     pass
        >>> list(stages.seconds)
        ['train']
    """

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def collect(
    *,
    seeds: Sequence[int],
    data_hash: str | None,
    stages: Mapping[str, float],
    started: datetime,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return the provenance of the command that ends now; unknown values are None.

    Args:
        seeds: The seeds.
        data_hash: Hash of the data.
        stages: Seconds per stage (``Stopwatch.seconds``).
        started: Start time with a time zone (``Stopwatch.started``).
        device: Device of the computation.

    Returns:
        JSON values: ``command``, ``versions``, ``seeds``, ``data_hash``, ``git`` (``commit``, ``dirty``),
        ``machine`` (memory in bytes), ``peak_rss_bytes``, ``started``, ``ended`` (ISO 8601, UTC), ``seconds``.
    """
    return {
        "command": shlex.join(sys.orig_argv),
        **describe_software(),
        "seeds": list(seeds),
        "data_hash": data_hash,
        "machine": _machine(torch.device(device)),
        "peak_rss_bytes": _peak_rss(),
        "started": started.astimezone(UTC).isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: round(seconds, 3) for stage, seconds in stages.items()},
    }


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _peak_rss() -> int | None:
    if sys.platform == "win32":
        return None
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
