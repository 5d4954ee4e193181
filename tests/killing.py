"""Kill a program at a point of its work, not at a time, so that a test does not depend on the load of the machine."""

import signal
from collections.abc import Sequence

from programs import Starter

# In the process of the program and in those of its runs.
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
    """Run ``python -m COMMAND``, and send it a signal when its folder holds ``count`` files with a name.

    The run that has written the last of them sends the signal, and waits until it is killed itself.

    Returns:
        The exit code, standard output and standard error of the program.
    """
    before = _BEFORE.format(name=name, run=run, count=count, sign=int(sign))
    return starter.start(["-m", *command], before).wait()
