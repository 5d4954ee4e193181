"""Kill a run at a place of its work, not at a time: what is tested does not depend on how busy the machine is."""

import signal
from collections.abc import Sequence

from programs import Starter

# In the run's process and in those of its cells.
_BEFORE = """
import os, signal
from pathlib import Path

replace = os.replace

def watched(source, target, **options):
    replace(source, target, **options)
    if Path(target).name == {name!r} and len(list(Path({run!r}).rglob({name!r}))) >= {count}:
        os.kill(PROGRAM, {sign})
        while True:
            signal.pause()

os.replace = watched
"""


def stopped_when_written(
    starter: Starter, command: Sequence[str], run: str, name: str, count: int = 1, sign: int = signal.SIGKILL
) -> tuple[int, str, str]:
    """Run ``python -m`` a command, send it a signal when so many files of a name are in its folder.

    The cell that has written the last of them sends the signal and goes no further, until it is ended itself.

    Returns:
        Its exit code, and what it has written to standard output and standard error.
    """
    before = _BEFORE.format(name=name, run=run, count=count, sign=int(sign))
    return starter.start(["-m", *command], before).wait()
