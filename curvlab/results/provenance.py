"""Where results come from: versions, command, code, machine, time."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from curvlab._version import __version__

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "backpack-for-pytorch",
    "nngeometry",
    "curvlinops-for-pytorch",
)


class Stopwatch:
    """Wall time by stage; a stage that comes again is added up.

    Attributes:
        started: When the stopwatch was made.
        seconds: Seconds a stage.

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
        """Count the time of the block to a stage."""
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
    """Describe the run that ends now; what cannot be found out is None.

    Args:
        seeds: The seeds used.
        data_hash: A hash of the data used.
        stages: Seconds a stage (``Stopwatch.seconds``).
        started: When the run began, with a time zone (``Stopwatch.started``).
        device: Where the computation was.

    Returns:
        JSON values: ``command``, ``versions``, ``seeds``, ``data_hash``, ``git`` (``commit``, ``dirty``),
        ``machine`` (memory in bytes), ``peak_rss_bytes``, ``started``, ``ended`` (ISO 8601, UTC), ``seconds``.
    """
    return {
        "command": shlex.join(sys.orig_argv),
        **software(),
        "seeds": list(seeds),
        "data_hash": data_hash,
        "machine": _machine(torch.device(device)),
        "peak_rss_bytes": _peak_rss(),
        "started": started.astimezone(UTC).isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: round(seconds, 3) for stage, seconds in stages.items()},
    }


def software() -> dict[str, Any]:
    """Return ``versions`` and ``git``, as in ``collect``: what has to be the same for the same numbers.

    Examples:
        >>> list(software())
        ['versions', 'git']
    """
    return {"versions": _versions(), "git": _git()}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"curvlab": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _git() -> dict[str, Any] | None:
    """Describe the checkout that the package is run from, or else the one around the current folder."""
    # An installed package may lie in a virtual environment inside a checkout that does not track it.
    for folder, tracked in ((Path(__file__).parent, [Path(__file__).name]), (Path.cwd(), [])):
        if tracked and not _ask_git(folder, "ls-files", *tracked):
            continue
        commit = _ask_git(folder, "rev-parse", "HEAD")
        changes = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
        if commit:
            return {"commit": commit, "dirty": None if changes is None else bool(changes)}
    return None


def _ask_git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


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
    import resource  # only where there is one

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
