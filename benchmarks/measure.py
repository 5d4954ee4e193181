"""What the benchmarks share: a case runs in a process of its own, timed, its peak memory read from the kernel."""

import json
import os
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


def emit(record: dict[str, Any]) -> None:
    """Print a result as a line of JSON, as soon as it is there: what is stopped has lost nothing."""
    print(json.dumps(record), flush=True)


def side_by_side(
    script: str, case: str, checkouts: dict[str, str], rounds: int, *arguments: str
) -> dict[str, list[float]]:
    """Run a case with the package of several checkouts in turn; return the number of every round, by name.

    Each is a process of its own that prints a number for every line that it is given (``--serve``).
    """
    processes = {
        name: subprocess.Popen(
            [sys.executable, script, "--case", case, "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": folder},
        )
        for name, folder in checkouts.items()
    }
    found: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(rounds + 1):  # the first is to warm up
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found[name].append(float(process.stdout.readline()))
    for process in processes.values():
        process.communicate("")
    return {name: values[1:] for name, values in found.items()}


def machine() -> dict[str, Any]:
    """Describe where the numbers were taken."""
    return {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
