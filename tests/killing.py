"""Kill a run at a place of its work, not at a time: what is tested does not depend on how busy the machine is."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Python imports a ``sitecustomize`` at its start, in the run's process and in those of its cells.
_SITE = """
import os, signal
from pathlib import Path

count, name, run = os.environ["KILLED_WHEN_WRITTEN"].split()
main = int(os.environ.setdefault("KILLED_PROCESS", str(os.getpid())))
replace = os.replace

def watched(source, target, **options):
    replace(source, target, **options)
    if Path(target).name == name and len(list(Path(run).rglob(name))) >= int(count):
        os.kill(main, signal.SIGKILL)
        while True:
            signal.pause()

os.replace = watched
"""


def killed_when_written(command: Sequence[str], run: str, name: str, count: int = 1) -> int:
    """Run ``python -m`` a command, kill it when so many files of a name are in its folder, return its exit code.

    The cell that has written the last of them kills the process and goes no further, until it is ended itself.
    """
    with tempfile.TemporaryDirectory() as site:
        Path(site, "sitecustomize.py").write_text(_SITE)
        path = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
        given = os.environ | {"PYTHONPATH": path, "KILLED_WHEN_WRITTEN": f"{count} {name} {run}"}
        return subprocess.run([sys.executable, "-m", *command], env=given, capture_output=True, check=False).returncode
