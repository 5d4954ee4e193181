"""Execution of one run in its own process, on this machine or on a worker of a cluster, up to its outcome."""

import json
import os
import platform
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from curvlab.grid import processes
from curvlab.grid.run_process import OUTPUT, escape_controls
from curvlab.grid.run_spec import Outcome
from curvlab.software import describe_software

_END_OF_OUTPUT = 4000  # characters of console output that are stored in place of a traceback

Task = Mapping[str, Any]


def supervise(task: Task, wanted: Callable[[], bool]) -> Outcome:
    """Execute a run in its own process and return its outcome; the process is killed once it is no longer wanted.

    Args:
        task: The run, with its folder, threads and time limit, as ``curvlab.grid.run`` makes it.
        wanted: Returns whether the outcome is still wanted; called twice a second.

    Raises:
        CurvlabError: No process can be started.
    """
    folder = Path(task["folder"])
    request = json.dumps(task).encode()
    ended = processes.run(
        task["function"], task["threads"], task["code"], request, folder / OUTPUT, task["timeout"], wanted
    )
    with suppress(OSError):
        folder.rmdir()  # a folder with files stays
    common = {
        "key": task["key"],
        "peak_bytes": ended.peak_bytes,
        "host": platform.node(),
        "threads": task["threads"],
        "software": _software(),
    }
    if ended.answer is None or ended.stopped:
        kind = "timeout" if ended.stopped == "timeout" else "killed"
        return Outcome(
            kind=kind, error=_explain(task, ended), traceback=_read_output(task), seconds=ended.seconds, **common
        )
    answer = json.loads(ended.answer)
    if "error" in answer:
        return Outcome(
            kind="raised", error=answer["error"], traceback=answer["traceback"], seconds=answer["seconds"], **common
        )
    records = answer["records"]
    nan = next((name for record in records for name, value in record.items() if value != value), None)
    return Outcome(
        kind=None if nan is None else "nan",
        error=None if nan is None else f"{nan} is NaN",
        records=records,
        seconds=answer["seconds"],
        **common,
    )


def _explain(task: Task, ended: processes.ProcessEnd) -> str:
    memory = "" if ended.peak_bytes is None else f", with {ended.peak_bytes / 1e9:.2f} GB of memory at its peak"
    if ended.stopped == "timeout":
        return f"not done after {task['timeout']:g} seconds{memory}"
    if ended.stopped == "orphaned":
        return f"the process that starts the runs was killed twice, also after this run was started again{memory}"
    if ended.code == -signal.SIGKILL:
        return f"killed (SIGKILL), most likely because memory ran out{memory}"
    if ended.code < 0:
        return f"killed ({signal.Signals(-ended.code).name}){memory}"
    return f"ended with exit code {ended.code} and no records{memory}"


def _read_output(task: Task) -> str | None:
    try:
        with (Path(task["folder"]) / OUTPUT).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16 * _END_OF_OUTPUT))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    # After a crash Python lists every extension module.
    return escape_controls(text.partition("\nExtension modules:")[0].strip()[-_END_OF_OUTPUT:]) or None


def forget_software() -> None:
    """Examine the code again before the next run, since it may have changed since the last sweep."""
    _software.cache_clear()


@cache
def _software() -> dict[str, Any]:
    return describe_software()
