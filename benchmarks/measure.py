"""What the benchmarks share: a case runs in a process of its own, timed, its peak memory read from the kernel."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_above(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Run ``work``; return its result, its wall seconds and by how many MB it raised the process's peak memory."""
    before = _reset_peak()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    return result, seconds, (_status("VmHWM") - before) / 1024


def _reset_peak() -> int:
    """Forget the peak so far (Linux) and return the memory held now, in kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def in_own_process(script: str, case: str, *arguments: str, repeats: int = 1) -> dict[str, Any]:
    """Run ``script --case CASE ARGUMENTS`` some times; return the case's last JSON with the medians of its numbers."""
    results = []
    for _ in range(repeats):
        command = [sys.executable, script, "--case", case, *arguments]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            last = finished.stderr.strip().splitlines()[-1] if finished.stderr.strip() else finished.returncode
            return {"failed": str(last)}
        results.append(json.loads(finished.stdout.splitlines()[-1]))
    merged = dict(results[-1])
    for key in {"seconds", "peak_mb"} & merged.keys():
        merged[key] = round(statistics.median(result[key] for result in results), 3)
    if repeats > 1:
        merged["runs"] = [round(result["seconds"], 3) for result in results]
    return merged


def machine() -> dict[str, Any]:
    """Describe where the numbers were taken."""
    return {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
