"""Kill a run at a place of its work, not at a time: what is tested does not depend on how busy the machine is."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).with_name("killed_when_written")


def killed_when_written(command: Sequence[str], folder: str, name: str, count: int = 1) -> int:
    """Run ``python -m`` a command, kill it when so many files of a name are in a folder, return its exit code.

    A cell that has written the last of them kills the process and goes no further, until it is ended itself.
    """
    path = os.pathsep.join([str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = os.environ | {"PYTHONPATH": path, "KILLED_WHEN_WRITTEN": f"{count} {name} {folder}"}
    given.pop("KILLED_PROCESS", None)
    return subprocess.run([sys.executable, "-m", *command], env=given, capture_output=True, check=False).returncode
